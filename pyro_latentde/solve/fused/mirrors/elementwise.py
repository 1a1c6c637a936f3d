# SPDX-License-Identifier: Apache-2.0
"""Elementwise operators."""

import math
from collections.abc import Callable
from typing import Any

from pyro_latentde.solve.fused.graph import Graph, Node
from pyro_latentde.solve.fused.mirrors.symbols import MIRRORS, Sym, arithmetic, as_float, elementwise, mirror
from pyro_latentde.solve.fused.scalar_ops import OPS
from pyro_latentde.solve.lift import Untraceable

__all__ = ["add", "choose", "divide", "rsqrt", "subtract"]


_SAME_NAME_UNARY = (
    "exp expm1 log log1p log2 log10 sqrt sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf "
    "abs sign floor ceil round trunc neg"
).split()


def _unary(op: str) -> Callable:
    float_only = op not in ("abs", "neg", "sign")

    def apply(graph: Graph, x: Any, **kwargs: Any) -> Sym:
        if kwargs.get("decimals"):
            raise Untraceable("round(decimals=...) has no scalar form here")
        return elementwise(graph, lambda n: graph.apply(op, as_float(graph, n) if float_only else n), x)

    return apply


for _name in _SAME_NAME_UNARY:
    MIRRORS[_name] = _unary(_name)
MIRRORS["fix"] = MIRRORS["trunc"]

for _name, _op in {
    "atan2": "atan2",
    "arctan2": "atan2",
    "maximum": "maximum",
    "minimum": "minimum",
    "fmax": "maximum",
    "fmin": "minimum",
    "lt": "lt",
    "le": "le",
    "gt": "gt",
    "ge": "ge",
    "eq": "eq",
    "ne": "ne",
    "mul": "mul",
    "pow": "pow",
    "remainder": "mod",
}.items():
    MIRRORS[_name] = lambda graph, a, b, _op=_op: elementwise(graph, lambda m, n: arithmetic(graph, _op, m, n), a, b)

for _name, _op in {"logical_and": "and", "bitwise_and": "and", "logical_or": "or", "bitwise_or": "or"}.items():
    MIRRORS[_name] = lambda graph, a, b, _op=_op: elementwise(graph, lambda m, n: graph.apply(_op, m, n), a, b)
for _name, _op in {"logical_not": "not", "bitwise_not": "not", "isnan": "isnan", "isfinite": "isfinite"}.items():
    MIRRORS[_name] = lambda graph, a, _op=_op: elementwise(graph, lambda n: graph.apply(_op, n), a)


@mirror("add")
def add(graph: Graph, a: Any, b: Any, alpha: float = 1) -> Sym:
    return elementwise(
        graph, lambda m, n: arithmetic(graph, "add", m, arithmetic(graph, "mul", n, graph.const(alpha))), a, b
    )


@mirror("sub")
def subtract(graph: Graph, a: Any, b: Any, alpha: float = 1) -> Sym:
    return elementwise(
        graph, lambda m, n: arithmetic(graph, "sub", m, arithmetic(graph, "mul", n, graph.const(alpha))), a, b
    )


@mirror("rsub")
def _rsub(graph: Graph, a: Any, b: Any, alpha: float = 1) -> Sym:
    return subtract(graph, b, a, alpha)


@mirror("div")
def divide(graph: Graph, a: Any, b: Any, rounding_mode: str | None = None) -> Sym:
    quotient = elementwise(graph, lambda m, n: arithmetic(graph, "div", m, n), a, b)
    return quotient if rounding_mode is None else MIRRORS[rounding_mode](graph, quotient)


@mirror("floor_divide")
def _floor_divide(graph: Graph, a: Any, b: Any) -> Sym:
    return divide(graph, a, b, "floor")


@mirror("fmod")
def _fmod(graph: Graph, a: Any, b: Any) -> Sym:
    return subtract(graph, a, MIRRORS["mul"](graph, b, divide(graph, a, b, "trunc")))


@mirror("reciprocal")
def _reciprocal(graph: Graph, a: Sym) -> Sym:
    return divide(graph, 1.0, a)


@mirror("rsqrt")
def rsqrt(graph: Graph, a: Sym) -> Sym:
    return divide(graph, 1.0, MIRRORS["sqrt"](graph, a))


@mirror("erfc")
def _erfc(graph: Graph, a: Sym) -> Sym:
    return subtract(graph, 1.0, MIRRORS["erf"](graph, a))


@mirror("exp2")
def _exp2(graph: Graph, a: Sym) -> Sym:
    return MIRRORS["exp"](graph, MIRRORS["mul"](graph, a, math.log(2.0)))


@mirror("sigmoid")
def _sigmoid(graph: Graph, a: Sym) -> Sym:
    # .5 (1 + tanh(x/2)): one call, no overflow on either side, derivative s (1 - s) from the table
    half = MIRRORS["tanh"](graph, MIRRORS["mul"](graph, a, 0.5))
    return MIRRORS["mul"](graph, add(graph, half, 1.0), 0.5)


@mirror("softplus")
def _softplus(graph: Graph, a: Sym, beta: float = 1.0, threshold: float = 20.0) -> Sym:
    def one(x: Node) -> Node:
        z = graph.apply("mul", x, float(beta))
        # max(z, 0) + log1p(exp(-|z|)), the branch taken on z so that the slope at 0 is 1/2
        tail = graph.apply("exp", graph.apply("where", graph.apply("gt", z, 0.0), graph.apply("neg", z), z))
        soft = graph.apply(
            "add",
            graph.apply("where", graph.apply("gt", z, 0.0), z, 0.0),
            graph.apply("log1p", tail),
        )
        return graph.apply("where", graph.apply("gt", z, float(threshold)), x, graph.apply("div", soft, float(beta)))

    return elementwise(graph, one, a)


@mirror("silu")
def _silu(graph: Graph, a: Sym) -> Sym:
    return MIRRORS["mul"](graph, a, _sigmoid(graph, a))


@mirror("relu")
def _relu(graph: Graph, a: Sym) -> Sym:
    return elementwise(graph, lambda x: graph.apply("where", graph.apply("gt", x, 0.0), x, 0.0), a)


@mirror("leaky_relu")
def _leaky_relu(graph: Graph, a: Sym, slope: float = 0.01) -> Sym:
    return elementwise(
        graph, lambda x: graph.apply("where", graph.apply("gt", x, 0.0), x, graph.apply("mul", x, slope)), a
    )


@mirror("elu")
def _elu(graph: Graph, a: Sym, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Sym:
    def one(x: Node) -> Node:
        positive = graph.apply("gt", x, 0.0)
        # the branch not taken must stay finite, or 0 * inf would enter the derivative
        safe = graph.apply("where", positive, 0.0, graph.apply("mul", x, float(input_scale)))
        low = graph.apply("mul", float(alpha), graph.apply("expm1", safe))
        return graph.apply("mul", float(scale), graph.apply("where", positive, x, low))

    return elementwise(graph, one, a)


@mirror("gelu")
def _gelu(graph: Graph, a: Sym, approximate: str = "none") -> Sym:
    mul = MIRRORS["mul"]
    if approximate == "none":
        inner = MIRRORS["erf"](graph, mul(graph, a, math.sqrt(0.5)))
    else:
        cube = mul(graph, mul(graph, a, mul(graph, a, a)), 0.044715)
        inner = MIRRORS["tanh"](graph, mul(graph, add(graph, a, cube), math.sqrt(2.0 / math.pi)))
    return mul(graph, mul(graph, a, 0.5), add(graph, inner, 1.0))


@mirror("clamp")
def _clamp(graph: Graph, a: Sym, min: Any = None, max: Any = None) -> Sym:  # noqa: A002
    def bound(x: Node, limit: Node, outside: str) -> Node:
        if x.kind == "f":
            limit = as_float(graph, limit)
        return graph.apply("where", graph.apply(outside, x, limit), limit, x)

    out = a
    if min is not None:
        out = elementwise(graph, lambda x, m: bound(x, m, "lt"), out, min)
    if max is not None:
        out = elementwise(graph, lambda x, m: bound(x, m, "gt"), out, max)
    return out


MIRRORS["clamp_min"] = lambda graph, a, min: _clamp(graph, a, min=min)  # noqa: A006
MIRRORS["clamp_max"] = lambda graph, a, max: _clamp(graph, a, max=max)  # noqa: A006
MIRRORS["hardtanh"] = lambda graph, a, low=-1.0, high=1.0: _clamp(graph, a, low, high)


@mirror("where")
def choose(graph: Graph, condition: Sym, a: Any = None, b: Any = None) -> Sym:
    if a is None:
        raise Untraceable("torch.where(condition) gives positions that depend on values")

    def one(c: Node, m: Node, n: Node) -> Node:
        if m.kind != n.kind:
            m, n = as_float(graph, m), as_float(graph, n)
        return graph.apply("where", c, m, n)

    return elementwise(graph, one, condition, a, b)


@mirror("lerp")
def _lerp(graph: Graph, a: Sym, b: Sym, weight: Any) -> Sym:
    return add(graph, a, MIRRORS["mul"](graph, weight, subtract(graph, b, a)))


@mirror("addcmul")
def _addcmul(graph: Graph, a: Sym, b: Sym, c: Sym, value: float = 1) -> Sym:
    return add(graph, a, MIRRORS["mul"](graph, MIRRORS["mul"](graph, b, c), value))


@mirror("hypot")
def _hypot(graph: Graph, a: Sym, b: Sym) -> Sym:
    mul = MIRRORS["mul"]
    return MIRRORS["sqrt"](graph, add(graph, mul(graph, a, a), mul(graph, b, b)))


@mirror("xlogy")
def _xlogy(graph: Graph, a: Any, b: Any) -> Sym:
    zero = MIRRORS["eq"](graph, a, 0.0)
    log = MIRRORS["log"](graph, choose(graph, zero, 1.0, b))
    return choose(graph, zero, 0.0, MIRRORS["mul"](graph, a, log))


@mirror("logaddexp")
def _logaddexp(graph: Graph, a: Sym, b: Sym) -> Sym:
    gap = MIRRORS["abs"](graph, subtract(graph, a, b))
    tail = MIRRORS["log1p"](graph, MIRRORS["exp"](graph, MIRRORS["neg"](graph, gap)))
    return add(graph, MIRRORS["maximum"](graph, a, b), tail)


assert set(_SAME_NAME_UNARY) <= set(OPS)
