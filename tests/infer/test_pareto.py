# SPDX-License-Identifier: Apache-2.0
"""Shape of the tail of importance weights: against ArviZ, and against weights that are exactly Pareto."""

import math

import arviz
import pytest
import torch

from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer.pareto import pareto_shape


def log_weights(k, count, rows, seed=0):
    """Logarithms of U^-k: Pareto weights of shape k."""
    generator = torch.Generator().manual_seed(seed)
    return -k * torch.rand(count, rows, generator=generator, dtype=torch.float64).log()


@pytest.mark.parametrize("count", [30, 200, 1000])
@pytest.mark.parametrize("k", [-0.5, 0.3, 1.2])
def test_agrees_with_arviz(k, count):
    weights = log_weights(k, count, 6) - 1234.0
    expected = arviz.psislw(weights.T.numpy().copy())[1]
    assert pareto_shape(weights).numpy() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("k", [0.2, 0.7, 1.0])
def test_finds_the_shape_of_pareto_weights(k):
    found = pareto_shape(log_weights(k, 4000, 100))
    size = math.ceil(3 * math.sqrt(4000))
    expected = (size * k + 5) / (size + 10)
    # false alarm 7 in a million; a fit's sd is about (1 + k) / sqrt(size), and its bias under .02
    error = 4.5 * (1 + k) / math.sqrt(size * 100)
    assert float(found.mean()) == pytest.approx(expected, abs=error + 0.02)
    assert float(found.std()) == pytest.approx((1 + k) / math.sqrt(size), rel=0.35)


def test_weights_without_a_tail():
    equal = torch.full((100, 1), -5e4) + 1e-3 * torch.rand(100, 1)
    assert pareto_shape(equal).tolist() == [0.0]
    few = torch.linspace(0, 1, 100)[:, None] * 1e6  # each weight is nothing beside the next
    assert pareto_shape(few).tolist() == [math.inf]
    assert pareto_shape(torch.full((100, 1), -math.inf)).tolist() == [math.inf]


def test_failed_solves_are_weights_of_zero():
    weights = log_weights(0.5, 1000, 2)
    lowest = weights[:, 0].argsort()[:300]
    weights[lowest[:150], 0], weights[lowest[150:], 0] = math.nan, -math.inf
    assert torch.equal(pareto_shape(weights), pareto_shape(log_weights(0.5, 1000, 2)))
    assert pareto_shape(weights).isfinite().all()


def test_too_few_draws():
    with pytest.raises(LatentDEError, match="at least 25 draws"):
        pareto_shape(torch.zeros(24, 3))
