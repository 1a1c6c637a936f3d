# SPDX-License-Identifier: Apache-2.0
"""Stuart-Landau network: drift against SciPy, noise and published statistics of the data set."""

import numpy as np
import pytest
import scipy.integrate
import torch

from pyro_latentde.models.systems import stuart_landau
from pyro_latentde.models.systems.simulation import solve_exactly


def test_states_without_noise_are_those_of_scipy():
    """The equations in complex numbers; the Heun scheme is of second order, with steps of 0.005 s."""
    z, truth = stuart_landau.simulate(3, seed=1, num_times=41, noise=0.0)[1:]
    for i, states in enumerate(z.numpy()):
        a, omega = (np.array([truth[f"{name}{k}"][i] for k in (1, 2, 3)]) for name in ("a", "omega"))
        pull = np.array([[0.0 if j == k else truth[f"c{k}{j}"][i] for j in (1, 2, 3)] for k in (1, 2, 3)])

        def f(t, y, a=a, omega=omega, pull=pull):
            w = y[:3] + 1j * y[3:]
            rate = 20 * ((a + 1j * omega - abs(w) ** 2) * w + 0.1 * (pull @ w - pull.sum(1) * w))
            return np.concatenate([rate.real, rate.imag])

        times = 0.05 * np.arange(41)
        solved = scipy.integrate.solve_ivp(f, (0, times[-1]), states[0], "DOP853", times, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(states, solved.y.T, atol=3e-3)
        np.testing.assert_allclose(
            stuart_landau.vector_field(torch.zeros(()), z[i, 5], {name: v[i] for name, v in truth.items()}),
            f(0.0, states[5]),
            atol=1e-12,
        )


def test_step_of_the_noise_has_its_variance():
    """What the equations without noise leave unexplained of a short step is sigma^2 times the step."""
    _, z, truth = stuart_landau.simulate(200, seed=2, num_times=21, step=0.005)
    start, end = z[:, :-1].flatten(0, 1), z[:, 1:].flatten(0, 1)
    p = {name: value.repeat_interleave(20) for name, value in truth.items()}
    drift = torch.func.vmap(lambda y, p: stuart_landau.vector_field(0.0, y, p))
    middle = start + 0.5 * 0.005 * drift(start, p)
    shocks = end - start - 0.005 * drift(middle, p)
    variance = shocks.square().mean().item()  # of 24,000 shocks: standard error 1 %
    assert variance == pytest.approx(0.02**2 * 0.005, rel=0.05)


def test_statistics_of_the_data_set():
    """Errors of forecasts of frames 46-65, over the mean absolute value: published 1.89, 1.36 and 0.088."""
    series, z, truth = stuart_landau.simulate(400, seed=0)
    window, future = series.values[:, :46].double(), series.values[:, 46:].double()
    times = series.times[0, 45:].double()
    oracle = solve_exactly(stuart_landau.vector_field, z[:, 45], times, truth)[:, 1:]
    forecasts = window[:, -1:], window.mean(1, keepdim=True), stuart_landau.lift(oracle)
    errors = [((future - x).square().mean().sqrt() / future.abs().mean()).item() for x in forecasts]
    assert errors == [pytest.approx(1.89, rel=0.04), pytest.approx(1.36, rel=0.04), pytest.approx(0.088, rel=0.1)]


def test_lift_is_one_linear_map():
    z = torch.eye(6, dtype=torch.float64)
    matrix = stuart_landau.lift(z)
    assert matrix.shape == (6, 784) and torch.equal(matrix, stuart_landau.lift(z))
    assert matrix.min() >= 0 and matrix.max() <= 1 and torch.linalg.matrix_rank(matrix) == 6
    series, z, _ = stuart_landau.simulate(2, num_times=3)
    torch.testing.assert_close(series.values.double(), z @ matrix, atol=1e-6, rtol=1e-6)
