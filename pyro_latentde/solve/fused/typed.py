# SPDX-License-Identifier: Apache-2.0
"""Kernel source with the type of every number written out, for compilers that would choose another.

``lower.py`` gives a variable the type of its first value and widens numbers where they meet. Numba's rules differ
(float32 and a whole number make float64; ``max`` passes over NaN), and so do Python's own (1.0 / 0.0 raises). Here
the source says all of it itself: floating numbers are ``real(...)``, and what the CPU's machine code does with
``max``, ``int`` and squares is done by functions with names.
"""

import ast
from collections.abc import Sequence

__all__ = ["PRECISION", "typed_functions"]

_KINDS = {"float": "real", "int": "int", "bool": "bool", "Floats": "reals", "FloatsAt": "reals", "Ints": "ints"}
_CALLED = {"min": "lesser", "max": "larger"}  # functions that come with the source
_TAKEN = {"real", "inf", "nan", "lesser", "larger", "square", "whole", "floor", "ceil", "rint", "trunc"}
_RANK = ("bool", "int", "real")

# Literals that stand for the resolution of float64, and what stands for that of float32.
PRECISION = {2.220446049250313e-16: 1.1920929e-07, 1e-300: 1e-37, 1e-12: 1e-06}


def typed_functions(source: str, single: bool = False) -> list[ast.FunctionDef]:
    """The functions of kernel source, rewritten; without annotations.

    Args:
        source: As :mod:`pyro_latentde.solve.fused.lower` takes it.
        single: For float32: literals that stand for the resolution are its own.
    """
    functions = [f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)]
    heads = {f.name: ([_kind(a.annotation) for a in f.args.args], _kind(f.returns)) for f in functions}
    return [_Typed(heads, f, single).function(f) for f in functions]


def _kind(annotation: ast.expr) -> str:
    return _KINDS[annotation.id]


Value = tuple[ast.expr, str]


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])


def _cast(value: Value, kind: str) -> ast.expr:
    node, own = value
    return _call("real", node) if kind == "real" and own != "real" else node


def _alike(values: Sequence[Value]) -> tuple[list[ast.expr], str]:
    """All of the widest kind among them."""
    widest = max((kind for _, kind in values), key=_RANK.index)
    return [_cast(v, widest) for v in values], widest


class _Typed:
    """One function; ``kinds`` of its variables as they turn up."""

    def __init__(self, heads: dict[str, tuple[list[str], str]], tree: ast.FunctionDef, single: bool) -> None:
        self.heads, self.single = heads, single
        self.kinds = dict(zip((a.arg for a in tree.args.args), heads[tree.name][0], strict=True))
        self.returns = heads[tree.name][1]

    def function(self, tree: ast.FunctionDef) -> ast.FunctionDef:
        arguments = ast.arguments([], [ast.arg(a.arg) for a in tree.args.args], None, [], [], None, [])
        return ast.fix_missing_locations(ast.FunctionDef(tree.name, arguments, self.block(tree.body), []))

    def block(self, statements: Sequence[ast.stmt]) -> list[ast.stmt]:
        return [getattr(self, "do_" + type(s).__name__.lower())(s) for s in statements]

    def value(self, e: ast.expr) -> Value:
        return getattr(self, "of_" + type(e).__name__.lower())(e)

    def plain(self, e: ast.expr) -> ast.expr:
        return self.value(e)[0]

    def truth(self, e: ast.expr) -> ast.expr:
        node, kind = self.value(e)
        return node if kind == "bool" else ast.Compare(node, [ast.NotEq()], [ast.Constant(0)])

    def do_assign(self, s: ast.Assign) -> ast.stmt:
        (target,) = s.targets
        value = self.value(s.value)
        if isinstance(target, ast.Name):
            if target.id in _TAKEN:
                raise NameError(f"kernel source: {target.id} is the name of a function; call the variable otherwise")
            kind = self.kinds.setdefault(target.id, value[1])
        else:
            target, kind = self.value(target)
        return ast.Assign([target], _cast(value, kind))

    def do_augassign(self, s: ast.AugAssign) -> ast.stmt:
        target, kind = self.value(s.target)
        return ast.AugAssign(target, s.op, _cast(self.value(s.value), kind))

    def do_expr(self, s: ast.Expr) -> ast.stmt:
        return ast.Expr(self.plain(s.value))

    def do_return(self, s: ast.Return) -> ast.stmt:
        return ast.Return(_cast(self.value(s.value), self.returns))

    def do_break(self, s: ast.Break) -> ast.stmt:
        return s

    def do_continue(self, s: ast.Continue) -> ast.stmt:
        return s

    def do_pass(self, s: ast.Pass) -> ast.stmt:
        return s

    def do_if(self, s: ast.If) -> ast.stmt:
        return ast.If(self.truth(s.test), self.block(s.body), self.block(s.orelse))

    def do_while(self, s: ast.While) -> ast.stmt:
        return ast.While(self.truth(s.test), self.block(s.body), [])

    def do_for(self, s: ast.For) -> ast.stmt:
        limits = [self.plain(a) for a in s.iter.args]
        self.kinds[s.target.id] = "int"
        return ast.For(s.target, _call("range", *limits), self.block(s.body), [])

    def of_constant(self, e: ast.Constant) -> Value:
        if isinstance(e.value, float):
            return _call("real", ast.Constant(PRECISION.get(e.value, e.value) if self.single else e.value)), "real"
        return e, type(e.value).__name__

    def of_name(self, e: ast.Name) -> Value:
        return e, self.kinds[e.id]

    def of_attribute(self, e: ast.Attribute) -> Value:
        return ast.Name(e.attr, ast.Load()), "real"  # inf or nan

    def of_subscript(self, e: ast.Subscript) -> Value:
        kind = "real" if self.kinds[e.value.id] == "reals" else "int"
        return ast.Subscript(e.value, self.plain(e.slice), e.ctx), kind

    def of_binop(self, e: ast.BinOp) -> Value:
        left, right = self.value(e.left), self.value(e.right)
        if isinstance(e.op, ast.Pow) and isinstance(e.right, ast.Constant) and e.right.value == 2:
            return _call("square", _cast(left, "real")), "real"
        if isinstance(e.op, (ast.Div, ast.Pow)):
            return ast.BinOp(_cast(left, "real"), e.op, _cast(right, "real")), "real"
        (a, b), kind = _alike([left, right])
        return ast.BinOp(a, e.op, b), kind

    def of_unaryop(self, e: ast.UnaryOp) -> Value:
        if isinstance(e.op, ast.Not):
            return ast.UnaryOp(e.op, self.truth(e.operand)), "bool"
        node, kind = self.value(e.operand)
        return ast.UnaryOp(e.op, node), kind

    def of_compare(self, e: ast.Compare) -> Value:
        (left, *others), _ = _alike([self.value(x) for x in (e.left, *e.comparators)])
        return ast.Compare(left, e.ops, others), "bool"

    def of_boolop(self, e: ast.BoolOp) -> Value:
        return ast.BoolOp(e.op, [self.truth(x) for x in e.values]), "bool"

    def of_ifexp(self, e: ast.IfExp) -> Value:
        (a, b), kind = _alike([self.value(e.body), self.value(e.orelse)])
        return ast.IfExp(self.truth(e.test), a, b), kind

    def of_call(self, e: ast.Call) -> Value:
        values = [self.value(a) for a in e.args]
        if isinstance(e.func, ast.Attribute):  # of math, or of np: floor, ceil, rint, trunc, which stay floating
            function = e.func if e.func.value.id == "math" else ast.Name(e.func.attr, ast.Load())
            return ast.Call(function, [_cast(v, "real") for v in values], []), "real"
        name = e.func.id
        if name in _CALLED:
            (result, *others), kind = _alike(values)
            for other in others:
                result = _call(_CALLED[name], result, other)
            return result, kind
        if name == "abs":
            return _call("abs", values[0][0]), values[0][1]
        if name == "float":
            return _cast(values[0], "real"), "real"
        if name == "int":
            return (_call("whole", values[0][0]) if values[0][1] == "real" else values[0][0]), "int"
        kinds, returned = self.heads[name]
        return _call(name, *(_cast(v, kind) for v, kind in zip(values, kinds, strict=True))), returned
