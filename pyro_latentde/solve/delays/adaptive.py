# SPDX-License-Identifier: Apache-2.0
"""Rows of a delay equation that choose their own steps: as in ``torch_engine/adaptive.py``, with a memory.

A step is no longer than the least lag, and the steps end at breaking points.
"""

import torch
from torch import Tensor

from pyro_latentde.solve.delays.breaking_points import breaking_points, closeness, next_breaking_point
from pyro_latentde.solve.delays.field import DelayedField
from pyro_latentde.solve.delays.lagged import Nodes, Records, StepField, lagged_states, locate
from pyro_latentde.solve.events.watch import Taken
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.row_solution import BAD_LAG, RowSolution
from pyro_latentde.solve.torch_engine.adaptive import AdaptiveRows
from pyro_latentde.solve.torch_engine.runge_kutta import dense_stages, interpolate

__all__ = ["solve_delayed_adaptive"]


@torch.no_grad()
def solve_delayed_adaptive(
    field: DelayedField,
    y0: Tensor,
    times: Tensor,
    t0: Tensor,
    method: Method,
    rtol: float,
    atol: float,
    max_steps: int,
) -> RowSolution:
    """Solve every row with its own step sizes; ``steps`` ``(R, N, 1 + L)`` hold the sizes and the lags."""
    solve = _DelayAdaptive(field, y0, times, t0, method, rtol, atol, max_steps)
    out = solve.run()
    taken = torch.where((out.steps != 0)[..., None], solve.lags[:, None, :], 0.0)
    out.steps = torch.cat([out.steps[..., None], taken], -1)
    return out


class _DelayAdaptive(AdaptiveRows):
    """One adaptive solve; ``self.past`` are the accepted steps of all rows, ``(R, N, ...)``."""

    def __init__(
        self,
        field: DelayedField,
        y0: Tensor,
        times: Tensor,
        t0: Tensor,
        method: Method,
        rtol: float,
        atol: float,
        max_steps: int,
    ) -> None:
        self.delayed, self.t0, self.y0 = field, t0, y0
        self.c = (*method.c, *method.dense_c)
        lags = field.lags.to(t0).expand(len(t0), -1)
        self.valid = ((lags > 0) & torch.isfinite(lags)).all(1)
        self.lags = torch.where(self.valid[:, None], lags, 1.0)
        self.least = self.lags.amin(1)
        self.points = breaking_points(self.lags, method.order)
        self.method, self.rows_all = method, torch.arange(len(t0), device=t0.device)
        self.past = _no_records(y0, t0, len(self.c))
        self.count = torch.zeros_like(self.rows_all)
        self._step(t0, torch.zeros_like(t0), self.rows_all)
        super().__init__(self._evaluate, y0, times, t0, method, rtol, atol, max_steps)

    def _evaluate(self, t: Tensor, y: Tensor, rows: Tensor | None = None) -> Tensor:
        return self.step(t, y)

    def _step(self, t: Tensor, h: Tensor, rows: Tensor) -> None:
        """Look up the lagged states of a step from t to t + h."""
        t0, lags = self.t0[rows], self.lags[rows]
        offset = t - t0
        scale = torch.maximum(t.abs(), t0.abs())
        record = locate(self.past.offset[rows], self.count[rows], offset, h, lags, self.c, scale)
        nodes = torch.tensor(self.c, dtype=h.dtype, device=h.device)
        s = (offset[:, None] + nodes * h[:, None])[:, :, None] - lags[:, None, :]

        def gather(at: Tensor, m: Tensor) -> Records:
            return Records(*(x[rows[at], m] for x in self.past))

        states = lagged_states(self.delayed, self.method, Nodes(s, record), self.y0[rows], t0, rows, gather)
        self.step = StepField(self.delayed, None if len(rows) == len(self.t0) else rows, t, h, self.c, states)

    def _begin(self) -> None:
        super()._begin()
        self.status[~self.valid] = BAD_LAG
        self.rows.live = self.rows.live & self.valid

    def _first_step(self, t0: Tensor, y0: Tensor, k1: Tensor, span: Tensor, direction: Tensor) -> Tensor:
        reach = torch.minimum(span, self.least)
        self._step(t0, reach, self.rows_all)  # all of it looks at the history
        self.step = _AnyTime(self.step, self)
        return super()._first_step(t0, y0, k1, reach, direction)

    def _next_trial(self) -> tuple[Tensor, Tensor] | None:
        """As in the base, with every piece between breaking points ended for itself."""
        s = self.rows
        end = s.times[:, -1] if s.times.shape[1] else s.t
        lags, t0 = self.lags[s.row], self.t0[s.row]
        close = closeness(lags, torch.maximum(s.t.abs(), t0.abs()))
        stop = t0 + next_breaking_point(self.points[s.row], s.t - t0, close)
        final = stop >= end - close
        stop = torch.where(final, end, stop)
        remaining = stop - s.t
        h = torch.minimum(s.h, self.least[s.row])
        arrives = h * (1 + 1e-9) >= remaining
        h = torch.where(2 * h > remaining, remaining / 2, h)
        h = torch.where(arrives, remaining, h)
        if self._none_left(h, arrives):
            return None
        if 2 * int(s.live.sum()) < len(s.live):
            h, final, arrives, stop = h[s.live], final[s.live], arrives[s.live], stop[s.live]
            self.rows = s = s.take(s.live)
        h = torch.where(s.live, h, 0.0)
        self._step(s.t, h, s.row)
        self.whole_field = self.step
        self.arrives, self.stop = arrives, stop
        return h, final & arrives

    def _attempt(self, h: Tensor, final: Tensor) -> None:
        super()._attempt(h, final)
        s = self.rows
        arrived = self.accept & self.arrives & ~final
        s.t = torch.where(arrived, self.stop, s.t)

    def _write(self, accept: Tensor, step: Taken) -> None:
        """Keep the accepted steps, with all stages, and write the outputs that lie in them."""
        s, method, h = self.rows, self.method, step.h
        self.accept = accept
        k = dense_stages(self.field, method, s.t, s.y, h, step.k)
        self.evals[s.row[accept]] += len(method.dense_c)
        self._remember(accept, h, torch.stack(k, 1))
        reach = torch.where(accept, torch.maximum(self._reached(step), s.cursor), s.cursor)
        index = torch.arange(s.times.shape[1], device=reach.device)
        at, j = ((index >= s.cursor[:, None]) & (index < reach[:, None])).nonzero(as_tuple=True)
        if len(at):
            theta = (s.times[at, j] - s.t[at]) / h[at]
            ends = (theta >= 1) | (s.times[at, j] == step.t_new[at])
            value = interpolate(method, theta, s.y, h, k, at)
            self.ys[s.row[at], j] = torch.where(ends[:, None], step.y_new[at], value)
        s.cursor = reach

    def _remember(self, accept: Tensor, h: Tensor, k: Tensor) -> None:
        s = self.rows
        row = s.row[accept]
        at = self.count[row]
        if len(at) and int(at.max()) >= self.past.h.shape[1]:
            more = _no_records(self.y0, self.t0, k.shape[1], self.past.h.shape[1])
            self.past = Records(*(torch.cat(pair, 1) for pair in zip(self.past, more, strict=True)))
        for place, value in zip(self.past, (s.t - self.t0[s.row], h, s.y, k), strict=True):
            place[row, at] = value[accept]
        self.count[row] += 1


class _AnyTime:
    """The field within one least lag of t0, at any time: every lagged state is the history's."""

    def __init__(self, step: StepField, solve: _DelayAdaptive) -> None:
        self.step, self.solve = step, solve

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.solve._step(self.solve.t0, t - self.solve.t0, self.solve.rows_all)
        return self.solve.step(t, y)


def _no_records(y0: Tensor, t0: Tensor, stages: int, room: int = 64) -> Records:
    rows, size = y0.shape
    return Records(
        t0.new_full((rows, room), torch.inf),
        t0.new_ones(rows, room),
        y0.new_zeros(rows, room, size),
        y0.new_zeros(rows, room, stages, size),
    )
