# SPDX-License-Identifier: Apache-2.0
"""Rows that choose their own steps (see ``adaptive.py``), of which some must end at given times."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.row_solution import MAX_STEPS, NON_FINITE, UNDERFLOW, RowSolution
from pyro_latentde.solve.stops.rows import RowStops
from pyro_latentde.solve.torch_engine.adaptive import _Adaptive, _Rows
from pyro_latentde.solve.torch_engine.runge_kutta import accepts_rows, dense_stages, interpolate, restrict
from pyro_latentde.solve.torch_engine.switching import LEAST, lost_leaps, switches
from pyro_latentde.solve.torch_engine.trial import take_trial

__all__ = ["solve_stopping"]


@torch.no_grad()
def solve_stopping(
    f: Callable[..., Tensor],
    y0: Tensor,
    times: Tensor,
    t0: Tensor,
    method: Method,
    rtol: float,
    atol: float,
    max_steps: int,
    stops: RowStops,
) -> RowSolution:
    """Solve every row with its own step sizes, from stop to stop (arguments as ``solve_rows``)."""
    return _Stopping(f, y0, times, t0, method, rtol, atol, max_steps, stops).run()


@dataclass
class _StopRows(_Rows):
    """The rows being integrated, with the stop ahead of each."""

    stop: Tensor

    def take(self, keep: Tensor) -> "_StopRows":
        return _StopRows(*(getattr(self, field.name)[keep] for field in fields(self)))


class _Stopping(_Adaptive):
    """One adaptive solve with steps that end at stops."""

    def __init__(
        self,
        f: Callable[..., Tensor],
        y0: Tensor,
        times: Tensor,
        t0: Tensor,
        method: Method,
        rtol: float,
        atol: float,
        max_steps: int,
        stops: RowStops,
    ) -> None:
        self.f, self.method, self.rtol, self.atol, self.max_steps = f, method, rtol, atol, max_steps
        self.stops, self.n_rows, self.subsets = stops, len(y0), accepts_rows(f)
        self.whole_field = restrict(f, torch.arange(self.n_rows), self.n_rows)
        self.status, self.accepted, self.refused, self.evals = (
            torch.zeros(self.n_rows, dtype=torch.int64, device=y0.device) for _ in range(4)
        )
        self.steps = times.new_zeros(self.n_rows, 64, 3)
        self.rows = self._at_start(y0, times, t0)
        at_start = times == t0[:, None]
        self.ys = torch.where(at_start[..., None], self._known(y0)[:, None], torch.nan)
        self._begin(at_start)

    @property
    def field(self) -> Callable[[Tensor, Tensor], Tensor]:
        return self.stops.between(self.whole_field, self.rows.row, self.rows.stop)

    def run(self) -> RowSolution:
        while (trial := self._next_trial()) is not None:
            self._attempt(*trial)
        longest = int(self.accepted.max()) if self.n_rows else 0
        steps = self.steps[:, :longest].contiguous()
        return RowSolution(self.ys, self.status, self.accepted, self.refused, self.evals, steps)

    def _at_start(self, y0: Tensor, times: Tensor, t0: Tensor) -> "_StopRows":
        """All rows at their starts, after the stops that lie there."""
        span, row, one = times[:, -1] - t0, torch.arange(len(y0), device=y0.device), torch.ones_like(t0)
        flag, zero = torch.zeros_like(row, dtype=torch.bool), torch.zeros_like(row)
        direction = torch.where(span < 0, -1.0, 1.0).to(times)
        kind = torch.full_like(t0, 2.0)  # a first stage that is f(t, y)
        first = self.stops.first(t0)
        changing = flag, zero, torch.full_like(row, LEAST), torch.zeros_like(t0)
        s = _StopRows(row, flag, t0, y0, span, y0, one, flag, flag, *changing, kind, zero, times, direction, first)
        self.rows = s
        while bool((there := self.stops.time(s.row, s.stop) == s.t).any()):
            self._record(there, torch.zeros_like(s.t), s.kind, s.stop)
            self._pass(there)
        return s

    def _known(self, y0: Tensor) -> Tensor:
        return self.rows.y if self.stops.stops.after else y0

    def _begin(self, at_start: Tensor) -> None:
        """The slope at the start, and the size of the first step."""
        s = self.rows
        s.k1, span, s.cursor = self.field(s.t, s.y), s.times[:, -1] - s.t, at_start.sum(1)
        good = torch.isfinite(s.y).all(1) & torch.isfinite(s.k1).all(1)
        self.status[~good] = NON_FINITE
        s.live = good & (span != 0)
        self.evals += 1 + s.live
        if bool(s.live.any()):
            s.h = s.direction * self._first_step(s.t, s.y, s.k1, span, s.direction)

    def _target(self) -> tuple[Tensor, Tensor]:
        """Where the next steps of all rows have to end at the latest, and whether that is a stop."""
        s = self.rows
        end = s.times[:, -1] if s.times.shape[1] else s.t
        stop = self.stops.time(s.row, s.stop)
        left = s.direction * (end - stop)
        near = left >= 0 if self.stops.stops.after else left > 0
        return torch.where(near, stop, end), near

    def _next_trial(self) -> tuple[Tensor, Tensor] | None:
        """End rows that may not go on; the steps to try, and whether each reaches its target."""
        s = self.rows
        remaining = self._target()[0] - s.t
        final = s.h.abs() >= remaining.abs()
        h = torch.where(2 * s.h.abs() > remaining.abs(), remaining / 2, s.h)
        h = torch.where(final, remaining, h)
        smallest = (16 * torch.finfo(s.t.dtype).eps * s.t.abs()).clamp(min=torch.finfo(s.t.dtype).tiny)
        spent = s.live & (self.accepted[s.row] + self.refused[s.row] >= self.max_steps)
        stuck = s.live & ~spent & ~final & (h.abs() < smallest)
        self.status[s.row[spent]] = MAX_STEPS
        self.status[s.row[stuck]] = torch.where(s.broken[stuck], NON_FINITE, UNDERFLOW)
        s.live = s.live & ~spent & ~stuck
        n_live = int(s.live.sum())
        if n_live == 0:
            return None
        if self.subsets and 2 * n_live < len(s.live):
            h, final = h[s.live], final[s.live]
            self.rows = s = s.take(s.live)
            self.whole_field = restrict(self.f, s.row, self.n_rows)
        return torch.where(s.live, h, 0.0), final

    def _attempt(self, h: Tensor, final: Tensor) -> None:
        s, method = self.rows, self.method
        control = (self.rtol, self.atol)
        trial = take_trial(self.field, method, s.t, s.y, h, s.k1, s.stiff, control)
        k, y_new, error = trial.k, trial.y_new, trial.error
        finite = torch.isfinite(error) & torch.isfinite(y_new).all(1)
        if method.fsal:
            finite &= torch.isfinite(k[-1]).all(1)
        accept = s.live & finite & trial.converged & (error <= 1)
        target, stop = self._target()
        t_new, landing = torch.where(final, target, s.t + h), final & stop
        self._write(accept, h, t_new, y_new, k, landing)
        kind = s.kind if method.kind == "implicit" else torch.where(s.stiff, s.kind, 0.0)
        self._record(accept, h, kind, torch.where(landing, s.stop, -s.stop))
        self.refused[s.row[s.live & ~accept]] += 1
        self.evals[s.row[s.live]] += trial.evals[s.live]

        # A row that stands still keeps everything, whatever its idle stages gave.
        factor = self._factor(error, s.error, finite, accept, s.rejected)
        factor = torch.where(trial.converged, factor, 0.25)
        s.h = torch.where(s.live, self._resized(h * factor, h, accept), s.h)
        s.error = torch.where(accept, error.clamp(min=1e-10), s.error)
        s.rejected, s.broken = s.live & ~accept, s.live & ~finite
        change = None
        if method.stiff is not None:
            s.rejected = s.rejected & ~lost_leaps(s, s.rejected)
            change = switches(method, trial, s, h, control, accept)
        s.t = torch.where(accept, t_new, s.t)
        s.y = torch.where(accept[:, None], y_new, s.y)
        s.live = s.live & ~(accept & final & ~landing)
        s.kind = torch.where(accept, 1.0, s.kind)
        if method.fsal:
            s.k1 = torch.where(accept[:, None], k[-1], s.k1)
            if change is not None and bool(change.any()):
                self._begin_anew(change)
        elif bool((onward := accept & s.live).any()):
            self.evals[s.row[onward]] += 1
            s.k1 = torch.where(onward[:, None], self.field(s.t, s.y), s.k1)
        self._stop(accept & landing)

    def _record(self, rows: Tensor, h: Tensor, kind: Tensor, mark: Tensor) -> None:
        """One more step of these of the rows, a mask."""
        won = self.rows.row[rows]
        if len(won) and int(self.accepted[won].max()) >= self.steps.shape[1]:
            self.steps = torch.cat([self.steps, torch.zeros_like(self.steps)], 1)
        self.steps[won, self.accepted[won]] = torch.stack([h, kind.to(h), mark.to(h)], 1)[rows]
        self.accepted[won] += 1

    def _resized(self, chosen: Tensor, h: Tensor, accept: Tensor) -> Tensor:
        """A step that was cut short says nothing against the size that was meant."""
        meant = self.rows.h
        shortened = accept & (h.abs() < meant.abs()) & (chosen.abs() < meant.abs())
        return torch.where(shortened, meant, chosen)

    def _pass(self, landed: Tensor) -> None:
        s = self.rows
        s.y = torch.where(landed[:, None], self.stops.dose(s.y, s.row, s.stop), s.y)
        s.stop = torch.where(landed, s.stop + self.stops.ahead[s.row], s.stop)

    def _stop(self, landed: Tensor) -> None:
        """Let it happen, and others at the same time; the next step begins with a slope of its own."""
        s, at = self.rows, landed
        while bool(at.any()):
            self._pass(at)
            s.k1 = torch.where(at[:, None], self.field(s.t, s.y), s.k1)
            self.evals[s.row[at]] += 1
            at = at & (self.stops.time(s.row, s.stop) == s.t)
            self._record(at, torch.zeros_like(s.t), torch.full_like(s.t, 2.0), s.stop)
        s.kind, s.error = torch.where(landed, 2.0, s.kind), torch.where(landed, 1.0, s.error)
        over = landed & (s.t == s.times[:, -1])
        s.live = s.live & ~over
        at, j = (over[:, None] & (torch.arange(s.times.shape[1], device=s.t.device) >= s.cursor[:, None])).nonzero(
            as_tuple=True
        )
        self.ys[s.row[at], j] = s.y[at]

    def _write(self, accept: Tensor, h: Tensor, t_new: Tensor, y_new: Tensor, k: list[Tensor], landing: Tensor) -> None:
        """Write the outputs that lie in the accepted steps."""
        s, method = self.rows, self.method
        toward = s.direction[:, None]
        reach = torch.searchsorted(toward * s.times, toward * t_new[:, None], right=True)[:, 0]
        reach = self._before_stop(reach, t_new, landing)
        reach = torch.where(accept, torch.maximum(reach, s.cursor), s.cursor)
        if bool((reach > s.cursor).any()):
            index = torch.arange(s.times.shape[1], device=reach.device)
            at, j = ((index >= s.cursor[:, None]) & (index < reach[:, None])).nonzero(as_tuple=True)
            theta = (s.times[at, j] - s.t[at]) / h[at]
            ends = (theta >= 1) | (s.times[at, j] == t_new[at])
            if method.dense_c and not bool(ends.all()):
                k = dense_stages(self.field, method, s.t, s.y, h, k)
                self.evals[s.row[at[~ends].unique()]] += len(method.dense_c)
            stiff = s.stiff if method.stiff is not None else None
            value = torch.where(ends[:, None], y_new[at], interpolate(method, theta, s.y, h, k, at, stiff))
            self.ys[s.row[at], j] = value
        s.cursor = reach

    def _before_stop(self, reach: Tensor, t_new: Tensor, landing: Tensor) -> Tensor:
        """How many outputs are reached by the steps that end at t_new; those at a stop may come after it."""
        if not self.stops.stops.after:
            return reach
        s, toward = self.rows, self.rows.direction[:, None]
        left = torch.searchsorted((toward * s.times).contiguous(), toward * t_new[:, None])[:, 0]
        return torch.where(landing, left, reach)
