# SPDX-License-Identifier: Apache-2.0
"""What kernels read and leave: inputs where they lie, outputs, accepted steps, cotangents."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

__all__ = ["Arrays", "Bars", "Layout", "Record", "Steps", "rows_of"]


class SolvesAgain(Protocol):
    """Makes the records of rows whose steps were not kept."""

    def records(self, lo: int, hi: int, spans: np.ndarray, buffer: np.ndarray) -> tuple[int, np.ndarray]:
        """Records of rows lo.., and the row after the last of them; ``spans`` says where they lie."""

    def row(self, r: int) -> "SolvesAgain":
        """For row r alone."""

    def is_long(self, r: int) -> bool:
        """Whether the steps of row r do not fit even alone."""


@dataclass(slots=True)
class Steps:
    """The accepted steps of every row: blocks of rows (lo, hi, records), and where each row's records lie in its block.

    A record of ``width`` numbers is (t, h, y_1 .. y_D) at the beginning of a step; with implicit steps (of ``kind``)
    also its stages, and last how it was taken (0 explicit, else implicit); before that ``ends`` numbers, the stop and
    the event at which it ended. Records of None were not kept: ``again`` makes them. ``inputs`` are those of the solve.
    """

    blocks: list[tuple[int, int, np.ndarray | None]]
    spans: np.ndarray
    status: np.ndarray
    width: int
    kind: str
    ends: int
    inputs: "Arrays"
    again: SolvesAgain | None = None

    @property
    def rows(self) -> int:
        return len(self.status)

    @property
    def nbytes(self) -> int:
        return sum([records.nbytes for _, _, records in self.blocks if records is not None])

    @property
    def solved_again(self) -> int:
        return sum([hi - lo for lo, hi, records in self.blocks if records is None])

    @property
    def complete(self) -> bool:
        return self.again is None

    def places(self) -> np.ndarray:
        """Where rows lie, to be handed to :meth:`pieces`, which changes it for rows that are solved again."""
        return self.spans if self.complete else self.spans.copy()

    def pieces(
        self, lo: int, hi: int, spans: np.ndarray, chunk: int = 0, cut: bool = False
    ) -> Iterator[tuple[int, int, np.ndarray | None]]:
        """The rows from lo to hi piece by piece, none across a multiple of ``chunk``: first, end and records.

        ``cut``: rows that are too long come alone, without records.
        """
        room = np.empty(0)
        for first, last, records in self.blocks:
            row, last = max(lo, first), min(hi, last)
            while row < last:
                end = min(last, (row // chunk + 1) * chunk) if chunk else last
                if records is not None:
                    yield row, end, records
                elif cut and self.again.is_long(row):
                    end = row + 1
                    yield row, end, None
                else:
                    end, room = self.again.records(row, end, spans, room)
                    yield row, end, room
                row = end

    def row(self, r: int) -> "Steps":
        """Row r alone."""
        records = next(records for lo, hi, records in self.blocks if lo <= r < hi)
        own = {"spans": self.spans[2 * r : 2 * r + 2], "status": self.status[r : r + 1], "blocks": [(0, 1, records)]}
        return replace(self, **own, again=self.again and self.again.row(r))

    def sizes(self) -> np.ndarray:
        """Step sizes h, ``(rows, most steps)``, padded with 0."""
        return self._columns(1)[..., 0]

    def plan(self) -> np.ndarray:
        """The steps as they are taken again: sizes; where methods alternate or steps end at stops, see RowSolution."""
        if self.kind != "switching" and not self.ends:
            return self.sizes()
        how = () if self.kind == "explicit" else (self.width - 1,)
        last = self.width - len(how)
        where = range(last - self.ends, last)
        found = self._columns(1, *how, *where)
        return found if how else np.insert(found, 1, 0.0, axis=2)

    def _columns(self, *columns: int) -> np.ndarray:
        spans, found = self.places(), []
        for lo, hi, records in self.pieces(0, self.rows, spans):
            table = records[: records.size // self.width * self.width].reshape(-1, self.width)
            found += [table[spans[2 * r] : spans[2 * r + 1], columns].copy() for r in range(lo, hi)]
        out = np.zeros((self.rows, max([1, *map(len, found)]), len(columns)))
        for r, steps in enumerate(found):
            out[r, : len(steps)] = steps
        return out


class Record(NamedTuple):
    """What a forward solve leaves: outputs, the report ``(5, R)``, column by column, steps if kept, events if any."""

    ys: np.ndarray
    report: np.ndarray
    steps: Steps | None
    found: Sequence[np.ndarray] = ()


@dataclass(slots=True)
class Arrays:
    """Inputs where they lie in memory, with row strides; ``held`` keeps them there.

    The parameters are one array that begins at address 0, so that each is read in its own place: ``offsets`` are
    addresses divided by 8.
    """

    rows: int
    y0: int
    y0_stride: int
    times: int
    times_stride: int
    points: int
    t0: int
    t0_stride: int
    offsets: np.ndarray
    layout: "Layout"
    shared: tuple[bool, ...]
    held: Any


def rows_of(a: Arrays, lo: int, hi: int) -> Arrays:
    """Rows lo to hi alone, for the forward solve: places of gradients stay those of all rows."""
    return replace(
        a,
        rows=hi - lo,
        y0=a.y0 + 8 * lo * a.y0_stride,
        times=a.times + 8 * lo * a.times_stride,
        t0=a.t0 + 8 * lo * a.t0_stride,
        offsets=a.offsets + lo * a.layout.strides,
    )


@dataclass(frozen=True)
class Layout:
    """Where tangents of the parameters lie, end to end in one buffer, and their gradients in theirs.

    The gradient buffer begins like that of the tangents; the gradient of a shared parameter lies behind it, one block
    per chunk of rows, of which the first receives the sum.
    """

    offsets: np.ndarray
    strides: np.ndarray
    places: np.ndarray
    chunk_strides: np.ndarray
    size: int
    shared_size: int
    columns: tuple[list[int], ...]  # offset, length, row stride, place of the gradient

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(rows: int, sizes: tuple[int, ...], shared: tuple[bool, ...]) -> "Layout":
        """``sizes``: entries of each parameter with all its rows."""
        offsets = [sum(sizes[:k]) for k in range(len(sizes))]
        strides = [0 if one else size // max(rows, 1) for size, one in zip(sizes, shared, strict=True)]
        size, behind, places = sum(sizes), 0, []
        for offset, length, one in zip(offsets, sizes, shared, strict=True):
            places.append(size + behind if one else offset)
            behind += length if one else 0
        chunk_strides = [behind if one else 0 for one in shared]
        arrays = (np.array(x, dtype=np.int64) for x in (offsets, strides, places, chunk_strides))
        return Layout(*arrays, size, behind, (offsets, list(sizes), strides, places))


class Bars(NamedTuple):
    """Cotangents of y0, times, t0 (flat, of all rows), parameter buffer; ``finite``: none overflowed."""

    y0: np.ndarray
    times: np.ndarray
    t0: np.ndarray
    p: np.ndarray
    finite: bool
