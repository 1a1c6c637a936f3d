# SPDX-License-Identifier: Apache-2.0
"""What all encoders of series share: their contract, and the order in which they read."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_latentde.nn._checks import check_series

__all__ = ["Reading", "SeriesEncoder", "read"]


class SeriesEncoder(nn.Module, ABC):
    """Maps a batch of irregular series with gaps to what is known at their starts.

    Series are read backwards in time, so that the state at a time summarises what was observed from it on: at the
    first time that is what the initial state z0 has to explain. Masked entries and times with nothing observed
    (padding) change neither values nor gradients; rows do not see each other.

    Args:
        in_features: F, values per time.
        out_features: H, size of a state.
        time_scale: one unit of the encoder's clock, in units of the times.
    """

    # Rounding adds up along a series, and most of the work is in the networks of frames.
    mixed_precision = False

    def __init__(self, in_features: int, out_features: int, time_scale: float = 1.0) -> None:
        super().__init__()
        self.in_features, self.out_features, self.time_scale = in_features, out_features, float(time_scale)

    @abstractmethod
    def _states(self, times: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """States (N, T, H); the inputs are checked, masked values are zero."""

    def _encoding(self, states: Tensor) -> Tensor:
        """(N, T, H) -> (N, H), what `forward` returns."""
        return states[:, 0]

    def states(self, times: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """For every time what is known from it on.

        Args:
            times: (N, T), not decreasing along T; in units of the caller.
            values: (N, T, F), finite, anything where not observed.
            mask: (N, T, F), bool, True where observed.

        Returns:
            States (N, T, H). At a time with nothing observed it is the state at the next observation; at the first
            time the gap up to there is taken into account as well.

        Raises:
            ShapeError: shapes, dtypes or devices do not fit.
        """
        check_series(self, times, values, mask)
        values = torch.where(mask, values.to(next(self.parameters()).dtype), 0.0)
        device = values.device.type
        with torch.autocast(device, enabled=self.mixed_precision and torch.is_autocast_enabled(device)):
            return self._states(times / self.time_scale, values, mask)

    def forward(self, times: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """What is known at the first time, (N, H); arguments as in `states`."""
        return self._encoding(self.states(times, values, mask))


@dataclass(frozen=True)
class Reading:
    """Series in the order in which they are read, without the times at which nothing was observed.

    Without those times no recurrent network needs a mask over time: whatever comes after the last one read is never
    looked at, so the loops that torch ships work for gaps and ragged rows as they are.

    Args:
        times: (N, K), times read, K the most of any row; behind the last one of a row it repeats.
        gaps: (N, K), not negative, time since the one read before; 0 for the first.
        values: (N, K, F), zero where not observed.
        mask: (N, K, F), True where observed.
        count: (N, T), how many times were read when a time of the series was reached; None if all of them are read.
        backward: whether the last time comes first.
    """

    times: Tensor
    gaps: Tensor
    values: Tensor
    mask: Tensor
    count: Tensor | None
    backward: bool

    def spread(self, states: Tensor) -> Tensor:
        """States (N, K, H) after each time read -> (N, T, H) at the times of the series, 0 before the first."""
        if self.count is not None:
            at = (self.count - 1).clamp(min=0)[..., None].expand(-1, -1, states.shape[-1])
            states = torch.where((self.count > 0)[..., None], states.gather(1, at), 0.0)
        return states.flip(1) if self.backward else states


def read(times: Tensor, values: Tensor, mask: Tensor, *, backward: bool = True) -> Reading:
    """Order the observed times of each row, the last one first.

    Backwards, the first time of a series is read whether anything was observed then or not: z0 stands there, and the
    gap from there to the first observation matters to it.

    Args:
        times: (N, T).
        values: (N, T, F), zero where not observed.
        mask: (N, T, F).
        backward: False reads the first time first.

    Returns:
        The reading.
    """
    if backward:
        times, values, mask = times.flip(1), values.flip(1), mask.flip(1)
    if bool(mask.all()):
        return Reading(times, _gaps(times, values), values, mask, None, backward)
    wanted = mask.any(dim=-1)
    if backward:
        wanted = torch.cat([wanted[:, :-1], torch.ones_like(wanted[:, :1])], dim=1)
    count = wanted.cumsum(dim=1)
    # on a GPU this waits, and saves a step for every time left out
    shortest, longest = torch.stack(count[:, -1].aminmax()).tolist()
    if shortest < times.shape[1]:
        longest = max(1, longest)
        order = (~wanted).int().argsort(dim=1, stable=True)[:, :longest]
        order = order.gather(1, torch.arange(longest, device=order.device).minimum((count[:, -1:] - 1).clamp(min=0)))
        columns = order[..., None].expand(-1, -1, values.shape[-1])
        times, values, mask = times.gather(1, order), values.gather(1, columns), mask.gather(1, columns)
    return Reading(times, _gaps(times, values), values, mask, None if shortest == count.shape[1] else count, backward)


def _gaps(times: Tensor, values: Tensor) -> Tensor:
    return torch.nn.functional.pad(times.diff(dim=1).abs(), (1, 0)).to(values.dtype)
