# SPDX-License-Identifier: Apache-2.0
"""Names and coordinates of the dimensions of sites, from plates, times and states."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.posterior.model_sites import Site

if TYPE_CHECKING:
    from pyro_latentde.posterior.posterior import Posterior

__all__ = ["Labels", "argument_tensors", "to_numpy"]


class Labels:
    """Dimension names of a model's sites.

    A batch dimension is named after its plate, an event dimension after the time or the state it stands
    for, or ``<site>_dim_<i>``. Dimensions of size one on which there is no plate are dropped: they are only
    there so that a plate further left has its place.

    Args:
        sites: the model's sites.
        names: variables which must not share a name with a dimension.
        dims: names given by the user, by site.
        coords: coordinates given by the user, by dimension.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        names: Iterable[str],
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Any] | None = None,
    ) -> None:
        self.sites = sites
        self.taken = {*names, *sites}
        self.dims = {name: list(value) for name, value in (dims or {}).items()}
        self.user_coords = dict(coords or {})
        self.coords: dict[str, Any] = {}
        # Sites with times and states, those of the solves first: others of the same shape share their names.
        timed = [site for site in sites.values() if site.times is not None and site.event_dim == 2]
        self.timed = sorted(timed, key=lambda site: site.kind != "ode")
        for site in self.timed:
            self._name_coords(site)

    def label(self, name: str, value: Tensor, lead: int, kind: str = "value") -> tuple[np.ndarray, list[str]]:
        """A value as an array and the names of its dimensions.

        Args:
            name: the site, or for ``kind="argument"`` the argument.
            value: ``(*lead, *site shape)``.
            lead: number of leading dimensions (chain, draw) to leave alone.
            kind: ``"value"``, ``"log_likelihood"`` (event dimensions may be gone) or ``"argument"``.

        Returns:
            The array without dropped dimensions, and the names of its dimensions after the leading ones.
        """
        shape = tuple(value.shape[lead:])
        site = self.sites.get(name)
        if kind == "argument":
            names, keep = self._argument_dims(name, value), [True] * len(shape)
        elif site is None:
            names, keep = [f"{name}_dim_{i}" for i in range(len(shape))], [True] * len(shape)
        else:
            events = len(shape) - len(site.batch_shape)
            names, keep = self._site_dims(site, shape, events)
        kept = tuple(n for n, k in zip(shape, keep, strict=True) if k)
        names = [self._free(n) for n, k in zip(names, keep, strict=True) if k]
        if name in self.dims and kind != "argument":
            names = self._user_dims(name, kept, names)
        return to_numpy(value.reshape(*value.shape[:lead], *kept)), names

    def names_of(self, site: Site) -> list[str]:
        """Names of all dimensions of a site's value, none dropped."""
        return [self._free(name) for name in self._site_dims(site, site.shape, site.event_dim)[0]]

    def used_coords(self, dims: Iterable[Sequence[str]]) -> dict[str, Any]:
        """Coordinates of the dimensions that occur in ``dims``; the user's own win."""
        used = {name for names in dims for name in names}
        return {name: value for name, value in {**self.coords, **self.user_coords}.items() if name in used}

    def settings(self) -> dict[str, Any]:
        """Solver settings of the ODE sites as flat attributes, such as ``{"z_method": "tsit5"}``."""
        return {
            f"{site.name}_{key}": value if isinstance(value, int | float | str) else str(value)
            for site in self.sites.values()
            for key, value in site.settings.items()
            if value is not None
        }

    def _site_dims(self, site: Site, shape: tuple[int, ...], events: int) -> tuple[list[str], list[bool]]:
        batch = len(shape) - events
        plates = {plate.dim + batch: plate for plate in site.plates}
        names = [plates[i].name if i in plates else f"{site.name}_batch_{i}" for i in range(batch)]
        keep = [i in plates or shape[i] != 1 for i in range(batch)]
        names += self._event_dims(site, shape[batch:])
        return names, keep + [True] * events

    def _event_dims(self, site: Site, shape: tuple[int, ...]) -> list[str]:
        if site.times is not None and site.event_dim == 2:
            time = next((s for s in self.timed if torch.equal(s.times, site.times)), site)
            state = next((s for s in self.timed if _same_states(s, site)), site)
            return [_grid_dims(time)[0], _grid_dims(state)[1]][: len(shape)]
        for other in self.timed:
            if shape == other.event_shape:
                return _grid_dims(other)
        measured = [s for s in self.timed if s.kind != "ode"] or self.timed
        for others, names in ((self.timed, _INITIAL), (measured, _ERRORS)):
            for other in others:
                known = {name.format(other.name) for name in names}
                if shape == other.event_shape[1:] and site.name in known:
                    return self._event_dims(other, other.event_shape)[1:]
        return [f"{site.name}_dim_{i}" for i in range(len(shape))]

    def _argument_dims(self, name: str, value: Tensor) -> list[str]:
        for site in self.timed:
            if value.ndim == 1 and site.times.ndim == 1 and site.times.shape == value.shape:
                return _grid_dims(site)[:1]
            if name == f"{site.name}_times" and value.shape == (*site.batch_shape, site.event_shape[0]):
                return self._site_dims(site, site.shape, 2)[0][:-1]
        return [f"{name}_dim_{i}" for i in range(value.ndim)]

    def _name_coords(self, site: Site) -> None:
        time, state = _grid_dims(site)
        times = site.times
        if times.ndim > 1 and bool((times == times.reshape(-1, times.shape[-1])[0]).all()):
            times = times.reshape(-1, times.shape[-1])[0]  # one grid, said once for each row
        if times.ndim == 1:
            self.coords[time] = to_numpy(times)
        if site.states is not None and len(site.states) == site.event_shape[1]:
            self.coords[state] = list(site.states)

    def _free(self, dim: str) -> str:
        return f"{dim}_dim" if dim in self.taken else dim

    def _user_dims(self, name: str, kept: tuple[int, ...], found: list[str]) -> list[str]:
        given = self.dims[name]
        if len(given) > len(kept):
            raise ValueError(f"dims of '{name}': expected at most {len(kept)} names for shape {kept}, got {given}")
        # Names for the event dimensions alone are enough.
        return found[: len(found) - len(given)] + given


def argument_tensors(posterior: Posterior) -> dict[str, Tensor]:
    """What the model was given and did not observe: its tensor arguments, and the times of its ODE sites."""
    sites = posterior.sites
    found: dict[str, Tensor] = {}
    if posterior.model is not None:
        fn = inspect.unwrap(posterior.model)
        fn = fn.forward if isinstance(fn, torch.nn.Module) else fn
        try:
            arguments = inspect.signature(fn).bind(*posterior.args, **posterior.kwargs).arguments
        except (TypeError, ValueError):
            arguments = {f"argument_{i}": value for i, value in enumerate(posterior.args)} | dict(posterior.kwargs)
        observed = [sites[name].value for name in sites.observed]
        for name, value in arguments.items():
            if isinstance(value, Tensor) and name not in sites and not any(_same(value, y) for y in observed):
                found[name] = value
    for name in (*sites.ode, *sites.observed):
        times = sites[name].times
        if times is not None and times.ndim > 1:
            found.setdefault(f"{name}_times", times)
        elif times is not None and not any(_same(times, value) for value in found.values()):
            found[f"{name}_times"] = times
    return found


# Names under which people keep one number for each state, and for each measured value.
_INITIAL = ("{}0", "{}_0", "{}_init", "z0", "y0", "x0", "z_0", "y_0", "x_0", "init")
_ERRORS = ("sigma", "sd", "noise", "error", "noise_scale", "obs_scale", "obs_sd")


def _grid_dims(site: Site) -> list[str]:
    return [f"{site.name}_time", f"{site.name}_{'state' if site.kind == 'ode' else 'value'}"]


def _same_states(a: Site, b: Site) -> bool:
    return a.event_shape[1] == b.event_shape[1] and b.states in (None, a.states)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def to_numpy(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
