# SPDX-License-Identifier: Apache-2.0
"""Solves whose steps do not all fit into memory: rows are solved again while the gradient is computed.

Rows do not depend on each other, so the start of a row is a checkpoint that costs nothing: the backward pass solves a
few rows again, records their steps, reverses them, and goes on to the next. The same machine code takes the same steps,
so the gradient is that of the plain backward pass bit for bit, for one forward solve more of the rows that were not
kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pyro_latentde.errors import SolveError
from pyro_latentde.solve.fused.records import Arrays, rows_of
from pyro_latentde.solve.memory import Allowance, readable, tell_once

if TYPE_CHECKING:
    from pyro_latentde.solve.fused.cpu import CpuKernel

__all__ = ["Again", "Blocks", "Control", "Keeping", "refuse", "tell"]

_LOG = logging.getLogger("pyro_latentde")

CACHED = 1 << 22  # bytes of records that are made and used at once where rows are short: they stay in the cache

Blocks = list[tuple[int, int, np.ndarray | None]]


class Keeping:
    """Which rows keep their steps: as many as the budget has room for.

    Args:
        budget: Bytes for the steps of this solve; None for half of what is free.
        width: Numbers in the record of a step.
    """

    __slots__ = ("allowance", "full", "width")

    def __init__(self, budget: int | None, width: int) -> None:
        self.allowance, self.width, self.full = Allowance(budget), width, False

    def records(self, rows: int, room: int) -> tuple[int, np.ndarray | None]:
        """Records for as many of the rows as fit, ``room`` steps for each; None where not even one fits."""
        numbers = room * self.width
        if not self.allowance.take(8 * rows * numbers):
            fit = self.allowance.left() // (8 * numbers)
            if not (0 < fit < rows and self.allowance.take(8 * fit * numbers)):
                self.full = True
                return rows, None
            rows = fit
        return rows, np.empty(rows * numbers)

    def used(self, records: np.ndarray, steps: int) -> np.ndarray:
        """The records without the room that was not needed, where it is worth the copy."""
        if records.size < 1 << 16 or 2 * steps * self.width > records.size:
            return records
        size = steps * self.width
        self.allowance.give_back(8 * (records.size - size))
        return records[:size].copy()

    def thinned(self, blocks: Blocks, spans: np.ndarray) -> Blocks:
        """The blocks; if not all were kept, as many as half of the allowance holds: the backward pass has the rest."""
        if not self.full:
            return blocks
        left, thin = self.allowance.limit // 2, []
        for lo, hi, records in blocks:
            if records is None:
                thin.append((lo, hi, None))
                continue
            ends = 8 * self.width * np.maximum.accumulate(spans[2 * lo + 1 : 2 * hi : 2])
            middle = lo + int(np.searchsorted(ends, left, side="right"))
            if middle > lo:
                size = int(ends[middle - lo - 1])
                left -= size
                thin.append((lo, middle, records[: size // 8] if middle == hi else records[: size // 8].copy()))
            if middle < hi:
                thin.append((middle, hi, None))
        return thin


class Control(NamedTuple):
    """How steps are chosen: ``mode`` 0 by tolerances, 1 of equal size, 2 given."""

    rtol: float
    atol: float
    max_steps: int
    mode: int
    step: float


@dataclass(slots=True)
class Again:
    """Solves rows once more, for their steps.

    Args:
        kernel: What solves.
        control: How.
        inputs: The inputs of the solve.
        plan: Given steps, a line for each row, or one number where there are none.
        counts: Accepted steps of every row.
        width: Numbers in the record of a step.
        budget: Bytes for the whole solve, of which the backward pass has half.
        threads: How many share them.
    """

    kernel: CpuKernel
    control: Control
    inputs: Arrays
    plan: np.ndarray
    counts: np.ndarray
    width: int
    budget: int
    threads: int

    @property
    def share(self) -> int:
        """Bytes that a thread may take."""
        return self.budget // (2 * self.threads)

    def row(self, r: int) -> Again:
        """For row r alone."""
        counts = self.counts[r : r + 1]
        return replace(self, inputs=rows_of(self.inputs, r, r + 1), plan=self.steps_given(r, r + 1), counts=counts)

    def steps_given(self, lo: int, hi: int) -> np.ndarray:
        return self.plan[lo:hi] if self.control.mode == 2 else self.plan

    def is_long(self, r: int) -> bool:
        """Whether the steps of row r do not fit even alone."""
        return 8 * self.width * (self.counts.item(r) + 2) > self.share

    def whole_row(self, r: int) -> str:
        """What it would take to keep the steps of row r at once."""
        size = 8 * self.width * (self.counts.item(r) + 2)
        return (
            f"the {self.counts[r]:,} steps of row {r} need {readable(size)}, and memory_budget = "
            f"{readable(self.budget)} leaves {readable(self.share)} for each of {self.threads} threads. Expected at "
            f"least {readable(2.1 * self.threads * size)}."
        )

    def records(self, lo: int, hi: int, spans: np.ndarray, buffer: np.ndarray) -> tuple[int, np.ndarray]:
        """The steps of rows from ``lo`` on, at least one and not beyond ``hi``: where they end, and their records.

        ``spans`` of these rows say where each lies; ``buffer`` is used if it is large enough.
        """
        most = np.maximum.accumulate(self.counts[lo:hi]) + 2
        sizes = 8 * np.arange(1, hi - lo + 1) * (self.width * most + self.inputs.points * self.kernel.states)
        rows = max(1, int(np.searchsorted(sizes, min(self.share, CACHED), side="right")))
        room = self.kernel.room(self.counts[lo : lo + rows])
        while True:
            if buffer.size < room * self.width:
                buffer = np.empty(room * self.width)
            end = self._solve(lo, lo + rows, buffer, spans)
            if end > lo:
                return end, buffer
            room *= 2

    def _solve(self, lo: int, hi: int, buffer: np.ndarray, spans: np.ndarray) -> int:
        n, inputs, own = hi - lo, rows_of(self.inputs, lo, hi), np.empty(2 * (hi - lo), dtype=np.int64)
        ys, report = np.empty((n, inputs.points, self.kernel.states)), np.empty((5, n), dtype=np.int64)
        done = self.kernel.solve(inputs, 0, n, self.control, self.steps_given(lo, hi), 1, ys, report, buffer, own)
        spans[2 * lo : 2 * (lo + done)] = own[: 2 * done]
        return lo + done

    def prepare(self, blocks: Blocks, ys: np.ndarray, report: np.ndarray, token: int, over_rows: Callable) -> None:
        """Tokens of rows that kept nothing; long rows are solved by the kernel that solves them for the gradient."""
        forgotten = np.zeros(len(self.counts), dtype=bool)
        for lo, hi, records in blocks:
            forgotten[lo:hi] = records is None

        def values(lo: int, hi: int) -> None:
            for r in range(lo, hi):
                if forgotten[r] and self.is_long(r):
                    if not self.kernel.cuts:
                        raise SolveError(f"rows of networks cannot be cut: {self.whole_row(r)}")
                    self.kernel.long_rows.check(self, r)
                    self.kernel.long_rows.values(self, r, ys, report)

        report[4] = np.arange(token, token + len(self.counts))
        over_rows(values, len(self.counts))


def tell(counts: np.ndarray, width: int, blocks: Blocks, limit: int, budget: int | None) -> None:
    """What a solve does whose steps do not fit: a warning, once, unless a budget was asked for."""
    held = [(hi - lo, records.nbytes) for lo, hi, records in blocks if records is not None]
    kept, size, rows = sum(n for n, _ in held), sum(size for _, size in held), len(counts)
    text = (
        f"backprop through {int(counts.max()):,} steps x {rows:,} rows needs ~{readable(8 * width * counts.sum())}; "
        f"keeping {kept:,} rows ({readable(size)}) and solving {rows - kept:,} again in the backward pass (at most "
        f"{readable(limit)}, +{1 - kept / rows:.2g} forward)."
    )
    if budget is None:
        tell_once("fused", text + " That is half of the free memory; memory_budget= sets another limit.")
    else:
        _LOG.info(text)


def refuse(counts: np.ndarray, width: int, limit: int) -> None:
    """Steps of solves with events are kept as a whole, since what happened between them is not known before."""
    needed = 8 * width * counts.sum()
    raise SolveError(
        f"backprop through {int(counts.max()):,} steps x {len(counts):,} rows with events needs ~{readable(needed)}; "
        f"the limit is {readable(limit)} (memory_budget=, or half of the free memory), and steps of solves with events "
        "are kept as a whole. Solve fewer rows at once, or with a larger rtol, or without gradient (torch.no_grad())."
    )
