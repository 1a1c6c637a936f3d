# SPDX-License-Identifier: Apache-2.0
"""Standardized networks and decoders that begin at the mean."""

import numpy as np
import pytest
import torch
from torch import nn

from pyro_latentde import Series
from pyro_latentde.errors import DataError, LatentDEError, ShapeError
from pyro_latentde.nn import MLP, ConvDecoder, ResidualMLP, Standardized, start_at


def _series(missing: float) -> Series:
    torch.manual_seed(0)
    values = 3.0 + torch.tensor([0.1, 2.0, 0.5]) * torch.randn(20, 7, 3)
    values[torch.rand(20, 7, 3) < missing] = torch.nan
    return Series.from_tensors(torch.arange(7.0), values)


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_constants_are_numpys_of_what_is_observed(missing):
    series = _series(missing)
    net = Standardized.of(series, inner := ResidualMLP(3, 2))
    seen = np.where(series.mask.numpy(), series.values.double().numpy(), np.nan)
    mean = np.nanmean(seen, axis=(0, 1))
    np.testing.assert_allclose(net.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(net.sd, np.sqrt(np.nanmean((seen - mean) ** 2)), rtol=1e-6)
    x = torch.randn(4, 3)
    torch.testing.assert_close(net(x), inner((x - net.mean) / net.sd))
    assert (net.in_features, net.out_features) == (3, 2)
    assert {"mean", "sd"} <= set(net.state_dict())


def test_constants_that_cannot_be_are_refused():
    with pytest.raises(ShapeError, match=r"mean has shape \(2,\), expected a number or \(3,\)"):
        Standardized(MLP(3, 1), torch.zeros(2), 1.0)
    with pytest.raises(DataError, match="positive"):
        Standardized(MLP(3, 1), 0.0, torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(DataError, match="nothing to learn"):
        Standardized.of(Series.from_tensors(torch.arange(3.0), torch.ones(4, 3, 1)), MLP(1, 1))
    with pytest.raises(DataError, match="no observations"):
        Standardized.of(Series(torch.zeros(2, 3), None, torch.ones(2, 3, 3, dtype=torch.bool)), MLP(3, 1))


@pytest.mark.parametrize("output", [None, "sigmoid", "softplus"])
@pytest.mark.parametrize("make", [MLP, ResidualMLP])
def test_decoders_begin_at_given_outputs(make, output):
    """Where all that varies is silenced, the outputs are the ones asked for."""
    wanted = torch.tensor([0.2, 0.5, 0.9])
    net = start_at(make(2, 3, output=output), wanted)
    last = net.last if make is ResidualMLP else net.net[-2]
    nn.init.zeros_(last.weight)
    torch.testing.assert_close(net(torch.randn(5, 2)), wanted.expand(5, 3))


def test_black_pixels_begin_at_a_finite_bias():
    net = start_at(ResidualMLP(2, 3, output="sigmoid"), torch.tensor([0.0, 0.5, 1.0]))
    assert bool(net.last.bias.isfinite().all())


def test_decoders_without_a_known_start_are_refused():
    with pytest.raises(LatentDEError, match="no output function"):
        start_at(MLP(2, 3, output="relu"), torch.zeros(3))
    with pytest.raises(LatentDEError, match="got ConvDecoder"):
        start_at(ConvDecoder(2, (16, 16)), torch.zeros(256))
    with pytest.raises(ShapeError, match=r"\(2,\), expected \(3,\)"):
        start_at(MLP(2, 3), torch.zeros(2))
