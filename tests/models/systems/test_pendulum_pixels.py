# SPDX-License-Identifier: Apache-2.0
"""Pendulum: equations against SciPy, frames against states."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from pyro_latentde.models.systems import pendulum_pixels


@pytest.mark.parametrize("friction", [0.0, 0.7])
def test_states_are_those_of_scipy(friction):
    z, truth = pendulum_pixels.simulate(5, seed=3, friction=friction)[1:]
    for states, length in zip(z.numpy(), truth["length"].tolist(), strict=True):

        def f(t, y, length=length):
            return [y[1], -10.0 / length * math.sin(y[0]) - friction / 1.0 * y[1]]

        times = 0.05 * np.arange(100)
        solved = scipy.integrate.solve_ivp(f, (0, times[-1]), states[0], "DOP853", times, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(states, solved.y.T, atol=1e-9)


def test_energy():
    """Constant without friction, and with friction lost at the rate b omega^2."""
    z, truth = pendulum_pixels.simulate(20, seed=1)[1:]
    assert (drift(z, truth).abs() < 1e-9).all()
    z, truth = pendulum_pixels.simulate(20, seed=1, friction=0.7, step=0.01)[1:]
    assert torch.equal(truth["friction"], torch.full((20,), 0.7, dtype=torch.float64))
    lost = 0.7 * torch.cumulative_trapezoid(z[..., 1].square(), dx=0.01, dim=1)
    torch.testing.assert_close(-drift(z, truth)[:, 1:], lost, atol=1e-4, rtol=0)


def drift(z, truth):
    energy = 0.5 * z[..., 1].square() - 10.0 / truth["length"][:, None] * z[..., 0].cos()
    return energy - energy[:, :1]


def angles(series):
    """From the centre of mass of each frame, seen from the pivot."""
    pictures = series.values.double().unflatten(-1, series.frame)
    centre, ink = torch.arange(28) + 0.5, pictures.sum((-1, -2))
    across, down = (pictures.sum(-2) * centre).sum(-1) / ink, (pictures.sum(-1) * centre).sum(-1) / ink
    return torch.atan2(across - 14.0, down - 4.0)


def test_frame_and_state_are_of_the_same_instant():
    series, z, _ = pendulum_pixels.simulate(30, seed=7)
    read = angles(series)
    assert (read - z[..., 0]).abs().max() < 1e-3
    # one frame later or earlier is another picture
    assert (read[:, 1:] - z[:, :-1, 0]).abs().mean() > 0.02 and (read[:, :-1] - z[:, 1:, 0]).abs().mean() > 0.02


def test_length_is_in_the_timing_only():
    """The same angle is the same picture; small swings have the period 2 pi sqrt(l / g)."""
    z = torch.tensor([[0.3, 0.0], [0.3, -1.0]])
    assert torch.equal(*pendulum_pixels.render(z))
    series, _, truth = pendulum_pixels.simulate(40, num_times=400, step=0.02)
    read = angles(series)
    up = (read[:, :-1] < 0) & (read[:, 1:] >= 0)
    for row, length, angle in zip(up, truth["length"].tolist(), read, strict=True):
        periods = row.nonzero().flatten().diff().double().mean() * 0.02
        amplitude = angle.abs().max()
        exact = 2 * math.pi * math.sqrt(length / 10.0) * (1 + amplitude**2 / 16 + 11 * amplitude**4 / 3072)
        assert periods.item() == pytest.approx(exact.item(), abs=0.02)


def test_priors_are_those_of_the_experiment():
    priors = pendulum_pixels.priors()
    z, truth = pendulum_pixels.simulate(3000, num_times=2)[1:]
    assert z[:, 0, 0].abs().max() <= math.pi / 6 and z[:, 0, 1].abs().max() <= 1
    # uniform: Kolmogorov-Smirnov at 1e-6
    for values, low, high in ((z[:, 0, 0], -math.pi / 6, math.pi / 6), (z[:, 0, 1], -1, 1), (truth["length"], 1, 2)):
        assert scipy.stats.kstest(values.numpy(), "uniform", (low, high - low)).pvalue > 1e-6
    assert priors["theta"]["length"].support.lower_bound == 1 and priors["theta"]["length"].support.upper_bound == 2


def test_bad_friction():
    with pytest.raises(ValueError, match="friction: expected a number of at least 0, got -1"):
        pendulum_pixels.simulate(1, friction=-1.0)
