# SPDX-License-Identifier: Apache-2.0
"""From an amortized guide to NUTS: a few series with everything that was learned held fixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from pyro_latentde.data.series import Series
from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer.adaptation import Metric
from pyro_latentde.infer.log_joint import LogJoint
from pyro_latentde.infer.nuts_run import DENSE_UP_TO, nuts
from pyro_latentde.infer.pair import Pair
from pyro_latentde.posterior import ModelSites, Posterior, inspect_model
from pyro_latentde.posterior.model_sites import seeded
from pyro_latentde.posterior.pyro_import import draw_latents

__all__ = ["HandOver", "hand_over", "held_values"]

# Series are independent, so one run over many of them has no use but overhead: the step size that suits all
# of their coordinates is smaller than the one that suits each series.
MOST_COORDINATES = 128
# A covariance of 64 coordinates to within a few per cent of the scales.
DRAWS_OF_GUIDE = 2000
# Their median is off by a sixteenth of the guide's sd.
DRAWS_OF_SHARED = 400
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class HandOver:
    """All that NUTS needs to go on from a guide.

    Args:
        model: the model with the sites outside the plate held.
        arguments: its arguments, the series first.
        kwargs: its keyword arguments.
        draws: draws of the guide, site -> (S, N, ...).
        metric: covariance (d, d) or variances (d,) of the draws in unconstrained coordinates.
        held: site outside the plate -> where its value came from.
    """

    model: Callable
    arguments: tuple
    kwargs: Mapping[str, Any]
    draws: dict[str, Tensor]
    metric: np.ndarray
    held: dict[str, str]

    def sample(self, **options: Any) -> Posterior:
        """Run :func:`.nuts`."""
        options = {"start": self, "metric": self.metric, **options}
        posterior = nuts(self.model, *self.arguments, **options, **self.kwargs)
        return replace(posterior, attrs={**posterior.attrs, "start": "guide", "held": self.held})

    def sample_start(self, num_chains: int, seed: int = 0) -> dict[str, Tensor]:
        """Starts of chains, site -> (num_chains, N, ...), as a fit offers them."""
        rows = np.random.default_rng(seed).permutation(len(next(iter(self.draws.values()))))[:num_chains]
        return {name: value[torch.as_tensor(rows, device=value.device)] for name, value in self.draws.items()}


def hand_over(pair: Pair, series: Series, *, given: Mapping[str, Any], plate: str, seed: int) -> HandOver:
    """Hold what series share, and take starts and metric of their own sites from the guide.

    Args:
        pair: model, with constant parameters, and guide.
        series: N series.
        given: values of sites outside the plate; see :func:`held_values` for the others.
        plate: name of the plate of the series.
        seed: seed of the draws.

    Returns:
        The model and where to begin.

    Raises:
        LatentDEError: too many coordinates for one run, or a local site that the guide does not draw.
    """
    whole = series._with(index=None, population=None, time_weight=1.0)
    held = held_values(pair, whole, given=given, plate=plate, seed=seed)
    conditional = _Held(held)(pair.model)
    joint = LogJoint(conditional, (whole, *pair.args), pair.kwargs)
    if joint.dim > MOST_COORDINATES:
        raise LatentDEError(
            f"{len(whole)} series of {joint.dim // len(whole)} coordinates each make {joint.dim}, and one run of NUTS "
            f"takes {MOST_COORDINATES}: their posteriors are independent, so sample them one after the other, "
            "fit.nuts(series[i]). fit.pareto_k(series) tells for which the guide is not good enough."
        )
    draws = _draws_of_series(pair, joint, whole, held, seed)
    free = joint.unconstrain(draws).double()
    usable = free.isfinite().all(-1)
    metric = Metric.estimate(free[usable].cpu().numpy(), dense=joint.dim <= DENSE_UP_TO).inverse
    draws = {name: value[usable] for name, value in draws.items()}
    sources = {name: "given" if name in given else "median of the guide" for name in held}
    return HandOver(conditional, (whole, *pair.args), pair.kwargs, draws, metric, sources)


def held_values(pair: Pair, series: Series, *, given: Mapping[str, Any], plate: str, seed: int) -> dict[str, Tensor]:
    """Values of the latent sites outside the plate of series: as given, else the guide's median.

    The median is that of each unconstrained coordinate.

    Returns:
        Site -> value of the site's shape.

    Raises:
        LatentDEError: values are given for sites that are none of these, or there is no such plate.
    """
    sites = inspect_model(pair.model, series, *pair.args, **pair.kwargs)
    shared = _outside(sites, plate, given)
    absent = [name for name in shared if name not in given]
    like = series.times
    held = {
        name: value.to(like.device) if isinstance(value, Tensor) else torch.as_tensor(value).to(like)
        for name, value in given.items()
    }
    if not absent:
        return held
    inputs = ((series, *pair.args), pair.kwargs)
    draws = draw_latents(pair.guide, sites, *inputs, num_samples=DRAWS_OF_SHARED, seed=seed)
    for name in absent:
        if name not in draws or sites[name].support.is_discrete:
            why = "is discrete" if name in draws else "is not drawn by the guide"
            raise LatentDEError(
                f"site '{name}' outside of plate '{plate}' {why}: give its value, given={{'{name}': ...}}"
            )
        transform = biject_to(sites[name].support)
        held[name] = transform(transform.inv(draws[name]).median(dim=0).values)
    return held


class _Held(Messenger):
    """Sites with fixed values, and no density of their own: constants of the model, reported as deterministic."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            value = self.values[msg["name"]]
            msg["fn"] = msg["fn"].mask(False)
            msg["value"], msg["is_observed"] = value, True
            msg["infer"] = {**(msg["infer"] or {}), "_deterministic": True}


def _outside(sites: ModelSites, plate: str, given: Mapping[str, Any]) -> list[str]:
    inside = [name for name in sites.latent if any(p.name == plate for p in sites[name].plates)]
    if not inside:
        raise LatentDEError(
            f"no latent site in a plate '{plate}': see lde.series_plate, or give plate=. For the posterior of all "
            "sites together use infer.nuts(model, series, start=fit)."
        )
    outside = [name for name in sites.latent if name not in inside]
    wrong = sorted(set(given) - set(outside))
    if wrong:
        raise LatentDEError(f"given: {wrong} are no latent sites outside of plate '{plate}'; those are {outside}.")
    return outside


def _draws_of_series(
    pair: Pair, joint: LogJoint, series: Series, held: Mapping[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Independent draws of the local sites, site -> (S, N, ...). Draws are more rows: each series several times."""
    n, found = len(series), []
    copies = max(1, min(DRAWS_OF_GUIDE, ROWS_AT_ONCE // n))
    batch = series[torch.arange(n).repeat(copies)]
    conditional = replace(pair, guide=poutine.condition(pair.guide, data=dict(held)))
    with seeded(seed):
        for _ in range(-(-DRAWS_OF_GUIDE // copies)):
            nodes = conditional.trace_guide(batch).nodes
            found.append({site.name: nodes[site.name]["value"] for site in joint.sites if site.name in nodes})
    draws = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    return {site.name: draws[site.name].reshape(-1, *site.shape) for site in joint.sites if site.name in draws}
