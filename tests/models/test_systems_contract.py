# SPDX-License-Identifier: Apache-2.0
"""What the systems of the zoo that have a Pyro model of one experiment and its repeats have in common."""

import importlib
import inspect
import math
import pkgutil

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch.distributions import biject_to

from pyro_latentde.models import systems

SUPPORT = {"dosing", "experiment", "renderer", "simulation"}
NAMES = [
    name
    for name in systems.__all__
    if hasattr(getattr(systems, name), "model") and not hasattr(getattr(systems, name), "population")
]


@pytest.fixture(params=NAMES)
def system(request):
    return importlib.import_module(f"pyro_latentde.models.systems.{request.param}")


def observed(system):
    """Names of what is measured: the states, unless the system says otherwise."""
    return getattr(system, "OBSERVED", system.STATES)


def test_every_system_is_listed():
    files = {module.name for module in pkgutil.iter_modules(systems.__path__)} - SUPPORT
    assert systems.__all__ == sorted(files)


def test_siblings_have_the_same_shape(system):
    assert {"PARAMETERS", "STATES", "model", "simulate", "vector_field"} <= set(system.__all__)
    arguments = list(inspect.signature(system.vector_field).parameters)
    assert arguments == (["t", "y", "lagged", "p"] if "lagged" in arguments else ["t", "y", "p"])
    for function, first, last in (
        (system.model, ["series", "times"], []),
        (system.simulate, ["times", "parameters"], ["num_series", "missing", "seed"]),
    ):
        parameters = inspect.signature(function).parameters
        names = list(parameters)
        assert names[: len(first)] == first and names[len(names) - len(last) :] == last
        assert all(parameter.default is not inspect.Parameter.empty for parameter in parameters.values())
        own = [parameters[name] for name in names[len(first) :]]  # a start, errors, a dose: what the system needs
        assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in own)
    assert ".. math::" in system.__doc__ and "unit" in system.__doc__ and "References:" in system.__doc__


def test_simulation_is_reproducible_and_leaves_the_global_generator(system):
    state = torch.get_rng_state()
    one, two, other = (system.simulate(missing=0.3, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.series.values, two.series.values) and torch.equal(one.series.mask, two.series.mask)
    assert not torch.equal(one.series.values, other.series.values)
    assert one.series.names == observed(system) and not one.series.complete
    assert one.series.mask[:, 0].all()


def test_simulation_takes_times_of_each_series(system):
    times = torch.tensor([[0.0, 2.0, 1.0], [0.5, 3.0, 4.0]])
    simulation = system.simulate(times)
    assert simulation.series.times.tolist() == [[0.0, 1.0, 2.0], [0.5, 3.0, 4.0]]
    assert simulation.z.shape == (2, 3, len(system.STATES))
    with pytest.raises(ValueError, match="num_series = 3"):
        system.simulate(times, num_series=3)


def test_simulation_errors(system):
    with pytest.raises(ValueError, match="has no .'speed'.; it has"):
        system.simulate(parameters={"speed": 1.0})
    with pytest.raises(ValueError, match="missing: expected a probability"):
        system.simulate(missing=1.0)


def test_truth_covers_every_latent_site(system):
    trace = poutine.trace(system.model).get_trace(system.simulate().series)
    assert set(trace.stochastic_nodes) == set(system.simulate().truth)
    for name, value in system.simulate().truth.items():
        assert trace.nodes[name]["value"].shape == value.shape
        assert trace.nodes[name]["value"].dtype == torch.float64


@pytest.mark.parametrize("num_series", [1, 3])
def test_model_scores_and_draws(system, num_series):
    simulation = system.simulate(num_series=num_series, missing=0.2, seed=1)
    batch = (num_series,) if num_series > 1 else ()
    model = poutine.condition(system.model, simulation.truth)
    trace = poutine.trace(model).get_trace(simulation.series)
    assert trace.log_prob_sum().isfinite()
    assert trace.nodes["z"]["value"].shape == (*batch, simulation.series.times.shape[1], len(system.STATES))
    times, d = torch.tensor([0.5, 1.5, 30.0], dtype=torch.float64), len(observed(system))
    assert system.model(simulation.series, times).shape == (*batch, 3, d)
    assert model(times=times).shape == (3, d)
    assert model(times=[0, 1]).shape == (2, d)
    with pytest.raises(ValueError, match="got neither"):
        system.model()


@pytest.mark.parametrize("num_series", [1, 3])
def test_model_works_in_svi_with_vectorized_particles(system, num_series):
    simulation = system.simulate(num_series=num_series, missing=0.2, seed=1)
    scale = 1e-11  # narrow for the posterior of a chaotic system too
    guide = AutoNormal(system.model, init_loc_fn=init_to_value(values=simulation.truth), init_scale=scale)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True)
    svi = SVI(system.model, guide, pyro.optim.Adam({"lr": 1e-14}), elbo)
    losses = torch.tensor([svi.step(simulation.series) for _ in range(3)])
    trace = poutine.trace(poutine.condition(system.model, simulation.truth)).get_trace(simulation.series)
    # around the truth the loss is the negative log-joint less the guide's entropy, of which four particles draw the
    # squares of n normals: 6 sd, false alarm 1e-7
    n = sum(value.numel() for value in simulation.truth.values())
    entropy = n * (math.log(scale) + 0.5 * math.log(2 * math.pi * math.e))
    for name, value in simulation.truth.items():
        transform = biject_to(trace.nodes[name]["fn"].support)
        entropy += transform.log_abs_det_jacobian(transform.inv(value), value).sum().item()
    expected = -trace.log_prob_sum().item() - entropy
    assert ((losses - expected).abs() < 6 * (n / 8) ** 0.5).all()


def test_model_predicts_in_parallel(system):
    simulation = system.simulate()
    guide = AutoNormal(system.model, init_loc_fn=init_to_value(values=simulation.truth), init_scale=0.01)
    guide(simulation.series)
    drawn = Predictive(system.model, guide=guide, num_samples=5, parallel=True)(times=torch.arange(4.0))
    assert drawn["obs"].shape[0] == 5 and drawn["obs"].shape[-2:] == (4, len(observed(system)))
