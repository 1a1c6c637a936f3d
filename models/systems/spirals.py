# SPDX-License-Identifier: Apache-2.0
r"""Two families of planar spirals, one turning left and growing evenly, the other turning right and ever faster.

With direction d, centre (5 d, 0), u = x - 5 d and :math:`r^2 = u^2 + y^2`,

.. math::
    \dot x = \rho u - d y, \qquad \dot y = \rho y + d u, \qquad
    \rho = \frac{1 + d}{2} \frac{b}{r} + \frac{1 - d}{2} \frac{r}{50 b}

so that r = b phi for d = 1 and r = 50 b / phi for d = -1, with phi the angle that runs at the rate d.

======  ================================================  =====  ==================================
symbol  meaning                                           unit   range
======  ================================================  =====  ==================================
x, y    coordinates                                       1      start on the spiral, see below
d       direction, of each series                         1      -1 or 1
b       growth                                            1      0.3
======  ================================================  =====  ==================================

A whole spiral has 1000 points at t in [0, 6 pi]: phi = t for d = 1, phi = 6 pi + 1 - t for d = -1. A series is a run
of 100 of them from one of the points 100 to 899 on, its time starts at 0, and x and y have normal errors of sd 0.3.
`priors` has a normal start of the same mean and sd, and for d a uniform distribution that reaches a little beyond the
two values.

References:
    Chen, R. T. Q. et al. (2018). Neural ordinary differential equations. arXiv:1806.07366 (the toy experiment).
"""

import math
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.models.systems.simulation import Simulation, even_times, random_stream, solve_exactly

__all__ = ["PARAMETERS", "STATES", "priors", "simulate", "vector_field"]

STATES = ("x", "y")
PARAMETERS = {"direction": (-1.25, 1.25)}
GROWTH, CENTRE = 0.3, 5.0
END, POINTS, RUN = 6.0 * math.pi, 1000, 100  # no series starts within RUN points of an end
STEP = END / (POINTS - 1)
START = {"mean": (-0.33, -0.17), "sd": (5.27, 1.78)}  # of the first observation


def vector_field(t: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """dy/dt.

    Args:
        t: time, scalar; the equations do not depend on it.
        y: (2,), coordinates.
        p: direction, scalar, -1 or 1.

    Returns:
        (2,), per unit of time.
    """
    d = p["direction"]
    u, v = y[0] - CENTRE * d, y[1]
    r = torch.sqrt(u**2 + v**2)
    rho = 0.5 * (1.0 + d) * GROWTH / r + 0.5 * (1.0 - d) * r / (50.0 * GROWTH)
    return torch.stack([rho * u - d * v, rho * v + d * u])


def priors() -> dict[str, Any]:
    """Priors of an inference: "z0" (2,) at the first observation, "theta" with direction."""
    return {
        "z0": dist.Normal(torch.tensor(START["mean"]), torch.tensor(START["sd"])).to_event(1),
        "theta": {name: dist.Uniform(low, high) for name, (low, high) in PARAMETERS.items()},
    }


def simulate(n: int, seed: int = 0, *, num_times: int = 100, noise: float = 0.3) -> Simulation:
    """Noisy pieces of n spirals.

    Args:
        n: number of series.
        seed: of starts, directions and errors; n series are the first n of more.
        num_times: points of each series, at most 100.
        noise: standard error of the coordinates.

    Returns:
        Simulation: series (n, num_times, 2), z (n, num_times, 2), truth direction (n,).

    Raises:
        ValueError: no series, not 2 to 100 points, or negative noise.

    Example:
        >>> from pyro_latentde.models.systems import spirals
        >>> spirals.simulate(3).series
        Series(3 series, up to 100 times, 2 values (x, y), 600 observed, 0 missing)
    """
    times = even_times(n, num_times, STEP)
    if num_times > RUN or not noise >= 0:
        raise ValueError(f"expected at most {RUN} times and noise >= 0, got {num_times} and {noise}")
    where, side = torch.from_numpy(random_stream(seed, 0).random((n, 2))).unbind(1)
    first = STEP * (RUN + (where * (POINTS - 2 * RUN)).floor())
    direction = torch.where(side < 0.5, -1.0, 1.0).double()
    phi = torch.where(direction > 0, first, END + 1.0 - first)
    radius = torch.where(direction > 0, GROWTH * phi, 50.0 * GROWTH / phi)
    z0 = torch.stack([radius * phi.cos() + CENTRE * direction, radius * phi.sin()], dim=-1)
    truth = {"direction": direction}
    z = solve_exactly(vector_field, z0, times, truth)
    values = z + noise * torch.from_numpy(random_stream(seed, 1).standard_normal(z.shape))
    return Simulation(Series.from_tensors(times, values, names=STATES, dtype=torch.float32), z, truth)
