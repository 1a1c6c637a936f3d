# SPDX-License-Identifier: Apache-2.0
"""TruncatedNormal against SciPy, by its moments, its gradients and its draws."""

import math

import pyro
import pytest
import scipy.stats
import torch
from torch.distributions import biject_to, constraints
from torch.testing import assert_close

from pyro_latentde.distributions import TruncatedNormal

INF = math.inf
CASES = [
    (1.0, 0.5, 0.0, INF),
    (0.05, 0.05, 0.0, INF),
    (-3.0, 1.0, 5.0, INF),  # 8 standard deviations out
    (5.0, 1.0, -INF, -3.0),
    (0.0, 1.0, -1.0, 2.0),
    (0.0, 1.0, 3.0, 4.0),
    (0.3, 2.0, -INF, INF),
]


def both(loc, scale, low, high):
    ours = TruncatedNormal(*torch.tensor([loc, scale], dtype=torch.float64), low, high)
    return ours, scipy.stats.truncnorm((low - loc) / scale, (high - loc) / scale, loc, scale)


@pytest.mark.parametrize("case", CASES)
def test_density_moments_and_cdf(case):
    ours, reference = both(*case)
    x = torch.as_tensor(reference.ppf([0.001, 0.1, 0.5, 0.9, 0.999]))
    assert_close(ours.log_prob(x), torch.as_tensor(reference.logpdf(x)), rtol=1e-9, atol=1e-9)
    assert_close(ours.cdf(x), torch.as_tensor(reference.cdf(x)), rtol=1e-8, atol=1e-10)
    assert_close(ours.icdf(ours.cdf(x)), x, rtol=1e-7, atol=1e-9)
    assert ours.mean.item() == pytest.approx(reference.mean(), rel=1e-9)
    assert ours.variance.item() == pytest.approx(reference.var(), rel=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_draws(case):
    """Kolmogorov-Smirnov at level 1e-4 for each of seven laws, with a fixed seed."""
    ours, reference = both(*case)
    draws = ours.sample((5000,))
    assert ours.support.check(draws).all()
    assert scipy.stats.kstest(draws.numpy(), reference.cdf).pvalue > 1e-4


@pytest.mark.parametrize("case", CASES)
def test_gradients_by_central_differences(case):
    loc, scale, low, high = case
    x = torch.as_tensor(both(*case)[1].ppf(0.3))
    u = torch.tensor(0.3).double()

    def log_prob(loc, scale, x):
        return TruncatedNormal(loc, scale, low, high, validate_args=False).log_prob(x)

    def draw(loc, scale):
        return TruncatedNormal(loc, scale, low, high).icdf(u)

    args = [torch.tensor(v).double().requires_grad_() for v in (loc, scale)]
    assert torch.autograd.gradcheck(log_prob, (*args, x.requires_grad_()))
    assert torch.autograd.gradcheck(draw, tuple(args))


def test_outside_is_impossible():
    prior = TruncatedNormal(torch.tensor(1.0), 0.5, validate_args=False)
    assert prior.log_prob(torch.tensor([-0.1, 0.2])).tolist()[0] == -INF
    with pytest.raises(ValueError, match="support"):
        TruncatedNormal(torch.tensor(1.0), 0.5).log_prob(torch.tensor(-0.1))
    with pytest.raises(ValueError, match="low < high"):
        TruncatedNormal(0.0, 1.0, low=2.0, high=1.0)


def test_supports():
    assert TruncatedNormal(0.0, 1.0).support is constraints.positive
    for low, high in ((2.0, INF), (-INF, 2.0), (1.0, 2.0), (-INF, INF)):
        law = TruncatedNormal(torch.zeros(3), 1.0, low, high)
        values = biject_to(law.support)(torch.linspace(-2, 2, 3))
        assert law.log_prob(values).isfinite().all()


def test_batches_expand_and_vmap():
    law = TruncatedNormal(torch.tensor([0.1, 1.0]).double(), 0.5)
    assert law.expand((4, 2)).rsample((3,)).shape == (3, 4, 2)
    x = torch.rand(5, 2).double()
    assert_close(torch.func.vmap(law.log_prob)(x), law.log_prob(x))
    drawn = torch.func.vmap(lambda loc: TruncatedNormal(loc, 0.5).rsample(), randomness="different")(x)
    assert drawn.shape == (5, 2) and (drawn > 0).all()


def test_as_a_site():
    def model():
        with pyro.plate("n", 3):
            return pyro.sample("x", TruncatedNormal(torch.tensor(0.0), 1.0))

    trace = pyro.poutine.trace(model).get_trace()
    assert trace.nodes["x"]["value"].shape == (3,)
    half_normal = torch.distributions.HalfNormal(1.0).log_prob(trace.nodes["x"]["value"]).sum()
    assert_close(trace.log_prob_sum(), half_normal)
