# SPDX-License-Identifier: Apache-2.0
"""What kernels read and leave: inputs where they lie, outputs, accepted steps, cotangents."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Arrays", "Bars", "Layout", "Record", "Steps"]


@dataclass(slots=True)
class Steps:
    """The accepted steps of every row: blocks of rows (lo, hi, records), and where each row's records lie in its block.

    A record of ``width`` numbers is (t, h, y_1 .. y_D) at the beginning of a step; with implicit steps (of ``kind``)
    also its stages, and last how it was taken (0 explicit, else implicit); ``stopping``: where it ended too.
    ``inputs`` are those of the solve.
    """

    blocks: list[tuple[int, int, np.ndarray]]
    spans: np.ndarray
    status: np.ndarray
    width: int
    kind: str
    stopping: bool
    inputs: "Arrays"

    @property
    def rows(self) -> int:
        return len(self.status)

    @property
    def nbytes(self) -> int:
        return sum([records.nbytes for _, _, records in self.blocks])

    def sizes(self) -> np.ndarray:
        """Step sizes h, ``(rows, most steps)``, padded with 0."""
        return self._column(1)

    def plan(self) -> np.ndarray:
        """The steps as they are taken again: sizes; where methods alternate or steps end at stops, see RowSolution."""
        if self.kind != "switching" and not self.stopping:
            return self._column(1)
        columns = [self._column(1)]
        columns.append(np.zeros_like(columns[0]) if self.kind == "explicit" else self._column(self.width - 1))
        if self.stopping:
            columns.append(self._column(self.width - (1 if self.kind == "explicit" else 2)))
        return np.stack(columns, -1)

    def _column(self, c: int) -> np.ndarray:
        spans, width = self.spans.reshape(-1, 2), self.width
        counts = spans[:, 1] - spans[:, 0]
        out = np.zeros((len(spans), max(1, int(counts.max(initial=0)))))
        for lo, hi, records in self.blocks:
            for r in range(lo, hi):
                out[r, : counts[r]] = records[spans[r, 0] * width + c : spans[r, 1] * width : width]
        return out


class Record(NamedTuple):
    """What a forward solve leaves: outputs, the report ``(5, R)``, column by column, and steps if kept."""

    ys: np.ndarray
    report: np.ndarray
    steps: Steps | None


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
