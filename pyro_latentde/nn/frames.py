# SPDX-License-Identifier: Apache-2.0
"""Encoders of videos: a network of frames before a network of series."""

from torch import Tensor, nn

from pyro_latentde.errors import ShapeError
from pyro_latentde.nn._series import SeriesEncoder

__all__ = ["FrameWise"]


class FrameWise(SeriesEncoder):
    r"""Encodes each frame, then the series of their features.

    .. math:: h = \mathrm{encoder}(t, \phi(m \odot x), m'), \quad m'_k = \max_d m_{kd}

    Missing pixels are 0 for the network of frames φ; a frame without any pixel is skipped by the encoder.

    Args:
        frames: φ, a network (..., D) -> (..., F) with `in_features` and `out_features`: MLP, ResidualMLP, ConvEncoder.
        encoder: any encoder of series with F values per time.

    Raises:
        ShapeError: the two do not fit; or, in `forward` and `states`, the series does not.

    Example:
        >>> import torch
        >>> from pyro_latentde.nn import FrameWise, RecurrentEncoder, ResidualMLP
        >>> encoder = FrameWise(ResidualMLP(784, 32, output="relu"), RecurrentEncoder(32, 16))
        >>> times, video = torch.linspace(0, 1, 10).expand(4, 10), torch.rand(4, 10, 784)
        >>> encoder(times, video, torch.ones_like(video, dtype=torch.bool)).shape
        torch.Size([4, 16])
    """

    mixed_precision = True  # in the network of frames; the encoder of series decides for itself

    def __init__(self, frames: nn.Module, encoder: SeriesEncoder) -> None:
        super().__init__(frames.in_features, encoder.out_features)
        if frames.out_features != encoder.in_features:
            raise ShapeError(
                f"FrameWise: {type(frames).__name__} gives {frames.out_features} features of a frame, "
                f"{type(encoder).__name__} takes {encoder.in_features} per time; make these numbers equal."
            )
        self.frames, self.encoder = frames, encoder

    def _states(self, times: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        features = self.frames(values)
        return self.encoder.states(times, features, mask.any(dim=-1, keepdim=True).expand_as(features))

    def _encoding(self, states: Tensor) -> Tensor:
        return self.encoder._encoding(states)
