# SPDX-License-Identifier: Apache-2.0
"""A model whose posterior, likelihood and predictive law are known in closed form."""

import math

import pyro
import pyro.distributions as dist
import torch

from pyro_latentde.posterior import Posterior, inspect_model

SD_PRIOR, SD_NOISE = 2.0, 0.5


def model(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=y.dtype), SD_PRIOR))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, SD_NOISE), obs=y)


def data(n=5):
    return torch.linspace(0.3, 1.7, n, dtype=torch.float64)


def exact(y):
    """Mean and sd of mu given y."""
    precision = 1 / SD_PRIOR**2 + len(y) / SD_NOISE**2
    return float(y.sum() / SD_NOISE**2 / precision), math.sqrt(1 / precision)


def posterior(y, chains=2, draws=2000):
    """Exact, independent draws."""
    mean, sd = exact(y)
    generator = torch.Generator().manual_seed(1)
    samples = {"mu": mean + sd * torch.randn(chains, draws, generator=generator, dtype=torch.float64)}
    return Posterior(
        samples=samples,
        stats={"diverging": torch.arange(chains * draws).reshape(chains, draws) % 7 == 0},
        sites=inspect_model(model, y),
        model=model,
        args=(y,),
        attrs={"inference": "nuts", "seed": 1},
    )
