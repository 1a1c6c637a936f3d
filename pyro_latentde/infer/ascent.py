# SPDX-License-Identifier: Apache-2.0
"""Gradient ascent on many rows of a log-density at once, to bring starts near the typical set."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["ascend"]

# Memory of the means of gradient and of squared gradient: short, for the landscape changes on the way.
_KEEP = 0.9


def ascend(
    value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]],
    u: Tensor,
    num_steps: int = 150,
    step_size: float = 0.1,
) -> tuple[Tensor, Tensor]:
    r"""Climb from each row of ``u`` on its own, by Adam with a short memory; tells the path and its worth.

    The worth of a place is a rough log-mass, the log-density plus the log-widths of the hill it belongs to,
    for near the top of a hill of width :math:`\sigma_i` the gradients met on the way are of size :math:`1 /
    \sigma_i`:

    .. math:: \ell(u) - \tfrac12 \sum_i \log \langle g_i^2 \rangle

    A narrow spike, such as the neck of a funnel, is so worth no more than its surroundings, however high. A
    row that steps where the log-density is not finite stays where it is and forgets its momentum.

    Args:
        value_and_grad: ``(R, d)`` to log-density ``(R,)``, minus infinity where it fails, and gradient ``(R,
            d)``.
        u: ``(R, d)`` places to start from, of finite log-density.
        num_steps: number of steps.
        step_size: about how far a coordinate moves in a step, in unconstrained units.

    Returns:
        Positions ``(num_steps, R, d)`` and worths ``(num_steps, R)`` along the paths.

    References:
        Kingma & Ba (2015), Adam: a method for stochastic optimization.

    Example:
        >>> path, worth = ascend(lambda u: (-0.5 * (u**2).sum(-1), -u), torch.full((3, 2), 5.0))
        >>> bool((path[-1].abs() < 0.5).all())
        True
    """
    lp, grad = value_and_grad(u)
    mean, square = torch.zeros_like(u), torch.zeros_like(u)
    path, worth = [], []
    for i in range(1, num_steps + 1):
        mean = _KEEP * mean + (1 - _KEEP) * grad
        square = _KEEP * square + (1 - _KEEP) * grad**2
        scale = torch.sqrt(square / (1 - _KEEP**i)) + 1e-8
        proposed = u + step_size * mean / (1 - _KEEP**i) / scale
        lp_there, grad_there = value_and_grad(proposed)
        good = torch.isfinite(lp_there)
        u = torch.where(good[:, None], proposed, u)
        lp = torch.where(good, lp_there, lp)
        grad = torch.where(good[:, None], grad_there, grad)
        mean = mean * good[:, None]
        path.append(u)
        # a coordinate without any gradient (a given site, a flat direction) shall not count as infinitely
        # wide
        worth.append(lp - torch.log(scale.clamp(min=1e-3)).sum(-1))
    return torch.stack(path), torch.stack(worth)
