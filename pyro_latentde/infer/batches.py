# SPDX-License-Identifier: Apache-2.0
"""Minibatches of series and of windows of them, from a random stream of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.errors import DataError

__all__ = ["Batches"]


class Batches:
    """Random minibatches: an epoch is a permutation of the series, each window starts anywhere with equal chance.

    The last, smaller batch of an epoch is left out, so that all batches weigh the same; another permutation
    follows. Each of several ranks gets its own part of the same batch.

    Args:
        series: the whole data set.
        batch_size: series in a batch, over all ranks; None for all.
        window: times in a window; a function of the step; or None for all.
        seed: seed of permutations and windows.
        rank: which part of each batch to take.
        world: number of parts.
        num_steps: number of steps for which a window schedule must fit.

    Raises:
        DataError: a batch larger than the data set, or not divisible by the ranks; a window longer than the series.

    Example:
        >>> series = Series.from_tensors(torch.arange(9.0), torch.randn(6, 9, 1))
        >>> batches = Batches(series, batch_size=3, window=5, seed=0)
        >>> one, two = batches.take(0), batches.take(1)
        >>> sorted(one.index.tolist() + two.index.tolist()), one.values.shape
        ([0, 1, 2, 3, 4, 5], torch.Size([3, 5, 1]))
    """

    def __init__(
        self,
        series: Series,
        batch_size: int | None = None,
        window: int | Callable[[int], int] | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        num_steps: int = 1,
    ) -> None:
        n = len(series)
        if batch_size is not None and not 1 <= batch_size <= n:
            raise DataError(f"batch_size: {batch_size} of {n} series; give 1 to {n}, or None for all at each step")
        if world > 1 and (batch_size or n) % world:
            raise DataError(f"batch_size: {batch_size or n} series cannot be shared evenly by {world} devices")
        self.series, self.window, self.rank, self.world = series, window, rank, world
        self.batch_size = batch_size if batch_size is not None or world == 1 else n
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.zeros(0, dtype=torch.int64)
        self._check_lengths(num_steps)

    def take(self, step: int) -> Series:
        """The batch of a step; to be asked once for each step, in order."""
        batch, size = self.series, len(self.series)
        if self.batch_size is not None:
            size = self.batch_size
            batch = batch.batch(self._part(self._next_rows(size)))
        if self.window is None:
            return batch
        room = self._length(step)
        starts = torch.randint(0, max(1, batch.times.shape[1] - room + 1), (size,), generator=self._generator)
        return self._cut(batch, self._part(starts), step)

    def example(self) -> Series:
        """A batch of the first series and times, without touching the random stream."""
        size = len(self.series) if self.batch_size is None else self.batch_size // self.world
        batch = self.series if self.batch_size is None else self.series.batch(torch.arange(size))
        return self._cut(batch, torch.zeros(size, dtype=torch.int64), 0)

    def state(self) -> dict[str, Tensor]:
        """What `load` needs to go on from here."""
        return {"generator": self._generator.get_state(), "order": self._order.clone()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        self._generator.set_state(state["generator"])
        self._order = state["order"]

    def _next_rows(self, size: int) -> Tensor:
        if len(self._order) < size:
            self._order = torch.randperm(len(self.series), generator=self._generator)
        rows, self._order = self._order[:size], self._order[size:]
        return rows

    def _part(self, rows: Tensor) -> Tensor:
        if self.batch_size is None:
            return rows
        size = len(rows) // self.world
        return rows[self.rank * size : (self.rank + 1) * size]

    def _check_lengths(self, num_steps: int) -> None:
        """A schedule that outgrows the series fails now, not after hours."""
        total = self.series.times.shape[1]
        for step in range(num_steps if callable(self.window) else self.window is not None):
            length = self._length(step)
            if not 1 <= length <= total:
                when = f" at step {step}" if callable(self.window) else ""
                raise DataError(
                    f"window: {length} times{when} from series of {total}; give 1 to {total}, or None for all"
                )

    def _length(self, step: int) -> int:
        length: Any = self.window(step) if callable(self.window) else self.window
        if length != int(length):
            raise DataError(f"window: expected a whole number of times at step {step}, got {length}")
        return int(length)

    def _cut(self, batch: Series, starts: Tensor, step: int) -> Series:
        if self.window is None:
            return batch
        length = self._length(step)
        if length == batch.times.shape[1]:
            return batch
        return batch.window(starts, length, sample=True)
