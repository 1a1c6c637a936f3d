# SPDX-License-Identifier: Apache-2.0
"""Products of vectors and matrices; those with a parameter matrix stay loops."""

import numpy as np

from pyro_latentde.solve.fused.graph import Graph, Matrix
from pyro_latentde.solve.fused.mirrors.elementwise import add, subtract
from pyro_latentde.solve.fused.mirrors.reductions import total
from pyro_latentde.solve.fused.mirrors.symbols import MIRRORS, Sym, as_float, mirror
from pyro_latentde.solve.fused.mirrors.views import transposed

__all__: list[str] = []


LOOP_SIZE = 16  # products of a parameter matrix with at least this many entries stay a loop in the kernel


def _matrix(a: Sym) -> Matrix | None:
    """The matrix ``a`` as a regular part of one parameter, if it is one and is worth a loop."""
    if a.leaf is None or a.array.size < LOOP_SIZE or min(a.shape) == 0:
        return None
    array = a.array
    first = int(array[0, 0])
    row = int(array[1, 0]) - first if a.shape[0] > 1 else 1
    column = int(array[0, 1]) - first if a.shape[1] > 1 else 1
    regular = first + row * np.arange(a.shape[0])[:, None] + column * np.arange(a.shape[1])[None, :]
    return Matrix(a.leaf, first, row, column, a.shape) if np.array_equal(regular, array) else None


@mirror("mv")
def _mv(graph: Graph, a: Sym, x: Sym) -> Sym:
    matrix = _matrix(a)
    vector = [as_float(graph, n) for n in x.nodes(graph)]
    out = np.empty(a.shape[0], dtype=object)
    if matrix is not None:
        out[:] = graph.matvec(matrix, vector)
    else:
        rows = a.nodes(graph)
        out[:] = [graph.total(graph.apply("mul", w, v) for w, v in zip(row, vector, strict=True)) for row in rows]
    return Sym(out)


@mirror("mm")
def _mm(graph: Graph, a: Sym, b: Sym) -> Sym:
    if _matrix(a) is None and _matrix(b) is not None:
        return transposed(graph, _mm(graph, transposed(graph, b), transposed(graph, a)))
    columns = [_mv(graph, a, b.view(b.array[:, j])).array for j in range(b.shape[1])]
    return Sym(np.stack(columns, axis=1))


@mirror("bmm")
def _bmm(graph: Graph, a: Sym, b: Sym) -> Sym:
    products = [_mm(graph, a.view(a.array[i]), b.view(b.array[i])).array for i in range(a.shape[0])]
    return Sym(np.stack(products))


@mirror("dot", "vdot")
def _dot(graph: Graph, a: Sym, b: Sym) -> Sym:
    return total(graph, MIRRORS["mul"](graph, a, b))


@mirror("addmm")
def _addmm(graph: Graph, c: Sym, a: Sym, b: Sym, *, beta: float = 1, alpha: float = 1) -> Sym:
    return _scaled_sum(graph, c, _mm(graph, a, b), beta, alpha)


@mirror("addmv")
def _addmv(graph: Graph, c: Sym, a: Sym, x: Sym, *, beta: float = 1, alpha: float = 1) -> Sym:
    return _scaled_sum(graph, c, _mv(graph, a, x), beta, alpha)


@mirror("baddbmm")
def _baddbmm(graph: Graph, c: Sym, a: Sym, b: Sym, *, beta: float = 1, alpha: float = 1) -> Sym:
    return _scaled_sum(graph, c, _bmm(graph, a, b), beta, alpha)


def _scaled_sum(graph: Graph, c: Sym, product: Sym, beta: float, alpha: float) -> Sym:
    mul = MIRRORS["mul"]
    return add(graph, mul(graph, c, float(beta)), mul(graph, product, float(alpha)))


@mirror("linalg_cross")
def _cross(graph: Graph, a: Sym, b: Sym, *, dim: int = -1) -> Sym:
    mul = MIRRORS["mul"]

    def turned(x: Sym, k: int) -> Sym:
        return x.view(np.roll(x.array, k, axis=dim))

    return subtract(graph, mul(graph, turned(a, -1), turned(b, -2)), mul(graph, turned(a, -2), turned(b, -1)))
