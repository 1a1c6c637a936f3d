# SPDX-License-Identifier: Apache-2.0
"""Poisson processes: densities by hand, draws against their intensity."""

import math

import pyro
import pytest
import scipy.stats
import torch
from torch.testing import assert_close

from pyro_latentde.distributions import GridPoissonProcess, PoissonProcess
from pyro_latentde.errors import SolveError


def test_density_by_hand_with_padding():
    logs = torch.tensor([[0.3, -1.0, 99.0], [2.0, torch.nan, torch.nan]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    integral = torch.tensor([1.5, 0.5], dtype=torch.float64, requires_grad=True)
    law = PoissonProcess(logs, integral, mask, validate_args=False)
    assert law.batch_shape == (2,) and law.event_shape == (3,)
    lp = law.log_prob(torch.full((2, 3), torch.inf))
    assert_close(lp, torch.tensor([0.3 - 1.0 - 1.5, 2.0 - 0.5], dtype=torch.float64))
    grads = torch.autograd.grad(lp.sum(), (logs, integral))
    assert torch.equal(grads[0], mask.double()) and (grads[1] == -1).all()
    assert law.expand((4, 2)).log_prob(torch.zeros(4, 2, 3)).shape == (4, 2)
    with pytest.raises(NotImplementedError, match="GridPoissonProcess draws"):
        law.sample()


GRID = torch.linspace(1.0, 4.0, 2001, dtype=torch.float64)


def rising():
    """lambda(t) = 2 + 3 (t - 1) on [1, 4]: 19.5 events expected."""
    return GridPoissonProcess(GRID, 2 * (GRID - 1) + 1.5 * (GRID - 1) ** 2, max_events=100)


def test_draws_follow_the_intensity():
    """Counts by chi-squared, times by Kolmogorov-Smirnov, gaps in units of expectation as exponentials: 1e-5 each."""
    draws = rising().sample((4000,))
    counts = draws.isfinite().sum(-1)
    assert (draws.diff(dim=-1)[:, :5] > 0).all() and draws.shape == (4000, 100)
    bins = [0, *range(12, 29, 2), 200]
    observed = torch.histogram(counts.double(), torch.tensor(bins).double())[0]
    expected = [
        scipy.stats.poisson.cdf(b - 1, 19.5) - scipy.stats.poisson.cdf(a - 1, 19.5)
        for a, b in zip(bins, bins[1:], strict=False)
    ]
    assert scipy.stats.chisquare(observed.numpy(), [4000 * e / sum(expected) for e in expected]).pvalue > 1e-5
    times = draws[draws.isfinite()].numpy()
    assert scipy.stats.kstest(times, lambda t: (2 * (t - 1) + 1.5 * (t - 1) ** 2) / 19.5).pvalue > 1e-5
    first = draws[:, :2].diff(dim=-1)[:, 0]
    grown = 2 * draws[:, :2].sub(1) + 1.5 * draws[:, :2].sub(1) ** 2
    assert first.min() > 0
    assert scipy.stats.kstest(grown.diff(dim=-1)[:, 0].numpy(), "expon").pvalue > 1e-5
    assert scipy.stats.kstest(grown[:, 0].numpy(), "expon").pvalue > 1e-5


def test_density_of_draws():
    law = rising()
    times = torch.tensor([1.0, 1.5, 2.25, 3.999, 4.0, math.inf], dtype=torch.float64)
    exact = (2 + 3 * (times[:5] - 1)).log().sum() - 19.5
    assert law.log_prob(times).item() == pytest.approx(exact.item(), abs=5 * 3e-3)
    assert law.log_prob(torch.full((3,), math.inf)).item() == pytest.approx(-19.5)
    assert law.mean_count == pytest.approx(19.5)


def test_batches_plates_and_room():
    counts = torch.stack([0 * GRID, 3 * (GRID - 1)])
    law = GridPoissonProcess(GRID, counts, max_events=40)
    with pyro.plate("rows", 2):
        value = pyro.sample("events", law)
    assert value.shape == (2, 40) and value[0].isinf().all()
    assert law.expand((5, 2)).sample().shape == (5, 2, 40)
    assert law.log_prob(value).shape == (2,) and law.log_prob(value)[0] == 0
    with pytest.raises(SolveError, match="max_events = 3 .up to 9 are expected"):
        GridPoissonProcess(GRID, counts, max_events=3).sample((100,))
