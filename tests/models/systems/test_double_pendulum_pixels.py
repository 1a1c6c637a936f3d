# SPDX-License-Identifier: Apache-2.0
"""Double pendulum: equations against the Lagrangian of its parts, frames against states."""

import numpy as np
import scipy.integrate
import torch
from torch.func import grad, hessian

from pyro_latentde.models.systems import double_pendulum_pixels as double


def lagrangian(state, mass2):
    """Of two rods, from the velocities of their centres of mass."""
    q, rate = state[:2], state[2:]
    middle1, middle2 = centres(q)
    velocity1, velocity2 = (torch.func.jvp(lambda q, k=k: centres(q)[k], (q,), (rate,))[1] for k in (0, 1))
    kinetic = 0.5 * velocity1 @ velocity1 + 0.5 * mass2 * velocity2 @ velocity2
    spin = 0.5 * rate[0] ** 2 + 0.5 * (rate[0] + rate[1]) ** 2
    return kinetic + spin + 9.8 * (middle1[1] + mass2 * middle2[1])  # the second coordinate points down


def centres(q):
    upper, lower = (torch.stack([angle.sin(), angle.cos()]) for angle in (q[0], q[0] + q[1]))
    return 0.5 * upper, upper + 0.5 * lower


def euler_lagrange(state, mass2):
    """(4,) rates: d/dt dL/dq' = dL/dq."""
    second, first = hessian(lagrangian)(state, mass2), grad(lagrangian)(state, mass2)
    acceleration = torch.linalg.solve(second[2:, 2:], first[:2] - second[2:, :2] @ state[2:])
    return torch.cat([state[2:], acceleration])


def test_field_is_that_of_the_lagrangian():
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        state = 3 * torch.randn(4, generator=generator, dtype=torch.float64)
        mass2 = 1 + torch.rand((), generator=generator, dtype=torch.float64)
        field = double.vector_field(torch.zeros(()), state, {"mass2": mass2})
        torch.testing.assert_close(field, euler_lagrange(state, mass2), atol=1e-10, rtol=1e-10)


def test_states_are_those_of_scipy():
    z, truth = double.simulate(3, seed=3)[1:]
    for states, m in zip(z.numpy(), truth["mass2"].tolist(), strict=True):

        def f(t, y, m=m):
            cos, sin, fall = np.cos(y[1]), np.sin(y[1]), 4.9 * m * np.sin(y[0] + y[1])
            mass = [[2.25 + m * (1.25 + cos), 1 + m * (0.25 + 0.5 * cos)], [1 + m * (0.25 + 0.5 * cos), 1 + 0.25 * m]]
            force = [
                0.5 * m * sin * (2 * y[2] + y[3]) * y[3] - 9.8 * (0.5 + m) * np.sin(y[0]) - fall,
                -0.5 * m * sin * y[2] ** 2 - fall,
            ]
            return [y[2], y[3], *np.linalg.solve(mass, force)]

        times = 0.05 * np.arange(100)
        solved = scipy.integrate.solve_ivp(f, (0, times[-1]), states[0], "DOP853", times, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(states, solved.y.T, atol=1e-8)


def test_energy_is_conserved():
    z, truth = double.simulate(50, seed=1)[1:]
    energy = double.energy(z, truth["mass2"][:, None])
    assert (energy - energy[:, :1]).abs().max() < 1e-9
    state, mass2 = z[0, 0], truth["mass2"][0]
    rate = grad(lagrangian)(state, mass2)[2:]
    torch.testing.assert_close(energy[0, 0], rate @ state[2:] - lagrangian(state, mass2))


def test_frame_and_state_are_of_the_same_instant():
    """The ink of two equal rods has its centre in the middle of their middles, but for the elbow drawn once."""
    series, z, _ = double.simulate(20, seed=7)
    pictures = series.values.double().unflatten(-1, series.frame)
    centre, ink = torch.arange(32) + 0.5, pictures.sum((-1, -2))
    across = (pictures.sum(-2) * centre).sum(-1) / ink
    expected = 16.0 + 9.0 * (0.75 * z[..., 0].sin() + 0.25 * (z[..., 0] + z[..., 1]).sin())
    error = (across - expected).abs()
    assert error.max() < 0.25
    assert (across[:, 1:] - expected[:, :-1]).abs().mean() > 3 * error.mean()


def test_the_whole_pendulum_stays_in_the_picture():
    pictures = double.simulate(100, seed=2).series.values.unflatten(-1, (32, 32))
    border = torch.cat([pictures[..., 0, :], pictures[..., -1, :], pictures[..., :, 0], pictures[..., :, -1]], dim=-1)
    assert border.max() < 0.05
