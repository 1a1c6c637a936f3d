# SPDX-License-Identifier: Apache-2.0
"""Kernels on the CPU: the generated source becomes machine code, a pool of threads runs blocks of rows."""

import math
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from pyro_latentde.errors import GradientPathError
from pyro_latentde.solve.fused.checkpoints import Again, Blocks, Control, Keeping, refuse, tell
from pyro_latentde.solve.fused.kernel_cache import load_kernel
from pyro_latentde.solve.fused.kernel_source import Kernel
from pyro_latentde.solve.fused.records import Arrays, Bars, Layout, Record, Steps
from pyro_latentde.solve.fused.segments import LongRows

__all__ = ["CpuKernel", "set_pool_size"]

CHUNK = 16  # rows whose shared-parameter gradients are summed together; fixed, so that sums do not depend on threads
BLOCK = 64  # rows a thread takes at once, where there are enough
SERIAL = 16  # below this many rows the pool costs more than it gives

SMALL = 60  # statements; a larger function is called, not copied to each stage: compiling would take the longer
FEW = 3  # states; Newton's method with more is called too: solves are as fast, and compiling 2 - 4 times faster


class _Pool:
    """One thread pool per process: re-made in a forked child, whose threads did not survive the fork."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner, self.executor = 0, None
        self.threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def map(self, task: Callable[[int, int], Any], rows: int, chunk: int) -> list[Any]:
        """``task(lo, hi)`` over blocks of whole chunks; results in order of rows."""
        if rows < SERIAL or self.threads == 1:
            return [task(0, rows)]
        size = max(BLOCK, rows // (4 * self.threads))
        size = -(-min(size, -(-rows // self.threads)) // chunk) * chunk
        bounds = [(lo, min(lo + size, rows)) for lo in range(0, rows, size)]
        results: list[Any] = [None] * len(bounds)
        waiting = deque(range(len(bounds)))

        def work() -> None:
            while True:
                try:
                    i = waiting.popleft()  # each thread takes the next block; this is atomic without the GIL too
                except IndexError:
                    return
                results[i] = task(*bounds[i])

        helpers = [self._executor().submit(work) for _ in range(min(self.threads, len(bounds)) - 1)]
        work()  # the calling thread works too: handing everything over would cost a wake-up
        for helper in helpers:
            if not helper.cancel():
                helper.result()
        return results

    def _executor(self) -> ThreadPoolExecutor:
        with self.lock:
            if self.owner != os.getpid():
                self.owner = os.getpid()
                self.executor = ThreadPoolExecutor(self.threads, thread_name_prefix="pyro_latentde")
            return self.executor


_POOL = _Pool()
if hasattr(os, "register_at_fork"):  # a child must not inherit a lock that another thread held
    os.register_at_fork(after_in_child=lambda: setattr(_POOL, "lock", threading.Lock()))


def set_pool_size(threads: int) -> None:
    """Threads of the pool from now on."""
    with _POOL.lock:
        _POOL.threads, _POOL.owner = threads, 0


_NO_PLAN = np.zeros((1, 1))


def _all_finite(x: np.ndarray) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):  # squares, and infinities of both signs
        if x.size <= 1000 and math.isfinite(x.dot(x)):  # quicker than a sum for few numbers
            return True
        return math.isfinite(np.add.reduce(x))


class _Scratch(threading.local):
    """Work arrays of a thread, kept: kernels need them only while they run, and making them takes time."""

    def __init__(self) -> None:
        self.arrays = (np.empty(0), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))

    def of(self, size: int, leaves: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """At least ``size`` numbers and twice ``leaves`` positions."""
        w, o, _ = self.arrays
        if w.size < size or o.size < leaves:
            size, leaves = max(size, w.size), max(leaves, o.size)
            self.arrays = (np.empty(size), np.empty(leaves, dtype=np.int64), np.empty(leaves, dtype=np.int64))
        return self.arrays


_SCRATCH = _Scratch()


@dataclass
class CpuKernel(Kernel):
    """The compiled solve of one vector field by one method."""

    steps_per_row: float = 64.0
    wide: bool = False  # a tangent kernel would be too long: tangents by replaying the steps
    cuts = True  # rows too long for the memory go through segment by segment

    def _build(self, kind: str) -> tuple[Callable, int]:
        source, size = self.source(kind)
        return load_kernel(source, kind, self.small), size

    @property
    def small(self) -> int:
        """Statements up to which a function is copied to where it is called."""
        return 0 if self.method.uses_newton and self.states > FEW else SMALL

    def chunk(self, rows: int) -> int:
        """Rows whose shared-parameter gradients are summed together: whatever the threads, or sums would differ."""
        return CHUNK

    def forward_kernel(self, a: Arrays) -> tuple[Callable, int, int]:
        """The kernel for such inputs, and the scratch it needs: numbers, and positions."""
        return *self._forward, self.leaves

    def adjoint_kernel(self, a: Arrays) -> tuple[Callable, int, int]:
        return *self._adjoint, self.leaves

    def expect(self, taken: list[int], spans: np.ndarray) -> None:
        """How many steps rows will take, by those they have taken: where blocks of records and those of rows end."""
        self.steps_per_row = 0.5 * self.steps_per_row + sum(taken) / len(spans)

    @cached_property
    def _forward(self) -> tuple[Callable, int]:
        return self._build("forward")

    @cached_property
    def _adjoint(self) -> tuple[Callable, int]:
        return self._build("adjoint")

    @cached_property
    def _tangent(self) -> tuple[Callable, int]:
        return self._build("tangent")

    def room(self, counts: np.ndarray) -> int:
        """Records that rows with so many steps need."""
        return int(counts.sum()) + 2 * len(counts)

    @cached_property
    def long_rows(self) -> LongRows:
        """Both kernels, made to stop in the middle of a row."""
        forward, adjoint = self.source("forward"), self.source("adjoint")
        return LongRows(
            *forward, *adjoint, self.carried, self.leaves, self.width, partial(load_kernel, small=self.small)
        )

    def solve(
        self,
        a: Arrays,
        lo: int,
        hi: int,
        control: Control,
        plan: np.ndarray,
        token: int,
        ys: np.ndarray,
        report: np.ndarray,
        records: np.ndarray,
        spans: np.ndarray,
        *found: np.ndarray,
    ) -> int:
        """Solve rows; returns the first that was not, since ``records`` had no room for its steps."""
        kernel, size, positions = self.forward_kernel(a)
        w, o, _ = _SCRATCH.of(size, positions)
        return kernel(
            lo, hi, a.rows, a.points, a.y0, a.y0_stride, a.times, a.times_stride, a.t0, a.t0_stride, 0, a.offsets,
            a.layout.strides, ys, report, control.rtol, control.atol, control.max_steps, control.mode, control.step,
            plan, plan.shape[1], token, records, records.size, spans, w, o, *found,
        )  # fmt: skip

    def forward(
        self,
        a: Arrays,
        rtol: float,
        atol: float,
        max_steps: int,
        step_size: float | None,
        replay: np.ndarray | None,
        token: int,
        budget: int | None = None,
    ) -> Record:
        """Solve; a ``token`` other than 0 keeps the steps, up to ``budget`` bytes; that of row r is ``token + r``."""
        ys = np.empty((a.rows, a.points, self.states))
        report = np.empty((5, a.rows), dtype=np.int64)
        spans = np.empty(2 * a.rows, dtype=np.int64)
        mode = 2 if replay is not None else 1 if step_size is not None else 0
        control = Control(rtol, atol, max_steps, mode, step_size or 0.0)
        plan = _NO_PLAN if replay is None else np.ascontiguousarray(replay).reshape(len(replay), -1)
        width, taken = self.width, []
        found = self.event_arrays(a.rows)
        found += [np.empty(found[0].shape, dtype=np.int64)] if found else []
        keeping = Keeping(budget, width)

        def task(lo: int, hi: int) -> Blocks:
            blocks, row, room = [], lo, int(1.2 * self.steps_per_row) + 8
            while row < hi:
                rows, records = keeping.records(hi - row, room) if token else (hi - row, None)
                kept = records is not None
                end = self.solve(
                    a, row, row + rows, control, plan, token if kept else 0, ys, report,
                    records if kept else _NO_PLAN, spans, *found,
                )  # fmt: skip
                if end == row:
                    keeping.allowance.give_back(records.nbytes)
                elif kept:
                    steps = spans.item(2 * end - 1)
                    taken.append(steps)
                    blocks.append((row, end, keeping.used(records, steps)))
                else:
                    blocks.append((row, end, None))
                row, room = end, room if end == row + rows else 2 * room
            return blocks

        blocks = [block for part in _POOL.map(task, a.rows, self.chunk(a.rows)) for block in part]
        if not token:
            return Record(ys, report, None, found)
        again = None
        if keeping.full and found:
            refuse(report[1], width, keeping.allowance.limit)
        if keeping.full:
            again = Again(self, control, a, plan, report[1], width, keeping.allowance.limit, _POOL.threads)
            blocks = keeping.thinned(blocks, spans)
            again.prepare(blocks, ys, report, token, partial(_POOL.map, chunk=CHUNK))
            tell(report[1], width, blocks, keeping.allowance.limit, budget)
        elif a.rows:
            self.expect(taken, spans)
        ends = (self.stops is not None) + (self.events is not None)
        return Record(ys, report, Steps(blocks, spans, report[0], width, self.method.kind, ends, a, again), found)

    def adjoint(self, a: Arrays, steps: Steps, gy: np.ndarray, *found: np.ndarray) -> Bars:
        """Cotangents of all inputs from those of the outputs, ``(R, T, D)``, and of times and states of events."""
        kernel, size, positions = self.adjoint_kernel(a)
        at, chunk, spans = a.layout, self.chunk(a.rows), steps.places()
        parts = self.zero_bars(a)

        def task(lo: int, hi: int) -> None:
            w, o, q = _SCRATCH.of(size, positions)
            tail = (spans, *parts, at.places, at.strides, at.chunk_strides)
            for row, end, records in steps.pieces(lo, hi, spans, chunk if at.shared_size else 0, cut=True):
                head = (row, end, row // chunk, a.points, a.times, a.times_stride, 0, a.offsets, at.strides, gy)
                if records is None:
                    self.long_rows.reverse(steps.again, row, (*head, steps.status), tail)
                else:
                    kernel(*head, steps.status, records, *tail, w, o, q, *found)

        _POOL.map(task, a.rows, chunk)
        return self.all_bars(a, *parts)

    def zero_bars(self, a: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Cotangents of y0, times, t0 and parameters, then of shared ones by chunks of rows: parts of one array."""
        chunks = -(-a.rows // self.chunk(a.rows))
        i = a.rows * self.states
        j = i + a.rows * a.points
        k = j + a.rows
        bars = np.zeros(k + a.layout.size + chunks * a.layout.shared_size)
        return bars[:i], bars[i:j], bars[j:k], bars[k:]

    def all_bars(self, a: Arrays, y0_bar: np.ndarray, ts_bar: np.ndarray, t0_bar: np.ndarray, g: np.ndarray) -> Bars:
        """The cotangents, those of shared parameters summed over the chunks."""
        at = a.layout
        if at.shared_size:
            g[at.size : at.size + at.shared_size] = g[at.size :].reshape(-1, at.shared_size).sum(0)
        return Bars(y0_bar, ts_bar, t0_bar, g, _all_finite(y0_bar.base))

    def tangent(
        self,
        a: Arrays,
        steps: Steps,
        y0_dot: np.ndarray,
        times_dot: np.ndarray,
        t0_dot: np.ndarray,
        p_dot: np.ndarray,
        p_dot_layout: Layout,
    ) -> list[np.ndarray]:
        """Directional derivative (R, T, D) of the outputs, and of times and states of events.

        Tangents of y0, times and t0 are given per row.
        """
        kernel, size = self._tangent
        out = np.empty((a.rows, a.points, self.states))
        found = self.event_arrays(a.rows)
        flat = [np.ascontiguousarray(x) for x in (y0_dot, times_dot, t0_dot)]
        spans = steps.places()

        def task(lo: int, hi: int) -> None:
            w, o, od = _SCRATCH.of(size, self.leaves)
            for row, end, records in steps.pieces(lo, hi, spans, cut=True):
                if records is None:
                    raise GradientPathError(f"forward derivatives go through whole rows: {steps.again.whole_row(row)}")
                kernel(
                    row, end, a.points, a.times, a.times_stride, 0, a.offsets, a.layout.strides, p_dot,
                    p_dot_layout.offsets, p_dot_layout.strides, steps.status, records, spans, *flat, out, w, o, od,
                    *found,
                )  # fmt: skip

        _POOL.map(task, a.rows, CHUNK)
        return [out, *found]
