# SPDX-License-Identifier: Apache-2.0
"""The SIR model: what is conserved, the law of the counts against SciPy, the boarding school of 1978."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from pyro import poutine

from pyro_latentde import infer
from pyro_latentde.data import Series, load_boarding_school
from pyro_latentde.models.systems import sir


def test_nobody_is_lost():
    z = sir.simulate(torch.linspace(0.0, 80.0, 41), parameters={"gamma": 0.9}, population=1e6, infected=30.0).z[0]
    assert (z.sum(-1) - 1e6).abs().max() < 1e-8 * 1e6
    assert (z >= 0).all() and (z[:, 0].diff() < 0).all() and (z[:, 2].diff() > 0).all()


def test_final_size():
    """Of the susceptible S0, those remain for whom log(S / S0) = R0 (S - N) / N; and I peaks at S = N / R0."""
    z = sir.simulate(torch.linspace(0.0, 200.0, 4001), parameters={"beta": 0.8, "gamma": 0.4}).z[0]
    left = scipy.optimize.brentq(lambda s: math.log(s / 762) - 2 * (s - 763) / 763, 1.0, 700.0)
    assert z[-1, 0].item() == pytest.approx(left, rel=1e-6)
    assert z[z[:, 1].argmax(), 0].item() == pytest.approx(763 / 2, rel=0.01)


def test_log_density_of_the_boarding_school():
    """Against SciPy's negative binomial, mean I and variance I + I^2 / 10, and normalised priors."""
    point = {"beta": 1.7, "gamma": 0.5, "phi_inv": 0.1}
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in point.items()}
    series = load_boarding_school()
    trace = poutine.trace(poutine.condition(sir.model, tensors)).get_trace(series)
    ill = sir.simulate(parameters={"beta": 1.7, "gamma": 0.5}).z[0, :, 1].numpy()
    counts = series.values[0, :, 0].numpy()
    expected = scipy.stats.nbinom(10, 10 / (10 + ill)).logpmf(counts).sum()
    expected += scipy.stats.truncnorm(-2, np.inf, 2, 1).logpdf(1.7)
    expected += scipy.stats.truncnorm(-0.8, np.inf, 0.4, 0.5).logpdf(0.5) + math.log(5) - 0.5
    assert trace.log_prob_sum().item() == pytest.approx(expected, abs=1e-3)
    assert trace.nodes["R0"]["value"].item() == pytest.approx(3.4)
    assert trace.nodes["recovery_time"]["value"].item() == pytest.approx(2.0)


def test_simulated_counts_have_the_law_of_the_model():
    """Mean and variance of 4,000 counts of a day within 5 standard errors (false alarm 2e-6)."""
    simulation = sir.simulate([5.0], num_series=4000, phi_inv=0.2, seed=3)
    counts, mean = simulation.series.values[:, 0, 0], simulation.z[0, 0, 1]
    variance = mean + 0.2 * mean**2
    assert abs(counts.mean() - mean) < 5 * (variance / 4000) ** 0.5
    fourth = ((counts - counts.mean()) ** 4).mean()
    assert abs(counts.var() - variance) < 5 * ((fourth - variance**2) / 4000) ** 0.5
    assert torch.equal(counts, counts.round())
    few = sir.simulate([5.0], num_series=3, phi_inv=0.2, seed=3).series
    assert torch.equal(few.values, simulation.series.values[:3])


def test_other_outbreaks_fit_too():
    """Population, first cases and first day are arguments; a day is a day, wherever the calendar begins."""
    settings = {"population": 20_000.0, "infected": 7.0}
    here = sir.simulate(**settings, seed=2)
    later = sir.simulate(torch.arange(31.0, 45.0), **settings, t0=30.0, seed=2)
    torch.testing.assert_close(later.z, here.z, rtol=1e-9, atol=1e-9)
    densities = [
        poutine.trace(poutine.condition(sir.model, here.truth)).get_trace(series, **settings, t0=t0).log_prob_sum()
        for series, t0 in ((here.series, 0.0), (later.series, 30.0))
    ]
    torch.testing.assert_close(*densities, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("infected", [0.0, -1.0, 763.0, float("nan")])
def test_start_must_be_an_epidemic(infected):
    with pytest.raises(ValueError, match="more than nobody infected"):
        sir.model(times=torch.arange(3.0), infected=infected)
    with pytest.raises(ValueError, match="more than nobody infected"):
        sir.simulate(infected=infected)


def test_counts_where_nobody_is_expected_to_be_ill():
    """Long after the outbreak I is zero up to the solver's error: the density stays finite."""
    point = {"beta": torch.tensor(2.0).double(), "gamma": torch.tensor(1.5).double()}
    series = Series.from_tensors([1.0, 500.0], [[1.0], [0.0]])
    assert poutine.trace(poutine.condition(sir.model, point)).get_trace(series).log_prob_sum().isfinite()


def test_boarding_school():
    """The published posterior: beta 1.73 (.05), gamma .54 (.05), R0 3.21 (.27), by Stan."""
    budget = {"num_warmup": 500, "num_samples": 500, "num_chains": 4, "progress": False}
    posterior = infer.nuts(sir.model, load_boarding_school(), seed=1, **budget)
    draws = posterior.draws()
    assert posterior.summary()["r_hat"].max() < 1.02
    assert not posterior.stats["diverging"].any() and not posterior.stats["ode_failed"].any()
    for value, mean, sd in (
        (draws["beta"], 1.73, 0.05),
        (draws["gamma"], 0.54, 0.05),
        (draws["beta"] / draws["gamma"], 3.21, 0.27),
    ):
        assert value.mean().item() == pytest.approx(mean, abs=0.3 * sd)
        assert value.std().item() == pytest.approx(sd, rel=0.3)
