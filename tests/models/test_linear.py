# SPDX-License-Identifier: Apache-2.0
"""The damped oscillator: field, exact solution against the closed form, model and simulator."""

import math

import pytest
import scipy.linalg
import scipy.stats
import torch
from pyro import poutine
from torch.testing import assert_close

from pyro_latentde.models.systems import linear


def params(omega, kappa):
    values = {"omega": omega, "kappa": kappa}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def test_exact_solution_is_the_closed_form():
    times = torch.linspace(1.0, 9.0, 30, dtype=torch.float64)
    p, x0, v0 = params(1.7, 0.2), 0.8, -0.5
    w, s = math.sqrt(1.7**2 - 0.2**2), times - 1.0
    x = torch.exp(-0.2 * s) * (x0 * torch.cos(w * s) + (v0 + 0.2 * x0) / w * torch.sin(w * s))
    start = torch.tensor([x0, v0], dtype=torch.float64)
    z = linear.exact_solution(times, start, p)
    assert_close(z[:, 0], x, rtol=1e-12, atol=1e-12)

    def position(t):
        return linear.exact_solution(t, start, p, t0=times[0])[:, 0]

    _, slope = torch.func.jvp(position, (times,), (torch.ones_like(times),))
    assert_close(slope, z[:, 1])


def test_exact_solution_in_batches():
    p = params([1.0, 2.0, 0.5], [0.0, 2.0, 3.0])  # undamped, critical, overdamped
    z0 = torch.tensor([1.0, -1.0], dtype=torch.float64).expand(3, 2)
    times = torch.tensor([0.0, 0.7, 3.0], dtype=torch.float64).expand(3, 3)
    z = linear.exact_solution(times, z0, p)
    for i in range(3):
        a = linear.matrix(p)[i].numpy()
        for j, t in enumerate((0.0, 0.7, 3.0)):
            assert_close(z[i, j], torch.as_tensor(scipy.linalg.expm(a * t) @ z0[i].numpy()))


def test_field_is_the_matrix():
    p, y = params(1.3, 0.4), torch.tensor([0.3, -2.0], dtype=torch.float64)
    assert_close(linear.vector_field(torch.tensor(0.0), y, p), linear.matrix(p) @ y)


def test_trajectory_and_density_of_the_model():
    simulation = linear.simulate(missing=0.3, seed=5)
    model = poutine.condition(linear.model, simulation.truth)
    trace = poutine.trace(model).get_trace(simulation.series)
    assert_close(trace.nodes["z"]["value"], simulation.z[0], rtol=1e-4, atol=1e-4)
    density = scipy.stats.norm(simulation.z, simulation.truth["sigma"]).logpdf(simulation.series.values)
    expected = density[simulation.series.mask.numpy()].sum()
    ours = trace.log_prob_sum(lambda name, _: name == "obs").item()
    assert ours == pytest.approx(expected, abs=1e-2)
    shapes = {name: tuple(trace.nodes[name]["value"].shape) for name in simulation.truth}
    assert shapes == {"omega": (), "kappa": (), "z0": (2,), "sigma": (2,)}


def test_simulation_residuals():
    """Mean and deviation of 4,000 residuals within 5 standard errors (false alarm 2e-6)."""
    simulation = linear.simulate(num_series=50, sigma=(0.2, 0.7), seed=2)
    residual = simulation.series.values - simulation.z
    for state, sigma in enumerate((0.2, 0.7)):
        seen = residual[..., state].flatten()
        assert abs(seen.mean().item()) < 5 * sigma / len(seen) ** 0.5
        assert seen.std().item() == pytest.approx(sigma, abs=5 * sigma / (2 * len(seen)) ** 0.5)
