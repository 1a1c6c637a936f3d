# SPDX-License-Identifier: Apache-2.0
"""MLP and ResidualMLP against their equations, and what they say about wrong inputs."""

import math

import pytest
import torch

from pyro_latentde.errors import LatentDEError, ShapeError
from pyro_latentde.nn import MLP, ResidualMLP


def test_mlp_is_its_equation():
    torch.manual_seed(0)
    net = MLP(3, 2, (5, 4), activation="tanh", output="softplus").double()
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    (w0, b0, w1, b1, w2, b2) = net.parameters()
    expected = torch.tanh(torch.tanh(x @ w0.T + b0) @ w1.T + b1) @ w2.T + b2
    torch.testing.assert_close(net(x), torch.log1p(expected.exp()))
    assert (net.in_features, net.out_features) == (3, 2)


def test_residual_mlp_is_its_equation():
    torch.manual_seed(0)
    net = ResidualMLP(3, 2, width=6, output="sigmoid").double()
    x = torch.randn(7, 3, dtype=torch.float64)
    h = (x @ net.first.weight.T + net.first.bias).clamp(min=0)
    for block in net.blocks:
        h = h + (h @ block.weight.T + block.bias).clamp(min=0)
    torch.testing.assert_close(net(x), 1 / (1 + torch.exp(-(h @ net.last.weight.T + net.last.bias))))


def test_residual_mlp_has_the_sizes_of_goku():
    net = ResidualMLP(784, 32)
    sizes = [tuple(p.shape) for p in net.parameters() if p.ndim == 2]
    assert sizes == [(200, 784), (200, 200), (200, 200), (32, 200)]


def test_no_hidden_layer_is_an_affine_map():
    net = MLP(3, 2, ())
    x, y = torch.randn(2, 4, 3)
    torch.testing.assert_close(net(0.25 * x + 0.75 * y), 0.25 * net(x) + 0.75 * net(y))


def test_weights_start_within_the_stated_bound():
    """Kaiming's uniform bound with gain 1 / sqrt(3): sqrt(3 / in) / sqrt(3); 40,000 weights come close to it."""
    torch.manual_seed(0)
    weight = ResidualMLP(784, 32).blocks[0].weight
    assert weight.abs().max().item() == pytest.approx(1 / math.sqrt(200), rel=1e-3)


@pytest.mark.parametrize("make", [MLP, ResidualMLP])
def test_wrong_inputs_are_explained(make):
    net = make(3, 2)
    with pytest.raises(ShapeError, match=r"expected \(\.\.\., 3\), got \(5, 4\)"):
        net(torch.zeros(5, 4))
    with pytest.raises(ShapeError, match="torch.float64, the weights torch.float32"):
        net(torch.zeros(5, 3, dtype=torch.float64))
    with pytest.raises(LatentDEError, match="Did you mean 'sigmoid'"):
        make(3, 2, output="sigmod")
