# SPDX-License-Identifier: Apache-2.0
"""What a Pyro model contains: sites with their shapes, plates, coordinates and observed values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_factor, site_is_subsample
from pyro.util import check_site_shape
from torch import Tensor

from pyro_latentde.errors import ShapeError, SolveError
from pyro_latentde.sites.ode_record import solve_record

__all__ = [
    "ModelSites",
    "Plate",
    "Site",
    "check_shape",
    "inspect_model",
    "kind_of",
    "observed_mask",
    "seeded",
]

KINDS = ("latent", "observed", "deterministic", "ode", "factor")
_MAX_TRIES = 20


@dataclass(frozen=True)
class Plate:
    """One vectorized plate of a site: its name, its (negative) batch dimension and its size there."""

    name: str
    dim: int
    size: int


@dataclass(frozen=True)
class Site:
    """One site of a model.

    Args:
        name: the site's name.
        kind: ``"latent"``, ``"observed"``, ``"deterministic"``, ``"ode"`` or ``"factor"``.
        shape: shape of its value, batch then event dimensions.
        event_dim: how many dimensions on the right belong to one event; 2, (time, state), for an ODE site.
        plates: the vectorized plates around it, from the leftmost dimension to the rightmost.
        states: names of the states of an ODE site, or of the values of an ``lde.observe`` site, if known.
        times: times of such a site, ``(T,)`` or ``(*batch, T)``, in the model's unit of time.
        support: the constraint a latent value obeys; None after loading from a file.
        value: the observed value; NaN where it was masked out.
        settings: solver settings of an ODE site, where it records them.
        pointwise: whether the log-likelihood is kept for every time and value, as ``lde.observe`` does.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    event_dim: int = 0
    plates: tuple[Plate, ...] = ()
    states: tuple[str, ...] | None = None
    times: Tensor | None = None
    support: Any = field(default=None, compare=False)
    value: Tensor | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    pointwise: bool = False

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape without the event dimensions."""
        return self.shape[: len(self.shape) - self.event_dim]

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one event."""
        return self.shape[len(self.shape) - self.event_dim :]


class ModelSites(dict[str, Site]):
    """Site name -> :class:`Site`, in the order in which the model visits them."""

    def of_kind(self, *kinds: str) -> tuple[str, ...]:
        """Names of the sites of these kinds, in the model's order."""
        return tuple(name for name, site in self.items() if site.kind in kinds)

    @property
    def latent(self) -> tuple[str, ...]:
        """Names of the latent sites."""
        return self.of_kind("latent")

    @property
    def observed(self) -> tuple[str, ...]:
        """Names of the observed sites."""
        return self.of_kind("observed")

    @property
    def deterministic(self) -> tuple[str, ...]:
        """Names of the deterministic sites that are not ODE sites."""
        return self.of_kind("deterministic")

    @property
    def ode(self) -> tuple[str, ...]:
        """Names of the ODE sites."""
        return self.of_kind("ode")

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Solver settings by ODE site: ``method``, ``engine``, ``rtol``, ``atol``, ``step_size``, where recorded."""
        return {name: self[name].settings for name in self.ode if self[name].settings}

    def solved_with(self, settings: Mapping[str, Mapping[str, Any]]) -> ModelSites:
        """The same sites with the settings their draws were made with, which need not be those of today."""
        changed = {
            name: replace(self[name], settings={**self[name].settings, **settings[name]})
            for name in self.ode
            if name in settings
        }
        return ModelSites({**self, **changed})


def inspect_model(model: Callable, *args: Any, **kwargs: Any) -> ModelSites:
    """Run a model once and write down its sites.

    The run uses a private random state and has Pyro's validation on, so that wrong shapes are reported
    with the site's name. Draws of the prior at which an ODE solve fails are tried again with other seeds.

    Args:
        model: Pyro model.
        *args: its arguments, data included.
        **kwargs: its keyword arguments.

    Returns:
        The sites by name.

    Raises:
        ShapeError: a site's value does not fit its distribution.
        ValueError: Pyro's own, when a site's shape and its plates do not fit.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("time", len(y)):
        ...         pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)
        >>> sites = inspect_model(model, torch.zeros(3))
        >>> sites.latent, sites.observed, sites["obs"].plates
        (('mu',), ('obs',), (Plate(name='time', dim=-1, size=3),))
    """
    for seed in range(_MAX_TRIES):
        try:
            with seeded(seed), torch.no_grad(), pyro.validation_enabled(False):
                trace = poutine.trace(model).get_trace(*args, **kwargs)
        except SolveError:  # of a solve that the model does by itself; of settings that cannot be met, at every seed
            if seed == _MAX_TRIES - 1:
                raise
            continue
        if not any(_solve_failed(node) for node in trace.nodes.values()):
            # NaN cannot be the reason of a complaint now: the same draw again, with the checks on.
            with seeded(seed), torch.no_grad(), pyro.validation_enabled(True):
                trace = poutine.trace(model).get_trace(*args, **kwargs)
                for node in trace.nodes.values():
                    if kind_of(node) is not None:
                        check_shape(node)
            break
    sites = ModelSites()
    for name, node in trace.nodes.items():
        kind = kind_of(node)
        if kind is not None:
            sites[name] = _describe(name, kind, node)
    return sites


def kind_of(node: dict[str, Any]) -> str | None:
    """Kind of a node of a Pyro trace, or None for plates, parameters and arguments."""
    if node["type"] != "sample" or site_is_subsample(node):
        return None
    if node["infer"].get("_deterministic"):
        return "ode" if "lde_ode" in node["infer"] else "deterministic"
    if site_is_factor(node):
        return "factor"
    return "observed" if node["is_observed"] else "latent"


def observed_mask(node: dict[str, Any]) -> Tensor | bool | None:
    """Mask that broadcasts against a node's value, of ``poutine.mask`` and masked distributions, or None."""
    fn = node["fn"]
    masks = [] if node["mask"] is None else [(node["mask"], fn.event_dim)]
    while isinstance(fn, dist.MaskedDistribution | dist.Independent):
        if isinstance(fn, dist.MaskedDistribution):
            # Inside an `Independent` such a mask may cover single components of an event.
            masks.append((fn._mask, fn.event_dim))
        fn = fn.base_dist
    result = None
    for mask, event_dim in masks:
        if isinstance(mask, Tensor):
            mask = mask.reshape(mask.shape + (1,) * event_dim)
        result = mask if result is None else result & mask
    return result


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random state set to ``seed`` inside, and as it was before outside."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _solve_failed(node: dict[str, Any]) -> bool:
    return solve_record(node) is not None and not bool(torch.isfinite(node["value"]).all())


def check_shape(node: dict[str, Any]) -> None:
    """Compare the shape of a node of a trace with its plates; its values are not looked at."""
    fn, value = node["fn"], node["value"]
    batch = value.shape[: value.ndim - fn.event_dim]
    try:
        shape = torch.broadcast_shapes(fn.batch_shape, batch)
        torch.broadcast_shapes(fn.event_shape, value.shape[value.ndim - fn.event_dim :])
    except RuntimeError:
        raise ShapeError(
            f"site '{node['name']}': the distribution has batch shape {tuple(fn.batch_shape)} and event "
            f"shape {tuple(fn.event_shape)}, the value has shape {tuple(value.shape)}. "
            "Did the data come transposed?"
        ) from None
    # Pyro's check looks at the shape of the log-density only, which need not be computed for it.
    check_site_shape({**node, "log_prob": torch.empty(shape)}, float("inf"))


def _describe(name: str, kind: str, node: dict[str, Any]) -> Site:
    value, fn = node["value"].detach(), node["fn"]
    facts = node["infer"].get("lde_ode" if kind == "ode" else "lde_observe") or {}
    plates = sorted(
        (Plate(f.name, f.dim, f.size) for f in node["cond_indep_stack"] if f.vectorized), key=lambda p: p.dim
    )
    times, states = facts.get("times"), facts.get("states")
    return Site(
        name=name,
        kind=kind,
        shape=tuple(value.shape),
        event_dim=fn.event_dim,
        plates=tuple(plates),
        states=None if states is None else tuple(states),
        times=None if times is None else times.detach(),
        support=fn.support if kind == "latent" else None,
        value=_masked(value, node) if kind == "observed" else None,
        settings=dict(facts.get("settings") or {}),
        pointwise="lde_observe" in node["infer"],
    )


def _masked(value: Tensor, node: dict[str, Any]) -> Tensor:
    """Observed value with NaN wherever a mask says that nothing was observed."""
    mask = observed_mask(node)
    if mask is None or mask is True or not value.is_floating_point():
        return value
    mask = torch.as_tensor(mask, device=value.device)
    return torch.where(mask, value, torch.full_like(value, torch.nan))
