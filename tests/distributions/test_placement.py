# SPDX-License-Identifier: Apache-2.0
"""Distributions move with all that is inside them; ``meta`` stands for another device."""

import pyro
import pyro.distributions as dist
import pytest
import torch

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
    moved = placed(fn, META)
    assert type(moved) is type(fn)
    assert (moved.batch_shape, moved.event_shape) == (fn.batch_shape, fn.event_shape)
    value = torch.full(fn.batch_shape + fn.event_shape, 1.5, device=META)
    with pyro.validation_enabled(False):  # which would look at values
        density = moved.log_prob(value)
    assert (density.device, density.shape) == (META, fn.batch_shape)


def test_the_original_stays_and_is_given_back_where_it_is() -> None:
    fn = FNS["joint"]
    placed(fn, META)
    assert fn.sample().device == torch.device("cpu")
    assert placed(fn, torch.device("cpu")) is fn
