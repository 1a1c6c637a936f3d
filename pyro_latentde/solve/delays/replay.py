# SPDX-License-Identifier: Apache-2.0
"""Given steps of a delay equation, taken again in differentiable operations: ``torch_engine/replay.py`` with a memory.

Steps, and the records in which lagged times lie, are constants of the derivative; where in its record a lagged time
lies moves with the lag.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_latentde.solve.delays.breaking_points import equal_steps
from pyro_latentde.solve.delays.field import DelayedField
from pyro_latentde.solve.delays.lagged import Nodes, Records, StepField, lagged_states, locate
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.row_solution import BAD_LAG, MAX_STEPS, NO_CONVERGENCE, NON_FINITE, OK, RowSolution
from pyro_latentde.solve.step_record import StepRecord
from pyro_latentde.solve.torch_engine.implicit import replayed_stages
from pyro_latentde.solve.torch_engine.plan import Plan, plan_outputs
from pyro_latentde.solve.torch_engine.runge_kutta import dense_stages, interpolate, main_stages

__all__ = ["replay_delayed", "solve_delayed_equal", "solve_delayed_given"]

OnStep = Callable[[int, Tensor, Tensor, Tensor], None]


def replay_delayed(field: DelayedField, y0: Tensor, times: Tensor, t0: Tensor, steps: Tensor, method: Method) -> Tensor:
    """Solve again along given steps ``(R, N, 1 + L)``, differentiably; see ``replay_rows``."""
    plan = plan_outputs(times, t0, StepRecord(steps[..., 0], None, None, None))
    return _Follow(field, field.start(y0, t0), times, t0, plan, steps[:, :1, 1:], method).run(None)


@torch.no_grad()
def solve_delayed_equal(
    field: DelayedField, y0: Tensor, times: Tensor, t0: Tensor, method: Method, step_size: float, max_steps: int
) -> RowSolution:
    """Equal steps between breaking points."""
    lags = field.lags.to(t0).expand(len(t0), -1)
    h, cut = equal_steps(lags, times[:, -1] - t0, t0, method.order, step_size, max_steps)
    steps = torch.cat([h[..., None], torch.where((h != 0)[..., None], lags[:, None, :], 0.0)], -1)
    return solve_delayed_given(field, y0, times, t0, steps, method, cut)


@torch.no_grad()
def solve_delayed_given(
    field: DelayedField,
    y0: Tensor,
    times: Tensor,
    t0: Tensor,
    steps: Tensor,
    method: Method,
    cut: Tensor | None = None,
) -> RowSolution:
    """Known steps ``(R, N, 1 + L)``; a row whose state or slope stops being finite fails there."""
    lags = field.lags.to(t0).expand(len(t0), -1)
    valid = ((lags > 0) & torch.isfinite(lags)).all(1)
    steps = torch.where(valid[:, None, None], steps, 0.0)
    plan = plan_outputs(times, t0, StepRecord(steps[..., 0], None, None, None))
    last_good, failed = plan.count.clone(), ~torch.isfinite(y0).all(1)

    def check(n: int, rows: Tensor, y: Tensor, slope: Tensor) -> None:
        finite = torch.isfinite(y).all(1)
        if method.fsal:
            finite &= torch.isfinite(slope).all(1)
        bad = rows[~finite]
        last_good[bad] = torch.minimum(last_good[bad], torch.tensor(n, device=rows.device))
        failed[bad] = True

    ys = _Follow(field, y0, times, t0, plan, steps[:, :1, 1:], method).run(check)
    at_start = times == t0[:, None]
    ys = torch.where((plan.step < last_good[:, None])[..., None], ys, torch.nan)
    ys = torch.where(at_start[..., None], y0[:, None], ys)
    short = (~at_start & (plan.step == steps.shape[1])).any(1)
    status = torch.where(short if cut is None else cut, MAX_STEPS, OK)
    status = torch.where(failed, NO_CONVERGENCE if method.kind == "implicit" else NON_FINITE, status)
    status = torch.where(valid, status, BAD_LAG)
    rejected = (failed & (plan.count > 0)).to(torch.int64)
    each = len(method.c) - 1 + len(method.dense_c)
    evals = 1 + last_good * each + rejected * (len(method.c) - 1) + (last_good + rejected - 1).clamp(min=0)
    taken = torch.arange(steps.shape[1], device=steps.device) < last_good[:, None]
    longest = int(last_good.max()) if len(last_good) else 0
    kept = torch.where(taken[..., None], steps, 0.0)[:, :longest]
    return RowSolution(ys, status, last_good, rejected, evals, kept)


class _Follow:
    """One solve along given steps, rows with most steps first: those that still move are the first ones."""

    def __init__(
        self,
        field: DelayedField,
        y0: Tensor,
        times: Tensor,
        t0: Tensor,
        plan: Plan,
        chosen: Tensor,
        method: Method,
    ) -> None:
        self.order = plan.count.argsort(descending=True, stable=True)
        self.same = bool((self.order[1:] > self.order[:-1]).all())
        self.field, self.times, self.plan, self.method = field, times, plan, method
        self.y0, self.t0 = y0[self.order], t0[self.order]
        self.lags = field.lags.expand(len(t0), -1)[self.order]
        # which record a lagged time lies in is that of the lags for which the steps were chosen
        chosen = chosen.to(t0) if chosen.shape[1] else field.lags.detach()[:, None].to(t0)
        self.chosen = chosen.expand(len(t0), -1, -1)[self.order, 0]
        self.c = (*method.c, *method.dense_c)
        self.records: list[Records] = []

    def run(self, on_step: OnStep | None) -> Tensor:
        plan, method, n_times = self.plan, self.method, self.times.shape[1]
        place = self.order.argsort()
        y, pieces = self.y0, [self._at_start(place)]
        for n, chunk in enumerate(plan.chunks[1:-1]):
            count = int((plan.count > n).sum())
            if count == 0:
                break
            rows = self.order[:count]
            y, h, offset = y[:count], plan.record.size[rows, n], plan.offsets[rows, n]
            t = self.t0[:count] + offset
            step = self._step(rows, t, h, offset)
            k, y_new = self._stages(step, t, y, h)
            self.records.append(Records(offset, h, y, torch.stack(k, 1)))
            if len(chunk):
                at = place[chunk // n_times]
                theta = (self.times.reshape(-1)[chunk] - t[at]) / h[at]
                value = interpolate(method, theta, y, h, k, at)
                ends = plan.at_end.reshape(-1)[chunk, None]
                pieces.append(value if on_step is None else torch.where(ends, y_new[at], value))
            if on_step is not None:
                on_step(n, rows, y_new, k[method.stages - 1])
            y = y_new
        missing = sum(len(chunk) for chunk in plan.chunks) - sum(len(piece) for piece in pieces)
        pieces.append(self.y0.new_full((missing, self.y0.shape[1]), torch.nan))
        order = torch.cat(plan.chunks).argsort()
        return torch.cat(pieces)[order].reshape(len(self.order), n_times, -1)

    def _stages(self, step: StepField, t: Tensor, y: Tensor, h: Tensor) -> tuple[list[Tensor], Tensor]:
        """All stages, and the end of the step; its first slope is fresh, since it looks ahead from a breaking point."""
        k1 = step(t, y)
        if self.method.kind == "implicit":
            return replayed_stages(step, self.method, t, y, h, k1)
        k, y_new = main_stages(step, self.method, t, y, h, k1)
        return dense_stages(step, self.method, t, y, h, k), y_new

    def _step(self, rows: Tensor, t: Tensor, h: Tensor, offset: Tensor) -> StepField:
        """The field of a step: lagged states of all its stages are looked up at once."""
        count, n = len(rows), len(self.records)
        grid = self.plan.offsets[rows, :n]
        number = torch.full((count,), n, device=rows.device)
        scale = torch.maximum(t.detach().abs(), self.t0[:count].detach().abs())
        record = locate(grid, number, offset, h, self.chosen[:count], self.c, scale)
        nodes = torch.tensor(self.c, dtype=h.dtype, device=h.device)
        s = (offset[:, None] + nodes * h[:, None])[:, :, None] - self.lags[:count, None, :]
        needed = record[record >= 0].unique()
        found = [self.records[m] for m in needed.tolist()]

        def gather(at: Tensor, m: Tensor) -> Records:
            which = torch.searchsorted(needed, m)
            return Records(
                *(torch.stack([x[:count] for x in column])[which, at] for column in zip(*found, strict=True))
            )

        y0, t0 = self.y0[:count], self.t0[:count]
        states = lagged_states(self.field, self.method, Nodes(s, record), y0, t0, rows, gather)
        everything = self.same and count == len(self.order)
        return StepField(self.field, None if everything else rows, t, h, self.c, states)

    def _at_start(self, place: Tensor) -> Tensor:
        """Outputs of rows without steps: the state at t0, moving with the output time by the slope there."""
        chunk = self.plan.chunks[0]
        at = place[chunk // max(self.times.shape[1], 1)]
        value = self.y0[at]
        if len(chunk) == 0:
            return value
        rows, t0 = self.order[at], self.t0[at]
        h = torch.zeros_like(t0)
        record = torch.full((len(at), 1, self.lags.shape[1]), -1, device=at.device)
        nodes = Nodes(-self.lags[at][:, None], record)
        with torch.no_grad():
            step = self._no_step(nodes, value, t0, rows, h)
            fine = torch.isfinite(step(t0, value)).all(1)
        keep = fine.nonzero()[:, 0]
        step = self._no_step(Nodes(nodes.s[keep], record[keep]), value[keep], t0[keep], rows[keep], h[keep])
        slope = torch.zeros_like(value).index_copy(0, keep, step(t0[keep], value[keep]))
        return value + (self.times.reshape(-1)[chunk] - t0).to(value)[:, None] * slope

    def _no_step(self, nodes: Nodes, y0: Tensor, t0: Tensor, rows: Tensor, h: Tensor) -> StepField:
        states = lagged_states(self.field, self.method, nodes, y0, t0, rows, _nothing)
        return StepField(self.field, rows, t0, h, (0.0,), states)


def _nothing(at: Tensor, record: Tensor) -> Records:
    raise AssertionError("a row without steps has no records")
