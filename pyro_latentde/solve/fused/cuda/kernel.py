# SPDX-License-Identifier: Apache-2.0
"""Kernels on a CUDA device: one thread for each row, tensors that stay where they are.

Each row has room for as many steps as the rows of the last solve took; the few that need more are solved once more
with more room. Counting all steps in a first pass would double every forward solve. The gradients of shared
parameters are kept for each row and summed by torch, in an order that the number of rows alone determines: the same
call gives the same bits, and no two threads write to one place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_latentde.solve.fused.cuda.device import compile_kernel, launch
from pyro_latentde.solve.fused.cuda.records import CudaBars, CudaRecord, CudaSteps, DeviceLayout, Inputs, most_rows
from pyro_latentde.solve.fused.cuda.source import cuda_source
from pyro_latentde.solve.fused.kernel_source import Kernel
from pyro_latentde.solve.memory import Allowance

__all__ = ["CudaKernel"]

MANY = 1 << 26  # numbers of gradients by row that are held at once


@dataclass
class CudaKernel(Kernel):
    """The compiled solve of one vector field by one method, for tensors of one dtype.

    float32 is computed in float32 by explicit methods; in float64 by implicit ones, whose Newton iterations would end
    in rounding, and where steps end at given times, just before and just after which float32 knows little.
    """

    dtype: torch.dtype = torch.float64
    room: int = 72
    _sources: dict[tuple[str, int], Any] = field(default_factory=dict)

    @cached_property
    def real(self) -> torch.dtype:
        return torch.float64 if self.method.uses_newton or self.stops is not None else self.dtype

    def inputs(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> Inputs:
        """Tensors as kernels read them: not copied, where they are as they should be."""
        y0, times, t0 = (self._flat(t) for t in tensors[:3])
        sizes = (tensors[0].shape[-1], tensors[1].shape[-1], 1)
        layout = self.layout(rows, shared[3:], tensors[3:], y0.device)
        strides = tuple(0 if one else size for size, one in zip(sizes, shared, strict=False))
        return Inputs(rows, sizes[1], y0, times, t0, self.packed(tensors[3:], y0), strides, shared, layout)

    def packed(self, leaves: Sequence[Tensor], like: Tensor) -> Tensor:
        """The parameters, or their tangents, end to end."""
        flat = [self._flat(x) for x in leaves]
        return flat[0] if len(flat) == 1 else torch.cat([*flat, like.new_zeros(1)])

    def layout(self, rows: int, shared: Sequence[bool], leaves: Sequence[Tensor], device: torch.device) -> DeviceLayout:
        return DeviceLayout.of(rows, tuple(x.numel() for x in leaves), tuple(shared), device)

    def _flat(self, t: Tensor) -> Tensor:
        return t.detach().resolve_neg().to(self.real).contiguous().view(-1)

    def _run(self, kind: str, like: Tensor, gradient: int = 0, **values: Any) -> None:
        key = (kind, gradient)
        if key not in self._sources:
            source, work = self.source(kind)
            single = self.real == torch.float32
            self._sources[key] = cuda_source(source, kind, work, self.leaves, gradient, single)
        source = self._sources[key]
        launch(compile_kernel(source), values["count"], like, [values[name] for name in source.arguments])

    def forward(
        self,
        a: Inputs,
        rtol: float,
        atol: float,
        max_steps: int,
        step_size: float | None,
        replay: Tensor | None,
        token: int,
        budget: int | None = None,
    ) -> CudaRecord:
        """Solve; a ``token`` other than 0 keeps the steps, up to ``budget`` bytes; that of row r is ``token + r``."""
        whole = {"dtype": torch.int64, "device": a.y0.device}
        ys = a.y0.new_empty(a.rows * a.points * self.states)
        report, spans = torch.empty(5 * a.rows, **whole), torch.empty(2 * a.rows, **whole)
        plan = a.y0.new_zeros(1, 1) if replay is None else replay.to(self.real).reshape(len(replay), -1)
        width = self.width
        fixed = dict(
            first=0, beyond=a.rows, R=a.rows, T=a.points, **self._places(a), y0=a.y0, y0s=a.strides[0], t0=a.t0,
            t0s=a.strides[2], ys=ys, report=report, rtol=rtol, atol=atol, max_steps=max_steps,
            mode=2 if replay is not None else 1 if step_size is not None else 0, step=step_size or 0.0,
            hs=plan.contiguous().view(-1), hss=plan.shape[1], token=token, spans=spans, grads=a.y0.new_empty(1, 1),
        )  # fmt: skip
        allowance, item = Allowance(budget, a.y0.device), width * a.y0.element_size()

        def run(members: Tensor, room: int, **others: Any) -> tuple[Tensor, Tensor]:
            records, ends = a.y0.new_empty(room * width, len(members)), torch.empty(len(members), **whole)
            self._run(
                "forward", a.y0, members=members, records=records, room=room * width, ends=ends,
                count=len(members), **{**fixed, **others},
            )  # fmt: skip
            return records, ends

        blocks, members, room = [], torch.arange(a.rows, **whole), self._first_room(plan, replay, max_steps)
        while len(members):
            if not (token and allowance.take(room * item * len(members))):
                run(members, 1, token=0)
                break
            records, ends = run(members, room)
            blocks.append((torch.where(ends > 0, members, -1), records))
            members, room = members[ends == 0], 4 * room
        report = report.view(5, a.rows)
        if not token:
            return CudaRecord(ys.view(a.rows, a.points, self.states), report.t(), None)
        self._learn(report[1])
        steps = CudaSteps(blocks, spans, report[0], width, self.method.kind, self.stops is not None)
        if len(members):
            report[4] = torch.arange(token, token + a.rows, **whole)
            most = int(report[1][members].max()) + 2
            at_once = most_rows(allowance.limit, most * item, len(members), most, budget)
            own = dict(ys=torch.empty_like(ys), report=torch.empty(5 * a.rows, **whole))
            steps.missing, steps.again = members.split(at_once), lambda some: run(some, most, **own)[0]
        return CudaRecord(ys.view(a.rows, a.points, self.states), report.t(), steps)

    def _first_room(self, plan: Tensor, replay: Tensor | None, max_steps: int) -> int:
        return min(self.room, max_steps + 1) if replay is None else plan.shape[1] + 1

    def _learn(self, accepted: Tensor) -> None:
        """Room for the longest row next time, unless few rows are much longer than the others."""
        if len(accepted):
            most, total = torch.stack([accepted.max(), accepted.sum()]).tolist()
            self.room = min(most, 4 * total // len(accepted)) + 8

    def _places(self, a: Inputs) -> dict[str, Any]:
        return dict(ts=a.times, tss=a.strides[1], p=a.p, po=a.layout.offsets, ps=a.layout.strides)

    def adjoint(self, a: Inputs, steps: CudaSteps, gy: Tensor) -> CudaBars:
        """Cotangents of all inputs from those of the outputs, ``(R, T, D)``."""
        size = sum(a.layout.lengths)
        y0_bar, ts_bar, t0_bar = (a.y0.new_zeros(a.rows * n) for n in (self.states, a.points, 1))
        fixed = dict(
            T=a.points, **self._places(a), gy=self._flat(gy), status=steps.status.contiguous(), spans=steps.spans,
            y0_bar=y0_bar, ts_bar=ts_bar, t0_bar=t0_bar, go=a.layout.places, gs=a.layout.zeros, gc=a.layout.zeros,
        )  # fmt: skip
        pieces: list[list[Tensor]] = [[] for _ in a.layout.lengths]
        finite = []
        part = max(1, MANY // max(size, 1))  # all rows at once, unless the parameters are very many
        for first in range(0, a.rows, part):
            beyond = min(first + part, a.rows)
            grads = a.y0.new_zeros(max(size, 1), beyond - first)
            for members, records in steps.pieces():
                self._run(
                    "adjoint", a.y0, size, count=len(members), members=members, first=first,
                    beyond=beyond, records=records, grads=grads, ends=torch.empty_like(members), **fixed,
                )  # fmt: skip
            finite.append(torch.isfinite(grads).all(0))
            for piece, bar, one in zip(pieces, a.layout.cut(grads), a.shared[3:], strict=True):
                piece.append(bar.sum(1) if one else bar.t())
        rows = [x.view(a.rows, -1) for x in (y0_bar, ts_bar, t0_bar)]
        fine = torch.cat(finite) if finite else torch.ones(0, dtype=torch.bool, device=a.y0.device)
        for x in rows:
            fine = fine & torch.isfinite(x).all(1)
        bars = [_together(x, one, n, a) for x, one, n in zip(pieces, a.shared[3:], a.layout.lengths, strict=True)]
        return CudaBars(*rows, bars, fine)

    def tangent(
        self, a: Inputs, steps: CudaSteps, moves: Sequence[Tensor], p_dot: Tensor, p_dot_layout: DeviceLayout
    ) -> Tensor:
        """Directional derivative (R, T, D) of the outputs; tangents of y0, times and t0 are given per row."""
        out = a.y0.new_empty(a.rows * a.points * self.states)
        y0_dot, ts_dot, t0_dot = (self._flat(x) for x in moves)
        for members, records in steps.pieces():
            self._run(
                "tangent", a.y0, count=len(members), members=members, first=0, beyond=a.rows,
                T=a.points, **self._places(a), pd=p_dot, pdo=p_dot_layout.offsets, pds=p_dot_layout.strides,
                status=steps.status.contiguous(), records=records, spans=steps.spans, y0_dot=y0_dot, ts_dot=ts_dot,
                t0_dot=t0_dot, ys_dot=out, grads=a.y0.new_empty(1, 1), ends=torch.empty_like(members),
            )  # fmt: skip
        return out.view(a.rows, a.points, self.states)


def _together(pieces: list[Tensor], shared: bool, length: int, a: Inputs) -> Tensor:
    """Sums over parts of the rows, in order; or the parts one after another."""
    if not pieces:
        return a.y0.new_zeros(length) if shared else a.y0.new_zeros(0, length)
    return torch.stack(pieces).sum(0) if shared else torch.cat(pieces)
