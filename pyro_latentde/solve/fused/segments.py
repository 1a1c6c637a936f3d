# SPDX-License-Identifier: Apache-2.0
"""The gradient of a row whose steps do not fit into memory even alone: recursive checkpointing.

The row is cut into segments of equal numbers of steps. States at the starts of some segments are kept; the others are
reached by solving forward from the last one before them. With c of them and l segments, no segment is solved more than
r + 1 times, where r is the least number with binomial(c + r, c) >= l, and no other order does with fewer steps.

References:
    Griewank, Walther, Algorithm 799: Revolve, ACM Trans. Math. Softw. 26 (2000) 19.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING

import numpy as np

from pyro_latentde.errors import SolveError
from pyro_latentde.solve.fused.records import rows_of
from pyro_latentde.solve.fused.templates.resumable import resumable_adjoint, resumable_forward
from pyro_latentde.solve.memory import readable

if TYPE_CHECKING:
    from pyro_latentde.solve.fused.checkpoints import Again

__all__ = ["Cut", "LongRows", "repetitions"]

_NOTHING = np.zeros(1)

LEAST_STEPS, LEAST_STATES = 32, 3  # with fewer, a backward pass would take more than some hundred solves


def repetitions(segments: int, states: int) -> int:
    """How often a segment is solved at most before its steps are recorded.

    Example:
        >>> from pyro_latentde.solve.fused.segments import repetitions
        >>> repetitions(1, 3), repetitions(4, 3), repetitions(5, 3), repetitions(1000, 10)
        (0, 1, 2, 4)
    """
    r = 0
    while comb(states + r, states) < segments:
        r += 1
    return r


def _first_part(segments: int, states: int) -> int:
    """How many segments lie before the next state to be kept."""
    r = repetitions(segments, states)
    return max(1, comb(states + r - 2, states) if r > 1 else 0, segments - comb(states - 1 + r, r))


@dataclass(frozen=True)
class Cut:
    """How a row is cut.

    Args:
        steps: Steps of a segment.
        states: States that are kept at most.
        sweeps: Forward solves that the gradient takes at most.
    """

    steps: int
    states: int
    sweeps: int

    @staticmethod
    def of(count: int, width: int, size: int, share: int) -> Cut:
        """For ``count`` steps of ``width`` numbers, states of ``size`` numbers, and ``share`` bytes: half for each."""
        states = max(LEAST_STATES, share // (16 * size))
        steps = max(LEAST_STEPS, share // (16 * width) - 2)
        return Cut(steps, states, 1 + repetitions(-(-count // steps), states))

    @staticmethod
    def least(width: int, size: int) -> int:
        """Bytes without which a row cannot be cut."""
        return 16 * max((LEAST_STEPS + 2) * width, LEAST_STATES * size)


class LongRows:
    """Solves and reverses rows segment by segment.

    Args:
        forward: Source of the forward kernel, then the size of its work array.
        adjoint: Source of its reverse, then the size of its work array.
        carried: Entries of the work array that steps carry on.
        leaves: Number of parameters.
        width: Numbers of a record.
        load: Compiles: ``load(source, name)``.
    """

    def __init__(
        self,
        forward: str,
        forward_work: int,
        adjoint: str,
        adjoint_work: int,
        carried: int,
        leaves: int,
        width: int,
        load: Callable[[str, str], Callable[..., int]],
    ) -> None:
        forward, self.state = resumable_forward(forward, carried)
        adjoint, self.back_state = resumable_adjoint(adjoint, carried)
        self.forward, self.adjoint = load(forward, "forward"), load(adjoint, "adjoint")
        self.work, self.leaves, self.width = max(forward_work, adjoint_work), leaves, width

    def check(self, again: Again, r: int) -> None:
        """Whether what a thread may take is enough for a row.

        Raises:
            SolveError: If not.
        """
        least = Cut.least(self.width, self.state)
        if again.share < least:
            raise SolveError(
                f"memory_budget = {readable(again.budget)} is too small for the {again.counts[r]:,} steps of row {r}: "
                f"expected at least {readable(1.05 * 2 * again.threads * least)}, half of it shared by {again.threads} "
                f"threads. Give more, or take fewer threads with lde.set_num_threads."
            )

    def values(self, again: Again, r: int, ys: np.ndarray, report: np.ndarray) -> None:
        """Outputs and report of row r."""
        row = _Row(self, again, r)
        row.solve(np.empty(self.state), False, -1, None)
        ys[r], report[:4, r] = row.ys[0], row.report[:4, 0]

    def reverse(self, again: Again, r: int, head: tuple, tail: tuple) -> None:
        """The gradient of row r; ``head`` and ``tail`` are the arguments of its kernel before and after the records."""
        if head[-1][r] == 0:
            _Reverse(self, again, r, head, tail).run()


class _Row:
    """One row on its way forward."""

    def __init__(self, kernels: LongRows, again: Again, r: int) -> None:
        self.kernels, self.control, self.a = kernels, again.control, rows_of(again.inputs, r, r + 1)
        self.plan = again.steps_given(r, r + 1)
        self.ys = np.empty((1, self.a.points, again.kernel.states))
        self.report, self.span = np.empty((5, 1), dtype=np.int64), np.empty(2, dtype=np.int64)
        self.w, self.o = np.empty(kernels.work), np.empty(kernels.leaves, dtype=np.int64)

    def solve(self, state: np.ndarray, resume: bool, stop: int, records: np.ndarray | None) -> int:
        """Go on from ``state`` until ``stop`` steps are accepted, and leave the state there: how many are recorded."""
        a, control, buffer = self.a, self.control, _NOTHING if records is None else records
        done = self.kernels.forward(
            0, 1, 1, a.points, a.y0, a.y0_stride, a.times, a.times_stride, a.t0, a.t0_stride, 0, a.offsets,
            a.layout.strides, self.ys, self.report, control.rtol, control.atol, control.max_steps, control.mode,
            control.step, self.plan, self.plan.shape[1], 0 if records is None else 1, buffer, buffer.size, self.span,
            self.w, self.o, state, int(resume), stop,
        )  # fmt: skip
        return self.span.item(1) if done else -1


class _Reverse:
    """One row on its way back."""

    def __init__(self, kernels: LongRows, again: Again, r: int, head: tuple, tail: tuple) -> None:
        self.kernels, self.row, self.head, self.tail = kernels, _Row(kernels, again, r), head, tail
        self.cut = Cut.of(again.counts.item(r), kernels.width, kernels.state, again.share)
        self.segments = -(-again.counts.item(r) // self.cut.steps)
        self.records = np.empty((self.cut.steps + 2) * kernels.width)
        self.back, self.q = np.empty(kernels.back_state), np.empty(kernels.leaves, dtype=np.int64)
        self.spans, self.r = tail[0], r

    def run(self) -> None:
        self._part(None, 0, self.segments, self.cut.states)

    def _part(self, start: np.ndarray | None, first: int, end: int, states: int) -> None:
        """Reverse the segments from ``first`` to ``end``; ``start`` is the state where the first begins."""
        while end - first > 1:
            middle = first + _first_part(end - first, states)
            state = np.empty(self.kernels.state) if start is None else start.copy()
            # one step before the segment, since reversing a step may look at the record before it
            self.row.solve(state, start is not None, middle * self.cut.steps - 1, None)
            self._part(state, middle, end, states - 1)
            end = middle
        self._segment(start, first)

    def _segment(self, start: np.ndarray | None, segment: int) -> None:
        final = segment == self.segments - 1
        stop = -1 if final else (segment + 1) * self.cut.steps
        while True:
            state = np.empty(self.kernels.state) if start is None else start.copy()
            end = self.row.solve(state, start is not None, stop, self.records)
            if end >= 0:
                break
            self.records = np.empty(2 * self.records.size)
        self.spans[2 * self.r : 2 * self.r + 2] = 0, end
        more, low = int(segment > 0), 0 if start is None else 1
        resume = int(not final)
        row = (self.row.w, self.row.o, self.q, self.back, resume, more, low)
        self.kernels.adjoint(*self.head, self.records, *self.tail, *row)
