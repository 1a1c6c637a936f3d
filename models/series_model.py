# SPDX-License-Identifier: Apache-2.0
"""The generative model of a batch of series: latent start and parameters, a differential equation, a decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_latentde.data.series import Series
from pyro_latentde.distributions.placement import placed
from pyro_latentde.errors import ShapeError
from pyro_latentde.models.latents import Latent
from pyro_latentde.models.shooting import Shooting
from pyro_latentde.models.unknown import draw_weights
from pyro_latentde.sites.observe_site import observe
from pyro_latentde.sites.ode_site import ode
from pyro_latentde.sites.series_plate import series_plate

__all__ = ["SeriesModel", "state_size"]


class SeriesModel(PyroModule):
    r"""For every series n

    .. math:: z_{n0} \sim p(z_0),\ \theta_n \sim p(\theta),\quad \dot z_n = f(t, z_n, \theta_n),\quad
              y_{nt} \sim p(y \mid g(z_n(t)))

    with sites "z0" (N, S), "theta" (N, P), "z" (N, T, S) and "obs" (N, T, D) in the plate "series", and a deterministic
    site for each named entry of theta, so that ``poutine.do`` can set it. GOKU-nets know f, up to theta; latent ODEs
    have a network for f and no theta.

    Args:
        field: vector field f(t, z, p) of one row; p is a dictionary of theta's entries and of the shared sites.
        z0: the latent start.
        decoder: network g, (..., S) -> (..., K).
        likelihood: from outputs (..., T, K) to the distribution of the values (..., T, D).
        theta: the parameters of each series.
        shared: priors of parameters that all series share, by name: sites outside the plate.
        states: names of the S states.
        augment: how many zeros are appended to z0, dimensions through which trajectories can pass each other.
        shooting: multiple shooting while series are scored.
        settings: of the solve: ``method``, ``rtol``, ``atol``, ``step_size``, ``engine``, ...

    References:
        Linial, Ravid, Eytan and Shalit, "Generative ODE modeling with known unknowns", CHIL 2021, arXiv:2003.10775.
        Chen, Rubanova, Bettencourt and Duvenaud, "Neural ordinary differential equations", NeurIPS 2018.
        Dupont, Doucet and Teh, "Augmented neural ODEs", NeurIPS 2019.
    """

    def __init__(
        self,
        field: Callable,
        z0: Latent,
        decoder: nn.Module,
        likelihood: Callable[[Tensor], dist.Distribution],
        *,
        theta: Latent | None = None,
        shared: Mapping[str, dist.Distribution] | None = None,
        states: Sequence[str] | None = None,
        augment: int = 0,
        shooting: Shooting | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.field, self.decoder, self.likelihood = field, decoder, likelihood
        self.z0, self.theta = z0, theta
        self.shared = dict(shared or {})
        self.states = None if states is None else tuple(states)
        self.augment, self.shooting, self.settings = augment, shooting, settings

    def forward(self, series: Series, times: Tensor | None = None) -> Tensor:
        """Score the series, or draw what would be observed at other times.

        Args:
            series: N series; their first times are those of z0.
            times: (T,) or (N, T), where to draw instead.

        Returns:
            Values of the site "obs", (N, T, D).
        """
        shared = {name: pyro.sample(name, placed(prior, series.times)) for name, prior in self.shared.items()}
        draw_weights(self)
        with series_plate(series):
            z0 = self.z0("z0", shared, series.times).to(series.times)
            params = self._params_of(shared, series)
            if self.augment:
                z0 = torch.cat([z0, z0.new_zeros(*z0.shape[:-1], self.augment)], dim=-1)
            z = self._trajectory(z0, series.times, params, times)
            fn = self.likelihood(self.decoder(z))
            return observe("obs", fn, series if times is None and series.values is not None else None)

    def _trajectory(self, z0: Tensor, grid: Tensor, params: Any, times: Tensor | None) -> Tensor:
        at = None if times is None else times.to(grid).expand(len(grid), -1)
        if self.shooting is not None:
            options = self.settings | {"event_dims": self._event_dims(params)}
            return self.shooting.trajectory("z", self.field, z0, grid, params, self.states, options, at)
        where = grid if at is None else at
        options = self.settings | {"event_dims": self._event_dims(params), "states": self.states}
        return ode("z", self.field, z0, where, params, t0=grid[:, 0], **options)

    def _event_dims(self, params: dict[str, Tensor] | None) -> dict[str, int]:
        """Entries of theta are scalars of each series; a shared parameter has the shape of its prior's event."""
        return {name: len(self.shared[name].event_shape) if name in self.shared else 0 for name in params or ()}

    def _params_of(self, shared: dict[str, Tensor], series: Series) -> dict[str, Tensor] | None:
        params = dict(shared)
        if self.theta is not None:
            theta = self.theta("theta", shared, series.times).to(series.times)
            names = self.theta.names(shared) or tuple(f"theta{i}" for i in range(theta.shape[-1]))
            if len(names) != theta.shape[-1]:
                raise ShapeError(
                    f"theta has {theta.shape[-1]} entries for {len(names)} names, {', '.join(names)}: give names= one "
                    "for each entry of the prior, or of what the head gives."
                )
            entries = zip(names, theta.unbind(-1), strict=True)
            params |= {name: pyro.deterministic(name, entry, event_dim=0) for name, entry in entries}
        return params or None

    def local_priors(self) -> dict[str, dist.Distribution]:
        """Prior of each site in the plate of series, for guides: its support and event shape matter, not its values."""
        shared = _drawn(self.shared)
        priors = {latent.site(name): latent.prior(shared) for name, latent in self._latents().items()}
        if self.shooting is not None:
            size = state_size(self.z0, self.shared) + self.augment
            priors["shots"] = dist.Normal(torch.zeros(size), 1.0).to_event(1)
        return priors

    def _latents(self) -> dict[str, Latent]:
        return {"z0": self.z0} if self.theta is None else {"z0": self.z0, "theta": self.theta}


def state_size(z0: Latent, shared: Mapping[str, dist.Distribution] | None = None) -> int:
    """Length S of the latent start, asked of its prior or of its head.

    Args:
        z0: the latent start.
        shared: priors of the shared sites, which the prior of the start may depend on.

    Returns:
        S.
    """
    prior = z0.prior(_drawn(shared or {}))
    with torch.no_grad(), poutine.block():
        return prior.event_shape[0] if z0.head is None else z0.head(prior.sample()).shape[-1]


def _drawn(priors: Mapping[str, dist.Distribution]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: prior.sample() for name, prior in priors.items()}
