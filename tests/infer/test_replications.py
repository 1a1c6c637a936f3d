# SPDX-License-Identifier: Apache-2.0
"""Rows with data of their own, and simulated data sets of a model."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_latentde.infer.batched_log_joint import BatchedLogJoint
from pyro_latentde.infer.log_joint import LogJoint
from pyro_latentde.infer.replications import Replications, simulate_truths
from pyro_latentde.models.systems import lotka_volterra


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def model(y):
    mean = pyro.sample("mean", dist.Normal(tensor(0.0), 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


@pytest.mark.parametrize("engine", ["loop", "eager", "traced"])
def test_every_row_is_scored_with_its_own_data(engine):
    data = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = torch.tensor([[0.1], [0.2], [-0.3]], dtype=torch.float64)
    batched = BatchedLogJoint(LogJoint(model, (torch.zeros(4).double(),)), u.numpy(), engine, data={"y": data})
    assert batched.engine == engine
    for values in (data, 2.0 * data + 1.0):  # the second without recording anew
        batched.exchange({"y": values})
        lp, grad, _, _ = batched.tensors(u)
        right = [LogJoint(model, (row,)).value_and_grad(x[None]) for row, x in zip(values, u, strict=True)]
        assert torch.allclose(lp, torch.cat([value for value, _, _ in right]))
        assert torch.allclose(grad, torch.cat([slope for _, slope, _ in right]))
    more = u.repeat(3, 1)[:7]  # any number of rows, all with the data of the first three in turn
    assert torch.allclose(batched.any_rows(more)[0][:3], lp)


def test_simulated_data_follow_the_prior_predictive():
    truths = simulate_truths(LogJoint(model, (torch.zeros(4).double(),)), 2000, seed=1)
    y = truths.data["y"]
    assert truths.u.shape == (2000, 1) and y.shape == (2000, 4) and len(truths.spare) == 64
    # sd of y about its truth .5, of the truth 2: four standard errors of 8000 and 2000 draws
    assert abs((y - truths.u).std().item() / 0.5 - 1) < 4 / np.sqrt(2 * 8000)
    assert abs(truths.u.std().item() / 2 - 1) < 4 / np.sqrt(2 * 2000)


def test_series_with_gaps_keep_their_gaps():
    series = lotka_volterra.simulate(num_series=2, missing=0.3, seed=0).series
    joint = LogJoint(lotka_volterra.model, (series,))
    truths = simulate_truths(joint, 4, seed=0)
    assert truths.data["obs"].shape == (4, 2, 21, 2)
    batch = Replications(joint, 2, 3, truths, "eager")
    assert batch.give(truths[2:3]) == 1  # the empty place repeats it
    rows = truths.u[2].expand(6, -1)
    before = batch.density(rows)[0]
    assert torch.allclose(before, before[0])
    hidden = truths.data["obs"].masked_fill(~series.mask, 1e3)  # what is missing does not count
    batch.batched.exchange({"obs": hidden[2:3].expand(6, -1, -1, -1)})
    assert torch.allclose(batch.density(rows)[0], before)


def test_starts_do_not_see_the_truth():
    joint = LogJoint(model, (torch.zeros(4).double(),))
    truths = simulate_truths(joint, 6, seed=0)
    batch = Replications(joint, 6, 4, truths)
    batch.give(truths)
    starts = batch.starts(seed=0)
    assert starts.shape == (6, 4, 1)
    moved = type(truths)(truths.u + 100.0, truths.data, truths.spare)
    batch.give(moved)
    assert torch.equal(batch.starts(seed=0), starts)
    # and are near the posterior, whose mean is about that of the data
    assert (starts.mean(1)[:, 0] - truths.data["y"].mean(1)).abs().max() < 1.5
