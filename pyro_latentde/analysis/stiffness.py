# SPDX-License-Identifier: Apache-2.0
"""How stiff the solves of a model are: eigenvalues of the field's Jacobian along them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.sites.solve_probe import watch_solves
from pyro_latentde.solve.problem import Problem, pose
from pyro_latentde.solve.solution import Solution
from pyro_latentde.solve.stiffness import jacobians_along

__all__ = ["jacobians_watched", "stiffness_of"]

# A Jacobian of more states costs more than the solve, and its table of eigenvalues says little.
MOST_STATES = 50
# Smaller parts of the largest eigenvalue are zero up to rounding: a conserved quantity, or a pure oscillation.
_ZERO = 1e-6


@contextmanager
def jacobians_watched() -> Iterator[dict[str, dict[str, Tensor]]]:
    """Collect, for each ``lde`` site that is solved inside, df/dy at a few output times, and the mean step.

    Returns:
        A dict, filled while the model runs: site -> ``jacobian`` ``(R, M, D, D)`` in 1/(unit of time),
        ``mean_step`` ``(R,)`` in units of time, and ``fixed`` ``()``, whether the user chose the steps. Works under
        ``vmap``.
    """
    store: dict[str, dict[str, Tensor]] = {}

    def look(name: str, solution: Solution, arguments: tuple[Any, ...]) -> None:
        states = solution.shape_of_state.flatten_trajectory(solution.ys)
        if states.shape[-1] <= MOST_STATES:
            problem = pose(*arguments)[0]
            store[name] = {
                "jacobian": jacobians_along(problem, states.reshape(-1, *states.shape[-2:])),
                "mean_step": _mean_step(solution, problem),
                "fixed": torch.tensor(solution.step_size is not None),
            }

    with watch_solves(look):
        yield store


def stiffness_of(jacobian: Tensor) -> tuple[np.ndarray, np.ndarray]:
    r"""Stiffness ratio and fastest decay, the largest along the solve.

    .. math:: \max_i |\mathrm{Re} \lambda_i| \, / \min_{\mathrm{Re} \lambda_i \neq 0} |\mathrm{Re} \lambda_i|,
        \qquad \max_i (-\mathrm{Re} \lambda_i)

    Args:
        jacobian: ``(..., M, D, D)``; where it is not finite, nothing is known.

    Returns:
        Ratio and decay, ``(...,)``; the ratio is 1 where no eigenvalue has a real part, both are NaN where no Jacobian
        is finite.
    """
    flat = jacobian.detach().to("cpu", torch.float64)
    good = torch.isfinite(flat).all(-1).all(-1)
    values = torch.linalg.eigvals(torch.where(good[..., None, None], flat, 0.0)).numpy()
    real, decay = np.abs(values.real), np.maximum(-values.real, 0.0).max(-1)
    smallest = np.where(real > _ZERO * np.abs(values).max(-1, keepdims=True), real, np.inf).min(-1)
    ratio = np.where(np.isfinite(smallest), real.max(-1) / smallest, 1.0)
    unknown = ~good.numpy()
    none = unknown.all(-1)
    ratio, decay = (np.where(unknown, -np.inf, x).max(-1) for x in (ratio, decay))
    return np.where(none, np.nan, ratio), np.where(none, np.nan, decay)


def _mean_step(solution: Solution, problem: Problem) -> Tensor:
    start = problem.tensors[2]
    times = solution.times.expand(*problem.batch, -1).reshape(-1, solution.times.shape[-1])
    span = torch.maximum(times.amax(-1), start) - torch.minimum(times.amin(-1), start)
    return span / solution.stats["n_accepted"].reshape(-1).clamp(min=1)
