# SPDX-License-Identifier: Apache-2.0
"""Gradient ascent on many rows of a log-density at once, to bring starts near the typical set."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["ascend"]


def ascend(
    value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]],
    u: Tensor,
    num_steps: int = 150,
    step_size: float = 0.1,
    decay: tuple[float, float] = (0.9, 0.9),
) -> tuple[Tensor, Tensor]:
    """Climb from each row of ``u`` on its own, by Adam with a short memory; keeps the whole path.

    A row that steps where the log-density is not finite stays where it is and forgets its momentum.

    Args:
        value_and_grad: ``(R, d)`` to log-density ``(R,)``, minus infinity where it fails, and gradient ``(R, d)``.
        u: ``(R, d)`` places to start from.
        num_steps: number of steps.
        step_size: about how far a coordinate moves in a step, in unconstrained units.
        decay: how much of the means of gradient and squared gradient is kept at each step.

    Returns:
        Positions ``(num_steps + 1, R, d)`` and log-densities ``(num_steps + 1, R)`` along the paths.

    References:
        Kingma & Ba (2015), Adam: a method for stochastic optimization.

    Example:
        >>> path, lp = ascend(lambda u: (-0.5 * (u**2).sum(-1), -u), torch.full((3, 2), 5.0))
        >>> bool((lp[-1] > -0.1).all())
        True
    """
    lp, grad = value_and_grad(u)
    mean, square = torch.zeros_like(u), torch.zeros_like(u)
    path, path_lp = [u], [lp]
    for i in range(1, num_steps + 1):
        mean = decay[0] * mean + (1 - decay[0]) * grad
        square = decay[1] * square + (1 - decay[1]) * grad**2
        scale = torch.sqrt(square / (1 - decay[1] ** i)) + 1e-8
        proposed = u + step_size * mean / (1 - decay[0] ** i) / scale
        lp_there, grad_there = value_and_grad(proposed)
        good = torch.isfinite(lp_there)
        u = torch.where(good[:, None], proposed, u)
        lp = torch.where(good, lp_there, lp)
        grad = torch.where(good[:, None], grad_there, grad)
        mean = mean * good[:, None]
        path.append(u)
        path_lp.append(lp)
    return torch.stack(path), torch.stack(path_lp)
