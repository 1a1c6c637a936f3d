# SPDX-License-Identifier: Apache-2.0
"""The fused engine as row functions: the solve, its adjoint, its tangent.

Inputs, in this order: y0 ``(D,)``, times ``(T,)``, t0 ``()``, then every parameter; each shared or per row.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.solve.events.watch import capacity
from pyro_latentde.solve.fused.cpu import CpuKernel
from pyro_latentde.solve.fused.event_graph import graph_events
from pyro_latentde.solve.fused.graph_torch import batched_graph
from pyro_latentde.solve.fused.records import Arrays, Bars, Layout, Record, Steps, rows_of
from pyro_latentde.solve.lift import is_wrapped
from pyro_latentde.solve.row_function import RowFunction
from pyro_latentde.solve.solution import Status
from pyro_latentde.solve.step_store import Tie, find_steps, keep_steps, new_token, tie_to
from pyro_latentde.solve.torch_engine.differentiable_rows import TorchRows, jvp_of, vjp_of
from pyro_latentde.solve.torch_engine.solve import replay_function, require_sorted, solve_outputs

__all__ = ["FusedJVP", "FusedSolve", "FusedVJP", "Settings", "warn_of_gradients"]

_LOG = logging.getLogger("pyro_latentde")
_NOWHERE = -1  # the address of symbolic zeros and of what a transform holds


@dataclass(frozen=True)
class Settings:
    """What a solve needs beside its tensors.

    ``sensitivity`` is ``"adjoint"`` (discrete) or ``"forward"``; ``checked``: the times are known to be sorted;
    ``budget``: bytes for the steps, None for half of what is free.
    """

    rtol: float
    atol: float
    max_steps: int
    step_size: float | None
    sensitivity: str
    keep: bool
    checked: bool
    budget: int | None = None


def _flat(t: Tensor) -> np.ndarray:
    """The values of a CPU tensor as a flat float64 array, without a copy where that is what it is."""
    return np.ascontiguousarray(t.numpy(force=True), dtype=np.float64).reshape(-1)


def _located(t: Tensor) -> tuple[int, Tensor, int]:
    """Where the values of a tensor lie as kernels read them, who holds that memory, an alias or a copy, and whose."""
    if t.dtype is torch.float64 and t.is_cpu and t.is_contiguous() and not (t.is_neg() or is_wrapped(t)):
        address = t.data_ptr()
        if address and address % 8 == 0:  # symbolic zeros lie nowhere
            return address, t.detach(), address  # not t itself, whose memory `t.data = other` exchanges
    copy = torch.from_numpy(np.array(t.numpy(force=True), dtype=np.float64, order="C"))
    return copy.data_ptr(), copy, _address(t) if t.is_contiguous() else _NOWHERE


def _arrays(rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> Arrays:
    places = [_located(t) for t in tensors]
    (y0, *_), (times, *_), (t0, *_), *leaves = places
    size, points = tensors[0].shape[-1], tensors[1].shape[-1]
    return Arrays(
        rows,
        y0,
        0 if shared[0] else size,
        times,
        0 if shared[1] else points,
        points,
        t0,
        0 if shared[2] else 1,
        np.array([address >> 3 for address, *_ in leaves], dtype=np.int64),
        _layout(rows, tensors[3:], shared[3:]),
        shared,
        places,
    )


def _arrays_of(steps: Steps, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> Arrays:
    """The inputs of a solve whose steps are known: kept with them, where they are the tensors that came.

    A transform may share them otherwise now, and hooks on saved tensors give others than those that were saved.
    """
    kept = steps.inputs
    if kept.shared == shared and all([own == _address(t) >= 0 for (*_, own), t in zip(kept.held, tensors)]):  # noqa: B905
        return kept
    return _arrays(rows, shared, tensors)


def _address(t: Tensor) -> int:
    return _NOWHERE if is_wrapped(t) else t.data_ptr() or _NOWHERE


def _layout(rows: int, leaves: Sequence[Tensor], shared: Sequence[bool]) -> Layout:
    # what one row has to itself is not shared with anybody, and saves the sum over rows
    return Layout.of(rows, tuple([x.numel() for x in leaves]), tuple(shared) if rows != 1 else (False,) * len(leaves))


class FusedSolve(RowFunction):
    """Outputs: ys ``(R, T, D)``, report ``(R, 5)``, and with events times ``(R, E)``, states and which."""

    saved = (1,)
    follows = (None, None)

    def __init__(self, kernel: CpuKernel, settings: Settings, replay: Tensor | None = None) -> None:
        super().__init__()
        self.kernel, self.settings, self.replay, self.lasting = kernel, settings, replay, replay is None
        self.wrt = tuple(range(3 + kernel.leaves))
        self.room = capacity(kernel.traits)
        if self.room:
            self.differentiable, self.follows = (0, 2, 3), (None,) * 5

    def record(self, a: Arrays, token: int) -> Record:
        """Solve, and keep the steps unless ``token`` is 0."""
        s = self.settings
        replay = None if self.replay is None else self.replay.detach().double().cpu().numpy()
        return self.kernel.forward(a, s.rtol, s.atol, s.max_steps, s.step_size, replay, token, s.budget)

    def inputs(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> Arrays:
        """The tensors as the kernel reads them."""
        return _arrays(rows, shared, tensors)

    def run(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        return self._run(rows, shared, tensors, new_token() if self.settings.keep else 0)

    def run_on(self, ctx: Any, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        token = new_token()
        outputs = self._run(rows, shared, tensors, token)
        ctx.steps_tie = Tie(token)
        return outputs

    def _run(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor], token: int) -> list[Tensor]:
        a = self.inputs(rows, shared, tensors)
        if not self.settings.checked:
            require_sorted(tensors[1], shared[1], tensors[2], shared[2])
        record = self.record(a, token)
        if token:
            keep_steps(token, record.steps)
        ys, dtype = torch.from_numpy(record.ys), tensors[0].dtype
        found = [torch.from_numpy(x) for x in record.found]
        found = [x.to(dtype) if x.is_floating_point() else x for x in found]
        return [ys if dtype is torch.float64 else ys.to(dtype), torch.from_numpy(record.report.T), *found]

    def outputs(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        return solve_outputs(rows, tensors, self.room)

    def on_context(self, ctx: object, outputs: Sequence[Tensor]) -> None:
        if self.settings.keep:
            tie_to(ctx, outputs[1])

    def steps(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> Steps:
        """The steps of the solve whose inputs and report these are."""
        steps = find_steps(tensors[-1])
        if steps is None:
            n = len(tensors) - 1
            steps = self.record(self.inputs(rows, shared[:n], tensors[:n]), new_token()).steps
        return steps

    def replayed(self) -> TorchRows:
        """The same solution as differentiable torch code along the accepted steps, for higher derivatives."""
        field = batched_graph(self.kernel.graph, self.kernel.outputs)

        def sizes(rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            steps = self.steps(rows, shared, [t.detach() for t in tensors])
            return torch.as_tensor(steps.plan()), torch.as_tensor(steps.status)

        kernel = self.kernel
        events = None if kernel.events is None else graph_events(kernel.graph, kernel.events)
        further = {"make_events": events, "room": self.room, "stops": kernel.stops}
        return replay_function(field, sizes, kernel.method, 3 + kernel.leaves, **further)

    def make_vjp(self) -> RowFunction:
        return FusedVJP(self)

    def make_jvp(self) -> RowFunction:
        return jvp_of(self.replayed()) if self.kernel.wide else FusedJVP(self)


class FusedVJP(RowFunction):
    """Inputs: those of the solve, report, cotangent of ys. Outputs: cotangents of y0, times, t0 and every parameter."""

    def __init__(self, solve: FusedSolve) -> None:
        super().__init__()
        self.solve, n = solve, 3 + solve.kernel.leaves
        self.follows = tuple(range(n))
        self.differentiable = self.follows
        self.wrt = (*self.follows, *range(n + 1, n + 1 + len(solve.differentiable)))

    def run(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.run_some(rows, shared, tensors, (True,) * len(self.follows))

    def run_some(
        self,
        rows: int,
        shared: tuple[bool, ...],
        tensors: Sequence[Tensor],
        wanted: Sequence[bool],
        ctx: Any = None,
    ) -> list[Tensor | None]:
        n = len(self.follows)
        inputs, seeds = tensors[: n + 1], tensors[n + 1 :]
        steps = ctx.steps_tie.steps() if ctx is not None else None
        if steps is None:
            steps = self.solve.steps(rows, shared[: n + 1], inputs)
        a = _arrays_of(steps, rows, shared[:n], inputs[:-1])
        gy, *found = [np.ascontiguousarray(x.numpy(force=True), dtype=np.float64) for x in seeds]
        if self.solve.settings.sensitivity == "forward":
            bars = _contract_sensitivities(self.solve.kernel, a, steps, gy, *found)
        else:
            bars = self.solve.kernel.adjoint(a, steps, gy, *found)
        if not bars.finite:
            bars = _without_bad_rows(self.solve.kernel, a, steps, bars, gy, *found)
        sizes = zip(inputs[:-1], wanted, strict=True)
        return [_gradient(rows, shared, k, x, a, bars) if asked else None for k, (x, asked) in enumerate(sizes)]

    def outputs(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors[: len(self.follows)]]

    def make_vjp(self) -> RowFunction:
        return vjp_of(vjp_of(self.solve.replayed()))

    def make_jvp(self) -> RowFunction:
        return jvp_of(vjp_of(self.solve.replayed()))


class FusedJVP(RowFunction):
    """Inputs: those of the solve, report, tangents of y0, times, t0 and every parameter. Output: tangent of ys."""

    def __init__(self, solve: FusedSolve) -> None:
        super().__init__()
        self.solve, self.n = solve, 3 + solve.kernel.leaves
        self.wrt = (*range(self.n), *range(self.n + 1, 2 * self.n + 1))
        self.differentiable = tuple(range(len(solve.differentiable)))
        self.follows = (None,) * len(self.differentiable)

    def run(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        n = self.n
        steps = self.solve.steps(rows, shared[: n + 1], tensors[: n + 1])
        a = _arrays_of(steps, rows, shared[:n], tensors[:n])
        moves = tensors[n + 1 :]
        y0_dot, times_dot, t0_dot = (
            np.broadcast_to(_flat(d).reshape(d.shape), (rows, *d.shape[0 if one else 1 :]))
            for d, one in zip(moves[:3], shared[n + 1 : n + 4], strict=True)
        )
        layout = _layout(rows, moves[3:], shared[n + 4 :])
        p_dot = np.concatenate([np.zeros(0), *map(_flat, moves[3:])])
        out = self.solve.kernel.tangent(a, steps, y0_dot, times_dot, t0_dot, p_dot, layout)
        return [torch.from_numpy(x).to(tensors[0].dtype) for x in out]

    def outputs(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        out = solve_outputs(rows, tensors[: self.n], self.solve.room)
        return [out[i] for i in self.solve.differentiable]

    def make_vjp(self) -> RowFunction:
        return vjp_of(jvp_of(self.solve.replayed()))

    def make_jvp(self) -> RowFunction:
        return jvp_of(jvp_of(self.solve.replayed()))


def _contract_sensitivities(kernel: CpuKernel, a: Arrays, steps: Steps, gy: np.ndarray, *found: np.ndarray) -> Bars:
    """The cotangents by forward sensitivities: one tangent solve per scalar input, contracted with what came in."""
    rows, points, d = gy.shape
    ok = steps.status == Status.OK
    seeds = [np.where(ok.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0) for x in (gy, *found)]
    y0_bar, ts_bar, t0_bar = np.zeros((rows, d)), np.zeros((rows, points)), np.zeros(rows)
    zeros = (np.zeros((rows, d)), np.zeros((rows, points)), np.zeros(rows), np.zeros(a.layout.size))

    def sensitivity(which: int, index: tuple) -> list[np.ndarray]:
        moves = [z.copy() if i == which else z for i, z in enumerate(zeros)]
        moves[which][index] = 1.0
        return kernel.tangent(a, steps, *moves, a.layout)

    def worth(which: int, index: tuple) -> np.ndarray:
        pairs = zip(seeds, sensitivity(which, index), strict=True)
        return sum((seed * moved).reshape(rows, -1).sum(1) for seed, moved in pairs)

    for i in range(d):
        y0_bar[:, i] = worth(0, (slice(None), i))
    ts_bar[:] = (seeds[0] * sensitivity(1, (slice(None),))[0]).sum(2)  # an output depends on its own time alone
    t0_bar[:] = worth(2, (slice(None),))
    g = np.zeros(a.layout.size + a.layout.shared_size)
    for offset, length, stride, place in zip(*a.layout.columns, strict=True):
        for j in range(stride or length):
            index = slice(offset + j, offset + length, stride) if stride else slice(offset + j, offset + j + 1)
            per_row = worth(3, (index,))
            if stride:
                g[place + j : place + length : stride] = per_row
            else:
                g[place + j] = per_row.sum()
    finite = all(np.isfinite(x).all() for x in (y0_bar, ts_bar, t0_bar, g))
    return Bars(y0_bar, ts_bar, t0_bar, g, bool(finite))


def _without_bad_rows(kernel: CpuKernel, a: Arrays, steps: Steps, bars: Bars, *seeds: np.ndarray) -> Bars:
    """Rows whose cotangent overflows although what came in is finite: zero gradient, a status, a message."""
    per_row = [x.reshape(a.rows, -1) for x in bars[:3]]
    for offset, _, stride, _ in zip(*a.layout.columns, strict=True):
        if stride:
            per_row.append(bars[3][offset : offset + a.rows * stride].reshape(a.rows, stride))
    bad = ~np.all([np.isfinite(x).all(1) for x in per_row], axis=0)
    if not bad.any():  # only sums over rows are affected: find the rows one by one
        rows = range(a.rows)
        alone = [kernel.adjoint(_row(a, r), steps.row(r), *(x[r : r + 1] for x in seeds)) for r in rows]
        bad = np.array([not one.finite for one in alone])
    bad &= np.isfinite(seeds[0]).all((1, 2)) & (steps.status == Status.OK)
    if not bad.any():
        return bars
    steps.status[bad] = Status.NON_FINITE_GRADIENT
    warn_of_gradients(int(bad.sum()), a.rows, int(np.argmax(bad)))
    return kernel.adjoint(a, steps, *seeds)


def warn_of_gradients(count: int, rows: int, first: int) -> None:
    """Tell that ``count`` of so many rows have a gradient that is not finite."""
    _LOG.warning(
        "%d of %d rows have a non-finite gradient (first: row %d); their gradient is set to zero. "
        "Try a tighter prior, or log-scale states.",
        count,
        rows,
        first,
    )


def _row(a: Arrays, r: int) -> Arrays:
    """Row r alone."""
    _, lengths, strides, _ = a.layout.columns
    sizes = tuple(stride or length for length, stride in zip(lengths, strides, strict=True))
    return replace(rows_of(a, r, r + 1), layout=Layout.of(1, sizes, (False,) * len(sizes)))


def _gradient(rows: int, shared: tuple[bool, ...], k: int, tensor: Tensor, a: Arrays, bars: Bars) -> Tensor:
    """Cut the gradient of input k, which is ``tensor``, out of the buffer."""
    if k < 3:
        piece = bars[k].reshape(rows, tensor.numel()).sum(0) if shared[k] and rows != 1 else bars[k]
    else:
        _, lengths, _, places = a.layout.columns
        piece = bars.p[places[k - 3] : places[k - 3] + lengths[k - 3]]
    bar = torch.from_numpy(piece.reshape(tensor.shape))
    return bar if tensor.dtype == torch.float64 else bar.to(tensor.dtype)
