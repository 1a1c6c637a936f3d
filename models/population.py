# SPDX-License-Identifier: Apache-2.0
"""A population of series: parameters of each, around typical values that all of them tell of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_latentde.data.series import Series
from pyro_latentde.distributions.placement import placed
from pyro_latentde.errors import DataError, LatentDEError
from pyro_latentde.sites.observe_site import observe
from pyro_latentde.sites.ode_site import ode
from pyro_latentde.sites.population_site import Link, inverse_link, population
from pyro_latentde.sites.series_plate import series_plate

__all__ = ["Population", "Varying"]

Values = dict[str, Tensor]


class Varying(NamedTuple):
    """A parameter that differs from series to series.

    Args:
        typical: prior of its typical value (the median over the population), in the parameter's own unit; its support
            is that of the parameter.
        spread: prior of its standard deviation over the population, on the scale of the link: the logarithm of a
            positive parameter, the logit of one in (0, 1), the parameter itself if it may be any number.
    """

    typical: dist.Distribution
    spread: dist.Distribution


class Population:
    r"""Hierarchical model of N series, solved in one batch:

    .. math:: g(\theta_n) \sim N(g(\bar\theta), \omega), \quad \dot z_n = f(t, z_n, \theta_n, \phi, x_n), \quad
              y_{nt} \sim p(y \mid z_n(t), \theta_n, \phi, x_n)

    with local parameters theta around typical ones, shared phi and known covariates x. Sites: each shared parameter;
    "CL_typical" and "CL_spread" for a local parameter CL; in the plate "series" CL itself (N,), see
    :func:`~pyro_latentde.population` for what is sampled; "z" (N, T, S) and "obs" (N, T, D).

    Args:
        field: vector field f(t, z, p) of one row; p is a dictionary of local and shared parameters and covariates.
        z0: the S numbers of the start; or a function of p that returns S of them, numbers or entries of p, such as
            ``lambda p: (p["dose"], 0.0)``.
        local: name -> :class:`Varying`, or a pair (typical, spread).
        likelihood: function of the states (N, T, S) and of p that returns the distribution of the values (N, T, D). The
            entries of p here have the shape (N, 1, 1), so that they broadcast against states.
        shared: priors of what all series have in common, by name; scalars or vectors.
        covariates: names of the columns of the series' covariates.
        centered: one for all local parameters, or by name (non-centred where left out). Centre what each series tells
            better than the population does.
        correlation: concentration of an LKJ prior of the correlation of the local parameters, on the scale of their
            links, 1 for a flat one; None for independent ones.
        t0: time of the start; by default the first time of each series.
        states: names of the S states.
        settings: of the solve: ``method``, ``rtol``, ``atol``, ``step_size``, ...

    Raises:
        LatentDEError: names that clash or are unknown, priors that do not fit.

    References:
        Gelman and Hill (2006), Data Analysis Using Regression and Multilevel/Hierarchical Models.
        Lavielle (2014), Mixed Effects Models for the Population Approach.
        Lewandowski, Kurowicka and Joe (2009), Generating random correlation matrices, J. Multivariate Analysis 100.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_latentde as lde
        >>> decay = lde.models.Population(
        ...     lambda t, z, p: -p["k"] * z,
        ...     z0=lambda p: (p["dose"],),
        ...     local={"k": (dist.LogNormal(0.0, 0.5), dist.HalfNormal(0.5))},
        ...     likelihood=lambda z, p: dist.LogNormal(z.log(), p["sigma"]),
        ...     shared={"sigma": dist.HalfNormal(0.5)},
        ...     covariates=("dose",),
        ... )
        >>> dose = torch.ones(6, 1).double()
        >>> series = lde.Series.from_tensors(torch.linspace(0, 2, 5), torch.ones(6, 5, 1), covariates=dose)
        >>> trace = pyro.poutine.trace(decay).get_trace(series)
        >>> trace.nodes["k_typical"]["value"].shape, trace.nodes["log_k_decentered"]["value"].shape
        (torch.Size([]), torch.Size([6]))
    """

    def __init__(
        self,
        field: Callable,
        z0: Callable[[Values], Sequence[Any]] | Sequence[float] | Tensor,
        local: Mapping[str, Varying | tuple[dist.Distribution, dist.Distribution]],
        likelihood: Callable[[Tensor, Values], dist.Distribution],
        *,
        shared: Mapping[str, dist.Distribution] | None = None,
        covariates: Sequence[str] = (),
        centered: bool | float | Mapping[str, bool | float] = False,
        correlation: float | None = None,
        t0: float | None = None,
        states: Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        self.field, self.z0, self.likelihood = field, z0, likelihood
        self.local = {name: Varying(*pair) for name, pair in local.items()}
        self.shared, self.covariates = dict(shared or {}), tuple(covariates)
        self.centered = _by_name(centered, self.local)
        self.correlation, self.t0, self.states = correlation, t0, states
        self.settings = settings
        self._check()
        self._links = {name: _link(varying.typical.support) for name, varying in self.local.items()}

    def __call__(self, series: Series, times: Tensor | None = None) -> Tensor:
        """Score the series, or draw what would be observed at other times.

        Args:
            series: N series, with their covariates.
            times: (T,) or (N, T), where to draw instead.

        Returns:
            Values of the site "obs", (N, T, D).

        Raises:
            DataError: the series have other covariates.
        """
        like = series.times
        known = self._known(series)
        shared = {name: pyro.sample(name, placed(prior, like)) for name, prior in self.shared.items()}
        hyper = self._hyper(like)
        with series_plate(series):
            p = {**shared, **self._draw_local(hyper), **known}
            z = self._trajectory(p, series, times)
            fn = self.likelihood(z, {name: self._beside_states(name, value) for name, value in p.items()})
            return observe("obs", fn, series if times is None and series.values is not None else None)

    def _hyper(self, like: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Centre and spread of every local parameter on the scale of its link."""
        hyper = {}
        for name, varying in self.local.items():
            typical = pyro.sample(f"{name}_typical", placed(varying.typical, like))
            spread = pyro.sample(f"{name}_spread", placed(varying.spread, like))
            hyper[name] = (inverse_link(name, self._links[name]).inv(typical), spread)
        if self.correlation is not None:
            concentration = like.new_tensor(self.correlation)
            hyper["correlation"] = pyro.sample("correlation", dist.LKJCholesky(len(self.local), concentration))
        return hyper

    def _draw_local(self, hyper: dict[str, Any]) -> Values:
        if self.correlation is None:
            return {
                name: population(name, *hyper[name], link=self._links[name], centered=self.centered[name])
                for name in self.local
            }
        centre, spread = (torch.stack([hyper[name][i] for name in self.local], dim=-1) for i in (0, 1))
        links, centered = list(self._links.values()), next(iter(self.centered.values()))
        x = population("local", centre, spread, link=links, centered=centered, correlation=hyper["correlation"])
        entries = zip(self.local, x.unbind(-1), strict=True)
        return {name: pyro.deterministic(name, entry, event_dim=0) for name, entry in entries}

    def _known(self, series: Series) -> Values:
        """Covariates of the series, (N,) by name."""
        given = 0 if series.covariates is None else series.covariates.shape[-1]
        if given != len(self.covariates):
            raise DataError(
                f"the population has covariates {self.covariates}, the series {given} columns of them: give "
                "Series.from_tensors(..., covariates=(N, C)) one column for each name, and name every column."
            )
        return {name: series.covariates[:, i] for i, name in enumerate(self.covariates)}

    def _trajectory(self, p: Values, series: Series, times: Tensor | None) -> Tensor:
        grid = series.times
        where = grid if times is None else times.to(grid).expand(len(grid), -1)
        start = self.z0(p) if callable(self.z0) else self.z0
        zero = torch.zeros_like(grid[:, 0])
        z0 = torch.stack(torch.broadcast_tensors(*(zero + entry for entry in start)), dim=-1)
        t0 = grid[:, 0] if self.t0 is None else torch.full_like(grid[:, 0], self.t0)
        event_dims = {name: self._event_dim(name) for name in p}
        return ode("z", self.field, z0, where, p, t0=t0, states=self.states, event_dims=event_dims, **self.settings)

    def _event_dim(self, name: str) -> int:
        return len(self.shared[name].event_shape) if name in self.shared else 0

    def _beside_states(self, name: str, value: Tensor) -> Tensor:
        """With the dimensions of times and columns: (N,) -> (N, 1, 1), a shared vector (D,) -> (1, D)."""
        return value.unsqueeze(-2) if self._event_dim(name) else value[..., None, None]

    def _check(self) -> None:
        if not self.local:
            raise LatentDEError("Population: no local parameter; expected {name: (prior of typical, prior of spread)}.")
        names = [*self.local, *self.shared, *self.covariates]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise LatentDEError(f"Population: {twice} are named twice among local, shared and covariates.")
        for name, varying in self.local.items():
            if any(len(prior.event_shape) or len(prior.batch_shape) for prior in varying):
                raise LatentDEError(f"Population: the priors of {name!r} are not scalar; name its entries one by one.")
        if self.correlation is not None and len(set(map(float, self.centered.values()))) > 1:
            raise LatentDEError(
                "Population: correlated parameters are centred all or none; give centered=True or False."
            )


def _by_name(centered: bool | float | Mapping[str, bool | float], local: Mapping[str, Any]) -> dict[str, bool | float]:
    if not isinstance(centered, Mapping):
        return dict.fromkeys(local, centered)
    unknown = sorted(set(centered) - set(local))
    if unknown:
        raise LatentDEError(f"Population: centered names {unknown}; the local parameters are {list(local)}.")
    return {name: centered.get(name, False) for name in local}


def _link(support: constraints.Constraint) -> Link:
    """The link whose inverse maps the real line onto a support."""
    if support is constraints.real:
        return "identity"
    bounds = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    return {(0, None): "log", (0, 1): "logit"}.get(bounds) or biject_to(support)
