# SPDX-License-Identifier: Apache-2.0
"""Stations of multiple shooting in series of different lengths, whose shorter ones repeat their last time."""

from collections.abc import Sequence

from torch import Tensor

__all__ = ["have_data"]


def have_data(times: Tensor, stations: Sequence[int]) -> Tensor:
    """Whether a series goes on at its stations: one that its last time has come before is in the padding.

    Args:
        times: (..., T), not decreasing.
        stations: J positions, none at 0.

    Returns:
        (..., J), bool.

    Example:
        >>> import torch
        >>> have_data(torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 1.0, 1.0]]), [1, 3])
        tensor([[ True,  True],
                [ True, False]])
    """
    return times[..., [station - 1 for station in stations]] < times[..., -1:]
