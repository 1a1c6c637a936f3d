# SPDX-License-Identifier: Apache-2.0
"""The lynx-hare problem as this package and as Pyro + torchdiffeq solve it."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torchdiffeq import odeint

from pyro_latentde.data import load_lynx_hare
from pyro_latentde.distributions.truncated_normal import TruncatedNormal

__all__ = ["TIMES", "near_posterior", "peer_model", "peer_solve", "rows", "solve"]

TOLERANCE = 1e-6
METHOD = "dopri5"
TIMES = torch.arange(21, dtype=torch.float64)
THETA = torch.tensor([0.547, 0.0277, 0.800, 0.0241], dtype=torch.float64)
START = torch.tensor([34.0, 5.94], dtype=torch.float64)


def rows(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Parameters ``(count, 4)`` and initial states ``(count, 2)`` spread like the posterior (about 10 %)."""
    generator = torch.Generator().manual_seed(seed)
    spread = lambda shape: 1 + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return THETA * spread((count, 4)), START * spread((count, 2))


def solve(theta: Tensor, y0: Tensor, engine: str = "auto") -> Tensor:
    """This package: ``(count, 21, 2)``."""
    import pyro_latentde as lde

    def field(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        (u, v), (a, b, c, d) = y, p
        return torch.stack([(a - b * v) * u, (-c + d * u) * v])

    settings = {"method": METHOD, "rtol": TOLERANCE, "atol": TOLERANCE, "engine": engine}
    return lde.odesolve(field, y0, TIMES, theta, **settings).ys


def peer_solve(theta: Tensor, y0: Tensor) -> Tensor:
    """torchdiffeq, one batched call (one step size for all rows): ``(21, count, 2)``."""
    a, b, c, d = theta.unbind(-1)

    def field(t: Tensor, y: Tensor) -> Tensor:
        u, v = y[..., 0], y[..., 1]
        return torch.stack([(a - b * v) * u, (-c + d * u) * v], dim=-1)

    return odeint(field, y0, TIMES, method=METHOD, rtol=TOLERANCE, atol=TOLERANCE)


def peer_model() -> None:
    """The same Pyro model with torchdiffeq inside."""
    counts = load_lynx_hare().values[0]
    one = counts.new_tensor(1.0)
    a = pyro.sample("alpha", TruncatedNormal(one, 0.5))
    b = pyro.sample("beta", TruncatedNormal(0.05 * one, 0.05))
    c = pyro.sample("gamma", TruncatedNormal(one, 0.5))
    d = pyro.sample("delta", TruncatedNormal(0.05 * one, 0.05))
    z0 = pyro.sample("z0", dist.LogNormal(counts.new_full((2,), math.log(10.0)), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(counts.new_full((2,), -1.0), 1.0).to_event(1))
    z = peer_solve(torch.stack([a, b, c, d]), z0).clamp(min=1e-9)
    pyro.sample("obs", dist.LogNormal(z.log(), sigma).to_event(2), obs=counts)


def near_posterior(chains: int, seed: int = 0) -> np.ndarray:
    """Unconstrained points ``(chains, 8)`` near the posterior, in the order of the sites."""
    theta, y0 = rows(chains, seed)
    sigma = torch.full((chains, 2), 0.25, dtype=torch.float64)
    return torch.cat([theta, y0, sigma], dim=-1).log().numpy()
