# SPDX-License-Identifier: Apache-2.0
"""Distributions move with all that is inside them; ``meta`` stands for another device."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to, constraints

from pyro_latentde.distributions.joint import Joint
from pyro_latentde.distributions.placement import placed
from pyro_latentde.distributions.truncated_normal import TruncatedNormal

META = torch.device("meta")
FNS = {
    "normal": dist.Normal(torch.zeros(2), 1.0),
    "independent": dist.Uniform(torch.zeros(2), torch.ones(2)).to_event(1),
    "transformed": dist.LogNormal(torch.zeros(2), 1.0),
    "multivariate": dist.MultivariateNormal(torch.zeros(2), scale_tril=torch.eye(2)),
    "masked": dist.Normal(torch.zeros(2), 1.0).mask(torch.ones(2, dtype=torch.bool)),
    "truncated": TruncatedNormal(torch.tensor(1.0), 0.5),
    "joint": Joint({"a": dist.Uniform(1.0, 2.0), "b": dist.LogNormal(0.0, 1.0)}),
}


@pytest.mark.parametrize("name", FNS)
def test_density_is_computed_where_the_distribution_was_put(name: str) -> None:
    fn = FNS[name]
    moved = placed(fn, torch.zeros((), device=META))
    assert type(moved) is type(fn)
    assert (moved.batch_shape, moved.event_shape) == (fn.batch_shape, fn.event_shape)
    value = torch.full(fn.batch_shape + fn.event_shape, 1.5, device=META)
    with pyro.validation_enabled(False):  # which would look at values
        density = moved.log_prob(value)
    assert (density.device, density.shape) == (META, fn.batch_shape)


def test_the_original_stays_and_is_given_back_where_it_is() -> None:
    fn = FNS["joint"]
    placed(fn, torch.zeros((), device=META))
    assert fn.sample().device == torch.device("cpu")
    assert placed(fn, torch.zeros(())) is fn


@pytest.mark.parametrize("name", FNS)
def test_floating_parameters_take_the_dtype(name: str) -> None:
    moved = placed(FNS[name], torch.zeros((), dtype=torch.float64))
    assert moved.sample().dtype == torch.float64
    assert moved.log_prob(moved.sample()).dtype == torch.float64


def test_transforms_move_too() -> None:
    transform = biject_to(constraints.interval(torch.tensor(1.0), torch.tensor(2.0)))
    assert placed(transform, torch.zeros((), dtype=torch.float64))(torch.zeros(3).double()).dtype == torch.float64
