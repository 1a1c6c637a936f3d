# SPDX-License-Identifier: Apache-2.0
"""Helpers of the implicit kernels: small dense LU, and simplified Newton for one stage.

A stage solves z = h gamma f(t, base + z) by z += (I - h gamma J)^-1 (h gamma f(base + z) - z), with a Jacobian J of
this or an earlier step. In the norm of the error test, increments shrink by a rate; what is left after the last of them
is rate / (1 - rate) times its size.

References:
    Hairer, Wanner, Solving Ordinary Differential Equations II, 2nd ed., Springer 1996, IV.8.
    Golub, Van Loan, Matrix Computations, 4th ed., Johns Hopkins 2013, 3.4.
"""

from collections.abc import Sequence

from pyro_latentde.solve.events.event import EventTraits
from pyro_latentde.solve.fused.templates.parts import WorkLayout
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.stops.schedule import Stops

__all__ = ["newton_source"]

MOST = 8  # iterations; a chord that needs more is worth a new Jacobian or a smaller step
MOST_EXACT = 20  # where every iteration has a Jacobian of its own


def newton_source(
    method: Method, d: int, stops: Stops | None = None, leaves: int = 0, events: Sequence[EventTraits] = ()
) -> str:
    """``lu_factor``, ``lu_solve``, ``lu_solve_transposed``, ``newton_matrix`` and ``newton``, where they are needed."""
    if not method.uses_newton:
        return ""
    at = WorkLayout(method, d, stops, leaves, events)
    return _LU.replace("DIM", str(d)) + _newton(at, d)


_LU = """
def lu_factor(w: Floats, a: int, pivots: int) -> float:
    for k in range(DIM):
        best = k
        size = abs(w[a + k * DIM + k])
        for i in range(k + 1, DIM):
            if abs(w[a + i * DIM + k]) > size:
                best = i
                size = abs(w[a + i * DIM + k])
        w[pivots + k] = best
        if not (size > 0.0 and size < np.inf):
            return 0.0
        if best != k:
            for j in range(DIM):
                value = w[a + k * DIM + j]
                w[a + k * DIM + j] = w[a + best * DIM + j]
                w[a + best * DIM + j] = value
        inverse = 1.0 / w[a + k * DIM + k]
        for i in range(k + 1, DIM):
            factor = w[a + i * DIM + k] * inverse
            w[a + i * DIM + k] = factor
            for j in range(k + 1, DIM):
                w[a + i * DIM + j] -= factor * w[a + k * DIM + j]
    return 1.0


def lu_solve(w: Floats, a: int, pivots: int, x: int) -> float:
    for k in range(DIM):
        best = int(w[pivots + k])
        value = w[x + best]
        w[x + best] = w[x + k]
        w[x + k] = value
    for i in range(1, DIM):
        value = w[x + i]
        for j in range(i):
            value -= w[a + i * DIM + j] * w[x + j]
        w[x + i] = value
    for i in range(DIM - 1, -1, -1):
        value = w[x + i]
        for j in range(i + 1, DIM):
            value -= w[a + i * DIM + j] * w[x + j]
        w[x + i] = value / w[a + i * DIM + i]
    return 0.0


def lu_solve_transposed(w: Floats, a: int, pivots: int, x: int) -> float:
    for i in range(DIM):
        value = w[x + i]
        for j in range(i):
            value -= w[a + j * DIM + i] * w[x + j]
        w[x + i] = value / w[a + i * DIM + i]
    for i in range(DIM - 2, -1, -1):
        value = w[x + i]
        for j in range(i + 1, DIM):
            value -= w[a + j * DIM + i] * w[x + j]
        w[x + i] = value
    for k in range(DIM - 1, -1, -1):
        best = int(w[pivots + k])
        value = w[x + best]
        w[x + best] = w[x + k]
        w[x + k] = value
    return 0.0
"""


def _newton(at: WorkLayout, d: int) -> str:
    """``newton`` leaves Y in ``ys``, the slope in ``k``, iterations in ``info``; gives the rate, -1 if it diverges."""
    return f"""

def newton_matrix(hg: float, w: Floats) -> float:
    for i in range({d}):
        for j in range({d}):
            w[{at.lu} + i * {d} + j] = -hg * w[{at.jac} + i * {d} + j]
        w[{at.lu} + i * {d} + i] += 1.0
    return lu_factor(w, {at.lu}, {at.pivots})


def newton(t: float, hg: float, k: int, exact: bool, rtol: float, atol: float, goal: float, w: Floats, p: Floats,
           o: Ints) -> float:
    rate = 0.0
    last = 0.0
    w[{at.info} + 1] = max(w[{at.info} + 1], 1e-16) ** 0.8  # a rate is trusted less the older it is
    most = {MOST_EXACT} if exact else {MOST}
    for m in range(most):
        w[{at.info}] += 1.0
        for i in range({d}):
            w[{at.ys} + i] = w[{at.base} + i] + w[{at.z} + i]
        field(t, w, {at.ys}, k, {at.scratch}, p, o)
        if exact:
            field_jac(t, w, {at.ys}, {at.jac}, {at.scratch}, p, o)
            if newton_matrix(hg, w) == 0.0:
                return -1.0
        for i in range({d}):
            w[{at.delta} + i] = hg * w[k + i] - w[{at.z} + i]
        lu_solve(w, {at.lu}, {at.pivots}, {at.delta})
        norm = 0.0
        for i in range({d}):
            w[{at.z} + i] += w[{at.delta} + i]
            w[{at.ys} + i] = w[{at.base} + i] + w[{at.z} + i]
            scale = atol + rtol * max(abs(w[{at.y} + i]), abs(w[{at.ys} + i]))
            norm += (w[{at.delta} + i] / scale) ** 2
        norm = math.sqrt(norm / {d})
        if not norm < np.inf:
            return -1.0
        for i in range({d}):
            w[k + i] = w[{at.z} + i] / hg
        if norm == 0.0:
            return rate
        if exact:  # down to rounding, where increments shrink no more
            if norm < 100.0 or (m > 1 and norm >= last and norm < 1e4):
                return rate
        elif m == 0:
            if w[{at.info} + 1] * norm < goal:
                return rate
        else:
            ratio = norm / last
            if ratio >= 1.0:
                return -1.0
            rate = max(rate, ratio)
            w[{at.info} + 1] = ratio / (1.0 - ratio)
            if w[{at.info} + 1] * norm < goal:
                return rate
        last = norm
    return -1.0
"""
