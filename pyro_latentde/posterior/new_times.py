# SPDX-License-Identifier: Apache-2.0
"""Trajectories and observations at times other than the model's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.errors import LatentDEError
from pyro_latentde.posterior.model_sites import ModelSites
from pyro_latentde.posterior.runner import Draw, per_chain, trace_model
from pyro_latentde.sites.settings import extra_times

if TYPE_CHECKING:
    from pyro_latentde.posterior.posterior import Posterior

__all__ = ["Observations", "observations_at", "trajectories_at"]


class Observations(dict[str, Tensor]):
    """Observed site -> new observations; asking for one that could not be drawn tells why."""

    def __init__(self, values: Mapping[str, Tensor] | None = None, reasons: Mapping[str, str] | None = None) -> None:
        super().__init__(values or {})
        self.reasons = dict(reasons or {})

    def __missing__(self, name: str) -> Tensor:
        if name in self.reasons:
            raise LatentDEError(self.reasons[name])
        raise KeyError(f"{name!r} is not an observed site; these are: {[*self, *self.reasons]}")


def trajectories_at(posterior: Posterior, times: Tensor, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """ODE site -> trajectories ``(chain, draw, *batch, T', D)`` at the new times."""
    if not posterior.sites.ode:
        return {}

    def one(draw: Draw) -> dict[str, Tensor]:
        with extra_times(times) as solved:
            trace_model(posterior.model, draw, posterior.args, posterior.kwargs)
        return dict(solved)

    return per_chain(posterior, one, **options)


def observations_at(
    posterior: Posterior,
    times: Tensor,
    trajectories: dict[str, Tensor],
    options: Mapping[str, Any],
    times_argument: str,
) -> Observations:
    """New observations at other times, or for each observed site the reason why there are none."""
    sites = posterior.sites

    def none(reason: str) -> Observations:
        text = (
            f"site '{{}}' cannot be drawn at new times: {reason}. Take the times as an argument of the "
            f"model, `def model({times_argument}, data=None)`, solve and observe at them, and let data=None "
            "mean that there are none."
        )
        return Observations(reasons={name: text.format(name) for name in sites.observed})

    call = _bind(posterior)
    own = None if call is None else _own_times(call, times_argument, sites)
    if isinstance(own, str) or own is None:
        return none(own or "its arguments cannot be read")
    union, index = _union(own, times)
    arguments, reason = dict(call.arguments), ""

    def one(draw: Draw, changes: Mapping[str, Any]) -> dict[str, Tensor]:
        call.arguments.update({**arguments, **changes})
        trace = trace_model(posterior.model, draw, call.args, call.kwargs, new_data=True)
        return {name: trace.nodes[name]["value"] for name in (*sites.observed, *sites.ode)}

    for changes in _changes(call, times_argument, union):
        try:
            values = per_chain(posterior, functools.partial(one, changes=changes), skip_errors=True, **options)
        except Exception as error:
            reason = reason or f"the model fails there ({type(error).__name__}: {error})"
            continue
        moved = _moved_start(values, trajectories, index)
        if moved is not None:
            return Observations(reasons=dict.fromkeys(sites.observed, moved))
        kept = {}
        for name in sites.observed:
            dim = _time_dim(sites[name].shape, values[name].shape[2:], union.shape[-1])
            found = None if dim is None else _select(values[name], 2 + dim, index)
            if found is not None:
                kept[name] = found
        if kept:
            unclear = none("its shape does not follow the model's times").reasons
            return Observations(kept, {name: text for name, text in unclear.items() if name not in kept})
        reason = reason or "its shape does not follow the model's times"
    return none(reason)


def _bind(posterior: Posterior) -> inspect.BoundArguments | None:
    """The model's arguments by name, or None where they cannot be found out."""
    fn = inspect.unwrap(posterior.model)
    fn = fn.forward if isinstance(fn, torch.nn.Module) else fn
    try:
        call = inspect.signature(fn).bind(*posterior.args, **posterior.kwargs)
    except (TypeError, ValueError):
        return None
    call.apply_defaults()
    return call


def _own_times(call: inspect.BoundArguments, times_argument: str, sites: ModelSites) -> Tensor | str:
    """The model's own times, ``(T,)`` or ``(*batch, T)``, or the reason why other times cannot be given to it."""
    series = [value for value in call.arguments.values() if isinstance(value, Series)]
    if times_argument in call.arguments:
        own = call.arguments[times_argument]
        if own is None:
            own = next((sites[name].times for name in sites.ode), None)
    elif len(series) == 1 and series[0].inputs is not None:
        return "its series have inputs, which are known at their own times only"
    elif len(series) == 1:
        own = series[0].times
    else:
        return f"the model has no argument '{times_argument}'"
    if own is None:
        return f"its argument '{times_argument}' is None"
    own = torch.as_tensor(own)
    rows = own.reshape(-1, own.shape[-1]) if own.ndim else own.reshape(1, 1)
    return rows[0] if bool((rows == rows[0]).all()) else own


def _changes(call: inspect.BoundArguments, times_argument: str, union: Tensor) -> Iterator[dict[str, Any]]:
    """Changes of the arguments to try: the times alone, and then also no data."""
    if times_argument not in call.arguments:
        name, series = next((n, v) for n, v in call.arguments.items() if isinstance(v, Series))
        times = union.expand(len(series), -1)
        yield {name: Series.at_times(times, names=series.names, ids=series.ids, covariates=series.covariates)}
        return
    yield {times_argument: union}
    optional = {name: None for name, p in call.signature.parameters.items() if p.default is None}
    yield {**optional, times_argument: union}


def _union(own: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """The model's times and the new ones in the model's order, and where the new ones are, by row as the model's are.

    The last time is repeated once, so that the length always differs from the model's own and shows which
    dimension of an observation is time.
    """
    new = new.to(own).expand(*own.shape[:-1], -1)
    sign = torch.where(own[..., -1:] < own[..., :1], -1, 1)  # of rows that go backwards
    union = (sign * torch.cat([own, new], -1)).sort(-1).values
    index = torch.searchsorted(union, sign * new)
    return sign * torch.cat([union, union[..., -1:]], -1), index


def _select(values: Tensor, dim: int, index: Tensor) -> Tensor | None:
    """Entries of a dimension, of all rows alike or of each row its own; None if the rows are not those of `values`."""
    rows = index.shape[:-1]
    if values.shape[dim - len(rows) : dim] != rows:
        return None
    index = index.to(values.device).reshape(*index.shape, *(1 for _ in values.shape[dim + 1 :]))
    return values.gather(dim, index.expand(*values.shape[:dim], -1, *values.shape[dim + 1 :]))


def _time_dim(own: Sequence[int], new: Sequence[int], length: int) -> int | None:
    if len(own) != len(new):
        return None
    changed = [dim for dim, (a, b) in enumerate(zip(own, new, strict=True)) if a != b]
    return changed[0] if len(changed) == 1 and new[changed[0]] == length else None


def _moved_start(values: Mapping[str, Tensor], trajectories: Mapping[str, Tensor], index: Tensor) -> str | None:
    """Both ways to the new times must agree; where new times moved the start of a solve they do not: what to tell."""
    for name, expected in trajectories.items():
        got = _select(values[name], values[name].ndim - 2, index)
        if got is None or got.shape != expected.shape:
            continue
        good = torch.isfinite(got) & torch.isfinite(expected)
        scale = expected[good].abs().max() if good.any() else 1.0
        if not torch.allclose(got[good], expected[good], rtol=1e-2, atol=1e-2 * float(scale)):
            return (
                f"site '{name}': with the new times the model starts its solve at another time, so that observations "
                "there cannot be drawn. Give lde.ode its start with t0=, so that it does not follow the times; or ask "
                "for times after the first of each series only."
            )
    return None
