# SPDX-License-Identifier: Apache-2.0
"""Spirals: solutions against their closed form, noise and starts."""

import math

import pytest
import torch

from pyro_latentde.models.systems import spirals


def test_states_lie_on_the_spirals():
    series, z, truth = spirals.simulate(200, seed=1)
    d = truth["direction"][:, None]
    u, y, times = z[..., 0] - 5 * d, z[..., 1], torch.arange(100, dtype=torch.float64) * 6 * math.pi / 999
    radius = torch.hypot(u, y)
    phi = torch.where(d > 0, radius / 0.3, 15.0 / radius)
    torch.testing.assert_close(u, radius * phi.cos(), atol=1e-7, rtol=0)
    torch.testing.assert_close(y, radius * phi.sin(), atol=1e-7, rtol=0)
    torch.testing.assert_close(phi - phi[:, :1], d * times, atol=1e-7, rtol=0)
    torch.testing.assert_close(series.times[0].double(), times, atol=1e-6, rtol=0)
    whole = torch.where(d > 0, phi, 6 * math.pi + 1 - phi)
    assert whole.min() > 0 and whole.max() < 6 * math.pi


def test_noise_and_directions():
    series, z, truth = spirals.simulate(900, seed=2)
    error = series.values.double() - z
    assert error.std().item() == pytest.approx(0.3, rel=0.01) and error.mean().abs() < 5e-3
    assert (truth["direction"].abs() == 1).all() and truth["direction"].mean().abs() < 0.16  # 5 standard errors
    assert torch.equal(spirals.simulate(3, noise=0.0).series.values, spirals.simulate(3).z.float())


def test_a_series_has_at_most_100_points():
    with pytest.raises(ValueError, match="at most 100 times.*got 101"):
        spirals.simulate(2, num_times=101)
