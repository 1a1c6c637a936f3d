# SPDX-License-Identifier: Apache-2.0
"""Symplectic steps of many rows, in plain torch operations that autograd can follow.

References:
    Hairer, Lubich, Wanner, Geometric Numerical Integration, 2nd ed., Springer 2006, I.1.4, II.5.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_latentde.solve.methods.record import Method

__all__ = ["end_slopes", "hermite", "symplectic_step"]

Field = Callable[[Tensor, Tensor], Tensor]


def symplectic_step(
    field: Field, method: Method, t: Tensor, y: Tensor, h: Tensor, k1: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Kicks and drifts of one step per row; arguments and result as ``main_stages``.

    Of the slopes that come and go, those of the momenta are f(t, y) and f(t + h, y_new); ``end_slopes`` has them all.
    """
    width, half = h.to(y.dtype)[:, None], y.shape[1] // 2
    q, p, pull = y[:, :half], y[:, half:], k1[:, half:]
    speed = k1[:, :half]
    for i, drift in enumerate(method.drifts):
        p = p + method.kicks[i] * width * pull
        speed = field(t + method.drift_nodes[i] * h, torch.cat([q, p], 1))[:, :half]
        q = q + drift * width * speed
        pull = field(t + method.kick_nodes[i + 1] * h, torch.cat([q, p], 1))[:, half:]
    p = p + method.kicks[-1] * width * pull
    return [k1, torch.cat([speed, pull], 1)], torch.cat([q, p], 1)


def end_slopes(field: Field, t: Tensor, y: Tensor, h: Tensor, y_new: Tensor, k: list[Tensor]) -> list[Tensor]:
    """f(t, y) and f(t + h, y_new), the momenta's from the step's slopes ``k``."""
    half = y.shape[1] // 2
    ends = ((t, y), (t + h, y_new))
    return [torch.cat([field(*at)[:, :half], slope[:, half:]], 1) for at, slope in zip(ends, k, strict=True)]


def hermite(theta: Tensor, y: Tensor, y_new: Tensor, h: Tensor, k: list[Tensor], at: Tensor) -> Tensor:
    """The cubic through both ends with the right slopes, for M outputs; the error is of order h^4.

    Args:
        theta: Fraction of the step per output, ``(M,)``.
        y: States at the start of the step, ``(R, D)``.
        y_new: States at its end, ``(R, D)``.
        h: Signed steps, ``(R,)``.
        k: Slopes there, from ``end_slopes``.
        at: Row of each output, ``(M,)``.

    Returns:
        ``(M, D)``.
    """
    theta = theta.to(y.dtype)[:, None]
    rise, rest = theta**2 * (3 - 2 * theta), 1 - theta
    slopes = theta * rest**2 * k[0][at] - theta**2 * rest * k[1][at]
    return y[at] + rise * (y_new[at] - y[at]) + h.to(y.dtype)[at, None] * slopes
