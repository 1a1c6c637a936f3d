# SPDX-License-Identifier: Apache-2.0
"""From kernel source to LLVM: the small typed subset of Python in which kernels are written.

Numbers are ``float`` (64 bits), ``int`` (64 bits) and ``bool``; arrays are flat, ``Floats`` (or ``FloatsAt``) or
``Ints``. Functions are annotated, and a variable has the type of its first value. There are assignments, ``if``,
``while``, ``for i in range(...)``, ``break``, ``continue``, ``return``, calls among the functions, and the functions of
``math``.

Kernels that advance several rows at once have one more type, ``Lanes``, a vector with one float for each of them, which
``w[i, :]`` reads from and writes to an array; arithmetic, comparisons and choices then go lane by lane.

The machine code is entered with one argument, a row of 8-byte slots (see :func:`slots`), since that is the cheapest
call from Python; an array is given by the address of its NumPy object, or, ``FloatsAt``, by that of its first entry.
"""

import ast
from collections.abc import Callable

from llvmlite import ir

from pyro_latentde.solve.fused.lanes.lower import LANE_FLAGS
from pyro_latentde.solve.fused.lower_values import BOOL, FAST, FLOAT, INT, TYPES, Values

__all__ = ["lower", "slots", "variable_types"]


def lower(source: str, name: str, small: int, lanes: int = 0) -> str:
    """LLVM source of the function ``name`` and what it calls; functions of up to ``small`` statements are inlined."""
    unit = _Unit(name, {f.name: f for f in ast.parse(source).body}, small, lanes)
    _entry(unit, name)
    return str(unit.module)


def _entry(unit: "_Unit", name: str) -> None:
    """``entry(slots)``: unpack the slots, call the kernel; -1 if an array is not as the kernel takes it to be.

    Slots 0 and 1 are the addresses of the NumPy dtypes float64 and int64. After Python's own header, a NumPy array
    object begins with: data, number of dimensions, shape, strides, base, dtype, flags (part of its public interface).
    """
    kernel = unit.function(name)
    entry = ir.Function(unit.module, ir.FunctionType(INT, [ir.PointerType(INT)]), "entry")
    b = ir.IRBuilder(entry.append_basic_block())
    fine, values = BOOL(1), []

    def word(base: ir.Value, index: int) -> ir.Value:
        return b.load(b.gep(base, [INT(index)]))

    for k, (argument, (_, kind)) in enumerate(zip(kernel.args, unit.parameters(name), strict=True), 2):
        slot = word(entry.args[0], k)
        if kind == "FloatsAt":
            values.append(b.inttoptr(slot, argument.type))
        elif isinstance(argument.type, ir.PointerType):
            array = b.inttoptr(b.add(slot, INT(object.__basicsize__)), ir.PointerType(INT))
            dtype = word(entry.args[0], 0 if argument.type.pointee == FLOAT else 1)
            fine = b.and_(fine, b.icmp_signed("==", word(array, 5), dtype))
            fine = b.and_(fine, b.trunc(word(array, 6), BOOL))  # the lowest flag: contiguous
            values.append(b.inttoptr(word(array, 0), argument.type))
        elif argument.type == FLOAT:
            values.append(b.bitcast(slot, FLOAT))
        else:
            values.append(b.trunc(slot, BOOL) if argument.type == BOOL else slot)
    with b.if_else(fine) as (yes, no):
        with yes:
            b.ret(b.call(kernel, values))
        with no:
            b.ret(INT(-1))
    b.unreachable()


def slots(source: str, name: str) -> list[tuple[str, str]]:
    """Names and annotations of the parameters of function ``name``; the rest of the source is not read."""
    head = source[source.index(f"def {name}(") :].split(":\n", 1)[0]
    (tree,) = ast.parse(head + ": pass").body
    return _parameters(tree)


def _parameters(tree: ast.FunctionDef) -> list[tuple[str, str]]:
    return [(a.arg, a.annotation.id) for a in tree.args.args]


class _Unit:
    """One module: its functions, each lowered once."""

    def __init__(self, name: str, functions: dict[str, ast.FunctionDef], small: int, lanes: int) -> None:
        self.module, self.functions, self.small = ir.Module(name), functions, small
        self.done: dict[str, ir.Function] = {}
        self.types = {**TYPES, "Lanes": ir.VectorType(FLOAT, lanes)} if lanes else TYPES
        self.flags = LANE_FLAGS if lanes else FAST

    def function(self, name: str) -> ir.Function:
        if name not in self.done:
            tree = self.functions[name]
            arguments = [self.types[a.annotation.id] for a in tree.args.args]
            type_ = ir.FunctionType(self.types[tree.returns.id], arguments)
            function = self.done[name] = ir.Function(self.module, type_, name)
            statements = sum(isinstance(node, ast.stmt) for node in ast.walk(tree))
            function.linkage = "internal"
            function.attributes.add("nounwind")
            function.attributes.add("alwaysinline" if statements <= self.small else "noinline")
            for argument in function.args:
                if isinstance(argument.type, ir.PointerType):  # arrays that are written overlap no others
                    argument.add_attribute("noalias")
            _Body(self, function).lower(tree)
        return self.done[name]

    def parameters(self, name: str) -> list[tuple[str, str]]:
        return _parameters(self.functions[name])

    def has(self, name: str) -> bool:
        return name in self.functions

    def intrinsic(self, name: str, kind: ir.Type, type_: ir.FunctionType) -> ir.Function:
        if not isinstance(kind, ir.VectorType):
            return self.module.declare_intrinsic(name, [kind], type_)
        full = f"{name}.v{kind.count}{'f64' if kind.element == FLOAT else 'i1'}"
        if full not in self.done:
            self.done[full] = ir.Function(self.module, type_, full)
        return self.done[full]

    def external(self, name: str, count: int) -> ir.Function:
        if name not in self.done:
            function = ir.Function(self.module, ir.FunctionType(FLOAT, [FLOAT] * count), name)
            function.attributes.add("nounwind")
            function.attributes.add("readnone")  # nothing reads errno
            self.done[name] = function
        return self.done[name]


class _Body(Values):
    """Statements of one function."""

    def __init__(self, unit: _Unit, function: ir.Function) -> None:
        super().__init__(unit, function)
        self.loops: list[tuple[ir.Block, ir.Block]] = []  # where continue and break lead

    def lower(self, tree: ast.FunctionDef) -> None:
        first = self.b.block
        for argument, value in zip(tree.args.args, self.function.args, strict=True):
            if isinstance(value.type, ir.PointerType):
                self.slots[argument.arg] = value
            else:
                self.assign(argument.arg, value)
        self.block(tree.body)
        if not self.b.block.is_terminated:
            self.b.unreachable()
        self.entry.branch(first)

    def block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            getattr(self, "do_" + type(statement).__name__.lower())(statement)

    def assign(self, name: str, value: ir.Value) -> None:
        if name not in self.slots:
            self.slots[name] = self.entry.alloca(value.type, name=name)
        slot = self.slots[name]
        self.b.store(self.cast(value, slot.type.pointee), slot)

    def do_assign(self, s: ast.Assign) -> None:
        (target,) = s.targets
        value = self.value(s.value)
        if isinstance(target, ast.Name):
            self.assign(target.id, value)
        else:
            self.write(value, self.place(target))

    def do_augassign(self, s: ast.AugAssign) -> None:
        place = self.slots[s.target.id] if isinstance(s.target, ast.Name) else self.place(s.target)
        self.write(self.arithmetic(s.op, self.read(place), self.value(s.value)), place)

    def do_expr(self, s: ast.Expr) -> None:
        self.value(s.value)

    def do_return(self, s: ast.Return) -> None:
        self.b.ret(self.cast(self.value(s.value), self.function.function_type.return_type))
        self.b.position_at_end(self.function.append_basic_block())

    def do_break(self, s: ast.Break) -> None:
        self.b.branch(self.loops[-1][1])
        self.b.position_at_end(self.function.append_basic_block())

    def do_continue(self, s: ast.Continue) -> None:
        self.b.branch(self.loops[-1][0])
        self.b.position_at_end(self.function.append_basic_block())

    def do_if(self, s: ast.If) -> None:
        then, other, end = (self.function.append_basic_block() for _ in range(3))
        self.b.cbranch(self.truth(s.test), then, other)
        for start, statements in ((then, s.body), (other, s.orelse)):
            self.b.position_at_end(start)
            self.block(statements)
            self.b.branch(end)
        self.b.position_at_end(end)

    def do_while(self, s: ast.While) -> None:
        self.loop(lambda: self.truth(s.test), s.body, lambda: None)

    def do_for(self, s: ast.For) -> None:
        limits = [self.value(a) for a in s.iter.args]
        start, end = limits[:2] if len(limits) > 1 else (INT(0), limits[0])
        step = limits[2] if len(limits) > 2 else INT(1)
        name, ahead = s.target.id, "<" if step.constant > 0 else ">"
        self.assign(name, start)
        slot = self.slots[name]

        def advance() -> None:
            self.b.store(self.b.add(self.b.load(slot), step, flags=("nsw",)), slot)

        self.loop(lambda: self.b.icmp_signed(ahead, self.b.load(slot), end), s.body, advance)

    def loop(self, test: Callable[[], ir.Value], body: list[ast.stmt], advance: Callable[[], None]) -> None:
        head, inside, following, end = (self.function.append_basic_block() for _ in range(4))
        self.b.branch(head)
        self.b.position_at_end(head)
        self.b.cbranch(test(), inside, end)
        self.b.position_at_end(inside)
        self.loops.append((following, end))
        self.block(body)
        self.loops.pop()
        self.b.branch(following)
        self.b.position_at_end(following)
        advance()
        self.b.branch(head)
        self.b.position_at_end(end)


def variable_types(source: str, name: str) -> dict[str, str]:
    """Type of every number that the function ``name`` keeps in a variable: ``float``, ``int`` or ``bool``."""
    unit = _Unit(name, {f.name: f for f in ast.parse(source).body}, 0, 0)
    tree = unit.functions[name]
    arguments = [TYPES[kind] for _, kind in unit.parameters(name)]
    body = _Body(unit, ir.Function(unit.module, ir.FunctionType(TYPES[tree.returns.id], arguments), name))
    body.lower(tree)
    kinds = {FLOAT: "float", INT: "int", BOOL: "bool"}
    return {x: kinds[slot.type.pointee] for x, slot in body.slots.items() if isinstance(slot, ir.AllocaInstr)}
