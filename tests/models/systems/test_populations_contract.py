# SPDX-License-Identifier: Apache-2.0
"""What the systems that are populations have in common: a model of series that differ, and how to fit it by name."""

import importlib
import inspect

import pytest
import torch
from pyro import poutine

from pyro_latentde.data import Series
from pyro_latentde.errors import DataError
from pyro_latentde.fitting.system import find_system
from pyro_latentde.models import systems

NAMES = [name for name in systems.__all__ if hasattr(getattr(systems, name), "population")]


@pytest.fixture(params=NAMES)
def system(request):
    return importlib.import_module(f"pyro_latentde.models.systems.{request.param}")


def test_populations_are_these():
    assert NAMES == ["pk_population", "sir_population"]


def test_siblings_have_the_same_shape(system):
    assert {"OBSERVED", "PARAMETERS", "STATES", "model", "population", "priors", "simulate"} <= set(system.__all__)
    assert list(inspect.signature(system.model).parameters) == ["series", "times"]
    assert ".. math::" in system.__doc__ and "unit" in system.__doc__ and "References:" in system.__doc__


def test_a_fit_finds_model_and_columns(system):
    name = system.__name__.rsplit(".", 1)[-1]
    found, series = find_system(name), system.simulate(num_series=2).series
    assert found.model is system.model and found.values == series.names
    assert len(found.covariates) == (0 if series.covariates is None else series.covariates.shape[-1])


def test_the_model_is_the_population_with_its_defaults_which_are_centred(system):
    """The same sites and log-density, and what is sampled of each series is the logarithm of its parameter."""
    series, _, truth = system.simulate(num_series=4, missing=0.2, seed=1)
    logs = {f"log_{name}": value.log() for name, value in truth.items() if value.ndim}
    values = {**{name: value for name, value in truth.items() if not value.ndim}, **logs}
    traces = [
        poutine.trace(poutine.condition(model, values)).get_trace(series)
        for model in (system.model, system.population())
    ]
    assert set(values) < set(traces[0].nodes)
    assert traces[0].log_prob_sum().isfinite() and torch.equal(*(trace.log_prob_sum() for trace in traces))
    free = poutine.trace(system.model).get_trace(series)
    assert set(free.stochastic_nodes) - {"series"} == set(values)


def test_the_model_draws_at_other_times_and_of_new_people(system):
    series = system.simulate(num_series=3).series
    assert system.model(series, torch.tensor([1.0, 2.0])).shape == (3, 2, 1)
    covariates = None if series.covariates is None else series.covariates[:2]
    plan = Series.at_times([1.0, 3.0, 9.0, 20.0], ids=["Ann", "Bo"], covariates=covariates)
    assert system.model(plan).shape == (2, 4, 1)


def test_a_dose_is_needed():
    with pytest.raises(DataError, match=r"the population has covariates \('dose',\), the series 0 columns"):
        systems.pk_population.model(Series.at_times([1.0, 2.0], ids=["Ann", "Bo"]))
