# SPDX-License-Identifier: Apache-2.0
"""Simulations against SciPy, with the equations written again, and models that find what simulations were made with."""

import numpy as np
import pytest
import scipy.integrate
import torch
from pyro import poutine
from torch.testing import assert_close

from pyro_latentde import infer
from pyro_latentde.models.systems import (
    fitzhugh_nagumo,
    lorenz,
    pendulum,
    pk_one_compartment,
    pk_two_compartment,
    sir,
    template,
)


def sir_field(y, beta, gamma):
    return [-beta * y[0] * y[1] / 500, beta * y[0] * y[1] / 500 - gamma * y[1], gamma * y[1]]


def fitzhugh_nagumo_field(y, a, b, c):
    return [c * (y[0] - y[0] ** 3 / 3 + y[1]), -(y[0] - a + b * y[1]) / c]


def lorenz_field(y, sigma, rho, beta):
    return [sigma * (y[1] - y[0]), y[0] * (rho - y[2]) - y[1], y[0] * y[1] - beta * y[2]]


def pendulum_field(y, length, friction):
    return [y[1], -9.81 / length * np.sin(y[0]) - friction * y[1]]


def one_compartment_field(y, ka, CL, V):
    return [-ka * y[0], ka * y[0] - CL / V * y[1]]


def two_compartment_field(y, ka, CL, V1, Q, V2):
    into, back = Q / V1 * y[1], Q / V2 * y[2]
    return [-ka * y[0], ka * y[0] - CL / V1 * y[1] - into + back, into - back]


def logistic_field(y, r, K):
    return [r * y[0] - r / K * y[0] ** 2]


CASES = {
    "sir": (sir, sir_field, [498.0, 2.0, 0.0], {"population": 500.0, "infected": 2.0}, {"beta": 0.9, "gamma": 0.3}),
    "fitzhugh_nagumo": (fitzhugh_nagumo, fitzhugh_nagumo_field, [0.5, -1.0], {"z0": (0.5, -1.0)}, {"a": 0.4, "c": 2.0}),
    "lorenz": (lorenz, lorenz_field, [2.0, 3.0, 15.0], {"z0": (2.0, 3.0, 15.0)}, {"sigma": 9.0, "rho": 26.0}),
    "pendulum": (pendulum, pendulum_field, [2.5, -1.0], {"z0": (2.5, -1.0)}, {"length": 0.7, "friction": 0.3}),
    "pk_one_compartment": (pk_one_compartment, one_compartment_field, [90.0, 0.0], {"dose": 90.0}, {"ka": 0.8}),
    "pk_two_compartment": (pk_two_compartment, two_compartment_field, [90.0, 0, 0], {"dose": 90.0}, {"Q": 4.0}),
    "template": (template, logistic_field, [3.0], {"z0": (3.0,)}, {"r": 0.8, "K": 50.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_simulation_and_model_solve_the_equations(case):
    """The simulator to 1e-7, the model to the tolerance of inference."""
    system, field, start, settings, parameters = CASES[case]
    simulation = system.simulate(torch.linspace(0.0, 5.0, 11), parameters=parameters, **settings)
    values, times = {**system.PARAMETERS, **parameters}, np.linspace(0.0, 5.0, 11)
    reference = scipy.integrate.solve_ivp(
        lambda t, y: field(y, **values), (0.0, 5.0), start, "DOP853", times, rtol=1e-12, atol=1e-12
    )
    exact = torch.as_tensor(reference.y.T)
    assert_close(simulation.z[0], exact, rtol=1e-7, atol=1e-7)
    model = poutine.condition(system.model, simulation.truth)
    known = {name: value for name, value in settings.items() if name != "z0"}  # what is an argument of the model too
    z = poutine.trace(model).get_trace(simulation.series, **known).nodes["z"]["value"]
    assert_close(z, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("system", [pk_one_compartment, template])
def test_posterior_finds_the_truth(system):
    """All means within 4 posterior sd; if the posterior is calibrated, by chance once in a thousand runs of all."""
    simulation = system.simulate(seed=6)
    budget = {"num_warmup": 150, "num_samples": 150, "num_chains": 4, "progress": False}
    posterior = infer.nuts(system.model, simulation.series, **budget)
    assert not posterior.stats["diverging"].float().mean() > 0.01
    for name, value in simulation.truth.items():
        draws = posterior.draws()[name]
        assert ((draws.mean(0) - value).abs() < 4 * draws.std(0)).all(), name
        if name in system.PARAMETERS:  # and it has learned: the prior's sd is above half its size
            assert (draws.std(0) < 0.3 * value).all(), name
