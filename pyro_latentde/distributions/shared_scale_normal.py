# SPDX-License-Identifier: Apache-2.0
"""Normal laws of many values, such as pixels, around their own means with one standard deviation."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

__all__ = ["SharedScaleNormal"]


class SharedScaleNormal(dist.Normal):
    r"""``Normal(loc, scale)`` whose log-density, summed over dimensions that share a scale, takes one pass.

    .. math:: \log p(v) = -\frac{1}{2 \sigma^2} \sum_i (v_i - x_i)^2 - n \log \sigma \sqrt{2 \pi}

    For a batch of videos the arrays of a density per pixel, and of their gradients, would cost as much time as the
    networks. Without ``to_event``, or where the summed dimensions do not share a scale, it is as any normal.

    Args:
        loc: means, any shape.
        scale: standard deviation, a number or a tensor to be broadcast against `loc`.

    Example:
        >>> import torch
        >>> normal = SharedScaleNormal(torch.zeros(64, 50, 784), 0.1)
        >>> normal.to_event(2).log_prob(torch.zeros(64, 50, 784)).shape
        torch.Size([64])
    """

    def __init__(self, loc: Tensor, scale: Tensor | float, *, validate_args: bool | None = None) -> None:
        self._shared = torch.as_tensor(scale, dtype=getattr(scale, "dtype", loc.dtype), device=loc.device)
        super().__init__(loc, scale, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: SharedScaleNormal | None = None) -> SharedScaleNormal:
        """The same law with a larger batch shape."""
        new = self._get_checked_instance(SharedScaleNormal, _instance)
        new._shared = self._shared
        return super().expand(batch_shape, new)

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> dist.Distribution:
        """The last dimensions as one event, all of them by default."""
        count = len(self.batch_shape) if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        shares = all(size == 1 for size in self._shared.shape[-count:])
        return _Summed(self, count) if count > 0 and shares else super().to_event(reinterpreted_batch_ndims)


class _Summed(dist.Independent):
    """The law of all values of an event, which share a scale."""

    def log_prob(self, value: Tensor) -> Tensor:
        base, count = self.base_dist, self.reinterpreted_batch_ndims
        if base._validate_args:
            base._validate_sample(value)
        loc, value = torch.broadcast_tensors(base.loc, value)
        wide = torch.promote_types(loc.dtype, value.dtype)
        squares = mse_loss(loc.to(wide), value.to(wide), reduction="none").sum(tuple(range(-count, 0)))
        sd = base._shared.reshape(base._shared.shape[:-count])
        return -0.5 * squares / sd**2 - self.event_shape.numel() * (sd.log() + 0.5 * math.log(2 * math.pi))
