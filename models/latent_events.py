# SPDX-License-Identifier: Apache-2.0
"""Latent ODEs of event times: a hidden state moves, and events come at a rate that depends on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_latentde.data.series import Series
from pyro_latentde.distributions.placement import placed
from pyro_latentde.guides.series_guide import SeriesGuide
from pyro_latentde.models.event_series import as_events
from pyro_latentde.models.latent_ode import NeuralField
from pyro_latentde.nn import MLP
from pyro_latentde.sites.events_site import events
from pyro_latentde.sites.series_plate import series_plate
from pyro_latentde.solve.integrate import odesolve

__all__ = ["EventSums", "LatentEvents", "Model"]


class LogRate(nn.Module):
    r"""The logarithm of the rate of events, :math:`g(z) = w \cdot z + \log r`.

    Args:
        latent: length S of z.
        rate: r at the start of training.
    """

    def __init__(self, latent: int, rate: float) -> None:
        super().__init__()
        self.linear = nn.Linear(latent, 1)
        nn.init.constant_(self.linear.bias, math.log(rate))

    def forward(self, t: Tensor | None, z: Tensor) -> Tensor:
        """(..., S) -> (...); it is the same at all times."""
        return self.linear(z).squeeze(-1)


class EventSums(nn.Module):
    r"""What the events of each series say together,

    .. math:: e = g\Big(\frac1c \sum_i \varphi(t_i)\Big), \quad t_i \text{ since the start of the series.}

    The density of a Poisson process, too, knows the events only through sums over them, of the logarithm of its
    intensity. There is no order in which they are read, and so no loop over hundreds of events.

    Args:
        hidden: length H of the encoding, and width of the networks.
        time_scale: unit of time of the features.
        count: c, about as many events as a series has.
    """

    def __init__(self, hidden: int = 40, *, time_scale: float = 1.0, count: float = 1.0) -> None:
        super().__init__()
        self.out_features, self.time_scale, self.count = hidden, time_scale, count
        self.features = MLP(1, hidden, hidden=(hidden,), activation="tanh", output="tanh")
        self.joined = MLP(hidden, hidden, hidden=(hidden,), activation="tanh")

    def forward(self, times: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Times (N, T), values and mask (N, T, 1) to encodings (N, H); an event is an observed 1."""
        events = torch.where(mask, values, 0.0)
        return self.joined((events * self.features(times[..., None] / self.time_scale)).sum(1) / self.count)


class Model(PyroModule):
    r"""The generative side:

    .. math:: z_0 \sim N(0, I), \quad \dot z = u(z) / \tau, \quad t_1, t_2, \dots \sim \mathrm{PoissonProcess}(e^{g(z)})

    with sites "z0" and "events" in the plate "series". The rate is integrated in the same solve as z.

    Args:
        latent: number S of latent dimensions.
        units: width of the hidden layer of u.
        time_scale: unit of time in which u is of order one.
        rate: events per unit of time at the start of training, such as their mean.
        settings: of the solve, as for :func:`~pyro_latentde.odesolve`.

    References:
        Rubanova, Chen and Duvenaud, "Latent ODEs for irregularly-sampled time series", NeurIPS 2019, section 3.2.
    """

    def __init__(
        self, latent: int, *, units: int = 30, time_scale: float = 1.0, rate: float = 1.0, **settings: Any
    ) -> None:
        super().__init__()
        self.field = NeuralField(MLP(latent, latent, hidden=(units,), activation="tanh"), time_scale)
        self.log_rate = LogRate(latent, rate)
        self.prior = dist.Normal(torch.zeros(latent), 1.0).to_event(1)
        self.settings = settings

    def forward(self, series: Series, times: Tensor | None = None) -> Tensor:
        """Score the events of N series, or say how often they come.

        Args:
            series: made by :func:`.as_series`.
            times: (T,) or (N, T), at which the intensity is wanted instead.

        Returns:
            States at the events, (N, E, S), or the site "intensity", (N, T), in events per unit of time.
        """
        with series_plate(series):
            z0 = pyro.sample("z0", placed(self.prior, series.times))
            if times is None:
                return events("events", self.field, self.log_rate, z0, as_events(series), **self.settings)
            return pyro.deterministic("intensity", self.intensity(z0, times, series.times[:, 0]), event_dim=1)

    def intensity(self, z0: Tensor, times: Tensor, start: Tensor | float) -> Tensor:
        """Events per unit of time at given times.

        Args:
            z0: (*batch, S), such as the draws of ``fit.encode``, (draws, N, S).
            times: (T,) or (*batch, T), not before the start.
            start: time of z0, () or (*batch,).

        Returns:
            Intensities (*batch, T).
        """
        start = torch.as_tensor(start, dtype=z0.dtype, device=z0.device)
        z = odesolve(self.field, z0, times.to(z0), t0=start, **self.settings).ys
        return self.log_rate(None, z).exp()


class LatentEvents(nn.Module):
    """A latent ODE of event times: ``model`` and ``guide``, to be fitted by ``infer.fit_svi``.

    Args:
        latent: number of latent dimensions.
        guide: keywords of :class:`.SeriesGuide`, and ``encoder=``, by default :class:`EventSums`.
        options: further keywords of :class:`Model`.

    Example:
        >>> import torch, pyro_latentde as lde
        >>> from pyro_latentde.models.systems import bursts
        >>> series = bursts.simulate(8, end=1.0).series
        >>> pair = LatentEvents(latent=2, units=5, rate=10.0)
        >>> fit = lde.infer.fit_svi(pair.model, pair.guide, series, num_steps=2, batch_size=4, progress=False)
        >>> z0 = fit.encode(series, num_samples=3)["z0"]
        >>> pair.model.intensity(z0, torch.linspace(0, 1, 5), 0.0).shape
        torch.Size([3, 8, 5])
    """

    def __init__(self, *, latent: int, guide: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.model = Model(latent, **options)
        keywords = dict(guide or {})
        encoder = keywords.pop("encoder", None) or EventSums()
        self.guide = SeriesGuide({"z0": self.model.prior}, encoder, **keywords)
