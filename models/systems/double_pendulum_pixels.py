# SPDX-License-Identifier: Apache-2.0
r"""Videos of a double pendulum (the acrobot, without a motor) with an unknown mass of its lower link.

With :math:`\phi = \theta_1 + \theta_2` the absolute angle of the lower link, moments of inertia
:math:`M` and :math:`h = m_2 l_1 c_2 \sin\theta_2`,

.. math::
    M_{11} = I_1 + I_2 + m_1 c_1^2 + m_2 (l_1^2 + c_2^2 + 2 l_1 c_2 \cos\theta_2), \quad
    M_{12} = I_2 + m_2 (c_2^2 + l_1 c_2 \cos\theta_2), \quad M_{22} = I_2 + m_2 c_2^2

    M_{11} \ddot\theta_1 + M_{12} \ddot\theta_2 &= h (2 \dot\theta_1 + \dot\theta_2) \dot\theta_2
        - (m_1 c_1 + m_2 l_1) g \sin\theta_1 - m_2 c_2 g \sin\phi

    M_{12} \ddot\theta_1 + M_{22} \ddot\theta_2 &= -h \dot\theta_1^2 - m_2 c_2 g \sin\phi

=========  ==========================================  ========  ============================
symbol     meaning                                     unit      range
=========  ==========================================  ========  ============================
theta1     angle of the upper link from below          rad       at the start U(pi/10, pi/6)
theta2     angle of the lower link against the upper   rad       at the start U(pi/10, pi/6)
omega1, 2  their rates                                 rad / s   at the start U(pi/10, pi/6)
m2         mass of the lower link, of each series      kg        U(1, 2)
m1         mass of the upper link                      kg        1
l1         length of the links, l2 the same            m         1
c1, c2     centres of mass along the links             m         0.5
I1, I2     moments of inertia about these centres      kg m^2    1
g          gravity                                     m / s^2   9.8
=========  ==========================================  ========  ============================

The energy is conserved. A frame has 32 x 32 pixels in [0, 1], without noise; frame and state k are of the same
instant, k * 0.05 s.

References:
    Sutton, R. S. (1996). Generalization in reinforcement learning. NIPS 8 (the acrobot).
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

__all__ = ["FRAME", "PARAMETERS", "STATES", "energy", "priors", "render", "simulate", "vector_field"]

STATES = ("theta1", "theta2", "omega1", "omega2")
PARAMETERS = {"mass2": (1.0, 2.0)}
FRAME = (32, 32)
GRAVITY = 9.8  # m / s^2
MASS1, LENGTH, CENTRE, INERTIA = 1.0, 1.0, 0.5, 1.0  # kg, m, m, kg m^2
PIVOT, ROD = (16.0, 7.0), 9.0  # pixels; the tip swings out to 1.45 links and stays in the picture


def vector_field(t: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """dy/dt.

    Args:
        t: time (s), scalar; the equations do not depend on it.
        y: (4,), angles (rad) and their rates (rad/s).
        p: mass2 (kg), scalar.

    Returns:
        (4,), rad/s and rad/s^2.
    """
    theta1, theta2, omega1, omega2 = y[0], y[1], y[2], y[3]
    m11, m12, m22 = _inertia(theta2, p["mass2"])
    h = p["mass2"] * LENGTH * CENTRE * torch.sin(theta2)
    lower = p["mass2"] * CENTRE * GRAVITY * torch.sin(theta1 + theta2)
    upper = (MASS1 * CENTRE + p["mass2"] * LENGTH) * GRAVITY * torch.sin(theta1)
    torque1 = h * (2.0 * omega1 + omega2) * omega2 - upper - lower
    torque2 = -h * omega1**2 - lower
    determinant = m11 * m22 - m12**2
    return torch.stack(
        [
            omega1,
            omega2,
            (m22 * torque1 - m12 * torque2) / determinant,
            (m11 * torque2 - m12 * torque1) / determinant,
        ]
    )


def energy(z: Tensor, mass2: Tensor) -> Tensor:
    """Kinetic and potential energy (J).

    Args:
        z: (*batch, 4), states.
        mass2: (*batch,) (kg).

    Returns:
        (*batch,); constant along a solution.
    """
    theta1, theta2, omega1, omega2 = z.unbind(-1)
    m11, m12, m22 = _inertia(theta2, mass2)
    kinetic = 0.5 * m11 * omega1**2 + m12 * omega1 * omega2 + 0.5 * m22 * omega2**2
    upper = (MASS1 * CENTRE + mass2 * LENGTH) * GRAVITY * theta1.cos()
    return kinetic - upper - mass2 * CENTRE * GRAVITY * (theta1 + theta2).cos()


def _inertia(theta2: Tensor, mass2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """M11, M12 and M22 of the equations."""
    coupling = mass2 * LENGTH * CENTRE * torch.cos(theta2)
    m22 = INERTIA + mass2 * CENTRE**2
    return INERTIA + MASS1 * CENTRE**2 + mass2 * LENGTH**2 + m22 + 2.0 * coupling, m22 + coupling, m22


def priors() -> dict[str, Any]:
    """The distributions that `simulate` draws from: "z0" of event shape (4,), "theta" with mass2."""
    return {
        "z0": dist.Uniform(torch.full((4,), math.pi / 10), torch.full((4,), math.pi / 6)).to_event(1),
        "theta": {name: dist.Uniform(low, high) for name, (low, high) in PARAMETERS.items()},
    }


def render(z: Tensor) -> Tensor:
    """Frames (..., 1024) of the states z (..., 4); only the angles are to be seen."""
    upper, lower = z[..., 0], z[..., 0] + z[..., 1]
    pivot = upper.new_tensor(PIVOT).expand(*upper.shape, 2)
    elbow = pivot + ROD * torch.stack([upper.sin(), upper.cos()], dim=-1)
    tip = elbow + ROD * torch.stack([lower.sin(), lower.cos()], dim=-1)
    return draw_rods(torch.stack([pivot, elbow, tip], dim=-2), FRAME)


def simulate(n: int, seed: int = 0, *, num_times: int = 100, step: float = 0.05) -> Simulation:
    """Videos of n double pendulums.

    Args:
        n: number of series.
        seed: of starts and masses; n series are the first n of more.
        num_times: frames in each series.
        step: time between frames (s).

    Returns:
        Simulation: series (n, num_times, 1024) with ``frame`` (32, 32), z (n, num_times, 4), truth mass2 (n,).

    Raises:
        ValueError: no series, fewer than two frames, or a step that is not positive.

    Example:
        >>> from pyro_latentde.models.systems import double_pendulum_pixels
        >>> series, z, truth = double_pendulum_pixels.simulate(3, num_times=10)
        >>> series.values.shape, z.shape, truth["mass2"].shape
        (torch.Size([3, 10, 1024]), torch.Size([3, 10, 4]), torch.Size([3]))
    """
    times = even_times(n, num_times, step)
    z0, truth = draw_priors(priors(), n, seed)
    z = solve_exactly(vector_field, z0, times, truth)
    return Simulation(Series.from_tensors(times, render(z), frame=FRAME, dtype=torch.float32), z, truth)
