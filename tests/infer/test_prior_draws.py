# SPDX-License-Identifier: Apache-2.0
"""Draws from the prior, and the predictions made from them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import pyro_latentde as lde
from pyro_latentde.analysis import stress_test
from pyro_latentde.data import EventTimes
from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer import prior


def model(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 2.0))
    with pyro.plate("data", len(y)):
        x = pyro.sample("x", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(x, 0.5), obs=y)


def test_prior_and_prior_predictive_have_the_law_of_the_model():
    p = prior(model, torch.full((3,), 100.0).double(), num_samples=4000, seed=5)
    assert p["mu"].shape == (1, 4000) and p["x"].shape == (1, 4000, 3) and p.attrs["inference"] == "prior"
    # Kolmogorov-Smirnov at level 1e-4 each; data at 100 would show if they were looked at
    new = p.predict(seed=1).observations["y"]
    for values, sd in ((p["mu"][0], 2.0), (p["x"][0, :, 1], 5**0.5), (new[0, :, 2], 5.25**0.5)):
        assert stats.kstest(values.numpy(), stats.norm(0, sd).cdf).pvalue > 1e-4


def test_data_upstream_of_a_latent_site_are_not_looked_at():
    def chain(y):
        first = pyro.sample("first", dist.Normal(torch.zeros(()).double(), 1.0), obs=y)
        pyro.sample("second", dist.Normal(first, 1.0))

    values = prior(chain, torch.tensor(50.0).double(), num_samples=2000)["second"][0].numpy()
    assert stats.kstest(values, stats.norm(0, 2**0.5).cdf).pvalue > 1e-4


def test_a_law_that_cannot_draw_keeps_its_data():
    """Poisson events are scored at the times given; the prior of the rate is the same with them."""
    data = EventTimes.from_lists([[0.2, 0.7], [0.5]], start=0.0, end=1.0)

    def events(data):
        rate = pyro.sample("rate", dist.LogNormal(torch.zeros(()).double(), 1.0))
        lde.events("e", lambda t, z, p: p + 0 * z, lambda t, z, p: z[0], torch.zeros(2, 1).double(), data, rate)

    values = prior(events, data, num_samples=500)["rate"][0].log().numpy()
    assert stats.kstest(values, stats.norm(0, 1).cdf).pvalue > 1e-4
    assert stress_test(events, data, num_draws=20).failed == 0


def test_seed():
    y = torch.zeros(3).double()
    a, b, c = (prior(model, y, num_samples=5, seed=seed)["mu"] for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_nothing_to_draw():
    with pytest.raises(LatentDEError, match="no latent site"):
        prior(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0)))
