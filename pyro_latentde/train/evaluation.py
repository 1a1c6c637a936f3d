# SPDX-License-Identifier: Apache-2.0
"""What a trained pair is worth: forecasts against floors, inferred against true parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_latentde.infer import Fit
from pyro_latentde.infer.forecast import Forecast
from pyro_latentde.posterior import scores
from pyro_latentde.train.recipe import Recipe, Split

__all__ = ["evaluate", "forecast_test"]

DRAWS = 100  # of the latent sites, for intervals
PATHS = 20  # of whole forecasts, which are large


def forecast_test(fit: Fit, recipe: Recipe, split: Split, seed: int = 0) -> Forecast:
    """Forecasts of the test series at all their times from the first ``recipe.observed`` ones."""
    seen = split.test.window(0, recipe.observed)
    return fit.forecast(seen, split.test.times, num_samples=PATHS, noise=False, seed=seed, memory="4GB")


def evaluate(fit: Fit, recipe: Recipe, split: Split, forecast: Forecast, seed: int = 0) -> dict[str, float]:
    """Plain numbers for ``metrics.json``.

    Returns:
        ``l1_reconstruction`` and ``l1_extrapolation`` (mean absolute error of the predictive mean at the observed and
        the later times), ``rmse_extrapolation``, the same of repeating the last observed values and the mean ones
        (``l1_last``, ``l1_mean``), and for each true parameter its correlation, root mean square error and the coverage
        of 90 % intervals; ``coverage90`` is that of the first parameter.
    """
    truth = split.test.values if split.truth.clean is None else split.truth.clean
    mask, k = split.test.mask, recipe.observed
    past = (slice(None), slice(0, k))
    future = (slice(None), slice(k, None))
    mean = forecast.mean
    metrics = {"l1_reconstruction": _l1(mean[past], truth[past], mask[past])}
    if truth.shape[1] > k:
        floors = {"last": truth[:, k - 1 : k], "mean": truth[past].mean(1, keepdim=True)}
        metrics["l1_extrapolation"] = _l1(mean[future], truth[future], mask[future])
        metrics["rmse_extrapolation"] = scores.rmse(mean[None][(slice(None), *future)], truth[future], mask[future])
        metrics |= {f"l1_{name}": _l1(floor, truth[future], mask[future]) for name, floor in floors.items()}
    return metrics | _parameters(fit, split, k, seed)


def _parameters(fit: Fit, split: Split, k: int, seed: int) -> dict[str, float]:
    if not split.truth.parameters:
        return {}
    draws = named_draws(fit, split, k, seed)
    metrics: dict[str, float] = {}
    for name, truth in split.truth.parameters.items():
        if name not in draws:
            continue
        inferred, true = draws[name].double(), truth.double()
        pair = torch.stack([inferred.mean(0), true])
        metrics[f"{name}_correlation"] = float(torch.corrcoef(pair)[0, 1])
        metrics[f"{name}_rmse"] = scores.rmse(inferred, true)
        metrics[f"{name}_coverage90"] = scores.coverage(inferred, true)
        metrics.setdefault("coverage90", metrics[f"{name}_coverage90"])
    return metrics


def named_draws(fit: Fit, split: Split, k: int, seed: int = 0) -> Mapping[str, Tensor]:
    """Posterior draws of the named parameters of the test series, name -> (S, N)."""
    return fit.encode(split.test.window(0, k), num_samples=DRAWS, seed=seed)


def _l1(predicted: Tensor, truth: Tensor, mask: Tensor) -> float:
    return scores.l1(predicted.expand_as(truth)[None], truth, mask)
