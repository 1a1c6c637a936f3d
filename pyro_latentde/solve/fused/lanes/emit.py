# SPDX-License-Identifier: Apache-2.0
"""Source code of a traced vector field and its reverse for several rows at once, layer by layer.

The conventions are those of ``emit.py``, except that entry i of the work array is a vector, ``w[i, :]``, and that
parameters which rows have to themselves are copied there. What the reverse pass needs of the forward one, stage by
stage, stays where it was computed, and the parameters' gradients are summed for all stages of a step in one sweep.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pyro_latentde.solve.fused.emit import literal
from pyro_latentde.solve.fused.graph import Graph, Node, reachable, vjp
from pyro_latentde.solve.fused.lanes.layers import Member, Run, Same, family
from pyro_latentde.solve.fused.lanes.sums import GradientSums
from pyro_latentde.solve.fused.scalar_ops import OPS

__all__ = ["LaneSource", "Parameters", "fits_lanes", "lane_source"]

COSTLY = {"exp", "expm1", "log", "log1p", "tanh", "erf", "sin", "cos", "pow", "div", "sqrt"}  # kept for the reverse
TILE = 8  # sums of a product that advance together
LOOP = 4  # shorter rows of nodes are written out


def fits_lanes(nodes: Iterable[Node]) -> bool:
    """Whether a field of these nodes is a network of layers, all of which can be done for several rows at once."""
    apart = ("gather", "search", "to_int")
    return any(n.op == "matvec" for n in nodes) and not any(n.op in apart or n.kind == "i" for n in nodes)


@dataclass(frozen=True)
class Parameters:
    """Where parameters lie: ``own[k]`` is where the lanes' copies of parameter k begin, for those not shared."""

    own: dict[int, int]

    def entry(self, leaf: int, index: str) -> str:
        return f"w[{self.own[leaf]} + {index}, :]" if leaf in self.own else f"p[o{leaf} + {index}]"


@dataclass(frozen=True)
class LaneSource:
    """Source of ``field`` (and ``field_vjp`` and what sums gradients), and the vectors of scratch each stage needs."""

    source: str
    scratch: int


class _Body:
    """Statements that compute nodes, each once; rows of nodes by loops."""

    def __init__(self, graph: Graph, places: Parameters, leaves: dict[str, Callable[[str], str]], kept: set) -> None:
        self.graph, self.places, self.leaves, self.kept = graph, places, leaves, kept
        self.lines: list[str] = []
        self.names: dict[Node, str] = {}
        self.stored: dict[tuple[Node, ...], int] = {}
        self.products: dict[Node, int] = {}
        self.known: dict = {}
        self.seen: dict[tuple[Node, ...], tuple] = {}
        self.again: set[tuple[Node, ...]] = set()
        self.used: set[int] = set()
        self.scratch = 0

    def next_function(self, leaves: dict[str, Callable[[str], str]]) -> None:
        """The statements that follow are another function's, which finds in scratch what this one left there."""
        self.leaves, self.lines, self.names, self.used = leaves, [], {}, set()

    def room(self, size: int) -> int:
        self.scratch += size
        return self.scratch - size

    def entry(self, leaf: int, index: str) -> str:
        self.used.add(leaf)
        return self.places.entry(leaf, index)

    def add(self, nodes: Sequence[Node]) -> None:
        """Scalars, each a variable (of all lanes)."""
        self.layers(nodes)
        for node in reachable(nodes, self.products):
            if node not in self.names:
                self.names[node] = self._define(node)

    def _define(self, node: Node) -> str:
        if node.op == "const":
            return literal(node)
        name = f"v{node.number}"
        self.lines.append(f"{name} = {self._expression(node)}")
        return name

    def _expression(self, node: Node) -> str:
        if node.op == "elem":
            return f"w[ws + {self.products[node.args[0]] + node.args[1]}, :]"
        if node.op == "leaf":
            return self.entry(node.args[0], str(node.args[1]))
        if node.op in OPS:
            return self._apply(node.op, [self.names[a] for a in node.args])
        return self.leaves[node.op](*map(str, node.args))

    def _apply(self, op: str, arguments: list[str]) -> str:
        return OPS[op].source.format(*arguments)

    def layers(self, nodes: Sequence[Node]) -> None:
        """Matrix products that the nodes depend on, with what they are of, in order."""
        for node in reachable(nodes, self.products):
            if node.op == "matvec" and node not in self.products:
                self.product(node)

    def product(self, node: Node) -> None:
        matrix, vector = node.args
        x, out = self.vector(vector), self.room(matrix.shape[0])
        self.products[node] = out
        rows = matrix.shape[0]
        whole = rows - rows % TILE
        if whole:
            self._tile(matrix, x, out, f"for i in range(0, {whole}, {TILE}):", "i", TILE)
        if rows % TILE:
            self._tile(matrix, x, out, "if True:", str(whole), rows % TILE)

    def _tile(self, matrix: object, x: int, out: int, head: str, i: str, count: int) -> None:
        """Some rows of a product: each loaded vector serves all of them."""
        lines = [f"s{k} = Lanes(0.0)" for k in range(count)]
        lines += [f"for j in range({matrix.shape[1]}):", f"    x = w[ws + {x} + j, :]"]
        for k in range(count):
            at = self.entry(matrix.leaf, f"{matrix.offset} + ({i} + {k}) * {matrix.row} + j * {matrix.column}")
            lines.append(f"    s{k} = s{k} + {at} * x")
        lines += [f"w[ws + {out + k} + {i}, :] = s{k}" for k in range(count)]
        self.lines += [head, *("    " + line for line in lines)]

    def vector(self, nodes: Sequence[Node], into: str | None = None) -> int:
        """Put nodes side by side into scratch (or elsewhere); where they begin there."""
        nodes = tuple(nodes)
        if into is None and nodes in self.stored:
            return self.stored[nodes]
        self.layers(nodes)
        kind = family(nodes, self.known) if len(nodes) >= LOOP else None
        place = self.room(len(nodes)) if into is None else 0
        target = into or f"ws + {place}"
        if kind is None:
            self.add(nodes)
            self.lines += [f"w[{target} + {i}, :] = {self.names[n]}" for i, n in enumerate(nodes)]
        else:
            loop = _Loop(self, nodes, len(nodes))
            value = loop.value(kind)
            body = [*loop.lines, f"w[{target} + i, :] = {value}"]
            self.lines += [f"for i in range({len(nodes)}):", *("    " + line for line in body)]
            self.stored.update(loop.stored)
        if into is None:
            self.stored[nodes] = place
        return place

    def function(self, head: str, result: str) -> str:
        loads = [f"o{k} = o[{k}]" for k in sorted(self.used) if k not in self.places.own]
        return "\n    ".join([head, *loads, *self.lines, result]) + "\n"


class _Loop:
    """The body of a loop over a family: each subfamily once."""

    def __init__(self, body: _Body, root: tuple[Node, ...], size: int) -> None:
        self.body, self.root, self.size = body, root, size
        self.lines: list[str] = []
        self.names: dict[tuple[Node, ...], str] = {}
        self.stored: dict[tuple[Node, ...], int] = {}

    def value(self, kind: Same | Run | Member) -> str:
        body = self.body
        if isinstance(kind, Same):
            body.add([kind.node])
            return body.names[kind.node]
        if isinstance(kind, Run):
            return self._leaf(kind)
        if kind.nodes not in self.names:
            self.names[kind.nodes] = self._member(kind)
        return self.names[kind.nodes]

    def _leaf(self, run: Run) -> str:
        index = f"{run.first} + i * {run.stride}"
        if run.op == "elem":
            return f"w[ws + {self.body.products[run.owner[0]]} + {index}, :]"
        if run.op == "leaf":
            return self.body.entry(run.owner[0], index)
        return self.body.leaves[run.op](index)

    def _member(self, kind: Member) -> str:
        body, name = self.body, f"u{kind.nodes[0].number}"
        if kind.nodes in body.stored:
            self.lines.append(f"{name} = w[ws + {body.stored[kind.nodes]} + i, :]")
            return name
        if kind.op in COSTLY and body.seen.setdefault(kind.nodes, self.root) != self.root:
            body.again.add(kind.nodes)
        other = _sister(body.graph, kind, body.known)
        expression = f"({self.value(other)} + 1.0)" if other else None
        expression = expression or body._apply(kind.op, [self.value(a) for a in kind.args])
        self.lines.append(f"{name} = {expression}")
        if kind.nodes in body.kept and kind.nodes != self.root:
            self.stored[kind.nodes] = body.room(self.size)
            self.lines.append(f"w[ws + {self.stored[kind.nodes]} + i, :] = {name}")
        return name


def _sister(graph: Graph, kind: Member, known: dict) -> Member | None:
    """The family exp(x) - 1, if that is computed too: 1 more costs less than another exponential."""
    if kind.op != "exp":
        return None
    nodes = tuple(graph.nodes.get(("expm1", n.args, n.kind)) for n in kind.nodes)
    return None if None in nodes else family(nodes, known)


def _field(body: _Body, outputs: Sequence[Node]) -> str:
    body.vector(outputs, "ko")
    head = "def field(t: Lanes, w: Floats, yo: int, ko: int, ws: int, p: Floats, o: Ints) -> float:"
    return body.function(head, "return 0.0")


def _reverse(body: _Body, graph: Graph, outputs: Sequence[Node], sums: GradientSums) -> list[str]:
    """``field_vjp``, which leaves what the parameters' gradients are made of, and what makes them."""
    bars = vjp(graph, outputs, [graph.leaf("seed", i) for i in range(len(outputs))])
    zero = graph.const(0.0)
    for matrix, g, x in bars.outer:
        sums.product(matrix, body.vector(g), body.vector(x))
    entries: dict[int, list[tuple[int, Node]]] = {}
    for node, bar in bars.scalars.items():
        if node.op == "leaf":
            entries.setdefault(node.args[0], []).append((node.args[1], bar))
    for k, found in sorted(entries.items()):
        for first, stride, group in _runs(sorted(found, key=lambda entry: entry[0])):
            sums.entries(k, first, stride, len(group), body.vector(group))
    body.vector([bars.scalars.get(graph.leaf("y", i), zero) for i in range(len(outputs))], "bo")
    t_bar = bars.scalars.get(graph.leaf("t"), zero)
    body.add([t_bar])
    head = "def field_vjp(t: Lanes, w: Floats, yo: int, co: int, bo: int, ws: int, p: Floats, o: Ints) -> Lanes:"
    return [body.function(head, f"return Lanes({body.names[t_bar]})"), sums.source()]


def _runs(entries: list[tuple[int, Node]]) -> list[tuple[int, int, list[Node]]]:
    """Gradients of a parameter's entries (place, node) in as few rows as have equal gaps."""
    runs, at = [], 0
    while at < len(entries):
        stride = entries[at + 1][0] - entries[at][0] if at + 1 < len(entries) else 1
        end = at + 1
        while end < len(entries) and entries[end][0] - entries[end - 1][0] == stride:
            end += 1
        runs.append((entries[at][0], stride, [node for _, node in entries[at:end]]))
        at = end
    return runs


def _state(base: str) -> Callable[[str], str]:
    return lambda i: f"w[{base} + {i}, :]"


def lane_source(graph: Graph, outputs: Sequence[Node], own: dict[int, int], sums: GradientSums | None) -> LaneSource:
    """Write out ``dy/dt = f(t, y, p)`` for several rows; with ``sums`` the reverse too.

    Args:
        outputs: The nodes of dy_i/dt.
        own: Where in the work array the lanes' copies of parameters begin that rows do not share.
        sums: Where the gradients of the parameters are to be summed.
    """
    places, kept = Parameters(own), set()
    forward = {"t": lambda: "t", "y": _state("yo")}
    for _ in range(2):  # the first time finds out what is needed again later
        body = _Body(graph, places, forward, kept)
        parts = [_field(body, outputs)]
        if sums is not None:
            sums.begin()
            body.next_function({**forward, "seed": _state("co")})
            parts += _reverse(body, graph, outputs, sums)
        kept = body.again
    return LaneSource("\n\n".join(parts), body.scratch)
