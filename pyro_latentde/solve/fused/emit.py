# SPDX-License-Identifier: Apache-2.0
"""Source code of a traced vector field and its derivatives, as scalar statements over flat arrays.

The three functions share their conventions with ``templates``: ``w`` is the work array of the thread, ``p`` holds every
parameter end to end, ``o[k]`` is where parameter k of this row begins, ``ws`` is where scratch space begins in ``w``.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pyro_latentde.solve.fused.event_graph import KernelEvents
from pyro_latentde.solve.fused.graph import Graph, Matrix, Node, jvp, reachable, vjp
from pyro_latentde.solve.fused.scalar_ops import OPS
from pyro_latentde.solve.fused.templates.parts import WorkLayout
from pyro_latentde.solve.fused.templates.stops import constant_input, constant_inputs_reverse, field_time

__all__ = ["FieldSource", "delayed_source", "field_source", "literal"]

DENSE = 6  # states; in larger Jacobians zeros are written by a loop, and only the other entries one by one
LONGEST = 4000  # statements; a longer Jacobian is a loop over its columns


@dataclass(frozen=True)
class FieldSource:
    """Python source of a field and one derivative, the scratch they need and the statements they have."""

    source: str
    scratch: int
    statements: int


class _Body:
    """Statements that compute a set of nodes, each once, in dependency order."""

    def __init__(self, leaves: dict[str, Callable[..., str]], lines: Iterable[str] = ()) -> None:
        self.leaves = leaves
        self.lines: list[str] = [*lines]
        self.names: dict[Node, str] = {}
        self.offsets: set[tuple[str, int]] = set()
        self.scratch = 0

    def add(self, nodes: Iterable[Node]) -> None:
        for node in reachable(nodes):
            if node not in self.names:
                self.names[node] = self._define(node)

    def array(self, leaf: int) -> tuple[str, str]:
        """The array that holds parameter ``leaf`` and the name of its offset; tangents follow the parameters."""
        array, offset, k = ("p", "o", leaf) if leaf < _TANGENT else ("pd", "od", leaf - _TANGENT)
        self.offsets.add((offset, k))
        return array, f"{offset}{k}"

    def _define(self, node: Node) -> str:
        if node.op == "const":
            return literal(node)
        name = f"v{node.number}"
        if node.op == "matvec":
            return self._matvec(node)
        if node.op == "elem":
            return self._let(name, f"w[{self.names[node.args[0]]} + {node.args[1]}]")
        if node.op == "leaf":
            array, offset = self.array(node.args[0])
            return self._let(name, f"{array}[{offset} + {node.args[1]}]")
        if node.op == "gather":
            leaf, start, stride, size, index = node.args
            array, offset = self.array(leaf)
            place = f"min(max({self.names[index]}, 0), {size - 1})"
            return self._let(name, f"{array}[{offset} + {start} + {stride} * {place}]")
        if node.op == "search":
            leaf, start, stride, size, right, value = node.args
            array, offset = self.array(leaf)
            arguments = f"{array}, {offset} + {start}, {stride}, {size}, {right}, {self.names[value]}"
            return self._let(name, f"insertion_point({arguments})")
        if node.op in OPS:
            return self._let(name, OPS[node.op].source.format(*(self.names[a] for a in node.args)))
        source = self.leaves[node.op](*node.args)
        return source if source.isidentifier() else self._let(name, source)

    def _let(self, name: str, expression: str) -> str:
        self.lines.append(f"{name} = {expression}")
        return name

    def vector(self, nodes: Sequence[Node]) -> str:
        """Put nodes side by side into scratch; the result is where they begin."""
        place = f"ws + {self.scratch}"
        self.lines += [f"w[{place} + {j}] = {self.names[x]}" for j, x in enumerate(nodes)]
        self.scratch += len(nodes)
        return place

    def _matvec(self, node: Node) -> str:
        matrix, vector = node.args
        x = self.vector(vector)
        out = f"ws + {self.scratch}"
        self.scratch += matrix.shape[0]
        array, offset = self.array(matrix.leaf)
        at = f"{array}[{offset} + {matrix.offset} + i * {matrix.row} + j * {matrix.column}]"
        if matrix.column <= matrix.row:  # rows lie contiguous: inner products
            self.lines += [
                f"for i in range({matrix.shape[0]}):",
                "    s = 0.0",
                f"    for j in range({matrix.shape[1]}):",
                f"        s += {at} * w[{x} + j]",
                f"    w[{out} + i] = s",
            ]
        else:  # columns lie contiguous: sums of columns
            self.lines += [
                f"for i in range({matrix.shape[0]}):",
                f"    w[{out} + i] = 0.0",
                f"for j in range({matrix.shape[1]}):",
                f"    s = w[{x} + j]",
                f"    for i in range({matrix.shape[0]}):",
                f"        w[{out} + i] += {at} * s",
            ]
        return out

    def outer(self, matrix: Matrix, g: Sequence[Node], x: Sequence[Node]) -> None:
        """``G += g x^T`` for the gradient array of a matrix."""
        g_at, x_at = self.vector(g), self.vector(x)
        self.offsets.add(("q", matrix.leaf))
        self.lines += [
            f"for i in range({matrix.shape[0]}):",
            f"    s = w[{g_at} + i]",
            f"    for j in range({matrix.shape[1]}):",
            f"        g[q{matrix.leaf} + {matrix.offset} + i * {matrix.row} + j * {matrix.column}] += s * w[{x_at} + "
            f"j]",
        ]

    def function(self, head: str, result: str) -> str:
        loads = [f"{array}{k} = {array}[{k}]" for array, k in sorted(self.offsets)]
        return "\n    ".join([head, *loads, *self.lines, result]) + "\n"


_TANGENT = 1 << 20  # parameters from this number on are tangents of parameters


def literal(node: Node) -> str:
    value = node.args[0]
    if node.kind == "f" and value != value:
        return "np.nan"
    if node.kind == "f" and value in (float("inf"), float("-inf")):
        return "np.inf" if value > 0 else "(-np.inf)"
    return f"({value!r})" if node.kind != "b" and value < 0 else repr(value)


def _state(base: str) -> Callable[[int], str]:
    return lambda i: f"w[{base} + {i}]"


@dataclass(frozen=True)
class _Part:
    """Some of the outputs, and what the functions that compute them are called."""

    name: str
    begin: int
    end: int


def _field(outputs: Sequence[Node], part: _Part, at: WorkLayout | None = None) -> tuple[str, _Body]:
    body = _Body({"t": lambda: "t", "y": _state("yo")}, field_time(at))
    body.add(outputs[part.begin : part.end])
    own = range(part.begin, part.end)
    body.lines += [f"w[ko + {i}] = {body.names[outputs[i]]}{constant_input(at, i)}" for i in own]
    head = f"def {part.name}(t: float, w: Floats, yo: int, ko: int, ws: int, p: Floats, o: Ints) -> float:"
    return body.function(head, "return 0.0"), body


def _field_vjp(
    graph: Graph, outputs: Sequence[Node], part: _Part, at: WorkLayout | None = None, states: int | None = None
) -> tuple[str, _Body]:
    seeds = [graph.leaf("seed", i) for i in range(part.begin, part.end)]
    bars = vjp(graph, outputs[part.begin : part.end], seeds)
    body = _Body({"t": lambda: "t", "y": _state("yo"), "seed": _state("co")}, field_time(at))
    body.add([*bars.scalars.values(), *(g for *_, g in bars.scatter), *(i for *_, i, _ in bars.scatter)])
    for matrix, g, x in bars.outer:
        body.add([*g, *x])
        body.outer(matrix, g, x)
    zero = graph.const(0.0)
    for i in range(len(outputs) if states is None else states):
        bar = bars.scalars.get(graph.leaf("y", i), zero)
        body.add([bar])
        body.lines.append(f"w[bo + {i}] = {body.names[bar]}")
    for leaf, bar in bars.scalars.items():
        if leaf.op == "leaf":
            k, j = leaf.args
            body.offsets.add(("q", k))
            body.lines.append(f"g[q{k} + {j}] += {body.names[bar]}")
    for k, start, stride, size, index, bar in bars.scatter:
        body.offsets.add(("q", k))
        place = f"min(max({body.names[index]}, 0), {size - 1})"
        body.lines.append(f"g[q{k} + {start} + {stride} * {place}] += {body.names[bar]}")
    body.lines += constant_inputs_reverse(at)
    t_bar = bars.scalars.get(graph.leaf("t"), zero)
    body.add([t_bar])
    head = (
        f"def {part.name}_vjp(t: float, w: Floats, yo: int, co: int, bo: int, ws: int, p: Floats, o: Ints, g: Floats, "
        "q: Ints) -> float:"
    )
    return body.function(head, f"return {body.names[t_bar]}"), body


def _field_jvp(graph: Graph, outputs: Sequence[Node], part: _Part, at: WorkLayout | None = None) -> tuple[str, _Body]:
    def tangent(node: Node) -> Node:
        if node.op == "leaf":
            return graph.leaf("leaf", node.args[0] + _TANGENT, node.args[1])
        return graph.leaf(node.op + "_dot", *node.args)

    dots = jvp(graph, outputs[part.begin : part.end], tangent, _TANGENT)
    leaves = {"t": lambda: "t", "t_dot": lambda: "td", "y": _state("yo"), "y_dot": _state("do")}
    body = _Body(leaves, field_time(at))
    body.add(dots)
    numbered = enumerate(dots, part.begin)
    body.lines += [f"w[ko + {i}] = {body.names[n]}{constant_input(at, i, turn=True)}" for i, n in numbered]
    head = (
        f"def {part.name}_jvp(t: float, td: float, w: Floats, yo: int, do: int, ko: int, ws: int, p: Floats, o: Ints, "
        "pd: Floats, od: Ints) -> float:"
    )
    return body.function(head, "return 0.0"), body


def _along(graph: Graph, outputs: Sequence[Node], name: str, at: WorkLayout) -> tuple[str, _Body]:
    """The derivative along t and y alone, with the parameters held fixed."""

    def tangent(node: Node) -> Node:
        return graph.const(0.0) if node.op == "leaf" else graph.leaf(node.op + "_dot", *node.args)

    dots = jvp(graph, outputs, tangent, None)
    leaves = {"t": lambda: "t", "t_dot": lambda: "td", "y": _state("yo"), "y_dot": _state("do")}
    body = _Body(leaves, field_time(at))
    body.add(dots)
    body.lines += [f"w[ko + {i}] = {body.names[n]}" for i, n in enumerate(dots)]
    head = (
        f"def {name}_along(t: float, td: float, w: Floats, yo: int, do: int, ko: int, ws: int, p: Floats, o: Ints) "
        "-> float:"
    )
    return body.function(head, "return 0.0"), body


def _field_jac(graph: Graph, outputs: Sequence[Node], at: WorkLayout) -> tuple[str, _Body]:
    """Rows by reverse mode, one for each output; what they have in common is computed once."""
    body, d = _Body({"t": lambda: "t", "y": _state("yo")}, field_time(at)), len(outputs)
    zero, one = graph.const(0.0), graph.const(1.0)
    sparse = d > DENSE
    if sparse:
        body.lines += [f"for i in range({d * d}):", "    w[jo + i] = 0.0"]
    for i in range(d):
        bars = vjp(graph, outputs, [one if j == i else zero for j in range(d)]).scalars
        row = [bars.get(graph.leaf("y", j), zero) for j in range(d)]
        body.add(row)
        body.lines += [f"w[jo + {i * d + j}] = {body.names[n]}" for j, n in enumerate(row) if not sparse or n != zero]
        if len(body.lines) > LONGEST:
            return _field_jac_by_columns(graph, outputs, at)
    return body.function(_JACOBIAN, "return 0.0"), body


def _field_jac_by_columns(graph: Graph, outputs: Sequence[Node], at: WorkLayout) -> tuple[str, _Body]:
    """A loop over columns, each the derivative along one state; what they have in common is computed before it."""
    d, zero = len(outputs), graph.const(0.0)
    dots = jvp(graph, outputs, lambda n: graph.leaf("y_dot", *n.args) if n.op == "y" else zero, None)
    body = _Body({"t": lambda: "t", "y": _state("yo"), "y_dot": _state("ws")}, field_time(at))
    body.scratch = d
    moving: set[Node] = set()
    for node in reachable(dots):
        if node.op == "y_dot" or any(a in moving for a in node.operands):
            moving.add(node)
        else:
            body.add([node])
    before = len(body.lines)
    body.add(dots)
    column = [*body.lines[before:], *(f"w[jo + {i * d} + m] = {body.names[n]}" for i, n in enumerate(dots))]
    seed = [f"for i in range({d}):", "    w[ws + i] = 0.0", "w[ws + m] = 1.0"]
    body.lines[before:] = [f"for m in range({d}):", *("    " + line for line in (*seed, *column))]
    return body.function(_JACOBIAN, "return 0.0"), body


_JACOBIAN = "def field_jac(t: float, w: Floats, yo: int, jo: int, ws: int, p: Floats, o: Ints) -> float:"


def field_source(
    graph: Graph,
    outputs: Sequence[Node],
    at: WorkLayout,
    kind: str = "adjoint",
    jacobian: bool = False,
    halves: bool = False,
    events: KernelEvents | None = None,
) -> FieldSource:
    """Write out ``dy/dt = f(t, y, p)`` and what a kernel needs of its derivatives.

    Args:
        outputs: The nodes of dy_i/dt.
        at: Where things lie in the work array.
        kind: ``"tangent"``: the Jacobian-vector product; else the vector-Jacobian product.
        jacobian: The matrix df_i/dy_j too.
        halves: Also the first and the second half of the field by themselves, ``field_drift`` and ``field_kick``.
        events: The functions of events too.
    """
    size, derivative = len(outputs), _field_jvp if kind == "tangent" else _field_vjp
    chosen = [_Part("field", 0, size)]
    if halves:
        chosen += [_Part("field_drift", 0, size // 2), _Part("field_kick", size // 2, size)]
    parts = [made for part in chosen for made in (_field(outputs, part, at), derivative(graph, outputs, part, at))]
    if jacobian:
        parts.append(_field_jac(graph, outputs, at))
    if events is not None:
        parts += _events(graph, outputs, kind, events, at.without_inputs())
    return FieldSource(
        source="\n\n".join(source for source, _ in parts),
        scratch=max(body.scratch for _, body in parts),
        statements=sum(len(body.lines) for _, body in parts),
    )


def _events(
    graph: Graph, outputs: Sequence[Node], kind: str, events: KernelEvents, at: WorkLayout
) -> list[tuple[str, _Body]]:
    """Conditions all at once, resets and derivatives one by one: what did not happen has no part in them."""
    resets = [(_Part(f"reset{e}", 0, len(nodes)), nodes) for e, nodes in enumerate(events.resets) if nodes]
    parts = [_along(graph, events.conditions, "conditions", at)]
    if kind == "forward":
        parts.append(_field(events.conditions, _Part("conditions", 0, len(events.conditions)), at))
        return parts + [_field(nodes, part, at) for part, nodes in resets]
    parts.append(_along(graph, outputs, "field", at))
    for part, nodes in [*((_Part(f"condition{e}", 0, 1), [c]) for e, c in enumerate(events.conditions)), *resets]:
        if kind == "tangent":
            parts.append(_field_jvp(graph, nodes, part, at))
        else:
            parts.append(_field_vjp(graph, nodes, part, at, len(outputs)))
    return parts


def delayed_source(graph: Graph, outputs: Sequence[Node], states: int, past: bool, tangent: bool) -> FieldSource:
    """Write out a field that sees lagged states behind its own, each function with one derivative.

    Args:
        outputs: The nodes of dy_i/dt, then those of the history at t.
        states: How many of each.
        past: Write out ``past``, the history, too.
        tangent: Forward mode instead of reverse mode.
    """
    derivative = _field_jvp if tangent else _field_vjp
    chosen = [_Part("field", 0, states)] + ([_Part("past", states, 2 * states)] if past else [])
    parts = [made for part in chosen for made in (_field(outputs, part), derivative(graph, outputs, part))]
    return FieldSource(
        source="\n\n".join(source for source, _ in parts),
        scratch=max(body.scratch for _, body in parts),
        statements=sum(len(body.lines) for _, body in parts),
    )
