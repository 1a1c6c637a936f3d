# SPDX-License-Identifier: Apache-2.0
"""Hash-consed scalar expression graphs: what a traced vector field is made of, and its derivatives.

A :class:`Node` is one scalar (or one small matrix-vector product). Equal expressions are the same object, constants are
folded, and products with 0 and 1 disappear. Derivatives are built from one table of partial derivatives, in reverse
mode (:func:`vjp`) for adjoints and in forward mode (:func:`jvp`) for sensitivities.

References:
    Griewank and Walther, "Evaluating Derivatives", 2nd ed., SIAM 2008, chapters 3 and 6.
"""

import threading
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field

from pyro_latentde.solve.fused.scalar_ops import BOOLEAN, CONSTANT_RULES, INTEGER, OPS

__all__ = ["Graph", "Node", "jvp", "reachable", "vjp"]


class Node:
    """One value of the graph. ``op`` names what it is, ``args`` its operands (nodes, or plain Python data for leaves).

    Leaves: ``const (value)``, ``t ()``, ``y (i)``, ``leaf (k, j)`` = element ``j`` of parameter ``k``, and their
    tangents (``t_dot``, ``y_dot``) and cotangents (``seed``), which :meth:`Graph.leaf` gives out.
    ``kind`` is ``"f"``, ``"i"`` or ``"b"`` (float, integer, boolean) or ``"v"`` (a vector whose elements are ``elem``
    nodes).
    """

    __slots__ = ("args", "kind", "number", "op")

    def __init__(self, op: str, args: tuple, kind: str, number: int) -> None:
        self.op, self.args, self.kind, self.number = op, args, kind, number

    @property
    def operands(self) -> tuple["Node", ...]:
        if self.op == "matvec":
            return self.args[1]
        return tuple(a for a in self.args if isinstance(a, Node))

    def __repr__(self) -> str:
        return f"{self.op}{self.args}" if not self.operands else f"{self.op}#{self.number}"


@dataclass(frozen=True)
class Matrix:
    """A matrix that lies inside parameter ``leaf``: element (i, j) is at ``offset + i * row + j * column``."""

    leaf: int
    offset: int
    row: int
    column: int
    shape: tuple[int, int]

    @property
    def transposed(self) -> "Matrix":
        return Matrix(self.leaf, self.offset, self.column, self.row, (self.shape[1], self.shape[0]))


@dataclass
class Graph:
    """A store of nodes; every constructor returns the one node of that expression."""

    nodes: dict[tuple, Node] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)  # kernels of several methods derive from one graph

    def _make(self, op: str, args: tuple, kind: str) -> Node:
        # -0.0 == 0.0 and 1 == True as dictionary keys, so constants are keyed by their exact representation
        key = (op, args, kind) if op != "const" else (op, float(args[0]).hex(), kind)
        node = self.nodes.get(key)
        if node is None:
            node = self.nodes[key] = Node(op, args, kind, len(self.nodes))
        return node

    def const(self, value: float | int | bool) -> Node:
        kind = "b" if isinstance(value, bool) else "i" if isinstance(value, int) else "f"
        return self._make("const", (value,), kind)

    def leaf(self, name: str, *index: int) -> Node:
        return self._make(name, index, "f")

    def apply(self, op: str, *args: "Node | float | int") -> Node:
        """The node of ``op(*args)``, simplified."""
        nodes = tuple(a if isinstance(a, Node) else self.const(a) for a in args)
        spec = OPS[op]
        if all(n.op == "const" for n in nodes) and spec.evaluate is not None:
            try:
                return self.const(_plain(spec.evaluate(*(n.args[0] for n in nodes)), op))
            except (ValueError, OverflowError, ZeroDivisionError):
                pass  # leave it to the kernel, which gives inf or nan as torch does
        simpler = CONSTANT_RULES.get(op, _no_rule)(self, *nodes)
        if simpler is not None:
            return simpler
        if op in ("add", "mul") and nodes[0].number > nodes[1].number:
            nodes = nodes[::-1]
        kind = "b" if op in BOOLEAN else "i" if op in INTEGER or _stays_integer(op, nodes) else "f"
        return self._make(op, nodes, kind)

    def gather(self, leaf: int, offset: int, stride: int, size: int, index: Node) -> Node:
        """Element ``index`` (computed at run time, clamped to the table) of a run of parameter ``leaf``."""
        return self._make("gather", (leaf, offset, stride, size, index), "f")

    def search(self, leaf: int, offset: int, stride: int, size: int, right: bool, value: Node) -> Node:
        """Insertion point of ``value`` in a sorted run of parameter ``leaf``."""
        return self._make("search", (leaf, offset, stride, size, right, value), "i")

    def matvec(self, matrix: Matrix, vector: Sequence[Node]) -> list[Node]:
        """The elements of ``matrix @ vector``, kept as one loop over the parameter array; of a unit vector a column."""
        zero, one = self.const(0.0), self.const(1.0)
        ones = [j for j, x in enumerate(vector) if x is one]
        if len(ones) == 1 and sum(x is zero for x in vector) == len(vector) - 1:
            first = matrix.offset + ones[0] * matrix.column
            return [self.leaf("leaf", matrix.leaf, first + i * matrix.row) for i in range(matrix.shape[0])]
        product = self._make("matvec", (matrix, tuple(vector)), "v")
        return [self._make("elem", (product, i), "f") for i in range(matrix.shape[0])]

    def total(self, terms: Iterable[Node]) -> Node:
        result = self.const(0.0)
        for term in terms:
            result = self.apply("add", result, term)
        return result


def _no_rule(graph: Graph, *nodes: Node) -> None:
    return None


def _plain(value: float | int | bool, op: str) -> float | int | bool:
    if op in BOOLEAN:
        return bool(value)
    return value if isinstance(value, int) else float(value)


def _stays_integer(op: str, nodes: tuple[Node, ...]) -> bool:
    operands = nodes[1:] if op == "where" else nodes
    return op in ("add", "sub", "mul", "neg", "maximum", "minimum", "where") and all(n.kind == "i" for n in operands)


def reachable(outputs: Iterable[Node], known: Container[Node] = ()) -> list[Node]:
    """Every node the outputs depend on, operands first; those that are ``known``, and what only they need, left out."""
    seen: set[int] = set()
    order: list[Node] = []
    stack: list[tuple[Node, bool]] = [(n, False) for n in outputs][::-1]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node.number not in seen:
            seen.add(node.number)
            stack.append((node, True))
            stack.extend((a, False) for a in node.operands if a.number not in seen and a not in known)
    return order


@dataclass
class Cotangents:
    """Result of :func:`vjp`: scalar cotangents by leaf, and updates of parameter arrays made by loops."""

    scalars: dict[Node, Node]
    outer: list[tuple[Matrix, tuple[Node, ...], tuple[Node, ...]]]
    scatter: list[tuple[int, int, int, int, Node, Node]]


def vjp(graph: Graph, outputs: Sequence[Node], seeds: Sequence[Node]) -> Cotangents:
    r"""Reverse mode: :math:`\bar x = (\partial \mathrm{outputs} / \partial x)^T \mathrm{seeds}` for every leaf x."""
    bar: dict[Node, Node] = {}
    elements: dict[Node, dict[int, Node]] = {}
    result = Cotangents({}, [], [])

    def add(node: Node, value: Node) -> None:
        bar[node] = graph.apply("add", bar[node], value) if node in bar else value

    for output, seed in zip(outputs, seeds, strict=True):
        add(output, seed)
    for node in reversed(reachable(outputs)):
        if node.op == "matvec":
            matrix, vector = node.args
            parts = elements.get(node, {})
            g = tuple(parts.get(i, graph.const(0.0)) for i in range(matrix.shape[0]))
            result.outer.append((matrix, g, vector))
            for x, xbar in zip(vector, graph.matvec(matrix.transposed, g), strict=True):
                add(x, xbar)
        elif node not in bar or node.kind != "f" or node.op == "const":
            continue
        elif node.op == "elem":
            elements.setdefault(node.args[0], {})[node.args[1]] = bar[node]
        elif node.op == "gather":
            result.scatter.append((*node.args[:4], node.args[4], bar[node]))
        elif node.op not in OPS:
            result.scalars[node] = bar[node]
        else:
            for operand, partial in zip(node.args, OPS[node.op].partials(graph, node), strict=True):
                if partial is not None and operand.kind == "f":
                    add(operand, graph.apply("mul", bar[node], partial))
    return result


def jvp(graph: Graph, outputs: Sequence[Node], tangent: Callable[[Node], Node], shift: int | None) -> list[Node]:
    r"""Forward mode: :math:`\dot o = (\partial o / \partial x)\,\dot x` for every output o.

    Args:
        tangent: gives the tangent of a leaf node (``t``, ``y`` or ``leaf``).
        shift: tangents of parameter ``k`` are the parameter arrays ``k + shift`` (for matrices and tables); None: the
            parameters do not move.
    """
    dot: dict[Node, Node] = {}
    zero = graph.const(0.0)
    for node in reachable(outputs):
        if node.op == "matvec":
            matrix, vector = node.args
            moved = graph.matvec(matrix, [dot[x] for x in vector])
            own = [zero] * matrix.shape[0]
            if shift is not None:
                turned = Matrix(matrix.leaf + shift, matrix.offset, matrix.row, matrix.column, matrix.shape)
                own = graph.matvec(turned, vector)
            for i in range(matrix.shape[0]):
                dot[graph._make("elem", (node, i), "f")] = graph.apply("add", moved[i], own[i])
        elif node.op == "elem":
            pass  # set together with its product
        elif node.kind != "f" or node.op == "const" or (node.op == "gather" and shift is None):
            dot[node] = zero
        elif node.op == "gather":
            leaf, offset, stride, size, index = node.args
            dot[node] = graph.gather(leaf + shift, offset, stride, size, index)
        elif node.op not in OPS:
            dot[node] = tangent(node)
        else:
            pairs = zip(node.args, OPS[node.op].partials(graph, node), strict=True)
            dot[node] = graph.total(
                graph.apply("mul", partial, dot[operand])
                for operand, partial in pairs
                if partial is not None and operand.kind == "f"
            )
    return [dot[o] for o in outputs]
