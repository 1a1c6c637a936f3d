# SPDX-License-Identifier: Apache-2.0
"""Expressions of kernel source as LLVM values; ``lower.py`` says what the language is."""

import ast
from collections.abc import Sequence
from typing import Protocol

from llvmlite import ir

from pyro_latentde.solve.fused.lanes.lower import BOOL, FLOAT, INT, LANE_CALLS, Lanes, is_mask

__all__ = ["BOOL", "FAST", "FLOAT", "INT", "TYPES", "Functions", "Values"]

TYPES = {
    "float": FLOAT,
    "int": INT,
    "bool": BOOL,
    "Floats": ir.PointerType(FLOAT),
    "FloatsAt": ir.PointerType(FLOAT),
    "Ints": ir.PointerType(INT),
}

# NaN and infinity must keep their meaning (failure detection), so neither nnan nor ninf; and kernels compare with
# infinity, since x - x == 0, the usual test for finiteness, is folded to True by reassoc and nsz
FAST = ("contract", "reassoc", "nsz", "arcp", "afn")

INTRINSICS = {"exp", "log", "log2", "log10", "sin", "cos", "sqrt", "floor", "ceil", "rint", "trunc"}
LIBM = {
    "expm1", "log1p", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf",
}  # fmt: skip
CONSTANTS = {"inf": float("inf"), "nan": float("nan")}

_FLOAT_OPS = {ast.Add: "fadd", ast.Sub: "fsub", ast.Mult: "fmul"}
_INT_OPS = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul"}
_COMPARE = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}


class Functions(Protocol):
    """Where an expression finds the functions it calls, and what arithmetic they keep to."""

    module: ir.Module
    types: dict[str, ir.Type]
    flags: tuple[str, ...]

    def function(self, name: str) -> ir.Function:
        """One of the source's own."""

    def has(self, name: str) -> bool:
        """Whether the source has a function of this name."""

    def external(self, name: str, count: int) -> ir.Function:
        """One of the C library, of ``count`` floats."""

    def intrinsic(self, name: str, kind: ir.Type, type_: ir.FunctionType) -> ir.Function:
        """One of LLVM's, on numbers or vectors of this kind."""


def _widest(values: Sequence[ir.Value]) -> ir.Type:
    types = [v.type for v in values]
    vectors = [t for t in types if isinstance(t, ir.VectorType)]
    if vectors:
        numbers = [t for t in types if t != BOOL and not (isinstance(t, ir.VectorType) and t.element == BOOL)]
        return ir.VectorType(FLOAT if numbers else BOOL, vectors[0].count)
    return FLOAT if FLOAT in types else INT if INT in types else BOOL


class Values(Lanes):
    """Expressions of one function. Variables are stack slots, which LLVM turns into registers."""

    def __init__(self, unit: Functions, function: ir.Function) -> None:
        self.unit, self.function = unit, function
        self.slots: dict[str, ir.Value] = {}  # arrays themselves, and the places of numbers
        self.entry = ir.IRBuilder(function.append_basic_block("entry"))
        self.b = ir.IRBuilder(function.append_basic_block("body"))

    def value(self, e: ast.expr) -> ir.Value:
        return getattr(self, "of_" + type(e).__name__.lower())(e)

    def cast(self, value: ir.Value, type_: ir.Type) -> ir.Value:
        if value.type == type_:
            return value
        if isinstance(type_, ir.VectorType):
            return self.spread(value, type_)
        if type_ == FLOAT:
            return self.b.uitofp(value, FLOAT) if value.type == BOOL else self.b.sitofp(value, FLOAT)
        if type_ == INT and value.type == BOOL:
            return self.b.zext(value, INT)
        raise TypeError(f"kernel source: a {value.type} where a {type_} is wanted")

    def alike(self, *values: ir.Value) -> list[ir.Value]:
        """All of the widest type among them."""
        return [self.cast(v, _widest(values)) for v in values]

    def truth(self, e: ast.expr) -> ir.Value:
        value = self.value(e)
        return value if is_mask(value) else self.compare("!=", value, ir.Constant(value.type, 0))

    def of_constant(self, e: ast.Constant) -> ir.Value:
        if isinstance(e.value, bool):
            return BOOL(int(e.value))
        return INT(e.value) if isinstance(e.value, int) else FLOAT(e.value)

    def of_name(self, e: ast.Name) -> ir.Value:
        slot = self.slots[e.id]
        return slot if isinstance(slot, ir.Argument) else self.b.load(slot)

    def of_attribute(self, e: ast.Attribute) -> ir.Value:
        return FLOAT(CONSTANTS[e.attr])

    def place(self, e: ast.Subscript) -> ir.Value:
        if isinstance(e.slice, ast.Tuple):  # w[i, :], all lanes of entry i
            return self.lanes_at(self.value(e.value), self.value(e.slice.elts[0]))
        return self.b.gep(self.value(e.value), [self.value(e.slice)], inbounds=True)

    def of_subscript(self, e: ast.Subscript) -> ir.Value:
        return self.read(self.place(e))

    def of_binop(self, e: ast.BinOp) -> ir.Value:
        if isinstance(e.op, ast.Pow):
            return self.power(e)
        return self.arithmetic(e.op, self.value(e.left), self.value(e.right))

    def arithmetic(self, op: ast.operator, a: ir.Value, b: ir.Value) -> ir.Value:
        if isinstance(op, ast.Div):
            a, b = self.alike(a, b)
            type_ = a.type if isinstance(a.type, ir.VectorType) else FLOAT
            return self.b.fdiv(self.cast(a, type_), self.cast(b, type_), flags=self.unit.flags)
        if isinstance(op, ast.RShift):
            return self.b.ashr(a, b)
        if isinstance(op, ast.FloorDiv):  # of whole numbers that are not negative
            return self.b.sdiv(a, b)
        a, b = self.alike(a, b)
        if a.type == FLOAT or isinstance(a.type, ir.VectorType):
            return getattr(self.b, _FLOAT_OPS[type(op)])(a, b, flags=self.unit.flags)
        return getattr(self.b, _INT_OPS[type(op)])(self.cast(a, INT), self.cast(b, INT), flags=("nsw",))

    def power(self, e: ast.BinOp) -> ir.Value:
        base, exponent = self.alike(self.value(e.left), FLOAT(0.0))[0], e.right
        if isinstance(exponent, ast.Constant) and exponent.value == 2:
            return self.b.fmul(base, base, flags=self.unit.flags)
        return self.intrinsic("pow", *self.alike(base, self.cast(self.value(exponent), base.type)))

    def of_unaryop(self, e: ast.UnaryOp) -> ir.Value:
        if isinstance(e.op, ast.Not):
            return self.b.not_(self.truth(e.operand))
        if isinstance(e.operand, ast.Constant):
            return self.of_constant(ast.Constant(-e.operand.value))
        value = self.value(e.operand)
        if isinstance(value.type, ir.VectorType):
            return self.b.fneg(value, flags=self.unit.flags)
        return self.b.fneg(value, flags=self.unit.flags) if value.type == FLOAT else self.b.neg(self.cast(value, INT))

    def of_compare(self, e: ast.Compare) -> ir.Value:
        values = [self.value(x) for x in (e.left, *e.comparators)]
        results = [self.compare(_COMPARE[type(op)], *values[i : i + 2]) for i, op in enumerate(e.ops)]
        result = results[0]
        for another in results[1:]:
            result = self.b.and_(result, another)
        return result

    def compare(self, op: str, a: ir.Value, b: ir.Value) -> ir.Value:
        a, b = self.alike(a, b)
        if a.type != FLOAT and not isinstance(a.type, ir.VectorType):
            return self.b.icmp_signed(op, self.cast(a, INT), self.cast(b, INT))
        return self.b.fcmp_unordered(op, a, b) if op == "!=" else self.b.fcmp_ordered(op, a, b)

    def of_boolop(self, e: ast.BoolOp) -> ir.Value:
        """Later operands are evaluated only when they matter: they may read beyond an array otherwise."""
        first = self.truth(e.values[0])
        if isinstance(first.type, ir.VectorType):
            return self.all_of(e.op, [first, *map(self.truth, e.values[1:])])
        end, incoming = self.function.append_basic_block(), []
        for position, operand in enumerate(e.values[:-1]):
            value = self.truth(operand) if position else first
            incoming.append((value, self.b.block))
            further = self.function.append_basic_block()
            self.b.cbranch(value, *((further, end) if isinstance(e.op, ast.And) else (end, further)))
            self.b.position_at_end(further)
        incoming.append((self.truth(e.values[-1]), self.b.block))
        self.b.branch(end)
        return self.join(end, incoming)

    def of_ifexp(self, e: ast.IfExp) -> ir.Value:
        test = self.truth(e.test)
        if isinstance(test.type, ir.VectorType):
            return self.choice(test, self.value(e.body), self.value(e.orelse))
        then, other, end = (self.function.append_basic_block() for _ in range(3))
        self.b.cbranch(test, then, other)
        values, blocks = [], []
        for start, expression in ((then, e.body), (other, e.orelse)):
            self.b.position_at_end(start)
            values.append(self.value(expression))
            blocks.append(self.b.block)
        widest, incoming = _widest(values), []
        for value, block in zip(values, blocks, strict=True):
            self.b.position_at_end(block)
            incoming.append((self.cast(value, widest), block))
            self.b.branch(end)
        return self.join(end, incoming)

    def join(self, end: ir.Block, incoming: list[tuple[ir.Value, ir.Block]]) -> ir.Value:
        self.b.position_at_end(end)
        phi = self.b.phi(incoming[0][0].type)
        for value, block in incoming:
            phi.add_incoming(value, block)
        return phi

    def of_call(self, e: ast.Call) -> ir.Value:
        values = [self.value(a) for a in e.args]
        if isinstance(e.func, ast.Attribute):  # of math or np
            return self.mathematics(e.func.attr, self.alike(*values, FLOAT(0.0))[:-1])
        name = e.func.id
        if name in LANE_CALLS:
            return LANE_CALLS[name](self, *values)
        if name in ("min", "max"):
            return self.extremum("<" if name == "min" else ">", values)
        if name == "abs":
            (x,) = values
            floating = x.type == FLOAT or isinstance(x.type, ir.VectorType)
            return self.intrinsic("fabs", x) if floating else self.extremum(">", [x, self.b.neg(x)])
        if name == "float":
            return self.cast(values[0], FLOAT)
        if name == "int":
            return self.whole(values[0])
        function = self.unit.function(name)
        return self.b.call(function, [self.cast(v, a.type) for v, a in zip(values, function.args, strict=True)])

    def whole(self, value: ir.Value) -> ir.Value:
        """Towards zero; the nearest there is for infinity, and 0 for NaN: the plain conversion may give anything."""
        if value.type != FLOAT:
            return self.cast(value, INT)
        type_ = ir.FunctionType(INT, [FLOAT])
        return self.b.call(self.unit.module.declare_intrinsic("llvm.fptosi.sat", [INT, FLOAT], type_), [value])

    def extremum(self, op: str, values: list[ir.Value]) -> ir.Value:
        result, *others = self.alike(*values)
        for other in others:
            result = self.b.select(self.compare(op, other, result), other, result)
        return result

    def mathematics(self, name: str, values: list[ir.Value]) -> ir.Value:
        if isinstance(values[0].type, ir.VectorType) and self.unit.has(f"lanes_{name}"):
            return self.b.call(self.unit.function(f"lanes_{name}"), values)
        if name in INTRINSICS:
            return self.intrinsic(name, *values)
        if name not in LIBM:
            raise NameError(f"kernel source: {name} is not among the known functions")
        if isinstance(values[0].type, ir.VectorType):
            return self.lane_by_lane(self.unit.external(name, len(values)), values)
        return self.b.call(self.unit.external(name, len(values)), values, fastmath=self.unit.flags)

    def intrinsic(self, name: str, *values: ir.Value) -> ir.Value:
        kind = values[0].type
        type_ = ir.FunctionType(kind, [kind] * len(values))
        return self.b.call(self.unit.intrinsic(f"llvm.{name}", kind, type_), values, fastmath=self.unit.flags)
