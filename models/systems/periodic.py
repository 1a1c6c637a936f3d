# SPDX-License-Identifier: Apache-2.0
r"""Sine waves of unknown frequency and level, at irregular times and with gaps.

.. math::
    \dot\varphi = 2 \pi f, \qquad \dot b = 0, \qquad
    x_1 = b + \sin\varphi, \quad x_2 = b + \cos\varphi, \quad x_3 = b + \sin 2\varphi

======  ==========================================  =====  ====================================
symbol  meaning                                     unit   range
======  ==========================================  =====  ====================================
phi     phase                                       rad    at time 0 Normal(0, 0.1)
b       level                                       1      Normal(1, 0.1)
f       frequency, of each series                   1 / s  U(0.4, 0.8)
x       observed values, one to three of them       1      with errors Normal(0, 0.01)
======  ==========================================  =====  ====================================

A data set has 100 times on [0, 5] s, sorted uniform draws that all series share; each series may keep its own random
part of them, and each value may be missing. In the original, x_1 alone is observed, the phase starts at 0 exactly,
and the errors are uniform and positive.

References:
    Rubanova, Y., Chen, R. T. Q. and Duvenaud, D. (2019). Latent ODEs for irregularly-sampled time series.
    arXiv:1907.03907 (the toy experiment).
"""

import math
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.models.systems.simulation import Simulation, draw_priors, even_times, random_stream, solve_exactly

__all__ = ["OBSERVED", "PARAMETERS", "STATES", "observables", "priors", "simulate", "vector_field"]

STATES = ("phase", "level")
OBSERVED = ("x1", "x2", "x3")
PARAMETERS = {"frequency": (0.4, 0.8)}
END = 5.0  # s


def vector_field(t: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """dy/dt.

    Args:
        t: time (s), scalar; the equations do not depend on it.
        y: (2,), phase (rad) and level.
        p: frequency (1/s), scalar.

    Returns:
        (2,), per second.
    """
    rate = 2.0 * math.pi * p["frequency"]
    return torch.stack([rate, torch.zeros_like(rate)])


def observables(z: Tensor, num_features: int = 3) -> Tensor:
    """The first of x1, x2, x3 without error, (..., num_features), of the states z (..., 2)."""
    phase, level = z.unbind(-1)
    waves = torch.stack([phase.sin(), phase.cos(), (2.0 * phase).sin()], dim=-1)
    return (level.unsqueeze(-1) + waves)[..., :num_features]


def priors() -> dict[str, Any]:
    """The distributions that `simulate` draws from: "z0" of event shape (2,), at time 0, "theta" with frequency."""
    return {
        "z0": dist.Normal(torch.tensor([0.0, 1.0]), 0.1).to_event(1),
        "theta": {name: dist.Uniform(low, high) for name, (low, high) in PARAMETERS.items()},
    }


def simulate(
    n: int,
    seed: int = 0,
    *,
    num_times: int = 100,
    keep: int | None = None,
    num_features: int = 1,
    missing: float = 0.0,
    noise: float = 0.01,
) -> Simulation:
    """Irregular series of n waves.

    What is kept and missing never changes what is drawn: a thinned data set is a part of the full one of its seed.

    Args:
        n: number of series.
        seed: of times, starts, frequencies, errors and gaps; n series are the first n of more.
        num_times: times of the data set.
        keep: times that each series keeps, another random part of them in each; all by default.
        num_features: 1, 2 or 3 values at each time.
        missing: probability that a value is missing; the first time of a series is complete.
        noise: standard error of the values.

    Returns:
        Simulation: series (n, keep or num_times, num_features), z at the same times (.., 2), truth frequency (n,).

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> from pyro_latentde.models.systems import periodic
        >>> periodic.simulate(20, keep=50, num_features=2, missing=0.3).series.values.shape
        torch.Size([20, 50, 2])
    """
    even_times(n, num_times, 1.0)
    keep = num_times if keep is None else keep
    if not 1 <= keep <= num_times:
        raise ValueError(f"keep: expected a number of times in 1 ... {num_times}, got {keep}")
    if num_features not in (1, 2, 3):
        raise ValueError(f"num_features: expected 1, 2 or 3, got {num_features}")
    if not 0 <= missing < 1 or not noise >= 0:
        raise ValueError(f"expected missing in [0, 1) and noise of at least 0, got {missing} and {noise}")
    times = torch.from_numpy(END * random_stream(seed, 1).random(num_times)).sort().values
    z0, truth = draw_priors(priors(), n, seed)
    z = solve_exactly(vector_field, z0, times, truth, t0=torch.zeros((), dtype=torch.float64))
    errors = torch.from_numpy(random_stream(seed, 2).standard_normal((n, num_times, 3)))
    values = observables(z) + noise * errors
    kept = torch.from_numpy(random_stream(seed, 3).random((n, num_times))).argsort(dim=1)[:, :keep].sort(dim=1).values
    gone = torch.from_numpy(random_stream(seed, 4).random((n, num_times, 3))) < missing
    values, z, gone = (x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1])) for x in (values, z, gone))
    gone[:, 0] = False
    values = values.masked_fill(gone, float("nan"))[..., :num_features]
    names = OBSERVED[:num_features]
    return Simulation(Series.from_tensors(times[kept], values, names=names, dtype=torch.float32), z, truth)
