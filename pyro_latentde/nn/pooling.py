# SPDX-License-Identifier: Apache-2.0
"""Encoders that also say what a whole series was like on average."""

import torch
from torch import Tensor

from pyro_latentde.nn._series import SeriesEncoder

__all__ = ["StatisticsPooling"]

_LEAST_VARIANCE = 1e-6  # the root's slope at zero is infinite


class StatisticsPooling(SeriesEncoder):
    r"""An encoder's state, beside mean and standard deviation of its states over all observed times,

    .. math:: c = [h_1, \bar h, s], \quad \bar h = \tfrac1K \sum_k h_k, \quad s^2 = \tfrac1K \sum_k (h_k - \bar h)^2

    The last state of a recurrent network has to carry through the whole series what it noticed early. Parameters of
    a differential equation act at all times, and what they do can be told from any few of them. Of three oscillators
    at a time, frequencies correlated by .7 to .8 with the truth after 800 steps, and without averages by 0 after 1500.

    Args:
        encoder: what is pooled; `out_features` is three times its own.

    Raises:
        ShapeError: in `forward` and `states`, shapes, dtypes or devices do not fit.

    References:
        Snyder, D. et al. (2018). X-vectors: robust DNN embeddings for speaker recognition. ICASSP.

    Example:
        >>> import torch
        >>> from pyro_latentde.nn import RecurrentEncoder, StatisticsPooling
        >>> encoder = StatisticsPooling(RecurrentEncoder(3, 16, cell="lstm", bidirectional=True))
        >>> times, values = torch.rand(8, 20).sort(dim=1).values, torch.randn(8, 20, 3)
        >>> encoder(times, values, torch.rand(8, 20, 3) < 0.5).shape
        torch.Size([8, 96])
    """

    def __init__(self, encoder: SeriesEncoder) -> None:
        super().__init__(encoder.in_features, 3 * encoder.out_features, encoder.time_scale)
        self.encoder = encoder

    def states(self, times: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """The encoder's states, each beside mean and standard deviation of all: (N, T, 3 H)."""
        return self._states(times, values, mask)

    def _states(self, times: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder.states(times, values, mask)
        seen = mask.any(dim=-1, keepdim=True).to(states.dtype)
        weight = seen / seen.sum(dim=1, keepdim=True).clamp(min=1.0)
        mean = (weight * states).sum(dim=1, keepdim=True)
        sd = ((weight * (states - mean) ** 2).sum(dim=1, keepdim=True) + _LEAST_VARIANCE).sqrt()
        return torch.cat([states, mean.expand_as(states), sd.expand_as(states)], dim=-1)

    def _encoding(self, states: Tensor) -> Tensor:
        own = self.encoder.out_features
        return torch.cat([self.encoder._encoding(states[..., :own]), states[:, 0, own:]], dim=-1)
