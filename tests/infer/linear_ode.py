# SPDX-License-Identifier: Apache-2.0
"""Two pairs for tests of training: a linear-Gaussian latent ODE with everything known exactly, and a small network."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn

import pyro_latentde as lde

MATRIX = torch.tensor([[-0.3, 1.0], [-1.0, -0.1]], dtype=torch.float64)
OUTPUT = torch.tensor([[1.0, 0.5], [0.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
PRIOR_MEAN = torch.tensor([0.5, -0.5], dtype=torch.float64)
PRIOR_SD = torch.tensor([1.0, 0.7], dtype=torch.float64)
NOISE = 0.4


def linear_series(n=6, length=7, seed=0):
    """Draws of the linear model at irregular times, a fifth of the values missing."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    times = torch.rand(n, length, generator=generator, dtype=torch.float64).sort(dim=1).values * 4.0
    z0 = PRIOR_MEAN + PRIOR_SD * normal(n, 2)
    z = torch.einsum("ntij,nj->nti", torch.matrix_exp(times[..., None, None] * MATRIX), z0)
    values = z @ OUTPUT.T + NOISE * normal(n, length, 3)
    mask = torch.rand(n, length, 3, generator=generator) > 0.2
    return lde.Series.from_tensors(times, values, mask=mask)


def linear_model(series):
    with lde.series_plate(series):
        z0 = pyro.sample("z0", dist.Normal(PRIOR_MEAN, PRIOR_SD).to_event(1))
        times = torch.cat([torch.zeros(len(series), 1, dtype=torch.float64), series.times], 1)
        z = lde.ode("z", lambda t, y, a: y @ a.T, z0, times, MATRIX, rtol=1e-9, atol=1e-9)
        lde.observe("obs", lambda z: dist.Normal(z @ OUTPUT.T, NOISE), series, z[..., 1:, :])


def exact(series):
    """Log-evidence (N,), and mean (N, 2) and covariance (N, 2, 2) of the posterior of z0."""
    evidence, means, covariances = [], [], []
    prior = torch.diag(PRIOR_SD**2)
    for times, values, mask in zip(series.times, series.values, series.mask, strict=True):
        design = (OUTPUT @ torch.matrix_exp(times[:, None, None] * MATRIX))[mask]  # (observed, 2)
        noise = NOISE**2 * torch.eye(len(design), dtype=torch.float64)
        covariance = design @ prior @ design.T + noise
        y = values[mask]
        evidence.append(dist.MultivariateNormal(design @ PRIOR_MEAN, covariance).log_prob(y))
        gain = prior @ design.T @ torch.linalg.inv(covariance)
        means.append(PRIOR_MEAN + gain @ (y - design @ PRIOR_MEAN))
        spread = prior - gain @ design @ prior
        covariances.append((spread + spread.T) / 2)
    return torch.stack(evidence), torch.stack(means), torch.stack(covariances)


class ExactGuide(PyroModule):
    """The exact posterior, moved and widened by two parameters that are zero at the start."""

    def __init__(self, shift=0.0, widen=0.0):
        super().__init__()
        self.shift = nn.Parameter(torch.full((2,), shift, dtype=torch.float64))
        self.widen = nn.Parameter(torch.tensor(widen, dtype=torch.float64))

    def forward(self, series):
        _, mean, covariance = exact(series)
        with lde.series_plate(series):
            pyro.sample("z0", dist.MultivariateNormal(mean + self.shift, covariance * self.widen.exp()))


class Decoder(PyroModule):
    """Static code -> values by a network with dropout and running means; a shared slope that depends on time."""

    def __init__(self, values=3, dropout=0.2, dtype=torch.float64):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, values))
        self.to(dtype)
        self.dtype = dtype

    def forward(self, series):
        slope = pyro.sample("slope", dist.Normal(torch.zeros((), dtype=self.dtype), 1.0))
        with lde.series_plate(series):
            code = pyro.sample("code", dist.Normal(torch.zeros(2, dtype=self.dtype), 1.0).to_event(1))
            mean = self.network(code)[..., None, :] + slope * series.times[..., None]
            lde.observe("obs", lambda z: dist.Normal(z, 0.5), series, mean)


class Encoder(PyroModule):
    """Mean over time -> normal code."""

    def __init__(self, values=3, dtype=torch.float64):
        super().__init__()
        self.head = nn.Linear(values, 4).to(dtype)
        self.center = nn.Parameter(torch.zeros((), dtype=dtype))
        self.spread = nn.Parameter(torch.zeros((), dtype=dtype))

    def forward(self, series):
        pyro.sample("slope", dist.Normal(self.center, self.spread.exp()))
        summary = torch.where(series.mask, series.values, 0.0).mean(1)
        mean, log_sd = self.head(summary).chunk(2, -1)
        with lde.series_plate(series):
            pyro.sample("code", dist.Normal(mean, (log_sd - 1).exp()).to_event(1))


def network_pair(seed=0, dtype=torch.float64, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Decoder(dtype=dtype, **options), Encoder(dtype=dtype)


def smooth_series(n=12, length=10, seed=1):
    generator = torch.Generator().manual_seed(seed)
    phase = torch.rand(n, 1, 1, generator=generator).double() * math.tau
    times = torch.arange(float(length), dtype=torch.float64) / length
    wave = torch.sin(phase + torch.arange(3.0).double()) + 0.3 * times[None, :, None]
    noise = torch.randn(n, length, 3, generator=generator, dtype=torch.float64)
    return lde.Series.from_tensors(times, wave + 0.3 * noise)
