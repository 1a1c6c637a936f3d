# SPDX-License-Identifier: Apache-2.0
"""Periodic series: waves against their closed form, thinning and gaps."""

import math

import pytest
import torch

from pyro_latentde.models.systems import periodic


def test_values_are_waves():
    series, z, truth = periodic.simulate(50, seed=1, num_features=3, noise=0.0)
    assert series.names == ("x1", "x2", "x3") and series.times.min() >= 0 and series.times.max() <= 5
    t, f = series.times.double(), truth["frequency"][:, None]
    level, start = z[:, :1, 1], z[:, :1, 0] - 2 * math.pi * f * t[:, :1]
    phase = start + 2 * math.pi * f * t
    waves = level[..., None] + torch.stack([phase.sin(), phase.cos(), (2 * phase).sin()], dim=-1)
    torch.testing.assert_close(series.values.double(), waves, atol=1e-5, rtol=0)
    assert start.std().item() == pytest.approx(0.1, rel=0.5) and level.mean().item() == pytest.approx(1, abs=0.08)
    assert ((f >= 0.4) & (f <= 0.8)).all()


def test_a_thinned_data_set_is_part_of_the_full_one():
    full = periodic.simulate(20, seed=2, num_features=3)
    thin = periodic.simulate(20, seed=2, num_features=2, keep=50, missing=0.3)
    assert thin.series.values.shape == (20, 50, 2) and thin.z.shape == (20, 50, 2)
    assert torch.equal(thin.truth["frequency"], full.truth["frequency"])
    for i in range(20):
        where = torch.searchsorted(full.series.times[i], thin.series.times[i])
        assert torch.equal(full.series.times[i, where], thin.series.times[i])
        assert torch.equal(full.z[i, where], thin.z[i])
        observed = thin.series.mask[i]
        assert torch.equal(full.series.values[i, where, :2][observed], thin.series.values[i][observed])
    assert not torch.equal(thin.series.times[0], thin.series.times[1])  # each keeps its own
    assert torch.equal(full.series.times[0], full.series.times[1])


def test_gaps_and_noise():
    series, z, _ = periodic.simulate(300, seed=3, num_features=2, missing=0.3)
    assert series.mask[:, 0].all()
    # 59,400 values: standard error 0.2 %
    assert (~series.mask[:, 1:]).double().mean().item() == pytest.approx(0.3, abs=0.01)
    error = (series.values.double() - periodic.observables(z, 2))[series.mask]
    assert error.std().item() == pytest.approx(0.01, rel=0.03)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 0}, "keep: expected a number of times in 1 ... 100, got 0"),
        ({"keep": 101}, "got 101"),
        ({"num_features": 4}, "num_features: expected 1, 2 or 3, got 4"),
        ({"missing": 1.0}, r"missing in \[0, 1\)"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        periodic.simulate(2, **options)
