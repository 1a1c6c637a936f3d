# SPDX-License-Identifier: Apache-2.0
"""Selecting elements, by known and by computed positions."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyro_latentde.solve.fused.graph import Graph, Node
from pyro_latentde.solve.fused.mirrors.symbols import MIRRORS, Sym, as_float, elementwise, mirror
from pyro_latentde.solve.lift import Untraceable

__all__: list[str] = []


def _known_positions(index: Sym, graph: Graph) -> np.ndarray | None:
    nodes = index.nodes(graph)
    if not all(n.op == "const" for n in nodes.reshape(-1)):
        return None
    kinds = {n.kind for n in nodes.reshape(-1)}
    return np.vectorize(lambda n: n.args[0], otypes=[bool if kinds == {"b"} else np.int64])(nodes)


def _look_up(graph: Graph, table: Sym, index: Sym) -> Sym:
    """``table[index]`` along the only dimension, with positions that are computed at run time."""
    size = table.shape[0]
    if table.leaf is not None:
        first = int(table.array[0])
        stride = int(table.array[1]) - first if size > 1 else 1
        if np.array_equal(table.array, first + stride * np.arange(size)):
            return elementwise(graph, lambda i: graph.gather(table.leaf, first, stride, size, i), index)
    if size > 64:
        raise Untraceable(f"indexing {size} computed values with a computed position has no scalar form here")
    entries = table.nodes(graph)

    def chain(i: Node) -> Node:
        value = entries[-1]
        for position in range(size - 2, -1, -1):
            reached = graph.apply("le", i, position)
            value = graph.apply("where", reached, as_float(graph, entries[position]), as_float(graph, value))
        return value

    return elementwise(graph, chain, index)


@mirror("index", "_unsafe_index")
def _index(graph: Graph, a: Sym, indices: Sequence[Sym | None]) -> Sym:
    known = [None if i is None else _known_positions(i, graph) for i in indices]
    if all(i is None or k is not None for i, k in zip(indices, known, strict=True)):
        return a.view(a.array[tuple(slice(None) if k is None else k for k in known)])
    if len(indices) == 1 and indices[0].nodes(graph).reshape(-1)[0].kind == "i":
        if a.array.ndim == 1:
            return _look_up(graph, a, indices[0])
        columns = a.array.reshape(a.shape[0], -1)
        picked = [_look_up(graph, a.view(columns[:, j]), indices[0]).array for j in range(columns.shape[1])]
        return Sym(np.stack(picked, axis=-1).reshape(indices[0].shape + a.shape[1:]))
    raise Untraceable("the field selects elements by a condition on computed values, so that shapes depend on values")


@mirror("index_select")
def _index_select(graph: Graph, a: Sym, dim: int, index: Sym) -> Sym:
    moved = a.view(np.moveaxis(a.array, dim, 0))
    picked = _index(graph, moved, [index if index.array.ndim else index.view(index.array.reshape(1))])
    return picked.view(np.moveaxis(picked.array, 0, dim))


@mirror("take")
def _take(graph: Graph, a: Sym, index: Sym) -> Sym:
    return _index(graph, a.view(a.array.reshape(-1)), [index])


@mirror("gather")
def _gather(graph: Graph, a: Sym, dim: int, index: Sym, sparse_grad: bool = False) -> Sym:
    if a.array.ndim == 1:
        return _index(graph, a, [index])
    known = _known_positions(index, graph)
    if known is None:
        raise Untraceable("gather with computed positions is traced for vectors only")
    return a.view(np.take_along_axis(a.array, known, dim))


@mirror("index_put_", "index_put")
def _index_put_(graph: Graph, a: Sym, indices: Sequence[Sym | None], values: Sym, accumulate: bool = False) -> Sym:
    known = [None if i is None else _known_positions(i, graph) for i in indices]
    if any(i is not None and k is None for i, k in zip(indices, known, strict=True)):
        raise Untraceable("the field writes to positions that depend on computed values")
    if a.leaf is not None or accumulate:
        raise Untraceable("index_put into a parameter, or with accumulate=True, has no scalar form here")
    a.array[tuple(slice(None) if k is None else k for k in known)] = values.nodes(graph)
    return a


def _search(graph: Graph, grid: Sym, value: Any, right: bool) -> Sym:
    if grid.array.ndim != 1:
        raise Untraceable("searchsorted in a table of more than one dimension has no scalar form here")
    size = grid.shape[0]
    if grid.leaf is not None and size > 1:
        first = int(grid.array[0])
        stride = int(grid.array[1]) - first
        if np.array_equal(grid.array, first + stride * np.arange(size)):
            return elementwise(graph, lambda v: graph.search(grid.leaf, first, stride, size, right, v), value)
    below = "le" if right else "lt"
    knots = grid.nodes(graph)

    def count(v: Node) -> Node:
        total = graph.const(0)
        for knot in knots:
            total = graph.apply("add", total, graph.apply("where", graph.apply(below, knot, v), 1, 0))
        return total

    return elementwise(graph, count, value)


MIRRORS["searchsorted"] = lambda graph, grid, value, right=False, side=None, **kw: _search(
    graph, grid, value, right or side == "right"
)
MIRRORS["bucketize"] = lambda graph, value, grid, right=False, **kw: _search(graph, grid, value, right)
