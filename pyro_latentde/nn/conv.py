# SPDX-License-Identifier: Apache-2.0
"""Convolutional networks of frames."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_latentde.errors import ShapeError
from pyro_latentde.nn._checks import check_features, check_placement
from pyro_latentde.nn.mlp import make_activation

__all__ = ["ConvDecoder", "ConvEncoder"]


class ConvEncoder(nn.Module):
    r"""Convolutions that halve a picture, then an affine map.

    .. math:: h_{l+1} = \mathrm{ReLU}(\mathrm{conv}_{3 \times 3,\ \text{stride } 2}(h_l)), \quad
        y = W\, \mathrm{vec}(h_L) + b

    Any height and width: odd ones are halved upwards. Weights and biases start uniform in
    :math:`\pm 1 / \sqrt{\text{inputs of a unit}}`, torch's own rule.

    Args:
        frame: (height, width) or (channels, height, width) of a picture, which comes row by row in D numbers.
        out_features: H, numbers that go out.
        channels: of the halved pictures, one number per halving.

    Raises:
        ShapeError: the frame has other than 2 or 3 numbers; in `forward`, a picture has another size or dtype.

    Example:
        >>> import torch
        >>> from pyro_latentde.nn import ConvEncoder
        >>> ConvEncoder((28, 28), 32)(torch.rand(4, 10, 784)).shape
        torch.Size([4, 10, 32])
    """

    def __init__(self, frame: Sequence[int], out_features: int, channels: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        self.frame, self.picture = tuple(frame), _picture(type(self), frame)
        self.in_features, self.out_features = math.prod(self.frame), out_features
        sizes = _halvings(self.picture[1:], len(channels))
        layers, width = [], self.picture[0]
        for count in channels:
            layers += [nn.Conv2d(width, count, kernel_size=3, stride=2, padding=1), nn.ReLU()]
            width = count
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * math.prod(sizes[-1]), out_features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., H)."""
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ShapeError(
                f"ConvEncoder: expected pictures {self.frame}, row by row as (..., {self.in_features}); got "
                f"{tuple(x.shape)}: image size that does not match the encoder. Make it with the frame of the "
                "series, ConvEncoder(series.frame, ...)."
            )
        check_placement(self, "pictures", x)
        return self.net(x.reshape(-1, *self.picture)).reshape(*x.shape[:-1], self.out_features)


class ConvDecoder(nn.Module):
    r"""An affine map to a small picture, then transposed convolutions that double it.

    .. math:: h_0 = \mathrm{ReLU}(W x + b), \quad
        h_{l+1} = \mathrm{ReLU}(\mathrm{conv}^T_{4 \times 4,\ \text{stride } 2}(h_l)), \quad y = o(\mathrm{vec}(h_L))

    No ReLU after the last one. The kernels are a multiple of the stride, so that every pixel gets as many terms as its
    neighbours; what an odd size has too much is cut off. Weights and biases start by torch's own rule.

    Args:
        in_features: F, numbers that come in.
        frame: (height, width) or (channels, height, width) of the picture that goes out, row by row in D numbers.
        channels: of the pictures before each doubling, one number per doubling.
        output: o, by name (sigmoid, softplus, tanh, ...), or None for the identity.

    Raises:
        LatentDEError: an unknown output.
        ShapeError: the frame has other than 2 or 3 numbers; in `forward`, the inputs do not fit.

    Example:
        >>> import torch
        >>> from pyro_latentde.nn import ConvDecoder
        >>> ConvDecoder(2, (28, 28), output="sigmoid")(torch.zeros(4, 10, 2)).shape
        torch.Size([4, 10, 784])
    """

    def __init__(
        self,
        in_features: int,
        frame: Sequence[int],
        channels: Sequence[int] = (64, 32, 16),
        output: str | None = None,
    ) -> None:
        super().__init__()
        self.frame, self.picture = tuple(frame), _picture(type(self), frame)
        self.in_features, self.out_features = in_features, math.prod(self.frame)
        self.sizes = _halvings(self.picture[1:], len(channels))[::-1]
        widths = [*channels, self.picture[0]]
        self.first = nn.Linear(in_features, widths[0] * math.prod(self.sizes[0]))
        self.doublings = nn.ModuleList(
            nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1)
            for before, after in zip(widths[:-1], widths[1:], strict=True)
        )
        self.output = make_activation(output)

    def forward(self, x: Tensor) -> Tensor:
        """(..., F) -> (..., D)."""
        check_features(self, x)
        h = self.first(x.reshape(-1, self.in_features)).unflatten(-1, (-1, *self.sizes[0]))
        for double, (height, width) in zip(self.doublings, self.sizes[1:], strict=True):
            h = double(torch.relu(h))[..., :height, :width]
        return self.output(h.reshape(*x.shape[:-1], self.out_features))


def _picture(kind: type, frame: Sequence[int]) -> tuple[int, int, int]:
    """(channels, height, width)."""
    if len(frame) not in (2, 3) or min(frame) < 1:
        raise ShapeError(
            f"{kind.__name__}: expected a frame (height, width) or (channels, height, width), got {tuple(frame)}."
        )
    return (1, *frame) if len(frame) == 2 else tuple(frame)


def _halvings(size: Sequence[int], times: int) -> list[tuple[int, int]]:
    """The size, its half, the half of this, ... rounded up."""
    sizes = [tuple(size)]
    for _ in range(times):
        sizes.append(tuple((n + 1) // 2 for n in sizes[-1]))
    return sizes
