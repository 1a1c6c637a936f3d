# SPDX-License-Identifier: Apache-2.0
"""Times at which something happened, in rows that may have none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_latentde.errors import DataError

__all__ = ["EventTimes"]


@dataclass(frozen=True, eq=False, repr=False)
class EventTimes:
    """N rows of event times, each watched over an interval of its own.

    Nothing happening is information too: a row without events is a row that was watched in vain.

    Args:
        times: (N, E), sorted along E, in the interval of the row; ``inf`` where a row has no more events.
        start: (N,), when watching began; unit: the user's.
        end: (N,), when it ended, later than `start`.
        marks: (N, E), int64, which of several kinds each event is; None for one kind.

    Raises:
        DataError: shapes disagree, or an event lies outside its interval.

    Example:
        >>> from pyro_latentde.data import EventTimes
        >>> EventTimes.from_lists([[0.5, 2.0], [], [1.0]], start=0.0, end=3.0)
        EventTimes(3 rows, 3 events, at most 2 in a row)
    """

    times: Tensor
    start: Tensor
    end: Tensor
    marks: Tensor | None = None
    highest_mark: int = field(init=False, default=-1)  # -1 without marks

    def __post_init__(self) -> None:
        _check(self)
        # Asked at every evaluation of a log-joint, which may not look at numbers while it is recorded.
        if self.marks is not None:
            object.__setattr__(self, "highest_mark", int(self.marks.max()))

    @classmethod
    def from_lists(
        cls,
        times: Sequence[Any],
        *,
        start: Any,
        end: Any,
        marks: Sequence[Any] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> EventTimes:
        """Event times from N lists of any lengths, in any order.

        Args:
            times: N lists or tensors of event times; empty ones for rows without events.
            start: when watching began, a number or N numbers.
            end: when watching ended, a number or N numbers.
            marks: N lists of whole numbers from 0, as long as those of times.
            dtype: of the times.

        Returns:
            Event times (N, E), E the most events of a row and at least one.

        Raises:
            DataError: no row, lengths that differ, events outside the interval.
        """
        if isinstance(times, Tensor) and times.dim() < 2 or not len(times):
            raise DataError("EventTimes: expected N lists of times, one per row; for one row, [[0.5, 2.0]].")
        rows = [torch.as_tensor(row, dtype=dtype).reshape(-1) for row in times]
        kinds = None if marks is None else [torch.as_tensor(row, dtype=torch.int64).reshape(-1) for row in marks]
        if kinds is not None and [len(k) for k in kinds] != [len(row) for row in rows]:
            raise DataError(
                f"EventTimes: one mark per event; got {[len(row) for row in rows]} times and "
                f"{[len(k) for k in kinds]} marks."
            )
        most = max(1, *(len(row) for row in rows))
        padded = torch.full((len(rows), most), torch.inf, dtype=dtype)
        padded_marks = None if kinds is None else torch.zeros(len(rows), most, dtype=torch.int64)
        for i, row in enumerate(rows):
            order = row.argsort(stable=True)
            padded[i, : len(row)] = row[order]
            if padded_marks is not None:
                padded_marks[i, : len(row)] = kinds[i][order]
        start, end = (torch.as_tensor(x, dtype=dtype).expand(len(rows)).clone() for x in (start, end))
        if bool(padded.isnan().any()):
            raise DataError("EventTimes: NaN among the times; leave out what did not happen.")
        return cls(padded, start, end, padded_marks)

    @property
    def mask(self) -> Tensor:
        """(N, E), True where there is an event."""
        return self.times.isfinite()

    @property
    def counts(self) -> Tensor:
        """(N,), number of events of each row."""
        return self.mask.sum(-1)

    def __len__(self) -> int:
        return self.times.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> EventTimes:
        """Some of the rows: a batch of one by an integer, else by a slice, list, index or bool tensor."""
        if isinstance(index, int) and not -len(self) <= index < len(self):  # IndexError also ends Python's iteration
            raise IndexError(f"row {index} of {len(self)}")
        rows = torch.arange(len(self), device=self.times.device)
        rows = rows[index if isinstance(index, slice) else torch.as_tensor(index)].reshape(-1)
        marks = None if self.marks is None else self.marks[rows]
        return self._with(times=self.times[rows], start=self.start[rows], end=self.end[rows], marks=marks)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> EventTimes:
        """The same events in another floating dtype, or on another device."""
        times, start, end = (x.to(dtype=dtype, device=device) for x in (self.times, self.start, self.end))
        marks = None if self.marks is None else self.marks.to(device=device)
        return self._with(times=times, start=start, end=end, marks=marks)

    def _with(self, **tensors: Tensor | None) -> EventTimes:
        """Tensors from checked ones: they need no second look."""
        new = object.__new__(EventTimes)
        for name, value in {**vars(self), **tensors}.items():
            object.__setattr__(new, name, value)
        return new

    def __repr__(self) -> str:
        counts = self.counts
        return f"EventTimes({len(self)} rows, {int(counts.sum())} events, at most {int(counts.max())} in a row)"


def _check(data: EventTimes) -> None:
    times, start, end, marks = data.times, data.start, data.end, data.marks
    rows = times.shape[:1]
    if times.dim() != 2 or not times.numel() or start.shape != rows or end.shape != rows:
        raise DataError(
            f"EventTimes: expected times (N, E), start (N,), end (N,); got {tuple(times.shape)}, "
            f"{tuple(start.shape)}, {tuple(end.shape)}. EventTimes.from_lists takes ragged rows."
        )
    if not bool((start < end).all()) or not bool((start.isfinite() & end.isfinite()).all()):
        raise DataError("EventTimes: expected finite start < end in every row.")
    there = times.isfinite()
    outside = there & ((times < start[:, None]) | (times > end[:, None]))
    if bool(outside.any()):
        row, column = outside.nonzero()[0].tolist()
        raise DataError(
            f"EventTimes: {int(outside.sum())} events lie outside the interval of their row; the first, in row {row}, "
            f"at {times[row, column].item():g}, outside [{start[row].item():g}, {end[row].item():g}]."
        )
    if not bool((times[:, 1:] >= times[:, :-1]).all()) or bool((times == -torch.inf).any()):
        raise DataError("EventTimes: times must be sorted in each row, inf last; EventTimes.from_lists sorts them.")
    if marks is not None and (marks.shape != times.shape or marks.dtype != torch.int64 or bool((marks < 0).any())):
        raise DataError(
            f"EventTimes: expected marks like times {tuple(times.shape)}, int64 from 0; got {tuple(marks.shape)} "
            f"{marks.dtype}."
        )
