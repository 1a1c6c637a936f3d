# SPDX-License-Identifier: Apache-2.0
"""Bursts of events: the hidden oscillator in closed form, and events that follow its rate."""

import math

import pytest
import torch

from pyro_latentde.models.event_series import as_events
from pyro_latentde.models.systems import bursts


def test_hidden_states_turn():
    series, z, truth = bursts.simulate(5, seed=1)
    t, (u0, v0) = series.times.double(), z[:, :1].unbind(-1)
    u = u0 * (math.pi * t).cos() + v0 * (math.pi * t).sin()
    torch.testing.assert_close(z[..., 0], u, atol=1e-6, rtol=0)
    torch.testing.assert_close(bursts.intensity(z), 60.0 * u.exp(), atol=1e-3, rtol=0)
    assert truth == {} and series.times[:, 0].eq(0).all() and series.times[:, -1].eq(2).all()


def test_events_follow_the_rate():
    """By the time change of a Poisson process, expected numbers of events between events are Exp(1)."""
    series, z, _ = bursts.simulate(40, seed=2)
    grid = torch.linspace(0, 2, 4001, dtype=torch.float64)
    rates = bursts.intensity(bursts.states_at(z[:, 0], grid))
    expected = torch.nn.functional.pad(torch.cumulative_trapezoid(rates, grid, dim=1), (1, 0))
    counts = as_events(series).counts
    # sums of Poisson numbers: 5 standard errors, a false alarm in 1.7 million
    total = expected[:, -1].sum()
    assert abs(counts.sum() - total) < 5 * total.sqrt()
    waits = []
    for times, rise, n in zip(series.times, expected, counts, strict=True):
        at = (times[: n + 1].double() * 2000).round().long()  # the first is the start
        waits.append(rise[at].diff())
    waits = torch.cat(waits)
    assert len(waits) > 5000
    for x in (0.2, 1.0, 2.5):
        share, wanted = (waits > x).double().mean(), math.exp(-x)
        assert abs(share - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / len(waits))


def test_series_are_reproducible_and_the_first_of_more():
    few, more = bursts.simulate(3, seed=4), bursts.simulate(6, seed=4)
    for i in range(3):
        assert torch.equal(*(x.series.times[i][x.series.mask[i, :, 0]] for x in (few, more)))
    assert not torch.equal(bursts.simulate(3, seed=5).z[:, 0], few.z[:, 0])
    shorter = bursts.simulate(3, seed=4, end=1.0).series
    assert shorter.times.max() == 1


def test_bad_sizes():
    with pytest.raises(ValueError, match="n: expected at least 1"):
        bursts.simulate(0)
    with pytest.raises(ValueError, match="positive"):
        bursts.simulate(2, end=0.0)
