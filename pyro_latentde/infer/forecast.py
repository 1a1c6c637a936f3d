# SPDX-License-Identifier: Apache-2.0
"""Using an amortized pair of model and guide: latent sites of new series, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.distributions.moments import expected
from pyro_latentde.errors import DataError, LatentDEError, ShapeError
from pyro_latentde.infer.failed_draws import tell_failed
from pyro_latentde.infer.pair import Pair, is_local
from pyro_latentde.posterior import scores
from pyro_latentde.posterior.model_sites import kind_of, seeded
from pyro_latentde.posterior.runner import memory_bytes

__all__ = ["Forecast", "draw_encoding", "draw_forecast", "draw_prior", "times_ahead"]


@dataclass(frozen=True, eq=False, repr=False)
class Forecast:
    """Draws of trajectories and observations of N series at T' times.

    A draw whose solve failed is NaN, and left out of the mean, the bands and the scores of its series.

    Args:
        times: (N, T'), in the series' unit.
        latents: draws of the latent sites, name -> (S, N, ...).
        z: draws of the trajectory, (S, N, T', states); None if the model has no ODE site.
        means: expected values of the observations in each draw, (S, N, T', D): without observation noise. Of C class
            numbers, which have no average, the probabilities of the classes, (S, N, T', D, C).
        values: draws of the observations, noise included, (S, N, T', D); None where not asked for.
    """

    times: Tensor
    latents: dict[str, Tensor]
    z: Tensor | None
    means: Tensor
    values: Tensor | None

    def __repr__(self) -> str:
        draws, n, times, size = self.means.shape[:4]
        return f"Forecast({draws} draws, {n} series, {times} times, {size} values)"

    def to(self, device: torch.device | str) -> Forecast:
        """The same forecast on another device."""
        latents = {name: value.to(device) for name, value in self.latents.items()}
        parts = (self.z, self.means, self.values)
        z, means, values = (None if part is None else part.to(device) for part in parts)
        return Forecast(self.times.to(device), latents, z, means, values)

    @property
    def failed(self) -> Tensor:
        """Share of the draws of each series whose solve failed, (N,)."""
        return _has_failed(self.means).to(self.means.dtype).mean(0)

    @property
    def mean(self) -> Tensor:
        """Predictive mean, (N, T', D), or (N, T', D, C) of classes; NaN for a series all of whose draws failed."""
        return self.means.nanmean(0)

    def band(self, probability: float = 0.9, noise: bool = True) -> tuple[Tensor, Tensor]:
        """Ends of central intervals, each (N, T', D), of observations or (noise=False) of their means.

        They are those of :func:`.scores.interval`, whose coverage :meth:`scores` measures.
        """
        draws = self.values if noise and self.values is not None else self.means
        return scores.interval(draws, probability)

    def scores(self, truth: Series | Tensor, probability: float = 0.9) -> dict[str, float]:
        """``l1`` and ``rmse`` of the predictive mean, ``crps`` and ``coverage`` of the draws of observations.

        Of classes the ``accuracy`` of the most probable one, and the :func:`.scores.brier` score.

        Args:
            truth: the series that came true at the same times, or its values (N, T', D).
            probability: of the intervals that ``coverage`` counts.

        Raises:
            ShapeError: the truth is of another shape.
        """
        mask = truth.mask if isinstance(truth, Series) else None
        values = truth.values if isinstance(truth, Series) else truth
        if values is None or values.shape != self.means.shape[1:4]:
            got = None if values is None else tuple(values.shape)
            raise ShapeError(f"truth has shape {got}, the forecast {tuple(self.means.shape[1:4])}")
        if self.means.dim() == 5:
            found = (self.means, values, mask)
            return {"accuracy": scores.accuracy(*found), "brier": scores.brier(*found)}
        draws = self.means if self.values is None else self.values
        result = {"l1": scores.l1(self.means, values, mask), "rmse": scores.rmse(self.means, values, mask)}
        if draws.shape[0] > 1:
            result["crps"] = scores.crps(draws, values, mask)
            result["coverage"] = scores.coverage(draws, values, mask, probability)
        return result


def draw_encoding(pair: Pair, series: Series, num_samples: int, seed: int) -> dict[str, Tensor]:
    """Draws of the latent sites, and of what the model computes of them under a name, name -> (S, ...).

    They are made on the device, and come back to that of the series.
    """
    home, series = series.times.device, series.to(device=pair.device)
    latents = _draw_latents(pair, series, num_samples, seed)
    named: dict[str, list[Tensor]] = {}
    with seeded(seed):
        for i in range(num_samples):
            trace = pair.trace_start(series, {name: value[i] for name, value in latents.items()})
            for name, node in trace.nodes.items():
                if kind_of(node) == "deterministic":
                    named.setdefault(name, []).append(node["value"])
    draws = latents | {name: torch.stack(values) for name, values in named.items()}
    return {name: value.to(home) for name, value in draws.items()}


def draw_forecast(
    pair: Pair,
    series: Series,
    horizon: int | Tensor,
    *,
    num_samples: int,
    noise: bool,
    do: Mapping[str, Any] | None,
    seed: int,
    memory: str | int,
) -> Forecast:
    """Latent sites from the guide, then the model at other times; see ``Fit.forecast``."""
    home, series = series.times.device, series.to(device=pair.device)
    times = times_ahead(series, horizon)
    do = {name: _as_tensor(value, series) for name, value in (do or {}).items()}
    if do:
        _check_sites(do, pair, series)
    latents = _draw_latents(pair, series, num_samples, seed)
    with seeded(seed + 1):
        return _run(pair, series, times, latents, num_samples, do, noise, memory).to(home)


def draw_prior(
    pair: Pair, series: Series, data: Series | None, *, plate: str, noise: bool, seed: int, memory: str | int
) -> Forecast:
    """New series at the times of one without values; what all series share is drawn from the guide, at the data."""
    with seeded(seed):
        nodes = pair.trace_start(series[:1]).nodes
        shared = [name for name, node in nodes.items() if _is_unknown(node) and not is_local(node, plate)]
        if shared and data is None:
            raise LatentDEError(
                f"sample: all series share {shared}, whose posterior is what the guide draws at the training data, and "
                "this fit has none: load it with them, Fit.load(path, model, guide, series)."
            )
        found = pair.trace_guide(data).nodes if shared else {}
        latents = {name: found[name]["value"][None] for name in shared if name in found}
        return _run(pair, series, series.times, latents, 1, {}, noise, memory)


def _draw_latents(pair: Pair, series: Series, num_samples: int, seed: int) -> dict[str, Tensor]:
    """Draws of the latent sites from the guide, name -> (S, ...)."""
    with seeded(seed):
        traces = [pair.trace_guide(series) for _ in range(num_samples)]
    # auxiliary sites are the unconstrained numbers behind another site
    names = [
        name
        for name, node in traces[0].nodes.items()
        if kind_of(node) == "latent" and not node["infer"].get("is_auxiliary")
    ]
    return {name: torch.stack([trace.nodes[name]["value"] for trace in traces]) for name in names}


def _run(
    pair: Pair,
    series: Series,
    times: Tensor,
    latents: dict[str, Tensor],
    num_samples: int,
    do: Mapping[str, Tensor],
    noise: bool,
    memory: str | int,
) -> Forecast:
    parts: dict[str, list[Tensor]] = {"z": [], "mean": [], "value": []}
    for i in range(num_samples):
        trace = pair.trace_model(series, times, {name: value[i] for name, value in latents.items()}, do)
        site = _observed(trace)
        parts["mean"].append(expected(site["fn"]))
        if noise:
            parts["value"].append(site["value"])
        parts["z"] += [node["value"] for node in trace.nodes.values() if kind_of(node) == "ode"][:1]
        if i == 0:
            _check_memory(parts, num_samples, memory)
    z, means, values = (torch.stack(part) if part else None for part in parts.values())
    failed = _has_failed(means)
    if bool(failed.any()):
        tell_failed(failed, "left out of means, bands and scores; Forecast.failed is their share in each series")
        z, means, values = (part if part is None else _without(part, failed) for part in (z, means, values))
    return Forecast(times.expand(len(series), -1), latents, z, means, values)


def _has_failed(means: Tensor) -> Tensor:
    """Draws (S, N) that have no finite expected value at some time."""
    return ~means.isfinite().flatten(2).all(-1)


def _without(part: Tensor, failed: Tensor) -> Tensor:
    """Failed draws as NaN at all times: what was reached before a solve broke off is of no use to a mean."""
    return torch.where(failed[(...,) + (None,) * (part.dim() - 2)], torch.nan, part)


def _check_sites(do: Mapping[str, Tensor], pair: Pair, series: Series) -> None:
    """An intervention on a site that is not there would be without effect."""
    with seeded(0):
        nodes = pair.trace_start(series).nodes
    sites = [name for name, node in nodes.items() if _is_unknown(node) or kind_of(node) in ("deterministic", "ode")]
    wrong = [name for name in do if name not in sites]
    if wrong:
        raise LatentDEError(f"do: the model has no site {wrong} to be set; it has {sites}")


def _is_unknown(node: dict[str, Any]) -> bool:
    """A latent site, and none of the observations, which are drawn here too."""
    infer = node.get("infer") or {}
    return kind_of(node) == "latent" and not ("lde_observe" in infer or infer.get("was_observed"))


def _observed(trace: poutine.Trace) -> dict[str, Any]:
    """The site of the observations: the one drawn by ``lde.observe``."""
    sites = [node for node in trace.nodes.values() if "lde_observe" in (node.get("infer") or {})]
    if len(sites) != 1:
        raise LatentDEError(
            f"a forecast needs one lde.observe site in the model, found {len(sites)}; use fit.posterior(...).predict "
            "for models of another form."
        )
    return sites[0]


def _check_memory(parts: dict[str, list[Tensor]], num_samples: int, memory: str | int) -> None:
    need = num_samples * sum(x.numel() * x.element_size() for part in parts.values() for x in part)
    if need > memory_bytes(memory):
        raise LatentDEError(
            f"{num_samples} draws take {need / 1e9:.1f} GB, more than memory={memory!r}: take fewer draws "
            "(num_samples=), fewer series at once (series[:50]), noise=False, or a larger memory=."
        )


def times_ahead(series: Series, horizon: int | Tensor | Any) -> Tensor:
    """Times of a forecast: given ones, or so many more at the last gap of each series.

    Raises:
        DataError: a whole number of steps for a series of one time.
    """
    if not isinstance(horizon, int):
        return torch.as_tensor(horizon, dtype=series.times.dtype, device=series.times.device)
    # ragged series repeat their last time, so the last gap is the last that is not zero
    gaps = series.times.diff(dim=-1)
    if horizon < 1 or gaps.shape[-1] == 0 or bool((gaps.amax(-1) == 0).any()):
        raise DataError(
            f"horizon = {horizon} steps after series of {series.times.shape[-1]} times: the step is not known; give "
            "the times themselves, forecast(series, torch.tensor([...]))."
        )
    last = (gaps > 0).to(torch.int64).cumsum(-1).argmax(-1, keepdim=True)
    steps = torch.arange(1, horizon + 1, dtype=gaps.dtype, device=gaps.device)
    return series.times[:, -1:] + gaps.gather(-1, last) * steps


def _as_tensor(value: Any, series: Series) -> Any:
    return torch.as_tensor(value, dtype=series.times.dtype, device=series.times.device)
