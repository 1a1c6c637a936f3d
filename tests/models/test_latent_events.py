# SPDX-License-Identifier: Apache-2.0
"""Latent ODEs of event times: the log-density by hand, the weight of minibatches, intensities."""

import pyro
import pytest
import torch
from torch.testing import assert_close

from pyro_latentde.data import EventTimes
from pyro_latentde.models import LatentEvents
from pyro_latentde.models.event_series import as_series
from pyro_latentde.models.latent_events import EventSums
from pyro_latentde.models.systems import bursts


@pytest.fixture
def pair():
    pyro.set_rng_seed(0)
    return LatentEvents(latent=2, units=5, rate=30.0, rtol=1e-8, atol=1e-10).double()


def score(model, series, z0):
    conditioned = pyro.poutine.condition(model, data={"z0": z0})
    return pyro.poutine.trace(conditioned).get_trace(series).nodes["events"]


def test_density_is_that_of_the_intensity(pair):
    series = bursts.simulate(3, seed=3).series.to(torch.float64)
    z0 = torch.randn(3, 2).double()
    node = score(pair.model, series, z0)
    grid = torch.linspace(0, 2, 20001).double()
    integral = torch.trapezoid(pair.model.intensity(z0, grid, 0.0), grid, dim=-1)
    at = pair.model.intensity(z0, series.times, 0.0).log()
    happened = series.mask & (series.values == 1)
    expected = torch.where(happened[..., 0], at, 0.0).sum(1) - integral
    assert_close(node["fn"].log_prob(node["value"]), expected, rtol=1e-6, atol=1e-4)


def test_minibatches_stand_for_the_whole(pair):
    series = bursts.simulate(6, seed=3, end=0.5).series.to(torch.float64)
    assert score(pair.model, series.batch([4, 1]), torch.zeros(2, 2).double())["scale"] == pytest.approx(6 / 2)


def test_intensity_at_the_start_is_the_rate_that_was_given(pair):
    data = EventTimes.from_lists([[0.1], [0.2, 0.3]], start=0.0, end=1.0)
    with torch.no_grad():
        pair.model.log_rate.linear.weight.zero_()
        found = pair.model(as_series(data), times=torch.tensor([0.0, 0.7]))
    assert_close(found, torch.full((2, 2), 30.0).double())


def test_an_encoding_is_a_function_of_the_sum_over_events():
    pyro.set_rng_seed(1)
    encoder = EventSums(6, time_scale=0.5, count=10.0).double()
    series = as_series(EventTimes.from_lists([[0.1, 0.4], [0.3]], start=0.0, end=1.0))
    values = torch.where(series.mask, series.values, 5.0)  # whatever stands where nothing was observed
    found = encoder(series.times, values, series.mask)
    of = lambda *times: sum(encoder.features(torch.tensor([t / 0.5]).double()) for t in times)  # noqa: E731
    assert_close(found, torch.stack([encoder.joined(of(0.1, 0.4) / 10.0), encoder.joined(of(0.3) / 10.0)]))
    longer = series.times.clone()
    longer[1, 2:] = 7.0  # padding, and the end
    assert torch.equal(encoder(longer, values, series.mask)[1], found[1])
