# SPDX-License-Identifier: Apache-2.0
"""The compiled solve of a delay equation, and the fused engine's row function for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.solve.delays.breaking_points import equal_steps
from pyro_latentde.solve.delays.field import rowwise
from pyro_latentde.solve.delays.replay import replay_delayed
from pyro_latentde.solve.delays.torch_solve import require_forward
from pyro_latentde.solve.fused import templates
from pyro_latentde.solve.fused.cpu import _POOL, _SCRATCH, CHUNK, CpuKernel
from pyro_latentde.solve.fused.emit import delayed_source
from pyro_latentde.solve.fused.graph_torch import batched_graph
from pyro_latentde.solve.fused.operator import FusedSolve
from pyro_latentde.solve.fused.records import Arrays, Bars, Layout, Record, Steps
from pyro_latentde.solve.fused.templates.delays.adjoint import delay_adjoint_source
from pyro_latentde.solve.fused.templates.delays.forward import delay_forward_source
from pyro_latentde.solve.fused.templates.delays.parts import DelayLayout, delay_helpers
from pyro_latentde.solve.fused.templates.delays.tangent import delay_tangent_source
from pyro_latentde.solve.torch_engine.differentiable_rows import TorchRows
from pyro_latentde.solve.torch_engine.solve import per_row, replay_function

__all__ = ["DelayKernel", "FusedDelaySolve"]

_TEMPLATES: dict[str, Callable[[DelayLayout], str]] = {
    "forward": delay_forward_source,
    "adjoint": delay_adjoint_source,
    "tangent": delay_tangent_source,
}


@dataclass(slots=True)
class DelayArrays(Arrays):
    """With the steps to take, ``(R, N, 1 + L)``, where they are known."""

    given: Tensor | None = None


@dataclass(slots=True)
class DelaySteps(Steps):
    """Records that end with the lags the step was chosen for."""

    lags: int = 1

    def plan(self) -> np.ndarray:
        """The steps as they are taken again: sizes and lags, ``(rows, most steps, 1 + lags)``."""
        return self._columns(1, *range(self.width - self.lags, self.width))


@dataclass
class DelayKernel(CpuKernel):
    """The compiled solve of one delay equation by one method; ``outputs`` are dy/dt, then the history at t."""

    at: DelayLayout | None = None

    @property
    def states(self) -> int:
        return self.at.d

    @property
    def width(self) -> int:
        return self.at.width

    def source(self, kind: str) -> tuple[str, int]:
        with self.graph.lock:
            code = delayed_source(self.graph, self.outputs, self.at.d, self.at.past, kind == "tangent")
        parts = [templates.INSERTION_POINT, code.source, delay_helpers(self.at), _TEMPLATES[kind](self.at)]
        return "\n".join(parts), self.at.scratch + code.scratch

    def forward(
        self,
        a: Arrays,
        rtol: float,
        atol: float,
        max_steps: int,
        step_size: float | None,
        replay: np.ndarray | None,
        token: int,
    ) -> Record:
        """As of the base; records are written in any case, since the solve looks back at them."""
        kernel, size = self._forward
        ys = np.empty((a.rows, a.points, self.states))
        report = np.empty((5, a.rows), dtype=np.int64)
        spans = np.empty(2 * a.rows, dtype=np.int64)
        plan = np.zeros((1, 1)) if replay is None else np.ascontiguousarray(replay).reshape(len(replay), -1)
        mode, hss = (0, 0) if replay is None else (2, plan.shape[1])
        plan = plan if plan.size else np.zeros((1, 1))
        width, taken = self.width, []

        def task(lo: int, hi: int) -> list[tuple[int, int, np.ndarray]]:
            w, o, _ = _SCRATCH.of(size, self.leaves + self.at.lags)
            blocks, row, room = [], lo, int(1.2 * self.steps_per_row) + 8
            while row < hi:
                records = np.empty((hi - row if token else 1) * room * width)
                end = kernel(
                    row, hi, a.rows, a.points, a.y0, a.y0_stride, a.times, a.times_stride, a.t0, a.t0_stride, 0,
                    a.offsets, a.layout.strides, ys, report, rtol, atol, max_steps, mode,
                    plan, hss, token, records, records.size, spans, w, o,
                )  # fmt: skip
                if token:
                    blocks.append((row, end, records))
                    taken.append(spans.item(2 * end - 1) if end > row else 0)
                row, room = end, 2 * room
            return blocks

        blocks = [block for part in _POOL.map(task, a.rows, CHUNK) for block in part]
        if not token:
            return Record(ys, report, None)
        if a.rows:
            self.expect(taken, spans)
        steps = DelaySteps(blocks, spans, report[0], width, self.method.kind, 0, a, lags=self.at.lags)
        return Record(ys, report, steps)

    def adjoint(self, a: Arrays, steps: Steps, gy: np.ndarray) -> Bars:
        """Cotangents of all inputs from those of the outputs, ``(R, T, D)``."""
        kernel, size = self._adjoint
        at, chunk, spans = a.layout, self.chunk(a.rows), steps.places()
        parts = self.zero_bars(a)

        def task(lo: int, hi: int) -> None:
            w, o, q = _SCRATCH.of(size, self.leaves + self.at.lags)
            for row, end, records in steps.pieces(lo, hi, spans, chunk if at.shared_size else 0):
                kernel(
                    row, end, row // chunk, a.points, a.times, a.times_stride, 0, a.offsets, at.strides, gy,
                    steps.status, records, self._beside(records), spans, *parts, at.places, at.strides,
                    at.chunk_strides, w, o, q,
                )  # fmt: skip

        _POOL.map(task, a.rows, chunk)
        return self.all_bars(a, *parts)

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
        """Directional derivative (R, T, D) of the outputs; tangents of y0, times and t0 are given per row."""
        kernel, size = self._tangent
        out = np.empty((a.rows, a.points, self.states))
        flat, spans = [np.ascontiguousarray(x) for x in (y0_dot, times_dot, t0_dot)], steps.places()

        def task(lo: int, hi: int) -> None:
            w, o, od = _SCRATCH.of(size, self.leaves + self.at.lags)
            for row, end, records in steps.pieces(lo, hi, spans):
                kernel(
                    row, end, a.points, a.times, a.times_stride, 0, a.offsets, a.layout.strides, p_dot,
                    p_dot_layout.offsets, p_dot_layout.strides, steps.status, records, self._beside(records), spans,
                    *flat, out, w, o, od,
                )  # fmt: skip

        _POOL.map(task, a.rows, CHUNK)
        return [out]

    def _beside(self, records: np.ndarray) -> np.ndarray:
        """Room for what belongs to the state and the stages of every record."""
        return np.empty(records.size // self.at.width * self.at.moved)


class FusedDelaySolve(FusedSolve):
    """As :class:`FusedSolve`, of a delay equation."""

    def inputs(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> DelayArrays:
        """The tensors as the kernel reads them; equal steps are chosen here, from the lags."""
        a, at, s = super().inputs(rows, shared, tensors), self.kernel.at, self.settings
        given = self.replay
        if given is None and s.step_size is not None:
            _, times, t0 = per_row(rows, shared[:3], [x.detach().double() for x in tensors[:3]])
            lags = per_row(rows, shared[3 + at.lag : 4 + at.lag], [tensors[3 + at.lag].detach().double()])[0]
            h, _ = equal_steps(lags, times[:, -1] - t0, t0, at.method.order, s.step_size, s.max_steps)
            given = torch.cat([h[..., None], torch.where((h != 0)[..., None], lags[:, None], 0.0)], -1)
        return DelayArrays(*(getattr(a, f.name) for f in fields(a)), given=given)

    def record(self, a: DelayArrays, token: int) -> Record:
        """Solve, and keep the steps unless ``token`` is 0."""
        given = None if a.given is None else a.given.detach().double().cpu().numpy()
        s = self.settings
        return self.kernel.forward(a, s.rtol, s.atol, s.max_steps, None, given, token)

    def _run(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor], token: int) -> list[Tensor]:
        if not self.settings.checked:
            _, times, t0 = per_row(rows, shared[:3], tensors[:3])
            require_forward(times, t0)
        return super()._run(rows, shared, tensors, token)

    def replayed(self) -> TorchRows:
        at, graph, outputs = self.kernel.at, self.kernel.graph, self.kernel.outputs
        past = batched_graph(graph, outputs[at.d : 2 * at.d]) if at.past else None
        make = rowwise(batched_graph(graph, outputs[: at.d]), past, at.lag, at.d)

        def found(rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            steps = self.steps(rows, shared, [t.detach() for t in tensors])
            return torch.from_numpy(steps.plan()), torch.from_numpy(steps.status)

        return replay_function(make, found, self.kernel.method, 3 + self.kernel.leaves, along=replay_delayed)
