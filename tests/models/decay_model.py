# SPDX-License-Identifier: Apache-2.0
"""A model of series for tests: exponential decay, whose densities are known."""

import pyro.distributions as dist
import torch

import pyro_latentde as lde
from pyro_latentde.distributions.likelihoods import Gaussian
from pyro_latentde.models.latents import Latent
from pyro_latentde.models.series_model import SeriesModel

N, T = 3, 7
TIMES = torch.linspace(0.0, 1.2, T, dtype=torch.float64)


def series(n: int = N, dtype: torch.dtype = torch.float64) -> lde.Series:
    generator = torch.Generator().manual_seed(0)
    return lde.Series.from_tensors(
        TIMES.to(dtype), torch.randn(n, T, 1, generator=generator, dtype=torch.float64).to(dtype)
    )


def decay(t: torch.Tensor, z: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
    return -p["rate"] * z


def model(**options) -> SeriesModel:
    """Exponential decay: z(t) = z0 exp(-rate t), observed with sd .5."""
    zero = torch.zeros(1, dtype=torch.float64)
    options = {"theta": Latent({"rate": dist.LogNormal(zero.sum(), 0.5)})} | options
    start = Latent(dist.Normal(zero, 1.0).to_event(1))
    return SeriesModel(decay, start, torch.nn.Identity(), Gaussian(sd=0.5), rtol=1e-9, atol=1e-9, **options)


def draw(n: int = N) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "z0": torch.randn(n, 1, generator=generator, dtype=torch.float64),
        "theta": torch.rand(n, 1, generator=generator, dtype=torch.float64) + 0.5,
    }
