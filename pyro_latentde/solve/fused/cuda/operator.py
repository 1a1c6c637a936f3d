# SPDX-License-Identifier: Apache-2.0
"""The fused engine on a CUDA device as row functions; ``fused/operator.py`` is the same on the CPU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_latentde.solve.fused.cuda.kernel import CudaKernel
from pyro_latentde.solve.fused.cuda.records import CudaBars, CudaRecord, CudaSteps, Inputs
from pyro_latentde.solve.fused.operator import FusedJVP, FusedSolve, FusedVJP, warn_of_gradients
from pyro_latentde.solve.row_function import RowFunction
from pyro_latentde.solve.solution import Status
from pyro_latentde.solve.step_store import keep_steps
from pyro_latentde.solve.torch_engine.solve import require_sorted

__all__ = ["CudaSolve"]


class CudaSolve(FusedSolve):
    """Outputs: ys ``(R, T, D)`` and report ``(R, 5)``, on the device of the inputs."""

    kernel: CudaKernel

    def record(self, a: Inputs, token: int) -> CudaRecord:
        """Solve, and keep the steps unless ``token`` is 0."""
        s = self.settings
        replay = None if self.replay is None else self.replay.detach().to(a.y0.device)
        return self.kernel.forward(a, s.rtol, s.atol, s.max_steps, s.step_size, replay, token, s.budget)

    def inputs(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> Inputs:
        """The tensors as the kernel reads them."""
        return self.kernel.inputs(rows, shared, tensors)

    def _run(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor], token: int) -> list[Tensor]:
        if not self.settings.checked:
            require_sorted(tensors[1], shared[1], tensors[2], shared[2])
        record = self.record(self.inputs(rows, shared, tensors), token)
        if token:
            keep_steps(token, record.steps)
        return [record.ys.to(tensors[0].dtype), record.report]

    def make_vjp(self) -> RowFunction:
        return _CudaVJP(self)

    def make_jvp(self) -> RowFunction:
        return _CudaJVP(self)


class _CudaVJP(FusedVJP):
    def run_some(
        self,
        rows: int,
        shared: tuple[bool, ...],
        tensors: Sequence[Tensor],
        wanted: Sequence[bool],
        ctx: Any = None,
    ) -> list[Tensor | None]:
        *inputs, gys = tensors
        steps = ctx.steps_tie.steps() if ctx is not None else None
        if steps is None:
            steps = self.solve.steps(rows, shared[:-1], inputs)
        a = self.solve.inputs(rows, shared[:-2], inputs[:-1])
        gy = gys.detach().to(self.solve.kernel.real)
        bars = self._bars(a, steps, gy)
        bad = ~bars.finite & torch.isfinite(gy).flatten(1).all(1) & (steps.status == Status.OK)
        if bool(bad.any()):
            steps.status[bad] = Status.NON_FINITE_GRADIENT
            warn_of_gradients(int(bad.sum()), rows, int(bad.long().argmax()))
            bars = self._bars(a, steps, gy)
        pieces = [x.sum(0) if one else x for x, one in zip(bars[:3], shared, strict=False)] + bars.p
        chosen = zip(pieces, inputs[:-1], wanted, strict=True)
        return [x.reshape(t.shape).to(t.dtype) if asked else None for x, t, asked in chosen]

    def _bars(self, a: Inputs, steps: CudaSteps, gy: Tensor) -> CudaBars:
        kernel = self.solve.kernel
        if self.solve.settings.sensitivity == "forward":
            return _contract_sensitivities(kernel, a, steps, gy)
        return kernel.adjoint(a, steps, gy)


class _CudaJVP(FusedJVP):
    def run(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        n, kernel = self.n, self.solve.kernel
        steps = self.solve.steps(rows, shared[: n + 1], tensors[: n + 1])
        a = kernel.inputs(rows, shared[:n], tensors[:n])
        moves, alike = tensors[n + 1 :], shared[n + 1 :]
        own = [d.expand(rows, *d.shape) if one else d for d, one in zip(moves[:3], alike, strict=False)]
        layout = kernel.layout(rows, alike[3:], moves[3:], a.y0.device)
        return [kernel.tangent(a, steps, own, kernel.packed(moves[3:], a.y0), layout).to(tensors[0].dtype)]


def _contract_sensitivities(kernel: CudaKernel, a: Inputs, steps: CudaSteps, gy: Tensor) -> CudaBars:
    """The cotangents by forward sensitivities: one tangent solve per scalar input, contracted with ``gy``."""
    seed = torch.where((steps.status == Status.OK)[:, None, None], gy, 0.0)
    zeros = [gy.new_zeros(a.rows, n) for n in (kernel.states, a.points, 1)] + [torch.zeros_like(a.p)]

    def sensitivity(which: int, index: Any) -> Tensor:
        moves = [z.clone() if i == which else z for i, z in enumerate(zeros)]
        moves[which][index] = 1.0
        return seed * kernel.tangent(a, steps, moves[:3], moves[3], a.layout)

    every = slice(None)
    y0_bar = [sensitivity(0, (every, i)).sum((1, 2)) for i in range(kernel.states)]
    ts_bar = sensitivity(1, every).sum(2)  # an output depends on its own time alone
    t0_bar = sensitivity(2, every).sum((1, 2))
    bars, begin = [], 0
    for length, one in zip(a.layout.lengths, a.shared[3:], strict=True):
        end = begin + (length if one else length * a.rows)
        columns = [
            sensitivity(3, begin + j if one else slice(begin + j, end, length)).sum((1, 2)) for j in range(length)
        ]
        bar = torch.stack(columns, 1) if columns else gy.new_zeros(a.rows, 0)
        bars.append(bar)
        begin = end
    own = [torch.stack(y0_bar, 1), ts_bar, t0_bar[:, None]]
    finite = torch.cat([*own, *bars], 1).isfinite().all(1)
    return CudaBars(*own, [x.sum(0) if one else x for x, one in zip(bars, a.shared[3:], strict=True)], finite)
