# SPDX-License-Identifier: Apache-2.0
"""Minibatches: the order of epochs, shards, windows, and gradients that are unbiased by full enumeration."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_ode import smooth_series
from pyro.infer import Trace_ELBO
from torch.testing import assert_close

import pyro_latentde as lde
from pyro_latentde.errors import DataError
from pyro_latentde.infer.batches import Batches
from pyro_latentde.infer.schedules import progressive


def test_an_epoch_is_a_permutation():
    batches = Batches(smooth_series(12), batch_size=4, seed=3)
    epochs = [[batches.take(step).index.tolist() for step in range(3)] for _ in range(2)]
    assert all(sorted(sum(epoch, [])) == list(range(12)) for epoch in epochs) and epochs[0] != epochs[1]
    again = Batches(smooth_series(12), batch_size=4, seed=3)
    assert [again.take(step).index.tolist() for step in range(3)] == epochs[0]


def test_the_last_smaller_batch_is_left_out():
    batches = Batches(smooth_series(10), batch_size=4, seed=0)
    assert [len(batches.take(step)) for step in range(7)] == [4] * 7


def test_shards_are_parts_of_one_batch():
    whole = Batches(smooth_series(12), 6, window=4, seed=5)
    ranks = [Batches(smooth_series(12), 6, window=4, seed=5, rank=rank, world=2) for rank in (0, 1)]
    for step in range(4):
        expected, parts = whole.take(step), [batches.take(step) for batches in ranks]
        assert torch.equal(torch.cat([part.index for part in parts]), expected.index)
        assert torch.equal(torch.cat([part.times for part in parts]), expected.times)
        assert all(len(part) == 3 and part.population == 12 for part in parts)


def test_windows_start_everywhere_with_equal_chance():
    series = smooth_series(12, length=10)
    batches = Batches(series, window=7, seed=0)
    starts = torch.cat([batches.take(step).times[:, 0] for step in range(500)]).mul(10).round().long()
    counts = torch.bincount(starts)
    # 6000 draws of 4 equally likely starts: chi2 with 3 degrees of freedom exceeds 21.1 once in 10,000
    assert len(counts) == 4 and ((counts - 1500.0) ** 2 / 1500).sum() < 21.1


def test_progressive_windows_and_state():
    batches = Batches(smooth_series(12, length=10), 4, progressive(2, 10, 8), seed=1)
    shapes = [tuple(batches.take(step).values.shape) for step in range(10)]
    assert shapes == [(4, length, 3) for length in (2, 3, 4, 5, 6, 7, 8, 9, 10, 10)]
    state = batches.state()
    ahead = [batches.take(step).index for step in range(10, 14)]
    other = Batches(smooth_series(12, length=10), 4, progressive(2, 10, 8), seed=99)
    other.load(state)
    assert all(torch.equal(other.take(10 + i).index, index) for i, index in enumerate(ahead))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 13}, "13 of 12 series"),
        ({"batch_size": 0}, "0 of 12 series"),
        ({"batch_size": 5, "world": 2}, "5 series cannot be shared evenly by 2 devices"),
        ({"window": 11}, "window: 11 times from series of 10"),
        ({"window": lambda step: 2.5}, "whole number of times"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(DataError, match=message):
        Batches(smooth_series(12, length=10), **options)


def model(series):
    """A shared slope, local levels, and a parameter of the model."""
    gain = pyro.param("gain", torch.tensor(1.3, dtype=torch.float64))
    slope = pyro.sample("slope", dist.Normal(torch.tensor(0.2).double(), 2.0))
    with lde.series_plate(series):
        level = pyro.sample("level", dist.Normal(slope * 0.1, 1.0))
        mean = gain * level[:, None, None] + slope * series.times[..., None]
        lde.observe("obs", dist.Normal(mean.expand(-1, -1, 3), 0.5), series)


def guide(series):
    """No noise in the draws: reparametrised at fixed quantiles, so that gradients can be compared exactly."""
    center = pyro.param("center", torch.tensor(0.4, dtype=torch.float64))
    weight = pyro.param("weight", torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64))
    pyro.sample("slope", FixedNormal(center, 0.3))
    with lde.series_plate(series):
        pyro.sample("level", FixedNormal(series.values.mean(1) @ weight, 0.2))


class FixedNormal(dist.Normal):
    def rsample(self, sample_shape=()):
        return self.loc + 0.7 * self.scale


def gradients(series):
    for name in pyro.get_param_store():
        pyro.param(name).unconstrained().grad = None
    loss = Trace_ELBO().loss_and_grads(model, guide, series)
    grads = [pyro.get_param_store()[name].unconstrained().grad for name in ("gain", "center", "weight")]
    return torch.cat([torch.tensor([loss], dtype=torch.float64), *(grad.reshape(-1) for grad in grads)])


def test_minibatch_gradients_are_unbiased():
    series = smooth_series(6, length=4)
    every = [gradients(series.batch(list(rows))) for rows in itertools.combinations(range(6), 2)]
    assert len(every) == 15
    assert_close(torch.stack(every).mean(0), gradients(series), rtol=1e-10, atol=1e-10)
    assert (torch.stack(every).std(0) > 0.1).all()  # they do differ


def test_minibatches_of_windows_are_unbiased():
    """Over all pairs of series and all pairs of starts: the mean over all windows, T / W of them to a series."""
    series, length = smooth_series(4, length=5), 3
    every = [
        gradients(series.batch(list(rows)).window(list(starts), length, sample=True))
        for rows in itertools.combinations(range(4), 2)
        for starts in itertools.product(range(3), repeat=2)
    ]
    # By hand: the sum over series and windows of the local terms is linear in the plate, so that the mean over starts
    # of whole-data windows, each with the weight T / W = 5 / 3, is the target.
    whole = [gradients(series.window(start, length, sample=True)) for start in range(3)]
    assert_close(torch.stack(every).mean(0), torch.stack(whole).mean(0), rtol=1e-10, atol=1e-10)


def test_weight_of_a_window_by_hand():
    """Local terms count N/B T/W times, the shared site once."""
    series = smooth_series(4, length=6)
    batch = series.batch([2]).window(1, 2, sample=True)
    slope, weight = 0.4 + 0.7 * 0.3, torch.tensor([0.3, -0.2, 0.1]).double()
    location = batch.values.mean(1) @ weight
    level = location + 0.7 * 0.2
    mean = 1.3 * level[:, None, None] + slope * batch.times[..., None]
    local = dist.Normal(mean, 0.5).log_prob(batch.values).sum()
    local += dist.Normal(slope * 0.1, 1.0).log_prob(level).sum() - dist.Normal(location, 0.2).log_prob(level).sum()
    shared = torch.tensor(slope).double()
    shared = dist.Normal(0.2, 2.0).log_prob(shared) - dist.Normal(0.4, 0.3).log_prob(shared)
    assert gradients(batch)[0].item() == pytest.approx(-(12 * local + shared).item(), rel=1e-6)
