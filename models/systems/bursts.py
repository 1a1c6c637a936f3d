# SPDX-License-Identifier: Apache-2.0
r"""Bursts of events, whose rate follows a hidden oscillator: a neuron's spikes, calls in a day, tremors.

.. math::
    \dot u = \omega v, \qquad \dot v = -\omega u, \qquad \lambda(t) = \lambda_0 \, e^{u(t)}

======  ==========================================  ==========  ============================
symbol  meaning                                     unit        range
======  ==========================================  ==========  ============================
u, v    hidden state, never observed                1           at time 0 U(-1.5, 1.5)
omega   angular frequency                           rad / s     pi
lambda  rate of events                              1 / s       lambda_0 = 10
======  ==========================================  ==========  ============================

Events are a Poisson process: given the rate, what happens in one stretch of time tells nothing about another. They are
drawn exactly, by thinning a process of constant rate.

References:
    Lewis, P. A. W. and Shedler, G. S. (1979). Simulation of nonhomogeneous Poisson processes by thinning.
    Naval Research Logistics Quarterly 26, 403-413.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_latentde.data.event_times import EventTimes
from pyro_latentde.models.event_series import as_series
from pyro_latentde.models.systems.simulation import Simulation, draw_priors, even_times, random_stream, solve_exactly

__all__ = ["PARAMETERS", "STATES", "intensity", "priors", "simulate", "vector_field"]

STATES = ("u", "v")
PARAMETERS: dict[str, tuple[float, float]] = {}  # the same oscillator in all series
OMEGA, RATE = math.pi, 60.0  # rad/s, 1/s


def vector_field(t: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """dy/dt.

    Args:
        t: time (s), scalar; the equations do not depend on it.
        y: (2,), hidden state.
        p: nothing.

    Returns:
        (2,), per second.
    """
    return OMEGA * torch.stack([y[1], -y[0]])


def intensity(z: Tensor) -> Tensor:
    """Events per second (...), of the states z (..., 2)."""
    return RATE * z[..., 0].exp()


def priors() -> dict[str, Any]:
    """The distributions that `simulate` draws from: "z0" of event shape (2,), at time 0; "theta" is empty."""
    return {"z0": dist.Uniform(torch.full((2,), -1.5), 1.5).to_event(1), "theta": {}}


def simulate(n: int, seed: int = 0, *, end: float = 2.0) -> Simulation:
    """Events of n series, watched from time 0 on.

    Args:
        n: number of series.
        seed: of starts and events; n series are the first n of more.
        end: when watching ends (s).

    Returns:
        Simulation: series as by :func:`.as_series`, z (n, T, 2) at their times, truth empty.

    Raises:
        ValueError: no series, or an end that is not positive.

    Example:
        >>> from pyro_latentde.models.systems import bursts
        >>> from pyro_latentde.models.event_series import as_events
        >>> as_events(bursts.simulate(4).series)
        EventTimes(4 rows, 802 events, at most 282 in a row)
    """
    even_times(n, 2, end)
    z0, truth = draw_priors(priors(), n, seed)
    stream = random_stream(seed, 1)
    events = EventTimes.from_lists([_draw_events(start, end, stream) for start in z0.numpy()], start=0.0, end=end)
    series = as_series(events, dtype=torch.float32)
    return Simulation(series, states_at(z0, series.times.double()), truth)


def states_at(z0: Tensor, times: Tensor) -> Tensor:
    """States (n, T, 2) of the starts z0 (n, 2) at times (T,) or (n, T) (s)."""
    return solve_exactly(vector_field, z0, times, {}, t0=torch.zeros((), dtype=torch.float64))


def _draw_events(start: np.ndarray, end: float, stream: np.random.Generator) -> np.ndarray:
    most = RATE * math.exp(math.hypot(*start))  # the oscillator turns in a circle
    times = end * stream.random(stream.poisson(most * end))
    kept = stream.random(len(times))
    u = start[0] * np.cos(OMEGA * times) + start[1] * np.sin(OMEGA * times)
    return times[kept * most < RATE * np.exp(u)]
