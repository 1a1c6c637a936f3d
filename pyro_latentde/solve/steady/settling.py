# SPDX-License-Identifier: Apache-2.0
"""Where trajectories settle: integration over longer and longer spans, with a try of Newton's method after each."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_latentde.solve.solution import Status
from pyro_latentde.solve.steady.newton import Equations, Tolerance, find_roots

__all__ = ["Integrate", "Settled", "is_stable", "settle"]

# ``integrate(y (N, D), spans (N,), rows (N,))``: states after the spans ``(N, D)``, statuses and numbers of steps
Integrate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

_SPANS = 18  # each ten times as long as the one before, from the fastest time of the field on
_GROWTH = 10.0
_TRIES = 8  # iterations of Newton's method after each span


class Settled(NamedTuple):
    """States ``(N, D)``, :class:`.Status` ``(N,)``, Newton iterations and integration steps ``(N,)``."""

    y: Tensor
    status: Tensor
    iterations: Tensor
    steps: Tensor


@torch.no_grad()
def settle(
    equations: Equations,
    integrate: Integrate,
    y: Tensor,
    rows: Tensor,
    tolerance: Tolerance,
    conserved: int,
    max_steps: int,
) -> Settled:
    """Follow the trajectories from ``y`` until Newton's method takes over, or until nothing moves any more.

    A root is taken only if it is stable, since no other is where a trajectory ends. Where steady states lie side by
    side there is none to be found by Newton's method: such a row ends when it moves no more, with
    ``Status.SINGULAR``.

    Args:
        equations: F and dF/dy.
        integrate: Solves y' = f(y).
        y: Starts, ``(N, D)``.
        rows: Rows they belong to.
        tolerance: Of the root.
        conserved: Number of conserved quantities that F knows of.
        max_steps: Most steps of a row.
    """
    y, n = y.clone(), len(y)
    status = torch.full((n,), int(Status.NO_STEADY_STATE), device=y.device)
    iterations, steps = (torch.zeros(n, dtype=torch.int64, device=y.device) for _ in range(2))
    slope = equations.linearised(y, rows)[2].abs().sum(2).amax(1)
    span = torch.where(torch.isfinite(slope) & (slope > 0), 1 / slope, 1.0)
    work = torch.arange(n, device=y.device)
    for _ in range(_SPANS):
        before, mine = y[work], rows[work]
        after, code, count = integrate(before, span[work], mine)
        steps[work] += count
        y[work] = after
        code = torch.where((code == 0) & (steps[work] > max_steps), int(Status.MAX_STEPS), code)
        status[work[code != 0]] = code[code != 0]
        work, before, after, mine = (x[code == 0] for x in (work, before, after, mine))
        if not len(work):
            break
        roots = find_roots(equations, after, mine, tolerance, _TRIES, damped=False)
        iterations[work] += roots.iterations
        good = roots.isolated & is_stable(roots.jacobian, conserved)
        status[work[good]] = int(Status.OK)
        still = ~roots.isolated & tolerance.small(0.1 * (after - before), after)
        status[work[still]] = int(Status.SINGULAR)
        near = roots.found & tolerance.small(1e-3 * (roots.y - after), after)
        end = work[good | (still & near)]
        y[end] = roots.y[good | (still & near)]
        work = work[~(good | still)]
        if not len(work):
            break
        span[work] *= _GROWTH
    return Settled(y, status, iterations, steps)


def is_stable(jacobian: Tensor, conserved: int) -> Tensor:
    """Which states are asymptotically stable, ``(N,)``: all eigenvalues but those of conserved quantities have negative
    real parts.

    Args:
        jacobian: df/dy, ``(N, D, D)``.
        conserved: Number of conserved quantities, each of which has an eigenvalue zero.
    """
    finite = torch.isfinite(jacobian).all(2).all(1)
    values = torch.linalg.eigvals(torch.where(finite[:, None, None], jacobian, 0.0))
    order = values.abs().argsort(1)[:, conserved:]
    moving = values.real.gather(1, order)
    rounding = 10 * torch.finfo(jacobian.dtype).eps * jacobian.abs().sum(2).amax(1, keepdim=True)
    return finite & (moving < -rounding).all(1)
