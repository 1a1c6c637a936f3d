# SPDX-License-Identifier: Apache-2.0
"""Scores of predictive draws against formulas worked out by hand."""

import math

import pytest
import torch

from pyro_latentde.errors import ShapeError
from pyro_latentde.posterior import scores


def crps_of_normal(mean, sd, y):
    """Gneiting and Raftery 2007, equation 21."""
    w = (y - mean) / sd
    normal = torch.distributions.Normal(0.0, 1.0)
    return sd * (w * (2 * normal.cdf(w) - 1) + 2 * normal.log_prob(w).exp() - 1 / math.sqrt(math.pi))


def crps_by_pairs(draws, truth):
    """The definition, over all pairs of two different draws."""
    count = len(draws)
    spread = sum((draws[i] - draws[j]).abs() for i in range(count) for j in range(count) if i != j)
    return (draws - truth).abs().mean(0) - 0.5 * spread / (count * (count - 1))


def test_errors_are_those_of_the_mean_where_something_is_observed():
    draws = torch.tensor([[0.0, 10.0, 3.0], [2.0, 14.0, 5.0]])  # means 1, 12, 4
    truth = torch.tensor([4.0, 8.0, 99.0])
    mask = torch.tensor([True, True, False])
    assert scores.l1(draws, truth, mask) == pytest.approx((3 + 4) / 2)
    assert scores.rmse(draws, truth, mask) == pytest.approx(math.sqrt((9 + 16) / 2))
    assert scores.l1(draws, truth) == pytest.approx((3 + 4 + 95) / 3)


def test_crps_of_few_draws_is_the_sum_over_pairs():
    draws, truth = torch.randn(7, 4, 3).double(), torch.randn(4, 3).double()
    expected = crps_by_pairs(draws, truth)
    assert scores.crps(draws, truth) == pytest.approx(expected.mean().item(), rel=1e-12)
    mask = torch.rand(4, 3) < 0.5
    assert scores.crps(draws, truth, mask) == pytest.approx(expected[mask].mean().item(), rel=1e-12)


def test_crps_of_many_normal_draws_is_the_closed_form():
    """Six laws, 40,000 draws of each. The sd of an estimate is below sd / sqrt(40,000): four of them, one in 10^4."""
    mean = torch.tensor([0.0, 0.0, 0.0, 1.0, -3.0, 5.0]).double()
    sd = torch.tensor([1.0, 1.0, 2.0, 0.1, 5.0, 3.0]).double()
    truth = torch.tensor([0.0, 1.5, -1.0, 1.3, 4.0, 5.0]).double()
    draws = mean + sd * torch.randn(40_000, 6).double()
    exact = crps_of_normal(mean, sd, truth)
    for i in range(6):
        assert scores.crps(draws[:, i], truth[i]) == pytest.approx(exact[i].item(), abs=4 * sd[i].item() / 200)
    assert scores.crps(draws, truth) == pytest.approx(exact.mean().item(), abs=0.04)


def test_crps_of_few_draws_is_unbiased():
    """Two draws at a time: the mean of 50,000 estimates, each of sd below 1; four sd, a false alarm in 10^4."""
    draws = torch.randn(2, 50_000).double()
    exact = crps_of_normal(torch.tensor(0.0), torch.tensor(1.0), torch.tensor(0.7)).item()
    estimates = torch.stack([(draws - 0.7).abs().mean(0), 0.5 * (draws[0] - draws[1]).abs()])
    assert (estimates[0] - estimates[1]).std() < 1
    assert scores.crps(draws, torch.full((50_000,), 0.7).double()) == pytest.approx(exact, abs=4 / math.sqrt(50_000))


def test_coverage_of_honest_draws_is_the_probability():
    """4,000 truths from the distribution of the draws; four binomial sd, a false alarm in 10^4."""
    center = torch.randn(4000)
    draws, truth = center + torch.randn(500, 4000), center + torch.randn(4000)
    for probability in (0.5, 0.9):
        spread = math.sqrt(probability * (1 - probability) / 4000)
        assert scores.coverage(draws, truth, probability=probability) == pytest.approx(probability, abs=4 * spread)
    assert scores.coverage(draws, truth + 100) == 0
    mask = torch.arange(4000) < 3000
    assert scores.coverage(draws, torch.where(mask, center, center + 100), mask) == 1


@pytest.mark.parametrize("count", [20, 50, 100])
def test_coverage_of_few_honest_draws_is_the_probability(count):
    """40,000 truths; four binomial sd. Quantiles of 20 draws would cover .9 * 19 / 21."""
    draws, truth = torch.randn(count, 40_000), torch.randn(40_000)
    assert scores.coverage(draws, truth) == pytest.approx(0.9, abs=4 * 0.3 / 200 + 0.003)


def test_quantiles_are_those_of_torch():
    draws = torch.randn(23, 5, 2).double()
    for q, found in zip((0.0, 0.05, 0.37, 1.0), scores.quantiles(draws, (0.0, 0.05, 0.37, 1.0)), strict=True):
        torch.testing.assert_close(found, draws.quantile(q, dim=0), rtol=1e-12, atol=1e-12)
    assert scores.quantiles(draws[:1], (0.3,))[0].equal(draws[0])


def test_many_pixels_have_quantiles():
    """torch.quantile refuses more than 2^24 numbers, which 20 films of 50 pendulums have."""
    low, high = scores.quantiles(torch.tensor([3.0, 1.0])[:, None].expand(2, 2**23 + 1), (0.05, 0.95))
    assert low[-1] == pytest.approx(1.1) and high[-1] == pytest.approx(2.9)


@pytest.mark.parametrize(
    ("score", "draws", "truth", "words"),
    [
        (scores.crps, torch.zeros(1, 3), torch.zeros(3), "at least 2"),
        (scores.l1, torch.zeros(()), torch.zeros(3), r"\(S, ...\)"),
        (scores.rmse, torch.zeros(5, 3), torch.zeros(4), r"\(5, 3\).*\(4,\)"),
    ],
)
def test_shapes_are_explained(score, draws, truth, words):
    with pytest.raises(ShapeError, match=words):
        score(draws, truth)


def test_probability_is_checked():
    with pytest.raises(ValueError, match="between 0 and 1"):
        scores.coverage(torch.zeros(3, 2), torch.zeros(2), probability=90)


def test_draws_that_are_nan_are_left_out_wherever_they_are():
    torch.manual_seed(3)
    draws, truth = torch.randn(9, 5).double(), torch.randn(5).double()
    holed = draws.clone()
    holed[2:6, 0], holed[0, 1], holed[1:, 2] = torch.nan, torch.nan, torch.nan
    for score in (scores.l1, scores.rmse, scores.coverage):
        alone = [score(holed[~holed[:, i].isnan(), i], truth[i]) for i in range(5)]
        found = [score(holed[:, i], truth[i]) for i in range(5)]
        assert found == pytest.approx(alone, rel=1e-12)
    crps = [scores.crps(holed[:, i], truth[i]) for i in (0, 1, 3)]
    assert crps == pytest.approx([scores.crps(holed[~holed[:, i].isnan(), i], truth[i]) for i in (0, 1, 3)], rel=1e-12)
    assert scores.crps(holed[:, 2], truth[2]) != scores.crps(holed[:, 2], truth[2])  # NaN: of one draw
    found = torch.stack(scores.quantiles(holed, (0.0, 0.3, 0.95, 1.0)))
    expected = torch.nanquantile(holed, torch.tensor([0.0, 0.3, 0.95, 1.0]).double(), dim=0)
    torch.testing.assert_close(found, expected)
    for end in (*scores.interval(draws[:, :1] * torch.nan), *scores.quantiles(draws * torch.nan, (0.5,))):
        assert end.isnan().all()
    assert scores.coverage(draws * torch.nan, truth) != scores.coverage(draws * torch.nan, truth)
