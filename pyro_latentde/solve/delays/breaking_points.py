# SPDX-License-Identifier: Apache-2.0
r"""Where the solution of a delay equation is not smooth, and equal steps that end there.

At t0 the derivative jumps from that of the history to the field's. The jump reappears one derivative higher after each
lag: at :math:`t_0 + \sum_l k_l \tau_l`. A method of order p does not see jumps of more than p lags.

References:
    Bellen, A. and Zennaro, M. (2003). Numerical Methods for Delay Differential Equations, Oxford, chapter 2.
"""

import itertools
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["breaking_points", "equal_steps", "next_breaking_point"]

CLOSE = 1e-9  # of the least lag: two breaking points so near are one


@lru_cache(maxsize=64)
def _sums(lags: int, order: int) -> tuple[tuple[int, ...], ...]:
    """How often each lag, 1 to ``order`` in all."""
    counts = itertools.product(range(order + 1), repeat=lags)
    return tuple(k for k in counts if 1 <= sum(k) <= order)


def breaking_points(lags: Tensor, order: int) -> Tensor:
    """Their distances from t0.

    Args:
        lags: ``(R, L)``.
        order: Order of the method.

    Returns:
        ``(R, K)``, sorted.

    Example:
        >>> import torch
        >>> breaking_points(torch.tensor([[1.0, 2.5]]), 2)
        tensor([[1.0000, 2.0000, 2.5000, 3.5000, 5.0000]])
    """
    counts = torch.tensor(_sums(lags.shape[-1], order), dtype=lags.dtype, device=lags.device)
    return (lags[:, None, :] * counts).sum(-1).sort(1).values


def closeness(lags: Tensor, t: Tensor) -> Tensor:
    """Distances below which two points of time are the same, ``(R,)``."""
    return CLOSE * lags.amin(1) + 16 * torch.finfo(t.dtype).eps * t.abs()


def next_breaking_point(points: Tensor, after: Tensor, close: Tensor) -> Tensor:
    """The first of ``points (R, K)`` that lies after ``after (R,)``, ``(R,)``; infinity if none does."""
    return torch.where(points > (after + close)[:, None], points, torch.inf).amin(1)


def equal_steps(
    lags: Tensor, span: Tensor, t0: Tensor, order: int, step_size: float, max_steps: int
) -> tuple[Tensor, Tensor]:
    """Equal steps from each breaking point to the next, of at most ``step_size`` and at most the least lag.

    Args:
        lags: ``(R, L)``; rows whose lags are not positive get no steps.
        span: From t0 to the last output time, ``(R,)``.
        t0: ``(R,)``.
        order: Order of the method.
        step_size: Largest step.
        max_steps: Most steps of a row.

    Returns:
        The steps ``(R, N)``, zeros at the right, and which rows would need more than ``max_steps``, ``(R,)``.
    """
    fine = (lags > 0).all(1) & torch.isfinite(lags).all(1) & torch.isfinite(span)
    lags, span = torch.where(fine[:, None], lags, 1.0), torch.where(fine, span, 0.0)
    close = closeness(lags, torch.maximum(t0.abs(), (t0 + span).abs()))
    points = breaking_points(lags, order)
    apart = torch.nn.functional.pad(points, (1, 0)).diff(dim=1) > close[:, None]
    inside = apart & (points < (span - close)[:, None])
    ends = torch.where(inside, points, 0.0).sort(1).values  # those left out come first, of length 0
    ends = torch.cat([ends, span[:, None]], 1)
    pieces = torch.nn.functional.pad(ends, (1, 0)).diff(dim=1)
    largest = lags.amin(1).clamp(max=step_size)[:, None]
    counts = torch.ceil(pieces / largest * (1 - 1e-9)).clamp(max=max_steps + 1).to(torch.int64)
    total = counts.sum(1)
    cut = total > max_steps
    counts = torch.where(cut[:, None], 0, counts)
    steps = [
        torch.repeat_interleave(piece / count.clamp(min=1), count) for piece, count in zip(pieces, counts, strict=True)
    ]
    padded = torch.nn.utils.rnn.pad_sequence(steps, batch_first=True) if steps else pieces[:, :0]
    return padded, cut
