# SPDX-License-Identifier: Apache-2.0
"""A drug in one and two compartments: closed forms, doses of series, the law of the concentrations."""

import numpy as np
import pytest
import scipy.stats
import torch
from pyro import poutine
from torch.testing import assert_close

from pyro_latentde.data import Series
from pyro_latentde.models.systems import pk_one_compartment, pk_two_compartment

SYSTEMS = [pk_one_compartment, pk_two_compartment]


def one_compartment(times, dose, ka, CL, V):
    """Concentration (mg/L), by Bateman's function."""
    k = CL / V
    return dose / V * ka / (ka - k) * (np.exp(-k * times) - np.exp(-ka * times))


def two_compartments(times, dose, ka, CL, V1, Q, V2):
    """Concentration (mg/L) as a sum of three exponentials, by partial fractions of its Laplace transform."""
    fast, slow = np.roots([1.0, -(CL / V1 + Q / V1 + Q / V2), CL * Q / (V1 * V2)])
    total = 0.0
    for rate, a, b in ((ka, fast, slow), (fast, ka, slow), (slow, ka, fast)):
        total += (Q / V2 - rate) / ((a - rate) * (b - rate)) * np.exp(-rate * times)
    return ka * dose / V1 * total


@pytest.mark.parametrize(
    "system, exact, parameters",
    [
        (pk_one_compartment, one_compartment, {"ka": 0.9, "CL": 5.0, "V": 12.0}),
        (pk_two_compartment, two_compartments, {"ka": 1.1, "CL": 4.0, "V1": 12.0, "Q": 9.0, "V2": 50.0}),
    ],
)
def test_concentrations_are_the_closed_form(system, exact, parameters):
    """Times from the dose on, at 2 o'clock, in the simulator and in the model."""
    times = np.array([2.5, 3.0, 4.0, 7.0, 14.0, 26.0])
    simulation = system.simulate(times, parameters=parameters, dose=150.0, t0=2.0, sigma=0.0)
    assert_close(
        simulation.series.values[0, :, 0], torch.as_tensor(exact(times - 2.0, 150.0, **parameters)), rtol=1e-7, atol=0
    )
    noisy = system.simulate(times, parameters=parameters, dose=150.0, t0=2.0, sigma=0.3)
    model = poutine.condition(system.model, noisy.truth)
    trace = poutine.trace(model).get_trace(noisy.series, dose=150.0, t0=2.0)
    expected = scipy.stats.lognorm(0.3, scale=exact(times - 2.0, 150.0, **parameters))
    density = trace.log_prob_sum(lambda name, _: name == "obs").item()
    assert density == pytest.approx(expected.logpdf(noisy.series.values[0, :, 0].numpy()).sum(), abs=1e-3)


def test_flip_flop():
    """ka and CL / V change places, and the curve stays."""
    k = 2.8 / 32.0
    other = {"ka": k, "CL": 2.8, "V": 2.8 / 1.5}
    here, there = pk_one_compartment.simulate(seed=1), pk_one_compartment.simulate(parameters=other, seed=1)
    assert_close(here.series.values, there.series.values, rtol=1e-6, atol=0)


def test_two_compartments_without_flow_are_one():
    p = {"ka": 1.2, "CL": 3.0}
    times = torch.linspace(0.5, 24.0, 9)
    one = pk_one_compartment.simulate(times, parameters={**p, "V": 20.0}, dose=100.0)
    two = pk_two_compartment.simulate(times, parameters={**p, "V1": 20.0, "Q": 0.0}, dose=100.0)
    assert_close(two.z[..., :2], one.z, rtol=1e-7, atol=1e-9)
    assert (two.z[..., 2] == 0).all()


@pytest.mark.parametrize("system", SYSTEMS)
def test_series_have_doses_of_their_own(system):
    doses = [100.0, 200.0, 50.0]
    simulation = system.simulate(dose=doses, sigma=0.2, seed=2)
    assert simulation.series.covariates.tolist() == [[dose] for dose in doses]
    for z, dose in zip(simulation.z, doses, strict=True):
        assert_close(z, simulation.z[0] * dose / 100, rtol=1e-7, atol=1e-7)
    model = poutine.condition(system.model, simulation.truth)
    together = poutine.trace(model).get_trace(simulation.series)
    assert_close(together.nodes["z"]["value"], simulation.z, rtol=1e-3, atol=1e-4)
    alone = [
        poutine.trace(model).get_trace(part, dose=dose).log_prob_sum(lambda name, _: name == "obs")
        for i, dose in enumerate(doses)
        for part in (simulation.series[i], Series.from_tensors(simulation.series.times[i], simulation.series.values[i]))
    ]
    density = together.log_prob_sum(lambda name, _: name == "obs")
    assert_close(sum(alone[::2]), density, rtol=1e-9, atol=1e-9)  # by covariate
    assert_close(sum(alone[1::2]), density, rtol=1e-9, atol=1e-9)  # by argument
    # predictions at other times keep the doses
    drawn = poutine.trace(model).get_trace(simulation.series, times=torch.tensor([4.0]).double())
    ratio = drawn.nodes["z"]["value"][:, 0, 1] / drawn.nodes["z"]["value"][0, 0, 1]
    assert_close(ratio, torch.tensor([1.0, 2.0, 0.5]).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("system", SYSTEMS)
def test_doses_are_positive(system):
    for dose in (0.0, -5.0, float("nan")):
        with pytest.raises(ValueError, match="dose: expected a positive amount"):
            system.model(times=torch.arange(1.0, 3.0), dose=dose)
        for wrong in (dose, [100.0, dose]):
            with pytest.raises(ValueError, match="dose: expected"):
                system.simulate(dose=wrong)


@pytest.mark.parametrize("system", SYSTEMS)
def test_density_is_finite_at_the_time_of_the_dose(system):
    simulation = system.simulate([0.0, 1.0, 2.0])
    trace = poutine.trace(poutine.condition(system.model, simulation.truth)).get_trace(simulation.series)
    assert trace.log_prob_sum().isfinite()
