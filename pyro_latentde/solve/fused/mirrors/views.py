# SPDX-License-Identifier: Apache-2.0
"""Views and rearrangements: NumPy does them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyro_latentde.solve.fused.graph import Graph
from pyro_latentde.solve.fused.mirrors.symbols import MIRRORS, Sym, mirror
from pyro_latentde.solve.lift import Untraceable

__all__ = ["squeeze", "transposed"]


@mirror("view", "_unsafe_view", "reshape")
def _view(graph: Graph, a: Sym, shape: Sequence[int]) -> Sym:
    return a.view(a.array.reshape(tuple(shape)))


@mirror("t")
def transposed(graph: Graph, a: Sym) -> Sym:
    return a.view(a.array.T)


@mirror("transpose")
def _transpose(graph: Graph, a: Sym, i: int, j: int) -> Sym:
    return a.view(np.swapaxes(a.array, i, j))


@mirror("permute")
def _permute(graph: Graph, a: Sym, dims: Sequence[int]) -> Sym:
    return a.view(np.transpose(a.array, tuple(dims)))


@mirror("select")
def _select(graph: Graph, a: Sym, dim: int, index: int) -> Sym:
    # squeezing a slice stays a view also for 1-d arrays, where indexing would give a bare node
    part = [slice(None)] * a.array.ndim
    index = index % a.array.shape[dim]
    part[dim] = slice(index, index + 1)
    return a.view(np.squeeze(a.array[tuple(part)], axis=dim))


@mirror("slice")
def _slice(graph: Graph, a: Sym, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Sym:
    part = [slice(None)] * a.array.ndim
    part[dim] = slice(start, end, step)
    return a.view(a.array[tuple(part)])


@mirror("unsqueeze")
def _unsqueeze(graph: Graph, a: Sym, dim: int) -> Sym:
    return a.view(np.expand_dims(a.array, dim))


@mirror("squeeze")
def squeeze(graph: Graph, a: Sym, dims: int | Sequence[int] | None = None) -> Sym:
    if dims is None:
        return a.view(np.squeeze(a.array))
    dims = [dims] if isinstance(dims, int) else dims
    return a.view(np.squeeze(a.array, axis=tuple(d for d in dims if a.array.ndim and a.shape[d] == 1)))


@mirror("expand")
def _expand(graph: Graph, a: Sym, size: Sequence[int], implicit: bool = False) -> Sym:
    lead = len(size) - a.array.ndim
    shape = tuple(s if s != -1 else a.shape[i - lead] for i, s in enumerate(size))
    return a.view(np.broadcast_to(a.array, shape))


@mirror("diagonal")
def _diagonal(graph: Graph, a: Sym, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Sym:
    return a.view(np.diagonal(a.array, offset, dim1, dim2))


@mirror("flip")
def _flip(graph: Graph, a: Sym, dims: Sequence[int]) -> Sym:
    return a.view(np.flip(a.array, tuple(dims)).copy())


@mirror("roll")
def _roll(graph: Graph, a: Sym, shifts: Any, dims: Any = ()) -> Sym:
    shifts = shifts if isinstance(shifts, int) else tuple(shifts)
    axes = None if dims == () or dims == [] else dims if isinstance(dims, int) else tuple(dims)
    if axes is None and not isinstance(shifts, int):
        shifts = shifts[0]
    return a.view(np.roll(a.array, shifts, axes))


@mirror("repeat")
def _repeat(graph: Graph, a: Sym, repeats: Sequence[int]) -> Sym:
    return a.view(np.tile(a.array, tuple(repeats)))


@mirror("cat", "concat")
def _cat(graph: Graph, parts: Sequence[Sym], dim: int = 0) -> Sym:
    return Sym(np.concatenate([p.nodes(graph) for p in parts if p.shape != (0,)], axis=dim))


@mirror("stack")
def _stack(graph: Graph, parts: Sequence[Sym], dim: int = 0) -> Sym:
    return Sym(np.stack([p.nodes(graph) for p in parts], axis=dim))


@mirror("unbind")
def _unbind(graph: Graph, a: Sym, dim: int = 0) -> list[Sym]:
    return [_select(graph, a, dim, i) for i in range(a.shape[dim])]


@mirror("split")
def _split(graph: Graph, a: Sym, size: int, dim: int = 0) -> list[Sym]:
    return [_slice(graph, a, dim, i, i + size) for i in range(0, a.shape[dim], size)]


@mirror("split_with_sizes")
def _split_with_sizes(graph: Graph, a: Sym, sizes: Sequence[int], dim: int = 0) -> list[Sym]:
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return [_slice(graph, a, dim, int(i), int(j)) for i, j in zip(starts[:-1], starts[1:], strict=True)]


@mirror("constant_pad_nd")
def _pad(graph: Graph, a: Sym, pad: Sequence[int], value: float = 0.0) -> Sym:
    widths = [(0, 0)] * a.array.ndim
    for i in range(len(pad) // 2):
        widths[-1 - i] = (pad[2 * i], pad[2 * i + 1])
    if any(w < 0 for pair in widths for w in pair):
        raise Untraceable("padding by negative amounts has no scalar form here")
    return Sym(np.pad(a.nodes(graph), widths, constant_values=graph.const(float(value))))


def _triangle(keep: Callable) -> Callable:
    def apply(graph: Graph, a: Sym, diagonal: int = 0) -> Sym:
        mask = keep(np.ones(a.shape[-2:], dtype=bool), diagonal)
        return Sym(np.where(np.broadcast_to(mask, a.shape), a.nodes(graph), graph.const(0.0)))

    return apply


MIRRORS["tril"], MIRRORS["triu"] = _triangle(np.tril), _triangle(np.triu)
