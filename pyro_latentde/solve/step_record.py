# SPDX-License-Identifier: Apache-2.0
"""What is kept of an accepted step: its size, how it was taken, which stop it was on the way to, how it ended.

Columns of ``RowSolution.steps``, ``(R, N, C)``; those that a solve cannot need are left out, and a single column is
``(R, N)``:

    size    signed, with zeros at the right
    kind    0 explicit, 1 implicit, 2 implicit and beginning with f(t, y); of switching methods, and where more follows
    mark    number of the stop ahead, positive where the step ends there and negative where not; with stops
    event   number of the event that the step ends in, from 1, or 0; with events
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_latentde.errors import SolveError

__all__ = ["StepLog", "StepRecord", "width"]


def width(switching: bool, stops: bool, events: bool) -> int:
    """C, the number of columns."""
    return 2 + stops + events if stops or events else 1 + switching


class StepRecord(NamedTuple):
    """Given steps by columns, each ``(R, N)``, or None."""

    size: Tensor
    kind: Tensor | None
    mark: Tensor | None
    event: Tensor | None

    @classmethod
    def read(cls, steps: Tensor, stops: bool, events: bool) -> "StepRecord":
        """From the columns of a solve with stops, with events, or with neither.

        Raises:
            SolveError: If there are other columns.
        """
        if steps.ndim == 2:
            columns = [steps, None]
        else:
            columns = list(steps.unbind(-1))
        if len(columns) != 2 + stops + events:
            raise SolveError(
                "replay= is a solution without these events, doses or jumps; solve it with the same ones first."
            )
        size, kind, *more = columns
        mark = more.pop(0).to(torch.int64) if stops else None
        return cls(size, kind, mark, more.pop(0).to(torch.int64) if events else None)

    @property
    def count(self) -> Tensor:
        """Steps per row, ``(R,)``; those of size 0 end at a stop."""
        taken = self.size != 0
        return (taken if self.mark is None else taken | (self.mark > 0)).sum(1)

    @property
    def landing(self) -> Tensor:
        """Which steps end at a stop."""
        return torch.zeros_like(self.size, dtype=torch.bool) if self.mark is None else self.mark > 0

    @property
    def breaks(self) -> Tensor:
        """Steps behind which time is counted anew, since a stop or an event moves by itself."""
        return self.landing if self.event is None else self.landing | (self.event > 0)


class StepLog:
    """Steps of R rows, written down as they are accepted."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self.steps = like.new_zeros(rows, 64, 4)
        self.count = torch.zeros(rows, dtype=torch.int64, device=like.device)

    def write(self, rows: Tensor, size: Tensor, kind: Tensor, mark: Tensor, event: Tensor) -> None:
        """One more step of each of these rows; all ``(K,)``."""
        number = self.count[rows]
        if len(rows) and int(number.max()) >= self.steps.shape[1]:
            self.steps = torch.cat([self.steps, torch.zeros_like(self.steps)], 1)
        self.steps[rows, number] = torch.stack([size, kind.to(size), mark.to(size), event.to(size)], 1)
        self.count[rows] += 1

    def packed(self, switching: bool, stops: bool, events: bool) -> Tensor:
        """The columns that such a solve needs."""
        chosen = [0, *([1] if switching or stops or events else []), *([2] if stops else []), *([3] if events else [])]
        longest = int(self.count.max()) if len(self.count) else 0
        steps = self.steps[:, :longest]
        return (steps[..., chosen] if len(chosen) > 1 else steps[..., 0]).contiguous()
