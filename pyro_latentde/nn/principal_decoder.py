# SPDX-License-Identifier: Apache-2.0
"""A linear decoder of as many directions as there are states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_latentde.data.series import Series
from pyro_latentde.errors import LatentDEError

__all__ = ["PrincipalDecoder"]

_PACE = 3.0  # Adam moves each parameter by about the learning rate, and a mixture has far to go


class PrincipalDecoder(nn.Module):
    r"""A linear decoder into the space of the principal components of the values,

    .. math:: x = \bar x + P M z

    with the mean and the first S directions P of the data as constants, and M (S, S) learned, the identity at first. P
    is scaled so that independent states of the given sd explain the values; what is left to learn is which mixture of
    components a state is: S x S numbers in place of D x S, and no direction in which there is nothing but noise.

    Args:
        mean: (D,).
        basis: P, (D, S).

    References:
        Hotelling, H. (1933). Analysis of a complex of statistical variables into principal components. Journal of
        Educational Psychology 24, 417-441.

    Example:
        >>> import torch
        >>> from pyro_latentde import Series
        >>> from pyro_latentde.nn import PrincipalDecoder
        >>> series = Series.from_tensors(torch.arange(20.0), torch.randn(5, 20, 40))
        >>> PrincipalDecoder.of(series, 6)(torch.zeros(3, 6)).shape
        torch.Size([3, 40])
    """

    def __init__(self, mean: Tensor, basis: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = basis.shape
        self.register_buffer("bias", mean)
        self.register_buffer("basis", basis)
        self.slow_mix = nn.Parameter(torch.eye(self.in_features, dtype=basis.dtype) / _PACE)

    @classmethod
    def of(cls, series: Series, states: int, sd: float = 1.0) -> PrincipalDecoder:
        """From the components of series.

        Args:
            series: what the model is trained on; missing values count as the mean.
            states: how many states S there are.
            sd: of a state.

        Raises:
            LatentDEError: the values vary in fewer than S directions.
        """
        mean = series.mean_values()
        centered = torch.where(series.mask, series.values - mean, 0).flatten(0, 1).double()
        spread, directions = torch.linalg.eigh(centered.T @ centered / len(centered))
        size = spread.shape[0]
        if size < states or not spread[size - states] > 1e-10 * spread[-1]:
            raise LatentDEError(f"PrincipalDecoder: the values vary in fewer than {states} directions; take fewer")
        return cls(mean, (directions[:, -states:] * spread[-states:].sqrt() / sd).to(mean))

    def start(self, mix: Tensor) -> None:
        """Begin at another mixture M, (S, S)."""
        with torch.no_grad():
            self.slow_mix.copy_(mix / _PACE)

    @property
    def weight(self) -> Tensor:
        """P M, (D, S)."""
        return self.basis @ (_PACE * self.slow_mix)

    def forward(self, z: Tensor) -> Tensor:
        """States (..., S) -> values (..., D)."""
        return nn.functional.linear(z, self.weight, self.bias)
