# SPDX-License-Identifier: Apache-2.0
"""How good predictive draws are: errors of their mean, CRPS, the coverage of their intervals; of classes, Brier score.

Draws that are NaN, as after a failed solve, are left out; where none are left, the result is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_latentde.errors import ShapeError

__all__ = ["accuracy", "brier", "coverage", "crps", "interval", "l1", "quantiles", "rmse"]


def l1(draws: Tensor, truth: Tensor, mask: Tensor | None = None) -> float:
    """Mean absolute error of the mean of the draws.

    Args:
        draws: (S, ...), in the unit of the truth.
        truth: (...).
        mask: (...), bool, False where there is nothing to compare.

    Example:
        >>> import torch
        >>> l1(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([1.0, 4.0]))
        1.0
    """
    _check(draws, truth)
    return _mean((draws.nanmean(0) - truth).abs(), mask)


def rmse(draws: Tensor, truth: Tensor, mask: Tensor | None = None) -> float:
    """Root mean square error of the mean of the draws; arguments as in :func:`l1`."""
    _check(draws, truth)
    return _mean((draws.nanmean(0) - truth).square(), mask) ** 0.5


def crps(draws: Tensor, truth: Tensor, mask: Tensor | None = None) -> float:
    r"""Mean continuous ranked probability score

    .. math:: \mathrm{CRPS}(F, y) = E|X - y| - \tfrac12 E|X - X'|

    by its unbiased estimate from the draws, in the unit of the truth; smaller is better, and for one sure draw it is
    the absolute error.

    Args:
        draws: (S, ...), S at least 2.
        truth: (...).
        mask: (...), bool, False where there is nothing to compare.

    References:
        Gneiting and Raftery, "Strictly proper scoring rules, prediction, and estimation", JASA 102, 2007.

    Example:
        >>> import torch
        >>> crps(torch.tensor([[0.0], [2.0]]), torch.tensor([1.0]))
        0.0
    """
    _check(draws, truth, at_least=2)
    ordered, num = _ordered(draws)
    # sum over pairs |x_i - x_j| = 2 sum_i (2 i - S + 1) x_(i), i from 0, of the sorted draws
    rank = torch.arange(len(draws), dtype=draws.dtype, device=draws.device)
    ends = torch.tensordot(2.0 * rank, ordered.masked_fill(ordered.isnan(), 0.0), 1) - (num - 1) * ordered.nansum(0)
    pairs = ends * 2.0 / (num * (num - 1))  # NaN of fewer than two
    return _mean((draws - truth).abs().nanmean(0) - 0.5 * pairs, mask)


def coverage(draws: Tensor, truth: Tensor, mask: Tensor | None = None, probability: float = 0.9) -> float:
    """Share of the truth that lies in each :func:`interval` of the draws; for honest ones, its probability.

    Args:
        draws: (S, ...).
        truth: (...).
        mask: (...), bool, False where there is nothing to compare.
        probability: of the central interval.

    Example:
        >>> import torch
        >>> coverage(torch.linspace(0, 1, 101)[:, None], torch.tensor([0.01, 0.5, 0.97, 0.3]))
        0.5
    """
    _check(draws, truth)
    low, high = interval(draws, probability)
    inside = ((truth >= low) & (truth <= high)).to(draws.dtype)
    return _mean(inside.masked_fill(low.isnan(), torch.nan), mask)


def accuracy(draws: Tensor, truth: Tensor, mask: Tensor | None = None) -> float:
    """Share of the truth that is the class of the highest mean probability.

    Args:
        draws: (S, ..., C), probabilities of classes.
        truth: (...), class numbers.
        mask: (...), bool, False where there is nothing to compare.

    Example:
        >>> import torch
        >>> accuracy(torch.tensor([[[0.9, 0.1], [0.8, 0.2]]]), torch.tensor([0.0, 1.0]))
        0.5
    """
    _check(draws[..., 0], truth)
    mean = draws.nanmean(0)
    right = (mean.nan_to_num(0.0).argmax(-1) == truth).to(draws.dtype)
    return _mean(right.masked_fill(mean.isnan().any(-1), torch.nan), mask)


def brier(draws: Tensor, truth: Tensor, mask: Tensor | None = None) -> float:
    r"""Mean Brier score :math:`\sum_c (p_c - 1[y = c])^2` of mean class probabilities p, 0 for a sure and right one.

    Args:
        draws: (S, ..., C), probabilities of classes.
        truth: (...), class numbers y.
        mask: (...), bool, False where there is nothing to compare.

    References:
        Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather Review 78, 1950.

    Example:
        >>> import torch
        >>> brier(torch.tensor([[[0.5, 0.5]]]), torch.tensor([1.0]))
        0.5
    """
    _check(draws[..., 0], truth)
    came = truth[..., None] == torch.arange(draws.shape[-1], device=draws.device)
    return _mean((draws.nanmean(0) - came.to(draws.dtype)).square().sum(-1), mask)


def interval(draws: Tensor, probability: float = 0.9) -> tuple[Tensor, Tensor]:
    """Ends of the central interval in which one more draw lies with the probability.

    They are (S + 1) (1 - p) / 2 - 1 draws from the extremes: plain quantiles of 20 draws would be too narrow, and
    cover 81 % instead of 90 %. Fewer than 2 / (1 - p) - 1 draws do not reach so far, and give their extremes.

    Args:
        draws: (S, ...).
        probability: between 0 and 1.

    Returns:
        Lower and upper ends, each (...).

    Example:
        >>> import torch
        >>> [round(end.item(), 3) for end in interval(torch.linspace(0, 1, 101), 0.9)]
        [0.041, 0.959]
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability = {probability}; expected a number between 0 and 1, such as .9")
    ordered, num = _ordered(draws)
    end = (0.5 * (1.0 - probability) * (num + 1) - 1).clamp(min=0.0)
    return _between(ordered, end), _between(ordered, num - 1 - end)


def quantiles(draws: Tensor, probabilities: Sequence[float]) -> list[Tensor]:
    """Quantiles over the draws, with straight lines between them as in torch.quantile, which refuses large tensors.

    Args:
        draws: (S, ...).
        probabilities: in [0, 1].

    Returns:
        One (...) for each probability.

    Example:
        >>> import torch
        >>> [float(q) for q in quantiles(torch.tensor([3.0, 1.0, 2.0]), (0.0, 0.25, 1.0))]
        [1.0, 1.5, 3.0]
    """
    ordered, num = _ordered(draws)
    return [_between(ordered, probability * (num - 1)) for probability in probabilities]


def _ordered(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Draws in ascending order, NaN last, and how many are not NaN: (S, ...), (...) in float64."""
    return draws.sort(0).values, len(draws) - draws.isnan().sum(0, dtype=torch.float64)


def _between(ordered: Tensor, place: Tensor) -> Tensor:
    """The value at a position (...) from 0 on, with straight lines between the draws; NaN where there are none."""
    place = place.clamp(min=0.0)
    below = place.long().unsqueeze(0)
    low = ordered.gather(0, below)[0]
    high = ordered.gather(0, (below + 1).clamp(max=len(ordered) - 1))[0]
    between = place - below[0]
    return torch.where(between > 0, low.lerp(high, between.to(low.dtype)), low)  # beyond the last draw may be NaN


def _check(draws: Tensor, truth: Tensor, at_least: int = 1) -> None:
    if draws.dim() == 0 or draws.shape[0] < at_least:
        raise ShapeError(f"draws have shape {tuple(draws.shape)}; expected at least {at_least} of them, (S, ...)")
    try:
        torch.broadcast_shapes(draws.shape[1:], truth.shape)
    except RuntimeError:
        raise ShapeError(
            f"draws {tuple(draws.shape)} and truth {tuple(truth.shape)} do not fit; expected (S, ...) and (...)"
        ) from None


def _mean(values: Tensor, mask: Tensor | None) -> float:
    if mask is None:
        return float(values.mean())
    return float(values[mask.expand_as(values)].mean())
