# SPDX-License-Identifier: Apache-2.0
"""The normal of many values with one scale is torch's normal, to every transform, and makes no array of densities."""

import pyro.distributions as dist
import pytest
import torch
from torch.func import hessian, vmap

from pyro_latentde.distributions.shared_scale_normal import SharedScaleNormal

LOC = torch.linspace(-2.0, 1.0, 24, dtype=torch.float64).reshape(2, 4, 3)
VALUE = LOC.flip(0) * 0.7 + 0.2


def _scale(kind):
    return {
        "number": 0.3,
        "scalar": torch.tensor(0.3, dtype=torch.float64),
        "per series": torch.tensor([0.3, 0.8], dtype=torch.float64)[:, None, None],
        "per value": torch.tensor([0.3, 0.8, 1.5], dtype=torch.float64),
    }[kind]


@pytest.mark.parametrize("kind", ["number", "scalar", "per series", "per value"])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_it_is_torchs_normal(kind, count):
    scale = _scale(kind)
    mine, reference = (law(LOC, scale).to_event(count) for law in (SharedScaleNormal, dist.Normal))
    assert mine.batch_shape == reference.batch_shape and mine.event_shape == reference.event_shape
    torch.testing.assert_close(mine.log_prob(VALUE), reference.log_prob(VALUE), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(mine.mean, reference.mean)
    torch.testing.assert_close(mine.stddev, reference.stddev)


def test_values_and_draws_broadcast_and_expand():
    mine, reference = (
        law(LOC[:1], _scale("scalar")).to_event(2).expand([2]) for law in (SharedScaleNormal, dist.Normal)
    )
    values = torch.stack([VALUE, VALUE + 1.0])
    assert mine.log_prob(values).shape == (2, 2)
    torch.testing.assert_close(mine.log_prob(values), reference.log_prob(values))
    torch.manual_seed(0)
    drawn = mine.rsample((5,))
    torch.manual_seed(0)
    torch.testing.assert_close(drawn, reference.rsample((5,)))


def test_a_mask_drops_values():
    mask = LOC > -1.0
    mine, reference = (law(LOC, 0.3).mask(mask).to_event(2) for law in (SharedScaleNormal, dist.Normal))
    torch.testing.assert_close(mine.log_prob(VALUE), reference.log_prob(VALUE))


@pytest.mark.parametrize("law", [SharedScaleNormal, dist.Normal])
def test_second_derivatives_under_vmap(law):
    def density(x):
        return law(x[:3], x[3].exp()).to_event(1).log_prob(VALUE[0, 0])

    points = torch.cat([LOC[0], torch.full((4, 1), -0.5, dtype=torch.float64)], dim=-1)
    found = vmap(hessian(density))(points)
    precision = torch.exp(torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(found[:, :3, :3], -precision * torch.eye(3, dtype=torch.float64).expand(4, 3, 3))
    error = VALUE[0, 0] - LOC[0]
    torch.testing.assert_close(found[:, 3, 3], -2.0 * precision * error.square().sum(-1))
    torch.testing.assert_close(found[:, :3, 3], -2.0 * precision * error)


def test_values_of_a_wider_type_are_scored_in_it():
    found = SharedScaleNormal(LOC.float(), 0.3).to_event(2).log_prob(VALUE)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, dist.Normal(LOC, 0.3).to_event(2).log_prob(VALUE), rtol=1e-6, atol=1e-6)


def test_values_are_checked_while_validation_is_on():
    with pytest.raises(ValueError, match="support"):
        SharedScaleNormal(LOC, 0.3, validate_args=True).to_event(2).log_prob(VALUE * torch.nan)


def test_an_array_of_densities_is_never_made():
    """One array of differences squared for the value, against six and more."""
    loc = LOC.expand(64, 2, 4, 3).clone().requires_grad_()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
        SharedScaleNormal(loc, torch.tensor(0.3, dtype=torch.float64, requires_grad=True)).to_event(3).log_prob(VALUE)
    assert sum(size == loc.numel() for size in sizes) <= 2  # the means and the values
