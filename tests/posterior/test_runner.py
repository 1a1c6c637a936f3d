# SPDX-License-Identifier: Apache-2.0
"""Running a model for many draws: batched, in chunks, or one by one."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_latentde.posterior.runner import memory_bytes, run_draws

ONE = torch.tensor(1.0)


@pytest.mark.parametrize(("text", "number"), [("1GB", 10**9), ("250 MB", 25 * 10**7), (1000, 1000), ("5B", 5)])
def test_memory_bytes(text, number):
    assert memory_bytes(text) == number


@pytest.mark.parametrize("text", ["many", "-1GB", 0])
def test_bad_memory(text):
    with pytest.raises(ValueError, match="memory"):
        memory_bytes(text)


def test_chunks_and_loop_agree_with_one_batch():
    draws, calls = {"x": torch.linspace(0, 1, 37)}, []

    def square(draw):
        calls.append(1)
        return {"y": draw["x"] ** 2}

    def square_by_item(draw):
        return {"y": torch.tensor(draw["x"].item() ** 2)}

    whole = run_draws(square, draws)["y"]
    batched = len(calls)
    assert batched == 2  # once alone, once for all
    chunked = run_draws(square, draws, memory=16 * 8 * 10)["y"]
    assert len(calls) == batched + 1 + 4
    assert torch.equal(whole, draws["x"] ** 2) and torch.equal(chunked, whole)
    assert torch.allclose(run_draws(square_by_item, draws)["y"], whole)


# Each is a distribution that is the same for all draws: rows must still be independent.
# Kolmogorov-Smirnov at level 1e-4 for each of six, with fixed seeds.
@pytest.mark.parametrize(
    ("fn", "law"),
    [
        (dist.Normal(0.0, ONE), stats.norm()),
        (dist.LogNormal(0.0, ONE), stats.lognorm(1.0)),
        (dist.Exponential(ONE), stats.expon()),
        (dist.Laplace(0.0, ONE), stats.laplace()),
        (dist.StudentT(3 * ONE, 0.0, ONE), stats.t(3)),
        (dist.Gamma(2 * ONE, ONE), stats.gamma(2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_sampling_under_vmap_has_the_right_law(fn, law):
    calls = []

    def one(draw):
        calls.append(1)
        return {"x": pyro.sample("x", fn)}

    values = run_draws(one, {"_": torch.zeros(3000)}, seed=3)["x"]
    assert len(calls) == 2, "it was not batched"
    assert len(values.unique()) > 2990
    assert stats.kstest(values.numpy(), law.cdf).pvalue > 1e-4
    assert torch.equal(values, run_draws(one, {"_": torch.zeros(3000)}, seed=3)["x"])


def test_errors_of_single_draws_can_become_nan():
    def picky(draw):
        if draw["x"].item() < 0:
            raise ValueError("negative")
        return {"y": draw["x"].sqrt()}

    draws = {"x": torch.tensor([-1.0, 4.0, 9.0])}
    with pytest.raises(ValueError, match="negative"):
        run_draws(picky, draws)
    values = run_draws(picky, draws, skip_errors=True)["y"]
    assert values[0].isnan() and values[1:].tolist() == [2.0, 3.0]
