# SPDX-License-Identifier: Apache-2.0
"""The Jacobian of the field along a solve, and the fastest decay that it tells."""

import torch
from torch import Tensor

from pyro_latentde.solve.engines import batched_field
from pyro_latentde.solve.problem import Problem

__all__ = ["fastest_decay", "jacobians_along"]

_MOMENTS = 5


def jacobians_along(problem: Problem, states: Tensor) -> Tensor:
    """df/dy of every row at a few output times, ``(R, M, D, D)``, 1/(unit of time); works under ``vmap``.

    Args:
        problem: What was solved.
        states: At the output times, ``(R, T, D)``.
    """
    length = states.shape[1]
    at = torch.linspace(0, length - 1, min(_MOMENTS, length)).round().long().tolist()
    times = problem.times.expand(*problem.batch, length).reshape(-1, length)
    seen = slice(3, 3 + problem.field_leaves)
    field = batched_field(problem)(problem.tensors[seen], problem.shared[seen])
    # rows do not touch each other, so the sum over rows has each row's own derivative
    found = [torch.func.jacrev(lambda y, t=times[:, m]: field(t, y).sum(0))(states[:, m]).transpose(0, 1) for m in at]
    return torch.stack(found, 1)


def fastest_decay(problem: Problem, states: Tensor, row: int) -> float:
    """Largest -Re of an eigenvalue of df/dy along one row, 1/(unit of time); 0 where nothing decays or is known."""
    with torch.no_grad():
        jacobian = jacobians_along(problem, states)[row].double().cpu()
    known = jacobian[torch.isfinite(jacobian).flatten(1).all(1)]
    return max(0.0, float((-torch.linalg.eigvals(known).real).max())) if len(known) else 0.0
