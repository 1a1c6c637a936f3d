# SPDX-License-Identifier: Apache-2.0
"""Damped Newton iteration of many rows, each with its own step length, end and failure."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Equations", "Roots", "Tolerance", "find_roots", "is_regular"]

_SMALLEST_SHARE = 1e-4
_NEARBY = 0.1  # contraction by which a start is known to lie next to its root


class Equations(Protocol):
    """F(y) = 0 over rows; ``rows (N,)`` says which rows the states ``y (N, D)`` belong to."""

    def residual(self, y: Tensor, rows: Tensor) -> Tensor:
        """F ``(N, D)``."""

    def linearised(self, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """F ``(N, D)``, dF/dy ``(N, D, D)``, and the Jacobian of the field itself."""


class Roots(NamedTuple):
    """Where the iteration ended.

    Args:
        y: States, ``(N, D)``.
        found: Whether they are roots, ``(N,)``.
        isolated: Whether they are roots with a regular dF/dy, ``(N,)``.
        jacobian: Of the field there, ``(N, D, D)``.
        iterations: Of each row, ``(N,)``.
    """

    y: Tensor
    found: Tensor
    isolated: Tensor
    jacobian: Tensor
    iterations: Tensor


class Tolerance(NamedTuple):
    """Sizes of corrections: one is small where every component is below ``atol + rtol |y|``."""

    rtol: float
    atol: float

    def scale(self, y: Tensor) -> Tensor:
        """``(N, D)``, never below what rounding leaves of a correction of the largest component."""
        limits = torch.finfo(y.dtype)
        rounding = 100 * limits.eps * y.abs().amax(1, keepdim=True)
        return (self.atol + self.rtol * y.abs() + rounding).clamp_min(limits.tiny)

    def small(self, correction: Tensor, y: Tensor) -> Tensor:
        return ((correction / self.scale(y)).abs() <= 1).all(1)


@torch.no_grad()
def find_roots(
    equations: Equations,
    y: Tensor,
    rows: Tensor,
    tolerance: Tolerance,
    max_iterations: int,
    *,
    damped: bool = True,
) -> Roots:
    r"""Newton's method with the natural monotonicity test: :math:`y \leftarrow y - \lambda A^{-1} F(y)`.

    A share :math:`\lambda` of the correction is taken if the next correction with the same matrix is shorter,
    :math:`\|A^{-1} F(y + \lambda \Delta)\| \leq (1 - \lambda / 4) \|\Delta\|`, and halved otherwise. Neither test nor
    path depend on the units of the equations or of the states.

    Args:
        equations: F and dF/dy.
        y: Starts, ``(N, D)``.
        rows: Rows they belong to, ``(N,)``.
        tolerance: When a correction is small enough; another one follows it.
        max_iterations: Most linearisations of a row.
        damped: Whether to shorten corrections; else a row is given up unless its start lies next to a root.

    References:
        Deuflhard, "Newton Methods for Nonlinear Problems", Springer 2004, section 3.3.
    """
    y, found = y.clone(), torch.zeros(len(y), dtype=torch.bool, device=y.device)
    iterations = torch.zeros(len(y), dtype=torch.int64, device=y.device)
    work = torch.arange(len(y), device=y.device)
    share = y.new_ones(len(y))
    for _ in range(max_iterations):
        if not len(work):
            break
        iterations[work] += 1
        start, mine = y[work], rows[work]
        residual, matrix, _ = equations.linearised(start, mine)
        solve = _solver(matrix)
        step = -solve(residual)
        usable = torch.isfinite(step).all(1)
        done = usable & tolerance.small(step, start)
        y[work[done]] = (start + step)[done]
        found[work[done]] = True
        go = (usable & ~done).nonzero()[:, 0]
        first = torch.minimum(4 * share[work[go]], y.new_ones(())) if damped else y.new_ones(len(go))
        taken = _shorten(equations, start, step, mine, solve, go, first, damped)
        better, length, nxt, correction = taken
        close = better & (length == 1) & tolerance.small(correction, nxt)
        end = torch.where(close[:, None], nxt + correction, nxt)
        work = work[go]
        y[work[better]], share[work] = end[better], length
        found[work[close]] = True
        work = work[better & ~close]
    residual, matrix, jacobian = equations.linearised(y, rows)
    last = y - _solver(matrix)(residual)  # one more correction, since the matrix is needed anyway
    y = torch.where((found & torch.isfinite(last).all(1))[:, None], last, y)
    found = found & torch.isfinite(y).all(1)
    return Roots(y, found, found & is_regular(matrix), jacobian, iterations)


Taken = tuple[Tensor, Tensor, Tensor, Tensor]


def _shorten(
    equations: Equations,
    start: Tensor,
    step: Tensor,
    rows: Tensor,
    solve: Callable[[Tensor], Tensor],
    go: Tensor,
    share: Tensor,
    damped: bool,
) -> Taken:
    """Of the rows ``go``: whether a share of the step brings them closer, which, where to, and the next correction."""
    scale = start.abs() + step.abs()
    scale = torch.where(scale > 0, scale, 1.0)
    size = (step / scale).abs().amax(1)
    share, better = share.clone(), torch.zeros(len(go), dtype=torch.bool, device=go.device)
    nxt, correction = start[go].clone(), step[go].clone()
    trying = torch.arange(len(go), device=go.device)
    while len(trying):
        at = go[trying]
        trial = start[at] + share[trying, None] * step[at]
        residual = equations.residual(trial, rows[at])
        following = step.new_zeros(step.shape).index_copy(0, at, residual)
        following = -solve(following)[at]
        bound = 1 - share[trying] / 4 if damped else _NEARBY
        shorter = (following / scale[at]).abs().amax(1) <= bound * size[at]  # False for NaN
        good = trying[shorter]
        better[good], nxt[good], correction[good] = True, trial[shorter], following[shorter]
        trying = trying[~shorter]
        share[trying] = share[trying] / 2
        trying = trying[share[trying] >= _SMALLEST_SHARE] if damped else trying[:0]
    return better, share, nxt, correction


def _solver(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """Solutions of A x = b for several b; where A is singular they are not finite, or of no use."""
    factors, pivots, info = torch.linalg.lu_factor_ex(matrix)

    def solve(b: Tensor) -> Tensor:
        x = torch.linalg.lu_solve(factors, pivots, b[..., None])[..., 0]
        return torch.where((info == 0)[:, None], x, torch.nan)

    return solve


def is_regular(matrix: Tensor) -> Tensor:
    """Which matrices ``(N, D, D)`` are not singular to rounding, whatever the units of rows and columns, ``(N,)``."""
    size = matrix.shape[-1]
    for _ in range(4):  # Ruiz: rows and columns come to a largest entry of one
        for dim in (1, 2):
            largest = matrix.abs().amax(dim, keepdim=True)
            matrix = matrix / torch.where(largest > 0, largest, 1.0).sqrt()
    inverse, info = torch.linalg.inv_ex(torch.where(torch.isfinite(matrix), matrix, 0.0))
    condition = torch.linalg.matrix_norm(matrix, 1) * torch.linalg.matrix_norm(inverse, 1)
    return (info == 0) & (condition < 1 / (10 * size * torch.finfo(matrix.dtype).eps))
