# SPDX-License-Identifier: Apache-2.0
"""The scalar operations a kernel can contain: how each is written, evaluated, differentiated and simplified.

One line per operation. ``partials`` gives the derivative by each operand as a node, or None where it is zero; at kinks
the
conventions are PyTorch's (``abs`` and ``relu`` have slope 0 at 0, ``maximum`` shares equally between equal operands).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyro_latentde.solve.fused.graph import Graph, Node

__all__ = ["BOOLEAN", "CONSTANT_RULES", "INTEGER", "OPS", "ScalarOp"]


@dataclass(frozen=True)
class ScalarOp:
    """``source``: Python source with {0}, {1}, ... for the operands. ``evaluate``: the same on plain numbers."""

    source: str
    evaluate: Callable | None
    partials: "Callable[[Graph, Node], list[Node | None]]"


BOOLEAN = {"lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not", "isnan", "isfinite"}
INTEGER = {"to_int"}


def _flat(graph: "Graph", node: "Node") -> "list[Node | None]":
    """Piecewise constant: no derivative."""
    return [None] * len(node.args)


def _unary(source: str, evaluate: Callable | None, slope: "Callable[[Graph, Node, Node], Node]") -> ScalarOp:
    """``slope(graph, x, f(x))`` is the derivative at x."""
    return ScalarOp(source, evaluate, lambda g, n: [slope(g, n.args[0], n)])


def _inverse_sqrt(g: "Graph", inside: "Node") -> "Node":
    return g.apply("div", 1.0, g.apply("sqrt", inside))


def _one_minus_square(g: "Graph", x: "Node") -> "Node":
    return g.apply("sub", 1.0, g.apply("mul", x, x))


def _one_plus_square(g: "Graph", x: "Node") -> "Node":
    return g.apply("add", 1.0, g.apply("mul", x, x))


def _pow_partials(g: "Graph", n: "Node") -> "list[Node | None]":
    x, p = n.args
    by_x = g.apply("mul", p, g.apply("pow", x, g.apply("sub", p, 1.0)))
    if p.op == "const":
        return [by_x, None]
    by_x = g.apply("where", g.apply("eq", p, 0.0), 0.0, by_x)
    # d x^p / dp = x^p log x, which torch takes as 0 at x = 0, p >= 0
    at_zero = g.apply("and", g.apply("eq", x, 0.0), g.apply("ge", p, 0.0))
    safe = g.apply("where", at_zero, 1.0, x)
    return [by_x, g.apply("where", at_zero, 0.0, g.apply("mul", n, g.apply("log", safe)))]


def _extremum_partials(larger: str) -> "Callable[[Graph, Node], list[Node | None]]":
    def partials(g: "Graph", n: "Node") -> "list[Node | None]":
        a, b = n.args
        half = g.apply("where", g.apply("eq", a, b), 0.5, 0.0)
        return [
            g.apply("where", g.apply(larger, a, b), 1.0, half),
            g.apply("where", g.apply(larger, b, a), 1.0, half),
        ]

    return partials


def _atan2_partials(g: "Graph", n: "Node") -> "list[Node | None]":
    y, x = n.args
    square = g.apply("add", g.apply("mul", x, x), g.apply("mul", y, y))
    return [g.apply("div", x, square), g.apply("neg", g.apply("div", y, square))]


def _mod_partials(g: "Graph", n: "Node") -> "list[Node | None]":
    a, b = n.args
    return [g.const(1.0), g.apply("neg", g.apply("floor", g.apply("div", a, b)))]


_TWO_OVER_SQRT_PI = 2.0 / math.sqrt(math.pi)

OPS: dict[str, ScalarOp] = {
    "add": ScalarOp("({0} + {1})", lambda a, b: a + b, lambda g, n: [g.const(1.0), g.const(1.0)]),
    "sub": ScalarOp("({0} - {1})", lambda a, b: a - b, lambda g, n: [g.const(1.0), g.const(-1.0)]),
    "mul": ScalarOp("({0} * {1})", lambda a, b: a * b, lambda g, n: [n.args[1], n.args[0]]),
    "div": ScalarOp(
        "({0} / {1})",
        lambda a, b: a / b,
        lambda g, n: [
            g.apply("div", 1.0, n.args[1]),
            g.apply("neg", g.apply("div", n, n.args[1])),
        ],
    ),
    "neg": ScalarOp("(-{0})", lambda a: -a, lambda g, n: [g.const(-1.0)]),
    "pow": ScalarOp("({0} ** {1})", lambda a, b: math.pow(a, b), _pow_partials),
    "mod": ScalarOp("({0} - {1} * np.floor({0} / {1}))", lambda a, b: a - b * math.floor(a / b), _mod_partials),
    "maximum": ScalarOp(
        "({0} if ({0} > {1} or {0} != {0}) else {1})", lambda a, b: max(a, b), _extremum_partials("gt")
    ),
    "minimum": ScalarOp(
        "({0} if ({0} < {1} or {0} != {0}) else {1})", lambda a, b: min(a, b), _extremum_partials("lt")
    ),
    "where": ScalarOp(
        "({1} if {0} else {2})",
        lambda c, a, b: a if c else b,
        lambda g, n: [None, g.apply("where", n.args[0], 1.0, 0.0), g.apply("where", n.args[0], 0.0, 1.0)],
    ),
    "exp": _unary("math.exp({0})", math.exp, lambda g, x, f: f),
    "expm1": _unary("math.expm1({0})", math.expm1, lambda g, x, f: g.apply("exp", x)),
    "log": _unary("math.log({0})", math.log, lambda g, x, f: g.apply("div", 1.0, x)),
    "log1p": _unary("math.log1p({0})", math.log1p, lambda g, x, f: g.apply("div", 1.0, g.apply("add", 1.0, x))),
    "log2": _unary("math.log2({0})", math.log2, lambda g, x, f: g.apply("div", 1.0 / math.log(2.0), x)),
    "log10": _unary("math.log10({0})", math.log10, lambda g, x, f: g.apply("div", 1.0 / math.log(10.0), x)),
    "sqrt": _unary("math.sqrt({0})", math.sqrt, lambda g, x, f: g.apply("div", 0.5, f)),
    "sin": _unary("math.sin({0})", math.sin, lambda g, x, f: g.apply("cos", x)),
    "cos": _unary("math.cos({0})", math.cos, lambda g, x, f: g.apply("neg", g.apply("sin", x))),
    "tan": _unary("math.tan({0})", math.tan, lambda g, x, f: _one_plus_square(g, f)),
    "asin": _unary("math.asin({0})", math.asin, lambda g, x, f: _inverse_sqrt(g, _one_minus_square(g, x))),
    "acos": _unary(
        "math.acos({0})", math.acos, lambda g, x, f: g.apply("neg", _inverse_sqrt(g, _one_minus_square(g, x)))
    ),
    "atan": _unary("math.atan({0})", math.atan, lambda g, x, f: g.apply("div", 1.0, _one_plus_square(g, x))),
    "atan2": ScalarOp("math.atan2({0}, {1})", math.atan2, _atan2_partials),
    "sinh": _unary("math.sinh({0})", math.sinh, lambda g, x, f: g.apply("cosh", x)),
    "cosh": _unary("math.cosh({0})", math.cosh, lambda g, x, f: g.apply("sinh", x)),
    "tanh": _unary("math.tanh({0})", math.tanh, lambda g, x, f: _one_minus_square(g, f)),
    "asinh": _unary("math.asinh({0})", math.asinh, lambda g, x, f: _inverse_sqrt(g, _one_plus_square(g, x))),
    "acosh": _unary(
        "math.acosh({0})",
        math.acosh,
        lambda g, x, f: _inverse_sqrt(g, g.apply("sub", g.apply("mul", x, x), 1.0)),
    ),
    "atanh": _unary("math.atanh({0})", math.atanh, lambda g, x, f: g.apply("div", 1.0, _one_minus_square(g, x))),
    "erf": _unary(
        "math.erf({0})",
        math.erf,
        lambda g, x, f: g.apply("mul", _TWO_OVER_SQRT_PI, g.apply("exp", g.apply("neg", g.apply("mul", x, x)))),
    ),
    "abs": _unary("abs({0})", abs, lambda g, x, f: g.apply("sign", x)),
    "sign": ScalarOp("((1.0 if {0} > 0.0 else 0.0) - (1.0 if {0} < 0.0 else 0.0))", None, _flat),
    # NumPy's, not math's, which give integers and so lose infinity and NaN
    "floor": ScalarOp("np.floor({0})", lambda a: float(math.floor(a)), _flat),
    "ceil": ScalarOp("np.ceil({0})", lambda a: float(math.ceil(a)), _flat),
    "round": ScalarOp("np.rint({0})", lambda a: float(round(a)), _flat),
    "trunc": ScalarOp("np.trunc({0})", lambda a: float(math.trunc(a)), _flat),
    "stop": ScalarOp("{0}", lambda a: a, _flat),
    "to_int": ScalarOp("int({0})", lambda a: int(a), _flat),
    "to_float": ScalarOp("float({0})", lambda a: float(a), _flat),
    "lt": ScalarOp("({0} < {1})", lambda a, b: a < b, _flat),
    "le": ScalarOp("({0} <= {1})", lambda a, b: a <= b, _flat),
    "gt": ScalarOp("({0} > {1})", lambda a, b: a > b, _flat),
    "ge": ScalarOp("({0} >= {1})", lambda a, b: a >= b, _flat),
    "eq": ScalarOp("({0} == {1})", lambda a, b: a == b, _flat),
    "ne": ScalarOp("({0} != {1})", lambda a, b: a != b, _flat),
    "and": ScalarOp("({0} and {1})", lambda a, b: a and b, _flat),
    "or": ScalarOp("({0} or {1})", lambda a, b: a or b, _flat),
    "not": ScalarOp("(not {0})", lambda a: not a, _flat),
    "isnan": ScalarOp("({0} != {0})", lambda a: a != a, _flat),
    "isfinite": ScalarOp("(abs({0}) < np.inf)", math.isfinite, _flat),
}


def _const(node: "Node", value: float) -> bool:
    return node.op == "const" and node.kind != "b" and node.args[0] == value


def _add(g: "Graph", a: "Node", b: "Node") -> "Node | None":
    if _const(a, 0.0):
        return b
    if _const(b, 0.0):
        return a
    if b.op == "neg":
        return g.apply("sub", a, b.args[0])
    if a.op == "neg":
        return g.apply("sub", b, a.args[0])
    return None


def _sub(g: "Graph", a: "Node", b: "Node") -> "Node | None":
    if _const(b, 0.0):
        return a
    if _const(a, 0.0):
        return g.apply("neg", b)
    if b.op == "neg":
        return g.apply("add", a, b.args[0])
    return None


def _mul(g: "Graph", a: "Node", b: "Node") -> "Node | None":
    # 0 * x is 0 here although it is nan for x = inf or nan: such an x makes the state non-finite by its own path,
    # and derivatives would otherwise keep every dead branch.
    for x, other in ((a, b), (b, a)):
        if _const(x, 0.0):
            return g.const(0.0)
        if _const(x, 1.0):
            return other
        if _const(x, -1.0):
            return g.apply("neg", other)
        if x.op == "neg":
            return g.apply("neg", g.apply("mul", x.args[0], other))
    return None


def _div(g: "Graph", a: "Node", b: "Node") -> "Node | None":
    if _const(b, 1.0):
        return a
    if _const(a, 0.0) and b.op != "const":
        return g.const(0.0)
    if a.op == "neg":
        return g.apply("neg", g.apply("div", a.args[0], b))
    return None


def _neg(g: "Graph", a: "Node") -> "Node | None":
    return a.args[0] if a.op == "neg" else None


def _pow(g: "Graph", a: "Node", p: "Node") -> "Node | None":
    """Small whole and half powers become products and roots: exact, and much faster than ``pow``."""
    if p.op != "const":
        return None
    value = p.args[0]
    if value == 0:
        return g.const(1.0)
    if value == 0.5:
        return g.apply("sqrt", a)
    if value == -0.5:
        return g.apply("div", 1.0, g.apply("sqrt", a))
    if value == int(value) and 1 <= abs(value) <= 8:
        n = abs(int(value))
        half = g.apply("pow", a, float(n // 2)) if n > 1 else None
        power = a if n == 1 else g.apply("mul", half, half)
        if n > 1 and n % 2:
            power = g.apply("mul", power, a)
        return power if value > 0 else g.apply("div", 1.0, power)
    return None


def _where(g: "Graph", c: "Node", a: "Node", b: "Node") -> "Node | None":
    if a is b:
        return a
    if c.op == "const":
        return a if c.args[0] else b
    return None


CONSTANT_RULES: dict[str, Callable] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "pow": _pow,
    "where": _where,
    "to_float": lambda g, a: a if a.kind == "f" else g.apply("where", a, 1.0, 0.0) if a.kind == "b" else None,
    "to_int": lambda g, a: a if a.kind == "i" else g.apply("where", a, 1, 0) if a.kind == "b" else None,
}
