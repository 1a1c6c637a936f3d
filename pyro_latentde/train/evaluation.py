# SPDX-License-Identifier: Apache-2.0
"""What a trained pair is worth: forecasts against floors, inferred against true parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.infer import Fit
from pyro_latentde.infer.forecast import Forecast
from pyro_latentde.models.unknown import missing_force
from pyro_latentde.posterior import scores
from pyro_latentde.train.recipe import Recipe, Split

__all__ = ["draw_parameters", "evaluate", "floors", "forecast_test"]

DRAWS = 1000  # of the latent sites: of 100 the error of a mean moves by a tenth from seed to seed
PATHS = (20, 100)  # of whole forecasts: the fewest, of pictures, and the most, of what is small
_NUMBERS = 20_000_000  # of a forecast that is no longer small


def forecast_test(fit: Fit, recipe: Recipe, split: Split, seed: int = 0) -> Forecast:
    """Forecasts of the test series at all their times from the first ``recipe.observed`` ones.

    Pictures are forecast without noise, which says nothing about a pixel and takes as much memory again.
    """
    seen, noise = split.test.window(0, recipe.observed), split.test.frame is None
    paths = max(PATHS[0], min(PATHS[1], _NUMBERS // split.test.values.numel()))
    return fit.forecast(seen, split.test.times, num_samples=paths, noise=noise, seed=seed, memory="4GB")


def draw_parameters(fit: Fit, recipe: Recipe, split: Split, seed: int = 0) -> Mapping[str, Tensor]:
    """Posterior draws of the latent sites and named parameters of the test series, name -> (S, N, ...)."""
    return fit.encode(split.test.window(0, recipe.observed), num_samples=DRAWS, seed=seed)


def evaluate(
    fit: Fit, recipe: Recipe, split: Split, forecast: Forecast, draws: Mapping[str, Tensor]
) -> dict[str, float]:
    """Plain numbers for ``metrics.json``.

    Returns:
        ``l1_reconstruction`` and ``l1_extrapolation`` (mean absolute error of the predictive mean at the observed and
        the later times, against values without noise where they are known), ``rmse_extrapolation``, both also of the
        :func:`floors` and of the recipe's own (``l1_last``, ...), and the mean absolute value to be predicted
        (``size_extrapolation``); of
        series that are no pictures the ``crps_`` and ``coverage90_extrapolation`` of new observations. For each true
        parameter its correlation, root mean square error (of known priors also as a part of their range) and the
        coverage of 90 % intervals; ``coverage90`` is that of all parameters. Of a missing force the correlation with
        the true one, and the slope of a line through both. ``failed`` is the share of the draws whose solve failed:
        they are left out, see :class:`.Forecast`.
    """
    k, clean = recipe.observed, split.truth.clean
    truth = split.test.values if clean is None else clean
    mask = split.test.mask if clean is None else torch.ones_like(split.test.mask)
    now, later = (slice(None), slice(0, k)), (slice(None), slice(k, None))
    predicted = forecast.mean
    metrics = {
        "failed": float(forecast.failed.double().mean()),
        "l1_reconstruction": scores.l1(predicted[None][:, *now], truth[now], mask[now]),
    }
    simple = {name: forecast_by(split, k) for name, forecast_by in recipe.floors.items()}
    predictions = {"extrapolation": predicted[later], **floors(split.test, k), **simple}
    for name, values in predictions.items():
        metrics[f"l1_{name}"] = scores.l1(values[None], truth[later], mask[later])
        metrics[f"rmse_{name}"] = scores.rmse(values[None], truth[later], mask[later])
    metrics["size_extrapolation"] = float(truth[later][mask[later]].abs().mean())
    if forecast.values is not None:
        seen = (split.test.values[later], split.test.mask[later])
        metrics["crps_extrapolation"] = scores.crps(forecast.values[:, *later], *seen)
        metrics["coverage90_extrapolation"] = scores.coverage(forecast.values[:, *later], *seen)
    return metrics | _parameters(recipe, split, draws) | _force(fit, recipe, forecast, draws)


def floors(series: Series, k: int) -> dict[str, Tensor]:
    """What anyone would predict of the times after the first k, from what is observed there.

    Returns:
        The ``last`` value, the ``mean`` and the linear ``trend`` of each, all (N, T - k, D).
    """
    times, later = series.times[:, :k, None], series.times[:, k:, None]
    values, mask = series.values[:, :k], series.mask[:, :k]
    last = values.gather(1, (mask.cumsum(1) * mask).argmax(1, keepdim=True))
    weight = mask / mask.sum(1, keepdim=True).clamp(min=1)
    center, mean = (weight * times).sum(1, keepdim=True), (weight * values).sum(1, keepdim=True)
    spread = (weight * (times - center) ** 2).sum(1, keepdim=True)
    slope = (weight * (times - center) * (values - mean)).sum(1, keepdim=True) / spread.clamp(min=1e-12)
    return {
        "last": last.expand(-1, later.shape[1], -1),
        "mean": mean.expand(-1, later.shape[1], -1),
        "trend": mean + slope * (later - center),
    }


def _parameters(recipe: Recipe, split: Split, draws: Mapping[str, Tensor]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    known = {name: truth for name, truth in split.truth.parameters.items() if name in draws}
    for name, truth in known.items():
        inferred, true = draws[name].double(), truth.double()
        metrics[f"{name}_correlation"] = _correlation(inferred.mean(0), true)
        metrics[f"{name}_rmse"] = scores.rmse(inferred, true)
        if name in recipe.range:
            low, high = recipe.range[name]
            metrics[f"{name}_rmse_of_range"] = metrics[f"{name}_rmse"] / (high - low)
        metrics[f"{name}_coverage90"] = scores.coverage(inferred, true)
    if known:
        metrics["coverage90"] = sum(metrics[f"{name}_coverage90"] for name in known) / len(known)
    return metrics


def _force(fit: Fit, recipe: Recipe, forecast: Forecast, draws: Mapping[str, Tensor]) -> dict[str, float]:
    """The learned missing force against the true one, at the states of the observed times."""
    if recipe.force is None:
        return {}
    device = next(fit.model.parameters()).device
    weights = {name: value.to(device) for name, value in draws.items() if name.startswith("field.")}
    states = forecast.z[:, :, : recipe.observed].nanmean(0).flatten(0, 1)
    learned = missing_force(fit.model, weights, states.to(device)).mean(0).to(states.device).flatten().double()
    true = recipe.force(states).flatten().double()
    slope = float(torch.cov(torch.stack([learned, true]))[0, 1] / true.var())
    return {"force_correlation": _correlation(learned, true), "force_slope": slope}


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])
