# SPDX-License-Identifier: Apache-2.0
"""Networks that read some of the values."""

from collections.abc import Sequence

from torch import Tensor, nn

from pyro_latentde.errors import LatentDEError, ShapeError

__all__ = ["Select"]


class Select(nn.Module):
    r"""A network of some columns of what it is given,

    .. math:: y = \mathrm{net}(x_{c_1}, \dots, x_{c_k})

    A decoder that reads only the states which are to be seen, such as the angle of a pendulum but not its rate, keeps
    the states what they are called: one that reads both can turn them into each other.

    Args:
        net: network (..., k) -> (..., F) with `in_features` and `out_features`.
        columns: which of the values, each from 0 to in_features - 1.
        in_features: D, how many values there are.

    Raises:
        LatentDEError: columns that do not exist, or not as many as the network reads.
        ShapeError: in `forward`, another number of values.

    Example:
        >>> import torch
        >>> from pyro_latentde.nn import MLP, Select
        >>> Select(MLP(1, 784), [0], 2)(torch.randn(8, 10, 2)).shape
        torch.Size([8, 10, 784])
    """

    def __init__(self, net: nn.Module, columns: Sequence[int], in_features: int) -> None:
        super().__init__()
        self.net, self.columns = net, tuple(columns)
        self.in_features, self.out_features = in_features, net.out_features
        if len(self.columns) != net.in_features or not all(0 <= c < in_features for c in self.columns):
            raise LatentDEError(
                f"Select: columns {self.columns} of {in_features} values for a network that reads {net.in_features}; "
                f"expected {net.in_features} numbers from 0 to {in_features - 1}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., F)."""
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"Select: expected (..., {self.in_features}), got {tuple(x.shape)}")
        return self.net(x[..., self.columns])
