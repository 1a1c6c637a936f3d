# SPDX-License-Identifier: Apache-2.0
"""Latent ODEs: a neural vector field in a latent space, between irregular observations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn

from pyro_latentde.distributions.likelihoods import Gaussian
from pyro_latentde.guides.series_guide import SeriesGuide
from pyro_latentde.models.guide_parts import shared_guide
from pyro_latentde.models.latents import Latent
from pyro_latentde.models.series_model import SeriesModel
from pyro_latentde.models.shooting import Shooting
from pyro_latentde.models.unknown import sampled_weights_
from pyro_latentde.nn import MLP, RecurrentEncoder

__all__ = ["Guide", "LatentODE", "Model", "NeuralField"]


class NeuralField(nn.Module):
    r"""The vector field :math:`\dot z = u(z) / \tau`, the same at all times.

    Args:
        network: u, (S,) -> (S,).
        time_scale: the unit of time :math:`\tau` in which u is of order one.
    """

    def __init__(self, network: nn.Module, time_scale: float = 1.0) -> None:
        super().__init__()
        self.network, self.rate = network, 1.0 / time_scale

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """dz/dt of one row, (S,)."""
        return self.rate * self.network(z)


class Model(SeriesModel):
    r"""The generative side: :math:`z_0 \sim N(0, I),\ \dot z = u(z)`, y from a decoder.

    Args:
        latent: number of latent dimensions with a prior.
        decoder: network (..., latent + augment) -> (..., K).
        likelihood: outputs (..., T, K) -> distribution of the values (..., T, D).
        network: u, by default an MLP with two hidden layers of ``units``.
        units: their width.
        augment: further dimensions that begin at zero.
        weight_sd: with a number, the weights of u have normal priors of this sd over root fan-in, and a posterior.
        time_scale: unit of time of u.
        shooting: multiple shooting.
        settings: of the solve, as for :func:`~pyro_latentde.odesolve`.

    References:
        Rubanova, Chen and Duvenaud, "Latent ODEs for irregularly-sampled time series", NeurIPS 2019, arXiv:1907.03907.
    """

    def __init__(
        self,
        latent: int,
        decoder: nn.Module,
        likelihood: Callable[[Tensor], dist.Distribution],
        *,
        network: nn.Module | None = None,
        units: int = 100,
        augment: int = 0,
        weight_sd: float | None = None,
        time_scale: float = 1.0,
        shooting: Shooting | None = None,
        **settings: Any,
    ) -> None:
        size = latent + augment
        network = MLP(size, size, hidden=(units, units), activation="tanh") if network is None else network
        field = NeuralField
        if weight_sd is not None:
            to_pyro_module_(network)
            sampled_weights_(network, weight_sd)
            field = PyroModule[NeuralField]  # gives the sampled weights names below the model's
        super().__init__(
            field(network, time_scale),
            Latent(dist.Normal(torch.zeros(latent), 1.0).to_event(1)),
            decoder,
            likelihood,
            augment=augment,
            shooting=shooting,
            **settings,
        )


class Guide(SeriesGuide):
    """The amortized side: a series encoder that reads backwards in time, and a head for z0.

    Args:
        model: the model, for its sites.
        values: number D of values at each time.
        frames: network (..., D) -> (..., F) of one time's values, for pictures; none by default.
        encoder: a series encoder, such as :class:`.ODERNNEncoder`; by default a GRU.
        hidden: width of the default encoder.
        head: ``"normal"``, ``"full_rank"`` or ``"flow"``.
        time_scale: unit of time for the default encoder.
        covariates: number of the series' covariates.
    """

    def __init__(
        self,
        model: Model,
        values: int,
        *,
        frames: nn.Module | None = None,
        encoder: nn.Module | None = None,
        hidden: int = 40,
        head: str = "normal",
        time_scale: float = 1.0,
        covariates: int = 0,
    ) -> None:
        if encoder is None:
            size = values if frames is None else frames.out_features
            encoder = RecurrentEncoder(size, hidden, cell="gru", time_scale=time_scale)
        super().__init__(
            model.local_priors(),
            encoder,
            frames=frames,
            head=head,
            shared=shared_guide(model),
            stations={} if model.shooting is None else {"shots": model.shooting.stations},
            covariates=covariates,
        )


class LatentODE(nn.Module):
    """A latent ODE: ``model`` and ``guide`` with sensible defaults, to be fitted by ``infer.fit_svi``.

    Args:
        values: number D of values at each time.
        latent: number of latent dimensions.
        decoder: network (..., latent + augment) -> (..., K); by default linear, as published.
        likelihood: by default normal with one learned sd.
        guide: keywords of :class:`Guide`.
        options: further keywords of :class:`Model`: ``units=``, ``augment=``, ``shooting=``, solver settings.

    Example:
        >>> import torch, pyro_latentde as lde
        >>> pair = LatentODE(values=2, latent=4, units=10)
        >>> series = lde.Series.from_tensors(torch.linspace(0, 1, 5), torch.randn(8, 5, 2))
        >>> fit = lde.infer.fit_svi(pair.model, pair.guide, series, num_steps=2, batch_size=4, progress=False)
        >>> len(fit.losses)
        2
    """

    def __init__(
        self,
        *,
        values: int,
        latent: int,
        decoder: nn.Module | None = None,
        likelihood: Callable[[Tensor], dist.Distribution] | None = None,
        guide: Mapping[str, Any] | None = None,
        augment: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        likelihood = Gaussian(sd="learned") if likelihood is None else likelihood
        if decoder is None:
            decoder = nn.Linear(latent + augment, values * getattr(likelihood, "outputs_per_value", 1))
        self.model = Model(latent, decoder, likelihood, augment=augment, **options)
        self.guide = Guide(self.model, values, **dict(guide or {}))
