# SPDX-License-Identifier: Apache-2.0
r"""A network of three noisy oscillators, of which 784 mixtures are observed.

Oscillator i near its Hopf bifurcation, with coordinates x_i and y_i:

.. math::
    dx_i &= v \Bigl[(a_i - x_i^2 - y_i^2)\, x_i - \omega_i y_i + G \sum_j C_{ij} (x_j - x_i)\Bigr] dt + \sigma\, dW

    dy_i &= v \Bigl[(a_i - x_i^2 - y_i^2)\, y_i + \omega_i x_i + G \sum_j C_{ij} (y_j - y_i)\Bigr] dt + \sigma\, dW'

=========  =============================================  =====  ==================================
symbol     meaning                                        unit   range
=========  =============================================  =====  ==================================
x, y       coordinates of the oscillators                 1      100 steps before the first U(0.3, 0.4)
a_i        growth; above 0 a cycle of radius sqrt(a_i)    1      U(-0.2, 0.2), of each series
omega_i    frequency                                      1      pi U(0.08, 0.14), of each series
C_ij       strength of the pull of j on i                 1      U(0, 0.2), of each series
G          coupling                                       1      0.1
v          speed                                          1 / s  20
sigma      noise                                          s^-.5  0.02
=========  =============================================  =====  ==================================

Observed is L z with one fixed random matrix L (784, 6) of U(0, 1) entries, without error, every 0.05 s. The paths
are drawn by the stochastic Heun scheme with ten steps between observations: for additive noise of strong order 1,
and of order 2 where the noise vanishes. The first 100 observations are dropped; `priors` has normal distributions of
the mean and sd that the states then have.

References:
    Abrevaya, G. et al. (2023). Effective latent differential equation models via attention and multiple shooting.
    arXiv:2307.05735 (the experiment).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.models.systems.simulation import Simulation, draw_priors, even_times, random_stream

__all__ = ["OBSERVABLES", "PARAMETERS", "STATES", "lift", "priors", "simulate", "vector_field"]

STATES = ("x1", "x2", "x3", "y1", "y2", "y3")
PARAMETERS = {
    **{f"a{i}": (-0.2, 0.2) for i in (1, 2, 3)},
    **{f"omega{i}": (0.08 * math.pi, 0.14 * math.pi) for i in (1, 2, 3)},
    **{f"c{i}{j}": (0.0, 0.2) for i in (1, 2, 3) for j in (1, 2, 3) if i != j},
}
OBSERVABLES = 784
SPEED, COUPLING, NOISE = 20.0, 0.1, 0.02
BURN_IN, SUBSTEPS = 100, 10
FIRST = (0.3, 0.4)  # range of the state before the burn-in
START_SD = 0.147  # of the state after it, whose mean is 0
CHUNK = 256  # series drawn at a time, for the memory of their noise


def vector_field(t: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """The drift, dy/dt without noise.

    Args:
        t: time (s), scalar; the equations do not depend on it.
        y: (6,), x1, x2, x3, y1, y2, y3.
        p: a1 to a3, omega1 to omega3 and c12, c13, c21, c23, c31, c32, scalars.

    Returns:
        (6,), per second.
    """
    x, v = y[:3], y[3:]
    dx, dv = [], []
    for i, others in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        growth = p[f"a{i + 1}"] - x[i] ** 2 - v[i] ** 2
        pull = [COUPLING * p[f"c{i + 1}{j + 1}"] for j in others]
        pull_x = sum(c * (x[j] - x[i]) for c, j in zip(pull, others, strict=True))
        pull_v = sum(c * (v[j] - v[i]) for c, j in zip(pull, others, strict=True))
        dx.append(SPEED * (growth * x[i] - p[f"omega{i + 1}"] * v[i] + pull_x))
        dv.append(SPEED * (growth * v[i] + p[f"omega{i + 1}"] * x[i] + pull_v))
    return torch.stack(dx + dv)


def priors() -> dict[str, Any]:
    """Priors of an inference: "z0" (6,) at the first observation, "theta" with the parameters of `vector_field`."""
    return {
        "z0": dist.Normal(torch.zeros(6), START_SD).to_event(1),
        "theta": {name: dist.Uniform(low, high) for name, (low, high) in PARAMETERS.items()},
    }


def lift(z: Tensor) -> Tensor:
    """The observables L z, (..., 784), of states z (..., 6)."""
    entries = np.random.default_rng(OBSERVABLES).random((OBSERVABLES, len(STATES)))
    return z @ torch.from_numpy(entries).to(z).T


def simulate(n: int, seed: int = 0, *, num_times: int = 66, step: float = 0.05, noise: float = NOISE) -> Simulation:
    """Observables of n networks.

    Args:
        n: number of series.
        seed: of starts, parameters and paths; n series are the first n of more.
        num_times: observations of each series; 46 to fit and 20 to forecast, in the experiment.
        step: time between them (s); the noise is accurate up to about 0.05.
        noise: sigma, s^-.5; 0 for the equations without noise.

    Returns:
        Simulation: series (n, num_times, 784), z (n, num_times, 6), truth by the names of `PARAMETERS`, each (n,).

    Raises:
        ValueError: no series, fewer than two times, a step that is not positive, or negative noise.

    Example:
        >>> from pyro_latentde.models.systems import stuart_landau
        >>> series, z, truth = stuart_landau.simulate(2, num_times=10)
        >>> series.values.shape, z.shape, len(truth)
        (torch.Size([2, 10, 784]), torch.Size([2, 10, 6]), 12)
    """
    if not noise >= 0:
        raise ValueError(f"noise: expected a number of at least 0, got {noise}")
    times = even_times(n, num_times, step)
    start = dist.Uniform(torch.full((6,), FIRST[0]), torch.full((6,), FIRST[1])).to_event(1)
    first, truth = draw_priors({"z0": start, "theta": priors()["theta"]}, n, seed)
    stream = random_stream(seed, 1)
    paths = []
    for rows in torch.arange(n).split(CHUNK):
        p = {name: value[rows] for name, value in truth.items()}
        paths.append(_paths(first[rows].T, p, BURN_IN + num_times, step, noise, stream))
    z = torch.cat(paths)[:, BURN_IN:]
    return Simulation(Series.from_tensors(times, lift(z), dtype=torch.float32), z, truth)


def _paths(
    y: Tensor, p: Mapping[str, Tensor], num_times: int, step: float, noise: float, stream: np.random.Generator
) -> Tensor:
    """(N, num_times, 6) from the starts y (6, N), by the stochastic Heun scheme; the field acts on all columns."""
    h = step / SUBSTEPS
    shocks = stream.standard_normal((y.shape[1], (num_times - 1) * SUBSTEPS, y.shape[0]))
    shocks = torch.from_numpy(noise * math.sqrt(h) * shocks).permute(1, 2, 0)
    t = torch.zeros(())
    path = [y]
    for k, shock in enumerate(shocks):
        slope = vector_field(t, y, p)
        guess = vector_field(t, y + h * slope + shock, p)
        y = y + 0.5 * h * (slope + guess) + shock
        if (k + 1) % SUBSTEPS == 0:
            path.append(y)
    return torch.stack(path).permute(2, 0, 1)
