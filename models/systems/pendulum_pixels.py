# SPDX-License-Identifier: Apache-2.0
r"""Videos of a pendulum, of unknown length and, on request, with friction.

.. math::
    \ddot\theta = -\frac{g}{l} \sin\theta - \frac{b}{m} \dot\theta

======  ======================================  =======  ==============================
symbol  meaning                                 unit     range
======  ======================================  =======  ==============================
theta   angle from below, towards the right     rad      at the start U(-pi/6, pi/6)
omega   its rate                                rad / s  at the start U(-1, 1)
l       length, one for each series             m        U(1, 2)
g       gravity                                 m / s^2  10
b, m    friction and mass                       kg / s   b = 0 (0.7 when damped), m = 1
======  ======================================  =======  ==============================

A frame has 28 x 28 pixels in [0, 1]. The rod is drawn 19 pixels long whatever l is: the length shows in the timing
only. There is no noise. Frame and state k are of the same instant, k * 0.05 s.

References:
    Linial, O. et al. (2021). Generative ODE modeling with known unknowns. arXiv:2003.10775 (the experiment).
"""

import math
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.models.systems.renderer import draw_rods
from pyro_latentde.models.systems.simulation import Simulation, draw_priors, even_times, solve_exactly

__all__ = ["FRAME", "PARAMETERS", "STATES", "damped_field", "priors", "render", "simulate", "vector_field"]

STATES = ("theta", "omega")
PARAMETERS = {"length": (1.0, 2.0)}
FRAME = (28, 28)
GRAVITY = 10.0  # m / s^2
MASS = 1.0  # kg
PIVOT, ROD = (14.0, 4.0), 19.0  # pixels; the swing reaches 0.7 rad, and the tip stays in the picture


def vector_field(t: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """dy/dt without friction.

    Args:
        t: time (s), scalar; the equations do not depend on it.
        y: (2,), angle (rad) and its rate (rad/s).
        p: length (m), scalar.

    Returns:
        (2,), rad/s and rad/s^2.
    """
    theta, omega = y[0], y[1]
    return torch.stack([omega, -GRAVITY / p["length"] * torch.sin(theta)])


def damped_field(t: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """dy/dt with friction.

    Args:
        t: time (s), scalar; the equations do not depend on it.
        y: (2,), angle (rad) and its rate (rad/s).
        p: length (m) and friction b (kg/s), scalars.

    Returns:
        (2,), rad/s and rad/s^2.
    """
    theta, omega = y[0], y[1]
    return torch.stack([omega, -GRAVITY / p["length"] * torch.sin(theta) - p["friction"] / MASS * omega])


def priors() -> dict[str, Any]:
    """The distributions that `simulate` draws from: "z0" of event shape (2,), "theta" with length."""
    high = torch.tensor([math.pi / 6, 1.0])
    return {
        "z0": dist.Uniform(-high, high).to_event(1),
        "theta": {name: dist.Uniform(low, high) for name, (low, high) in PARAMETERS.items()},
    }


def render(z: Tensor) -> Tensor:
    """Frames (..., 784) of the states z (..., 2); only the angle is to be seen."""
    theta = z[..., 0]
    pivot = theta.new_tensor(PIVOT).expand(*theta.shape, 2)
    tip = pivot + ROD * torch.stack([theta.sin(), theta.cos()], dim=-1)
    return draw_rods(torch.stack([pivot, tip], dim=-2), FRAME)


def simulate(n: int, seed: int = 0, *, num_times: int = 100, step: float = 0.05, friction: float = 0.0) -> Simulation:
    """Videos of n pendulums.

    Args:
        n: number of series.
        seed: of starts and lengths; n series are the first n of more.
        num_times: frames in each series.
        step: time between frames (s).
        friction: b (kg/s), the same for all series; 0.7 in the damped experiment.

    Returns:
        Simulation: series (n, num_times, 784) with ``frame`` (28, 28), z (n, num_times, 2), truth length (n,) and,
        with friction, friction (n,).

    Raises:
        ValueError: no series, fewer than two frames, a step that is not positive, or negative friction.

    Example:
        >>> from pyro_latentde.models.systems import pendulum_pixels
        >>> series, z, truth = pendulum_pixels.simulate(3, num_times=10)
        >>> series.values.shape, z.shape, truth["length"].shape
        (torch.Size([3, 10, 784]), torch.Size([3, 10, 2]), torch.Size([3]))
    """
    if not friction >= 0:
        raise ValueError(f"friction: expected a number of at least 0, got {friction}")
    times = even_times(n, num_times, step)
    z0, truth = draw_priors(priors(), n, seed)
    if friction:
        truth["friction"] = torch.full((n,), float(friction), dtype=torch.float64)
    z = solve_exactly(damped_field if friction else vector_field, z0, times, truth)
    return Simulation(Series.from_tensors(times, render(z), frame=FRAME, dtype=torch.float32), z, truth)
