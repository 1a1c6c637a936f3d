# SPDX-License-Identifier: Apache-2.0
"""A linear decoder read backwards, against NumPy's least squares; its start at principal components."""

from types import SimpleNamespace

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_latentde import Series
from pyro_latentde.errors import LatentDEError
from pyro_latentde.guides.series_guide import SeriesGuide
from pyro_latentde.nn import LeastSquares, PrincipalDecoder, RecurrentEncoder


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return nn.Linear(3, 20).double()


def test_the_states_are_those_of_numpys_least_squares(decoder):
    x = torch.randn(4, 5, 20, dtype=torch.float64)
    w, b = decoder.weight.detach().numpy(), decoder.bias.detach().numpy()
    right = np.linalg.lstsq(w, (x.numpy() - b).reshape(-1, 20).T, rcond=None)[0].T.reshape(4, 5, 3)
    assert_close(LeastSquares(decoder)(x), torch.from_numpy(right), rtol=0, atol=1e-5)  # a ridge of 1e-6


def test_missing_values_count_for_nothing(decoder):
    x = torch.randn(4, 5, 20, dtype=torch.float64)
    mask = torch.rand(4, 5, 20) < 0.6
    w, b = decoder.weight.detach().numpy(), decoder.bias.detach().numpy()
    got = LeastSquares(decoder)(torch.where(mask, x, 0.0), mask)
    for i in range(4):
        for j in range(5):
            keep = mask[i, j].numpy()
            right = np.linalg.lstsq(w[keep], x[i, j].numpy()[keep] - b[keep], rcond=None)[0]
            assert_close(got[i, j], torch.from_numpy(right), rtol=0, atol=1e-4)


def test_where_nothing_was_observed_the_states_are_zero(decoder):
    nothing = torch.zeros(2, 20, dtype=torch.float64)
    assert_close(LeastSquares(decoder)(nothing, torch.zeros(2, 20, dtype=torch.bool)), nothing[:, :3])


def test_the_decoder_learns_through_it_and_belongs_to_the_model(decoder):
    frames = LeastSquares(decoder)
    assert not list(frames.parameters())
    x = torch.randn(6, 20, dtype=torch.float64)

    def read(weight):
        parts = {"weight": weight, "bias": decoder.bias.detach(), "in_features": 3, "out_features": 20}
        return LeastSquares(SimpleNamespace(**parts))(x)

    assert torch.autograd.gradcheck(read, decoder.weight.detach().clone().requires_grad_())
    decoder(frames(x)).square().sum().backward()
    assert decoder.weight.grad.abs().max() > 0


def test_a_guide_gives_it_the_mask(decoder):
    """Values that were not observed may be anything."""
    decoder = decoder.float()
    guide = SeriesGuide(
        {"z0": dist.Normal(torch.zeros(3), 1.0).to_event(1)}, RecurrentEncoder(3, 8), frames=LeastSquares(decoder)
    )
    z, mask = torch.randn(2, 7, 3), torch.rand(2, 7, 20) < 0.7
    values = decoder(z).detach()
    series = Series.from_tensors(torch.arange(7.0), values, mask=mask)
    assert_close(guide.features(series).values, z, rtol=0, atol=1e-3)


def test_it_begins_at_principal_components_of_the_spread_that_states_have():
    rng = torch.Generator().manual_seed(0)
    states = 0.2 * torch.randn(50, 40, 3, generator=rng, dtype=torch.float64)
    lift = torch.rand(3, 30, generator=rng, dtype=torch.float64)
    series = Series.from_tensors(torch.arange(40.0), states @ lift + 5.0, dtype=torch.float64)
    decoder = PrincipalDecoder.of(series, 3, sd=0.2).double()
    found = LeastSquares(decoder)(series.values).flatten(0, 1)
    assert_close(torch.cov(found.T), 0.04 * torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-3)
    assert_close(decoder(found).view_as(series.values), series.values, rtol=0, atol=1e-4)


def test_too_few_values_or_directions_are_refused():
    with pytest.raises(LatentDEError, match="4 values do not determine 6 states"):
        LeastSquares(nn.Linear(6, 4))
    flat = Series.from_tensors(torch.arange(5.0), torch.randn(3, 5, 1).expand(-1, -1, 8))
    with pytest.raises(LatentDEError, match="fewer than 2 directions"):
        PrincipalDecoder.of(flat, 2)
