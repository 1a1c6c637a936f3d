# SPDX-License-Identifier: Apache-2.0
"""What is written down of a model's sites."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_latentde as lde
from pyro_latentde.errors import ShapeError
from pyro_latentde.posterior.model_sites import Plate, inspect_model


def model(times, data, mask):
    k = pyro.sample("k", dist.LogNormal(torch.zeros(2).double(), 1.0).to_event(1))
    pyro.factor("bonus", -k.sum())
    pyro.deterministic("half", k / 2)
    with pyro.plate("series", 3, dim=-1):
        y0 = pyro.sample("y0", dist.LogNormal(torch.zeros(2).double(), 1.0).to_event(1))
        z = lde.ode("z", lambda t, y, p: -p["k"] * y, y0, times, {"k": k}, states=("a", "b"), event_dims={"k": 1})
        with pyro.poutine.mask(mask=mask):
            pyro.sample("obs", dist.Normal(z, 0.1).to_event(2), obs=data)


def test_kinds_shapes_plates_and_coordinates():
    times, data = torch.linspace(0, 1, 4).double(), torch.zeros(3, 4, 2).double()
    sites = inspect_model(model, times, data, torch.tensor([True, False, True]))
    assert sites.latent == ("k", "y0")
    assert sites.ode == ("z",) and sites.observed == ("obs",) and sites.deterministic == ("half",)
    assert sites.of_kind("factor") == ("bonus",)
    assert sites["z"].shape == (3, 4, 2) and sites["z"].batch_shape == (3,) and sites["z"].event_shape == (4, 2)
    assert sites["z"].plates == (Plate("series", -1, 3),)
    assert sites["z"].states == ("a", "b") and torch.equal(sites["z"].times, times)
    assert sites["k"].support.event_dim == 1
    missing = sites["obs"].value.isnan()
    assert missing[1].all() and not missing[[0, 2]].any()


def test_masks_of_single_components_become_nan():
    mask = torch.tensor([[True, False], [True, True]])

    def masked():
        pyro.sample("obs", dist.Normal(torch.zeros(2, 2), 1.0).mask(mask).to_event(2), obs=torch.ones(2, 2))

    assert torch.equal(inspect_model(masked)["obs"].value.isnan(), ~mask)


def test_random_state_is_left_alone():
    before = torch.get_rng_state()
    inspect_model(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_prior_draw_that_cannot_be_solved_is_no_error():
    def explosive():
        k = pyro.sample("k", dist.Normal(torch.zeros(()).double(), 3.0))
        z = lde.ode("z", lambda t, y, k: k * y * y, torch.ones(1).double(), torch.linspace(0, 1, 3).double(), k)
        pyro.sample("obs", dist.Normal(z, 1.0).to_event(2), obs=torch.ones(3, 1).double())

    assert inspect_model(explosive).ode == ("z",)


def test_undeclared_batch_dimension_is_told_with_the_site():
    with pytest.raises(ValueError, match="obs"):
        inspect_model(lambda: pyro.sample("obs", dist.Normal(torch.zeros(3), 1.0), obs=torch.ones(3)))


def test_transposed_data_are_told_with_the_site():
    def transposed():
        pyro.sample("obs", dist.Normal(torch.zeros(5, 2), 1.0).to_event(2), obs=torch.ones(2, 5))

    with pytest.raises(ShapeError, match="'obs'.*transposed"):
        inspect_model(transposed)
