# SPDX-License-Identifier: Apache-2.0
"""Series that a model draws, with the latent values they come from: what simulation-based inference learns from."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer.svi_modules import evaluating
from pyro_latentde.posterior.model_sites import kind_of, seeded

__all__ = ["Dreams", "dream", "is_local", "is_teachable", "remember"]

_NUMBERS_AT_ONCE = 10_000_000  # of values that exist at the same time


@dataclass(frozen=True)
class Dreams:
    """Series drawn from a model.

    Args:
        series: N series; where the guide reads frames by a network of its own, what that network says of them.
        latents: values of the guide's sites of each series that they come from, name -> (N, ...).
        reading: what the guide must be called inside of, so that it takes features for what they are.
    """

    series: Series
    latents: Mapping[str, Tensor]
    reading: Callable[[], contextlib.AbstractContextManager[None]] | None = None

    def __len__(self) -> int:
        return len(self.series)

    def __getitem__(self, rows: Tensor) -> Dreams:
        return Dreams(self.series[rows], {name: value[rows] for name, value in self.latents.items()}, self.reading)


def dream(
    model: Callable, guide: Callable, plate: str, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[Dreams, Tensor]:
    """One dream for each series that is the first argument, at its times and with its gaps.

    What all series share is drawn from the guide, the rest from the model.

    Returns:
        The dreams, and which of them are finite, (N,), bool: a solve may fail. Others hold zeros.
    """
    if not (args and isinstance(args[0], Series)):
        raise LatentDEError("Sleep: the first argument of model and guide must be a Series, to be dreamt anew")
    with torch.no_grad():
        asleep = poutine.trace(guide).get_trace(*args, **kwargs)
        _check_local(asleep, plate)
        names = [name for name, node in asleep.nodes.items() if _is_latent(node)]
        shared = {name: asleep.nodes[name]["value"] for name in names if not is_local(asleep.nodes[name], plate)}
        dreaming = poutine.condition(poutine.uncondition(model), data=shared)
        trace = poutine.trace(dreaming).get_trace(*args, **kwargs)
    latents = {name: trace.nodes[name]["value"] for name in names if name in trace.nodes and name not in shared}
    # of a failed solve, starts of segments too; zero times the gradient at NaN would be NaN
    latents = {name: torch.where(value.isnan(), 0.0, value) for name, value in latents.items()}
    values = _observations(trace)
    series = args[0]._with(values=values.nan_to_num(0.0, 0.0, 0.0))
    return Dreams(series, latents), values.isfinite().flatten(1).all(1)


def remember(
    model: Callable,
    guide: Callable,
    series: Series,
    count: int,
    *,
    seed: int = 0,
    plate: str = "series",
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Dreams:
    """Many dreams, to be read again and again.

    Of a guide with a network of frames they are what that network says of each frame, which is a hundredth of the
    memory and of the work; the network must then stay as it is.

    Args:
        model: Pyro model.
        guide: Pyro guide.
        series: whose times, gaps, covariates and inputs the dreams have, in turn.
        count: number of dreams, of which those whose solve failed are left out.
        seed: seed of the draws.
        plate: name of the plate of series.
        args: further arguments of model and guide.
        kwargs: their keyword arguments.

    Raises:
        LatentDEError: no dream was finite.
    """
    kept: list[Dreams] = []
    read, reading = getattr(guide, "features", None), getattr(guide, "given_features", None)
    at_once = max(1, _NUMBERS_AT_ONCE // series.mask[0].numel())
    # Pyro's validation would stop at the NaN of a failed solve
    with seeded(seed), evaluating(model, guide), pyro.validation_enabled(False):
        for first in range(0, count, at_once):
            rows = torch.arange(first, min(first + at_once, count)) % len(series)
            dreams, finite = dream(model, guide, plate, (series[rows], *args), kwargs or {})
            dreams = dreams[finite.nonzero()[:, 0]] if bool(finite.any()) else None
            if dreams is not None:
                kept.append(dreams if read is None else Dreams(read(dreams.series), dreams.latents, reading))
    if not kept:
        raise LatentDEError(
            f"Sleep: none of {count} draws from the model could be solved. Draw from its priors and solve by hand "
            "(lde.odesolve says where and why it fails); narrower priors, or another method, help."
        )
    lost = count - sum(map(len, kept))
    if 2 * lost > count:
        warnings.warn(f"Sleep: {lost} of {count} draws from the model failed and are left out", stacklevel=3)
    tensors = zip(*(d.series._tensors().values() for d in kept), strict=True)
    together = dict(zip(kept[0].series._tensors(), map(torch.cat, tensors), strict=True))
    latents = {name: torch.cat([d.latents[name] for d in kept]) for name in kept[0].latents}
    return Dreams(kept[0].series._with(**together, ids=None), latents, kept[0].reading)


def is_teachable(node: Mapping[str, Any]) -> bool:
    """Whether a node of the guide's trace is a site: conditioning on a dream has marked it as observed."""
    return kind_of(node) in ("latent", "observed") and "log_prob" in node


def is_local(node: Mapping[str, Any], plate: str) -> bool:
    """Whether it belongs to one series each."""
    return any(frame.name == plate for frame in node["cond_indep_stack"])


def _is_latent(node: Mapping[str, Any]) -> bool:
    return kind_of(node) == "latent"


def _check_local(asleep: poutine.Trace, plate: str) -> None:
    latent = [node for node in asleep.nodes.values() if _is_latent(node)]
    if not any(is_local(node, plate) for node in latent):
        plates = sorted({frame.name for node in latent for frame in node["cond_indep_stack"]})
        raise LatentDEError(
            f"Sleep: the guide draws no site in a plate '{plate}', and so has nothing to learn from dreams; "
            f"its plates are {plates}. See lde.series_plate, or give plate=."
        )


def _observations(dream: poutine.Trace) -> Tensor:
    sites = [node for node in dream.nodes.values() if "lde_observe" in (node.get("infer") or {})]
    if len(sites) != 1:
        raise LatentDEError(f"Sleep: needs one lde.observe site in the model, found {len(sites)}")
    return sites[0]["value"]
