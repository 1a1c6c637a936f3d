# SPDX-License-Identifier: Apache-2.0
"""Sums, extrema, norms and softmax."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyro_latentde.solve.fused.graph import Graph, Node
from pyro_latentde.solve.fused.mirrors.elementwise import add, divide, rsqrt, subtract
from pyro_latentde.solve.fused.mirrors.symbols import MIRRORS, Sym, arithmetic, as_float, mirror
from pyro_latentde.solve.fused.mirrors.views import squeeze
from pyro_latentde.solve.lift import Untraceable

__all__ = ["total"]


def _reduce(graph: Graph, a: Sym, dims: Any, keepdim: bool, combine: Callable[[list[Node]], Node]) -> Sym:
    array = a.nodes(graph)
    axes = range(array.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    axes = sorted(d % array.ndim for d in axes) if array.ndim else []
    rest = [d for d in range(array.ndim) if d not in axes]
    moved = np.transpose(array, [*rest, *axes]).reshape([array.shape[d] for d in rest] + [-1])
    out = np.empty(moved.shape[:-1], dtype=object)
    for index in np.ndindex(*out.shape):
        out[index] = combine(list(moved[index]))
    if keepdim:
        out = out.reshape([1 if d in axes else array.shape[d] for d in range(array.ndim)])
    return Sym(out)


def _fold(graph: Graph, op: str) -> Callable[[list[Node]], Node]:
    def combine(nodes: list[Node]) -> Node:
        result = nodes[0]
        for node in nodes[1:]:
            result = arithmetic(graph, op, result, node)
        return result

    return combine


@mirror("sum")
def total(graph: Graph, a: Sym, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Sym:
    return _reduce(graph, a, dims, keepdim, lambda ns: graph.total(as_float(graph, n) for n in ns))


@mirror("mean")
def _mean(graph: Graph, a: Sym, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Sym:
    return _reduce(graph, a, dims, keepdim, lambda ns: graph.apply("div", graph.total(ns), float(len(ns))))


@mirror("var")
def _var(graph: Graph, a: Sym, dims: Any = None, correction: float | None = None, keepdim: bool = False) -> Sym:
    if isinstance(dims, bool):  # the old signature var(unbiased)
        dims, correction = None, float(dims)
    correction = 1.0 if correction is None else float(correction)
    deviation = subtract(graph, a, _mean(graph, a, dims, True))
    squares = total(graph, MIRRORS["mul"](graph, deviation, deviation), dims, keepdim)
    count = a.array.size // max(1, squares.array.size)
    return divide(graph, squares, count - correction)


@mirror("std")
def _std(graph: Graph, a: Sym, *args: Any, **kwargs: Any) -> Sym:
    return MIRRORS["sqrt"](graph, _var(graph, a, *args, **kwargs))


@mirror("native_layer_norm")
def _layer_norm(graph: Graph, a: Sym, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> tuple[Sym, Sym, Sym]:
    dims = list(range(-len(shape), 0))
    mean = _mean(graph, a, dims, True)
    rstd = rsqrt(graph, add(graph, _var(graph, a, dims, 0.0, True), eps))
    out = MIRRORS["mul"](graph, subtract(graph, a, mean), rstd)
    out = out if weight is None else MIRRORS["mul"](graph, out, weight)
    return out if bias is None else add(graph, out, bias), mean, rstd


@mirror("prod")
def _prod(graph: Graph, a: Sym, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Sym:
    return _reduce(graph, a, dims, keepdim, _fold(graph, "mul"))


@mirror("amax")
def _amax(graph: Graph, a: Sym, dims: Any = None, keepdim: bool = False) -> Sym:
    return _reduce(graph, a, dims, keepdim, _fold(graph, "maximum"))


@mirror("amin")
def _amin(graph: Graph, a: Sym, dims: Any = None, keepdim: bool = False) -> Sym:
    return _reduce(graph, a, dims, keepdim, _fold(graph, "minimum"))


def _extreme_with_position(largest: str) -> Callable:
    better = "gt" if largest == "maximum" else "lt"

    def apply(graph: Graph, a: Sym, dim: int | None = None, keepdim: bool = False) -> Any:
        def position(nodes: list[Node]) -> Node:
            best, where = nodes[0], graph.const(0)
            for i, node in enumerate(nodes[1:], 1):
                wins = graph.apply(better, node, best)
                best, where = graph.apply("where", wins, node, best), graph.apply("where", wins, i, where)
            return where

        values = _reduce(graph, a, dim, keepdim, _fold(graph, largest))
        return values if dim is None else (values, _reduce(graph, a, dim, keepdim, position))

    return apply


MIRRORS["max"], MIRRORS["min"] = _extreme_with_position("maximum"), _extreme_with_position("minimum")


@mirror("any")
def _any(graph: Graph, a: Sym, dims: Any = None, keepdim: bool = False) -> Sym:
    return _reduce(graph, a, dims, keepdim, _fold_bool(graph, "or"))


@mirror("all")
def _all(graph: Graph, a: Sym, dims: Any = None, keepdim: bool = False) -> Sym:
    return _reduce(graph, a, dims, keepdim, _fold_bool(graph, "and"))


def _fold_bool(graph: Graph, op: str) -> Callable[[list[Node]], Node]:
    def combine(nodes: list[Node]) -> Node:
        nodes = [n if n.kind == "b" else graph.apply("ne", n, 0) for n in nodes]
        result = nodes[0]
        for node in nodes[1:]:
            result = graph.apply(op, result, node)
        return result

    return combine


@mirror("cumsum")
def _cumsum(graph: Graph, a: Sym, dim: int, dtype: Any = None) -> Sym:
    array = np.moveaxis(a.nodes(graph).copy(), dim, 0)
    for i in range(1, array.shape[0]):
        array[i : i + 1] = add(graph, Sym(array[i - 1 : i]), Sym(array[i : i + 1])).array
    return Sym(np.moveaxis(array, 0, dim))


@mirror("linalg_vector_norm")
def _norm(graph: Graph, a: Sym, ord: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Sym:  # noqa: A002
    if ord == 2:
        return MIRRORS["sqrt"](graph, total(graph, MIRRORS["mul"](graph, a, a), dim, keepdim))
    if ord == 1:
        return total(graph, MIRRORS["abs"](graph, a), dim, keepdim)
    if ord == math.inf:
        return _amax(graph, MIRRORS["abs"](graph, a), dim, keepdim)
    raise Untraceable(f"the vector norm of order {ord} has no scalar form here")


@mirror("_softmax")
def _softmax(graph: Graph, a: Sym, dim: int, half_to_float: bool = False) -> Sym:
    shifted = MIRRORS["exp"](graph, subtract(graph, a, _frozen_max(graph, a, dim)))
    return divide(graph, shifted, total(graph, shifted, dim, True))


@mirror("logsumexp")
def _logsumexp(graph: Graph, a: Sym, dim: Any, keepdim: bool = False) -> Sym:
    peak = _frozen_max(graph, a, dim)
    exponentials = total(graph, MIRRORS["exp"](graph, subtract(graph, a, peak)), dim, True)
    out = add(graph, MIRRORS["log"](graph, exponentials), peak)
    return out if keepdim else squeeze(graph, out, dim)


@mirror("_log_softmax")
def _log_softmax(graph: Graph, a: Sym, dim: int, half_to_float: bool = False) -> Sym:
    return subtract(graph, a, _logsumexp(graph, a, dim, True))


def _frozen_max(graph: Graph, a: Sym, dim: Any) -> Sym:
    return _amax(graph, a, dim, True)
