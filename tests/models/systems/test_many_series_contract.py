# SPDX-License-Identifier: Apache-2.0
"""What the systems of many series, each with parameters of its own, have in common."""

import importlib
import inspect

import numpy as np
import pytest
import torch

from pyro_latentde import odesolve
from pyro_latentde.models import systems

NAMES = ("cardiovascular", "double_pendulum_pixels", "pendulum_pixels", "periodic", "spirals", "stuart_landau")
NOISY = ("cardiovascular", "periodic", "spirals", "stuart_landau")


@pytest.fixture(params=NAMES)
def system(request):
    return importlib.import_module(f"pyro_latentde.models.systems.{request.param}")


def test_every_system_without_a_model_is_tested_here():
    others = {name for name in systems.__all__ if not hasattr(getattr(systems, name), "model")}
    of_their_own = {"bursts", "hopper"}  # have test files by these names
    assert others == {*NAMES, *of_their_own}


def test_siblings_have_the_same_shape(system):
    assert {"PARAMETERS", "STATES", "priors", "simulate", "vector_field"} <= set(system.__all__)
    assert list(inspect.signature(system.vector_field).parameters) == ["t", "y", "p"]
    parameters = inspect.signature(system.simulate).parameters
    assert list(parameters)[:3] == ["n", "seed", "num_times"]
    assert parameters["seed"].default == 0
    assert ".. math::" in system.__doc__ and "unit" in system.__doc__ and "References:" in system.__doc__


def test_simulation_has_series_states_and_truth(system):
    series, z, truth = system.simulate(4, num_times=7)
    assert len(series) == 4 and series.times.shape == (4, 7) and series.complete
    assert series.values.dtype == torch.float32 and series.times.dtype == torch.float32
    assert z.shape == (4, 7, len(system.STATES)) and z.dtype == torch.float64
    assert set(truth) == set(system.PARAMETERS)
    assert all(value.shape == (4,) and value.dtype == torch.float64 for value in truth.values())
    if hasattr(system, "FRAME"):
        assert series.frame == system.FRAME
        torch.testing.assert_close(series.values, system.render(z))
        assert series.values.min() >= 0 and series.values.max() <= 1


def test_priors_cover_the_simulation(system):
    _, z, truth = system.simulate(400, num_times=2, seed=2)
    priors = system.priors()
    assert set(priors) == {"z0", "theta"} and list(priors["theta"]) == list(system.PARAMETERS)
    assert priors["z0"].event_shape == (len(system.STATES),)
    assert priors["z0"].log_prob(z[:, 0].float()).shape == (400,)
    for name, prior in priors["theta"].items():
        assert prior.event_shape == () and prior.log_prob(truth[name].float()).isfinite().all()
    if system.__name__.rsplit(".", 1)[-1] == "periodic":  # z0 is at time 0, before the first observation
        return
    mean, sd = priors["z0"].mean, priors["z0"].stddev
    # 5 standard errors of the mean; the sds of these light-tailed starts have errors below 4 %
    assert ((z[:, 0].mean(0) - mean).abs() < 5 * sd / 20).all()
    assert ((z[:, 0].std(0) / sd - 1).abs() < 0.2).all()


def test_vector_field_compiles(system):
    _, z, truth = system.simulate(3, num_times=3)
    times, ranks = torch.linspace(0.0, 1.0, 3, dtype=torch.float64), dict.fromkeys(truth, 0)
    fused, mapped = (
        odesolve(system.vector_field, z[:, 0], times, truth, event_dims=ranks, engine=engine, method="dopri8")
        for engine in ("auto", "torch")
    )
    assert fused.engine == "fused", fused.reason
    torch.testing.assert_close(fused.ys, mapped.ys, atol=1e-6, rtol=0)


def test_simulation_is_reproducible_and_leaves_the_global_generators(system):
    before, state = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two, more, other = (system.simulate(n, seed, num_times=5) for n, seed in ((3, 4), (3, 4), (6, 4), (3, 5)))
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == state).all()
    assert torch.equal(one.series.values, two.series.values) and torch.equal(one.z, two.z)
    torch.testing.assert_close(more.z[:3], one.z, atol=1e-12, rtol=0)  # up to rounding
    torch.testing.assert_close(more.series.values[:3], one.series.values, atol=1e-6, rtol=0)
    for name in one.truth:
        assert torch.equal(more.truth[name][:3], one.truth[name])
    assert not torch.equal(one.z, other.z)


def test_simulation_errors(system):
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        system.simulate(0)
    with pytest.raises(ValueError, match="num_times: expected at least 2, got 1"):
        system.simulate(2, num_times=1)
    if "step" in inspect.signature(system.simulate).parameters:
        with pytest.raises(ValueError, match="step: expected a positive time"):
            system.simulate(2, step=0.0)


@pytest.mark.parametrize("name", NOISY)
def test_noise(name):
    system = getattr(systems, name)
    with pytest.raises(ValueError, match="noise"):
        system.simulate(2, noise=-0.1)
    with pytest.raises(ValueError, match="noise"):
        system.simulate(2, noise=float("nan"))
