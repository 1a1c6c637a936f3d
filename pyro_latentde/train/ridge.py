# SPDX-License-Identifier: Apache-2.0
"""A floor that learns: later values by linear regression on earlier ones."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.errors import DataError
from pyro_latentde.train.recipe import Split

__all__ = ["ridge_forecast"]

PENALTIES = [10.0**k for k in range(-3, 5)]


def ridge_forecast(split: Split, k: int) -> Tensor:
    r"""Forecast of the test series at the times after the first k by ridge regression,

    .. math:: \hat W = \arg\min_W \|Y - X W\|^2 + \alpha \|W\|^2,

    X the values at the first k times and a one, Y those that follow. W is learned from the training series, and
    :math:`\alpha` is one of 0.001, 0.01, ..., 10000: the best on the held-out ones.

    Args:
        split: series with nothing missing, all at the same numbers of times.
        k: how many times are seen.

    Returns:
        (N, T - k, D).

    Raises:
        DataError: values are missing.

    References:
        Hoerl, A. E. and Kennard, R. W. (1970). Ridge regression. Technometrics 12, 55-67.

    Example:
        >>> import torch
        >>> line = torch.linspace(1, 2, 9)[:, None] * torch.arange(1.0, 5.0)
        >>> series = Series.from_tensors(torch.arange(4.0), line[..., None])
        >>> ridge_forecast(Split(series[:6], series[6:8], series[8:]), 2).round(decimals=2).flatten().tolist()
        [6.0, 8.0]
    """
    x, y = _sides(split.train, k)
    known, wanted = _sides(split.heldout, k)
    gram, product, one = x.T @ x, x.T @ y, torch.eye(x.shape[1], dtype=x.dtype)
    weights = [torch.linalg.solve(gram + alpha * one, product) for alpha in PENALTIES]
    best = min(weights, key=lambda w: float((known @ w - wanted).square().mean()))
    forecast = _sides(split.test, k)[0] @ best
    return forecast.reshape(len(split.test), -1, split.test.values.shape[-1]).to(split.test.values)


def _sides(series: Series, k: int) -> tuple[Tensor, Tensor]:
    """Values at the first k times with a one, (N, k D + 1), and at the others, (N, (T - k) D)."""
    if not series.complete:
        raise DataError(f"ridge regression needs every value, and of these some are missing: {series!r}")
    values = series.values.detach().cpu().double()
    return torch.nn.functional.pad(values[:, :k].flatten(1), (0, 1), value=1.0), values[:, k:].flatten(1)
