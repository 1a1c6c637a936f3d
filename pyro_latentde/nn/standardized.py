# SPDX-License-Identifier: Apache-2.0
"""Networks that read values in units of their own spread."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_latentde.data.series import Series
from pyro_latentde.errors import DataError, ShapeError

__all__ = ["Standardized"]


class Standardized(nn.Module):
    r"""A network of standardized values,

    .. math:: y = \mathrm{net}((x - \mu) / \sigma)

    with constants μ and σ. Frames of a video are nearly the same picture: without this, what tells them apart is a
    tenth of what a network reads, and an encoder may take thousands of steps to notice it, or never.

    Args:
        net: network (..., D) -> (..., F) with `in_features` and `out_features`.
        mean: μ, (D,) or a number, in units of x.
        sd: σ > 0, (D,) or a number, in units of x.

    Raises:
        ShapeError: `mean` or `sd` has another length than the network reads.
        DataError: `sd` is not positive and finite, or `mean` is not finite.

    Example:
        >>> import torch
        >>> from pyro_latentde import Series
        >>> from pyro_latentde.nn import ResidualMLP, Standardized
        >>> videos = Series.from_tensors(torch.arange(10.0), torch.rand(8, 10, 784))
        >>> frames = Standardized.of(videos, ResidualMLP(784, 32, output="relu"))
        >>> frames(videos.values).shape
        torch.Size([8, 10, 32])
    """

    def __init__(self, net: nn.Module, mean: Tensor | float, sd: Tensor | float) -> None:
        super().__init__()
        self.net, self.in_features, self.out_features = net, net.in_features, net.out_features
        for name, value in (("mean", mean), ("sd", sd)):
            value = torch.as_tensor(value, dtype=torch.get_default_dtype())
            if value.shape not in ((), (self.in_features,)):
                raise ShapeError(
                    f"Standardized: {name} has shape {tuple(value.shape)}, expected a number or ({self.in_features},), "
                    f"one for each value that {type(net).__name__} reads."
                )
            self.register_buffer(name, value)
        if not (self.mean.isfinite().all() and self.sd.isfinite().all() and (self.sd > 0).all()):
            raise DataError("Standardized: expected finite means and positive, finite standard deviations")

    @classmethod
    def of(cls, series: Series, net: nn.Module) -> Standardized:
        """With the mean of each value over all series and times, and one standard deviation for all values.

        One scale, since pixels that hardly ever change would become as loud as those that tell something.

        Args:
            series: what the network is trained on.
            net: network of one time's values.

        Raises:
            DataError: nothing was observed, or nothing changes.
        """
        mean = series.mean_values()
        squares = torch.where(series.mask, series.values - mean, 0).square().sum()
        sd = (squares / series.mask.sum()).sqrt()
        if not sd > 0:
            raise DataError("Standardized.of: all series have the same constant values; there is nothing to learn")
        return cls(net, mean, sd)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., F)."""
        return self.net((x - self.mean) / self.sd)
