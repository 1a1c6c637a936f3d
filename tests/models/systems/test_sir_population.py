# SPDX-License-Identifier: Apache-2.0
"""Outbreaks from a population: what the equations keep, and priors that can be simulated."""

import numpy as np
import pytest
import scipy.integrate
import torch

import pyro_latentde as lde
from pyro_latentde.models.systems import sir_population as sir


def test_states_are_those_of_scipy():
    series, z, truth = sir.simulate(num_series=3, seed=1)
    for states, beta, gamma in zip(z.numpy(), truth["beta"].tolist(), truth["gamma"].tolist(), strict=True):

        def f(t, y, beta=beta, gamma=gamma):
            return [-beta * y[0] * y[1], beta * y[0] * y[1] - gamma * y[1]]

        options = {"method": "DOP853", "t_eval": series.times[0].numpy(), "rtol": 1e-11, "atol": 1e-13}
        solved = scipy.integrate.solve_ivp(f, (0, 36), [0.999, 0.001], **options)
        np.testing.assert_allclose(np.exp(states), solved.y.T, rtol=1e-7)


def test_draws_of_the_prior_can_be_simulated():
    series = lde.Series.at_times(torch.arange(3.0, 37.0, 3.0).double().expand(6, -1))
    prior = lde.infer.prior(sir.population(), series, num_samples=300, seed=2)
    assert prior["log_beta"].shape == (1, 300, 6)
    observed = prior["obs"]
    assert observed.shape == (1, 300, 6, 12, 1)
    assert observed.isfinite().all() and (observed > 0).all()


def test_simulated_outbreaks_follow_the_population():
    series, z, truth = sir.simulate(num_series=3000, seed=3)
    for name in ("beta", "gamma"):
        x = truth[name].log()
        # 5 standard errors: a false alarm in 300,000 for the five of them
        assert abs(x.mean() - truth[f"{name}_typical"].log()) < 5 * truth[f"{name}_spread"] / 3000**0.5
        assert abs(x.std() / truth[f"{name}_spread"] - 1) < 5 / 6000**0.5
    residual = (series.values.log() - z[..., 1:]) / truth["sigma"]
    assert abs(residual.std() - 1) < 5 / (2 * 36_000) ** 0.5


def test_simulation_is_reproducible():
    one, two, other = (sir.simulate(missing=0.3, seed=seed).series for seed in (4, 4, 5))
    assert torch.equal(one.values, two.values) and torch.equal(one.mask, two.mask)
    assert not torch.equal(one.values, other.values) and one.mask[:, 0].all()
    with pytest.raises(ValueError, match="has no .'speed'.; it has"):
        sir.simulate(parameters={"speed": 1.0})
