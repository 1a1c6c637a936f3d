# SPDX-License-Identifier: Apache-2.0
"""Starts: valid, different by chain, out of worthless modes and necks; and what is told if there is none."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_latentde.errors import InitError, LatentDEError
from pyro_latentde.infer.ascent import ascend
from pyro_latentde.infer.log_joint import LogJoint
from pyro_latentde.infer.starts import find_starts
from pyro_latentde.posterior.posterior import Posterior

ZERO = torch.zeros((), dtype=torch.float64)


def two_sites():
    pyro.sample("a", dist.Normal(ZERO, 1.0))
    pyro.sample("b", dist.LogNormal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))


def solve_fails_where(condition, status=1):
    """A model of rate ``beta`` whose 'solve' gives NaN and a status wherever ``condition(beta)``."""

    def model():
        beta = pyro.sample("beta", dist.LogNormal(ZERO, 2.0))
        gamma = pyro.sample("gamma", dist.Normal(ZERO, 1.0))
        failed = condition(beta)
        z = torch.where(failed, torch.full_like(beta, math.nan), beta).reshape(1, 1)
        record = {"status": failed.long() * status, "n_steps": torch.ones((), dtype=torch.int64)}
        infer = {"_deterministic": True, "lde_ode": record}
        pyro.sample("z", dist.Delta(z, event_dim=2).mask(False), obs=z, infer=infer)
        pyro.sample("obs", dist.Normal(z[0, 0] + gamma, 1.0), obs=ZERO + 1)

    return model


def test_starts_are_valid_and_different_and_repeatable():
    joint = LogJoint(solve_fails_where(lambda beta: beta > 2.0))
    starts = find_starts(joint, 5, seed=1)
    assert starts.shape == (5, 2) and starts.dtype == np.float64
    assert torch.isfinite(joint.value_and_grad(torch.from_numpy(starts))[0]).all()
    assert len(np.unique(starts[:, 0])) == 5
    assert np.array_equal(starts, find_starts(joint, 5, seed=1))
    assert not np.allclose(starts, find_starts(joint, 5, seed=2))


def test_a_chain_starts_at_the_same_place_whatever_the_number_of_chains():
    joint = LogJoint(two_sites)
    assert np.allclose(find_starts(joint, 2, seed=0), find_starts(joint, 6, seed=0)[:2], rtol=1e-9, atol=1e-9)


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    find_starts(LogJoint(two_sites), 2, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_starts_are_near_typical_draws_of_a_sharp_posterior_but_not_at_its_top():
    data = torch.linspace(2.9, 3.1, 200, dtype=torch.float64)

    def model():
        mean = pyro.sample("mean", dist.Normal(torch.zeros(4, dtype=torch.float64), 10.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(ZERO, 1.0))
        with pyro.plate("n", 200):
            pyro.sample("obs", dist.Normal(mean.sum(), scale), obs=data)

    joint = LogJoint(model)
    lp = joint.value_and_grad(torch.from_numpy(find_starts(joint, 8, seed=0)))[0]
    top = ascend(lambda u: joint.value_and_grad(u)[:2], torch.zeros(1, joint.dim).double(), 2000, 0.01)[0][-1]
    deficit = joint.value_and_grad(top)[0] - lp
    assert (deficit < 60).all()  # prior draws are typically tens of thousands below
    assert len(torch.unique(lp)) == 8


def test_flat_and_worthless_modes_are_left():
    # an oscillation seen at 40 times: the likelihood in its frequency has one narrow peak among flat places
    t = torch.linspace(0, 10, 40, dtype=torch.float64)
    data = torch.sin(2.0 * t)

    def model():
        omega = pyro.sample("omega", dist.LogNormal(ZERO, 0.7))
        noise = pyro.sample("noise", dist.LogNormal(ZERO, 1.0))
        with pyro.plate("t", 40):
            pyro.sample("obs", dist.Normal(torch.sin(omega * t), noise), obs=data)

    joint = LogJoint(model)
    starts = torch.from_numpy(find_starts(joint, 10, seed=0))
    omega = joint.constrain(starts)["omega"]
    assert ((omega - 2.0).abs() < 0.1).all()


def test_the_neck_of_a_funnel_is_not_taken_for_a_mode():
    def model():
        v = pyro.sample("v", dist.Normal(ZERO, 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(9, dtype=torch.float64), (v / 2).exp()).to_event(1))

    joint = LogJoint(model)
    v = find_starts(joint, 10, seed=0)[:, 0]
    assert (v > -5).all() and (v < 8).all()  # the log-density alone would lead to v < -8 with ever more steps


def test_given_values_for_all_chains_for_each_chain_and_in_part():
    joint = LogJoint(two_sites)
    complete = {"a": torch.tensor(0.7), "b": torch.tensor([1.0, 2.0])}
    starts = find_starts(joint, 3, seed=0, start=complete)
    assert np.allclose(starts, [[0.7, 0.0, math.log(2.0)]] * 3, atol=1e-6)
    each = {"a": torch.tensor([0.1, 0.2, 0.3]), "b": torch.ones(3, 2)}
    assert np.allclose(find_starts(joint, 3, seed=0, start=each)[:, 0], [0.1, 0.2, 0.3])
    part = find_starts(joint, 3, seed=0, start={"a": 0.7})
    assert np.allclose(part[:, 0], 0.7) and len(np.unique(part[:, 1])) == 3


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"c": 1.0}, r"\['c'\] are no latent sites"),
        ({"a": torch.zeros(2)}, r"start\['a'\]: expected shape \(\), or \(3,\)"),
        ({"b": torch.tensor([1.0, -1.0])}, r"start\['b'\].*outside its support"),
        ("prior", "expected 'auto'"),
        (3, "got int"),
    ],
)
def test_bad_starts_are_told(start, message):
    with pytest.raises(LatentDEError, match=message):
        find_starts(LogJoint(two_sites), 3, seed=0, start=start)


def test_starts_from_a_posterior_and_from_a_fit():
    joint = LogJoint(two_sites)
    draws = {"a": torch.randn(2, 50).double() + 100, "b": torch.rand(2, 50, 2).double() + 1}
    posterior = Posterior(samples=draws)

    class Fit:
        def posterior(self, num_samples):
            return Posterior(samples={"a": torch.randn(1, num_samples) + 50, "b": torch.ones(1, num_samples, 2)})

    class Sampler:
        def sample_start(self, n, seed):
            return {"a": torch.randn(n, generator=torch.Generator().manual_seed(seed)) + 20, "b": torch.ones(n, 2)}

    for start, where in ((posterior, 100), (Fit(), 50), (Sampler(), 20)):
        starts = find_starts(joint, 4, seed=0, start=start)
        assert np.abs(starts[:, 0] - where).max() < 5
        assert len(np.unique(starts[:, 0])) == 4
        assert np.allclose(starts[:2], find_starts(joint, 2, seed=0, start=start))
    with pytest.raises(LatentDEError, match=r"no draws of latent sites \['b'\]"):
        find_starts(joint, 4, seed=0, start=posterior.select(["a"]))


def test_failed_solves_are_counted_by_cause_and_placed():
    joint = LogJoint(solve_fails_where(lambda beta: beta > 1e-30))
    with pytest.raises(InitError) as caught:
        find_starts(joint, 2, seed=0)
    text = str(caught.value)
    assert text.startswith("No valid start for chain 0 in 100 tries: 100 ODE max_steps.")
    assert "they covered beta " in text and "gamma" in text
    assert "lde.solver" in text and "fit_svi" in text


def test_mixed_causes_name_the_site_and_the_region():
    def model():
        beta = pyro.sample("beta", dist.LogNormal(ZERO, 2.0))
        failed = beta > 0.5
        record = {"status": failed.long() * 3, "n_steps": torch.ones((), dtype=torch.int64)}
        z = beta.reshape(1, 1)
        infer = {"_deterministic": True, "lde_ode": record}
        pyro.sample("z", dist.Delta(z, event_dim=2).mask(False), obs=z, infer=infer)
        pyro.factor("impossible", torch.log(-beta))

    with pytest.raises(InitError) as caught:
        find_starts(LogJoint(model), 2, seed=0)
    text = str(caught.value)
    assert "ODE non_finite" in text and "non-finite log_prob at 'impossible'" in text
    assert "100 % of 'ODE non_finite' lie at beta > 0." in text


def test_gradients_that_are_not_finite_are_named():
    def model():
        x = pyro.sample("x", dist.Normal(ZERO, 1.0))
        pyro.factor("kink", torch.sqrt((x - x).abs()))  # zero with an infinite slope

    with pytest.raises(InitError, match="100 non-finite gradient"):
        find_starts(LogJoint(model), 1, seed=0)


def test_a_given_start_that_fails_is_one_try():
    joint = LogJoint(solve_fails_where(lambda beta: beta > 2.0, status=2))
    with pytest.raises(InitError, match="in 1 tries: 1 ODE underflow"):
        find_starts(joint, 2, seed=0, start={"beta": 5.0, "gamma": 0.0})


def test_models_that_cannot_be_vectorised_get_starts_too():
    def model():
        x = pyro.sample("x", dist.Normal(ZERO, 1.0))
        pyro.sample("obs", dist.Normal(x, 1.0 if x.item() > 0 else 2.0), obs=ZERO)

    starts = find_starts(LogJoint(model), 3, seed=0)
    assert np.isfinite(starts).all() and len(np.unique(starts)) == 3


def test_ascent_stays_where_the_log_density_is_finite():
    def value_and_grad(u):
        lp = torch.where(u[:, 0] > 1.0, torch.full_like(u[:, 0], -math.inf), u[:, 0])
        return lp, torch.isfinite(lp)[:, None] * torch.ones_like(u)

    path, worth = ascend(value_and_grad, torch.zeros(2, 1), 100)
    assert (path[-1] <= 1.0).all() and (path[-1] > 0.7).all() and torch.isfinite(worth).all()
