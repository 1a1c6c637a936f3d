# SPDX-License-Identifier: Apache-2.0
"""lde.ode with events: what it returns and records, and inference on hitting times."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_latentde as lde
from pyro_latentde.errors import LatentDEError

TIMES = torch.tensor([0.0, 1.0, 6.0], dtype=torch.float64)
HIT = lde.Event(lambda t, y, k: y[0] - 0.25, terminal=True)


def decaying(k):
    start = torch.ones(1, dtype=torch.float64)
    return lde.ode("z", lambda t, y, k: -k * y, start, TIMES, k, events=HIT, event_dims={"p": 0}, rtol=1e-9)


def model(observed):
    k = pyro.sample("k", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))
    _, found = decaying(k)
    pyro.sample("hit", dist.Normal(found.times[..., 0], 0.05), obs=observed)


def test_the_site_returns_and_records_events():
    k = torch.tensor(0.7, dtype=torch.float64)
    states, found = decaying(k)
    expected = torch.log(torch.tensor(4.0, dtype=torch.float64)) / k
    torch.testing.assert_close(found.times, expected.reshape(1), rtol=1e-8, atol=0)
    torch.testing.assert_close(states[-1, 0], torch.tensor(0.25, dtype=torch.float64), rtol=1e-12, atol=0)
    nodes = poutine.trace(decaying).get_trace(k).nodes
    assert nodes["z"]["value"].shape == (3, 1)
    torch.testing.assert_close(nodes["z.events"]["value"], found.times)
    rates = torch.tensor([0.7, 1.4], dtype=torch.float64)
    with poutine.trace() as traced, pyro.plate("rows", 2):
        decaying(rates)
    torch.testing.assert_close(traced.trace.nodes["z.events"]["value"][:, 0], 0.7 * expected / rates, rtol=1e-8, atol=0)


def test_errors_name_the_site():
    with pytest.raises(LatentDEError, match="site 'z'.*expected lde.Event"):
        lde.ode("z", lambda t, y: -y, torch.ones(1), TIMES.float(), events=lambda t, y: y[0])


def test_nuts_finds_the_rate_from_a_hitting_time():
    """log 4 / k is seen with an error of 0.05: the posterior of k is narrow around log 4 / 2."""
    posterior = lde.infer.nuts(
        model, torch.tensor(2.0, dtype=torch.float64), num_samples=150, num_warmup=150, num_chains=2, seed=3
    )
    k = posterior.samples["k"]
    hits = torch.log(torch.tensor(4.0, dtype=torch.float64)) / k
    assert abs(float(hits.mean()) - 2.0) < 0.02 and 0.03 < float(hits.std()) < 0.07
    assert not posterior.stats["ode_failed"].any()
