# SPDX-License-Identifier: Apache-2.0
"""Fully connected networks of frames and states."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_latentde.errors import LatentDEError, ShapeError
from pyro_latentde.nn._checks import check_features
from pyro_latentde.solve.choices import not_among

__all__ = ["MLP", "ResidualMLP", "make_activation", "start_at"]

ACTIVATIONS = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def make_activation(name: str | None) -> nn.Module:
    """The activation of this name as a module; None is the identity.

    Args:
        name: one of relu, tanh, sigmoid, softplus, elu, gelu, silu; or None.

    Returns:
        A module without weights.

    Raises:
        LatentDEError: an unknown name.
    """
    if name is None:
        return nn.Identity()
    if name not in ACTIVATIONS:
        raise LatentDEError(not_among("activation", name, ACTIVATIONS))
    return ACTIVATIONS[name]()


_INVERSE_OUTPUTS = {
    nn.Identity: lambda y: y,
    # a pixel that is black in all frames would begin at minus infinity
    nn.Sigmoid: lambda y: y.clamp(0.01, 0.99).logit(),
    nn.Softplus: lambda y: y.clamp(min=0.01).expm1().log(),
}


def start_at(net: nn.Module, outputs: Tensor) -> nn.Module:
    """Set the last bias of a decoder so that its outputs begin around these, such as the mean picture.

    A decoder that begins elsewhere first learns the mean alone, and can end in it: until the mean is right, what tells
    one state from another is too small to be noticed.

    Args:
        net: MLP or ResidualMLP, with no output function, ``"sigmoid"`` or ``"softplus"``.
        outputs: (out_features,).

    Returns:
        The network itself.

    Raises:
        LatentDEError: another network or output function.
        ShapeError: another number of outputs.

    Example:
        >>> import torch
        >>> from pyro_latentde.nn import ResidualMLP
        >>> decoder = start_at(ResidualMLP(2, 784, output="sigmoid"), torch.full((784,), 0.3))
        >>> bool((decoder(torch.zeros(2)).mean() - 0.3).abs() < 0.05)
        True
    """
    last, output = [*net.net][-2:] if isinstance(net, MLP) else (getattr(net, "last", None), getattr(net, "output", 0))
    if not isinstance(net, (MLP, ResidualMLP)) or type(output) not in _INVERSE_OUTPUTS:
        raise LatentDEError(
            f"start_at: expected an MLP or ResidualMLP with no output function, 'sigmoid' or 'softplus', got "
            f"{type(net).__name__}; set the bias of its last layer yourself."
        )
    if outputs.shape != (net.out_features,):
        raise ShapeError(f"start_at: outputs of shape {tuple(outputs.shape)}, expected ({net.out_features},)")
    with torch.no_grad():
        last.bias.copy_(_INVERSE_OUTPUTS[type(output)](outputs))
    return net


class MLP(nn.Module):
    r"""Fully connected layers on the last dimension.

    .. math:: h_0 = x, \quad h_{l+1} = \sigma(W_l h_l + b_l), \quad y = o(W_L h_L + b_L)

    Weights and biases start uniform in :math:`\pm 1 / \sqrt{\text{inputs of the layer}}`, torch's own rule.

    Args:
        in_features: F, numbers that come in.
        out_features: H, numbers that go out.
        hidden: widths of the hidden layers; ``()`` is one affine map.
        activation: σ, by name (relu, tanh, sigmoid, softplus, elu, gelu, silu).
        output: o, by name, or None for the identity.

    Raises:
        LatentDEError: an unknown activation.
        ShapeError: in `forward`, the last dimension or the dtype does not fit.

    Example:
        >>> import torch
        >>> from pyro_latentde.nn import MLP
        >>> MLP(784, 32, hidden=(200,))(torch.rand(64, 50, 784)).shape
        torch.Size([64, 50, 32])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Sequence[int] = (200, 200),
        activation: str = "relu",
        output: str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        layers, width = [], in_features
        for units in hidden:
            layers += [nn.Linear(width, units), make_activation(activation)]
            width = units
        self.net = nn.Sequential(*layers, nn.Linear(width, out_features), make_activation(output))

    def forward(self, x: Tensor) -> Tensor:
        """(..., F) -> (..., H)."""
        check_features(self, x)
        return self.net(x)


class ResidualMLP(nn.Module):
    r"""Residual blocks of one width between two affine maps: feature extractor and decoder of GOKU.

    .. math:: h_0 = \sigma(W_0 x + b_0), \quad h_{l+1} = h_l + \sigma(W_l h_l + b_l), \quad y = o(W_L h_L + b_L)

    Weights and biases start uniform in :math:`\pm 1 / \sqrt{\text{inputs of the layer}}` (Kaiming's uniform rule with a
    gain of :math:`1 / \sqrt 3`, as in GOKU).

    Args:
        in_features: F, numbers that come in.
        out_features: H, numbers that go out.
        width: of the blocks.
        blocks: number of residual blocks.
        activation: σ, by name (relu, tanh, sigmoid, softplus, elu, gelu, silu).
        output: o, by name, or None for the identity.

    Raises:
        LatentDEError: an unknown activation.
        ShapeError: in `forward`, the last dimension or the dtype does not fit.

    References:
        Linial, O., Ravid, N., Eytan, D. and Shalit, U. (2021). Generative ODE modeling with known unknowns. CHIL.

    Example:
        >>> import torch
        >>> from pyro_latentde.nn import ResidualMLP
        >>> ResidualMLP(2, 784, output="sigmoid")(torch.zeros(64, 50, 2)).shape
        torch.Size([64, 50, 784])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        width: int = 200,
        blocks: int = 2,
        activation: str = "relu",
        output: str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.first = nn.Linear(in_features, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.last = nn.Linear(width, out_features)
        self.activation, self.output = make_activation(activation), make_activation(output)

    def forward(self, x: Tensor) -> Tensor:
        """(..., F) -> (..., H)."""
        check_features(self, x)
        h = self.activation(self.first(x))
        for block in self.blocks:
            h = h + self.activation(block(h))
        return self.output(self.last(h))
