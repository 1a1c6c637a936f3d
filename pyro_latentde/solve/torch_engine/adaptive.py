# SPDX-License-Identifier: Apache-2.0
"""Rows that choose their own steps: error control, first step, outputs between steps, failures.

Error norm: e = sqrt(mean_D((err / (atol + rtol max(|y|, |y_new|)))^2)); DOP853: e5^2 / sqrt(e5^2 + .01 e3^2).
A trial is accepted iff e <= 1 and everything it computed is finite. Controller, with k = error_order:

    accepted   h *= 0.9 e^(-0.7/k) e_prev^(0.4/k), within [0.2, 10]; at most 1 after a rejection
    rejected   h *= max(0.2, 0.9 e^(-1/k)); 0.2 if the trial was not finite, 0.25 if Newton's method did not converge

References:
    Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, 2nd ed., Springer 1993, II.4.
    Gustafsson, Control theoretic techniques for stepsize selection, ACM Trans. Math. Softw. 17 (1991) 533.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pyro_latentde.solve.events.rows import RowEvent
from pyro_latentde.solve.events.watch import Taken, Watch, reset_states
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.row_solution import MAX_STEPS, NON_FINITE, TOO_MANY_EVENTS, UNDERFLOW, RowSolution
from pyro_latentde.solve.torch_engine.runge_kutta import accepts_rows, dense_stages, interpolate, restrict
from pyro_latentde.solve.torch_engine.switching import LEAST, change_rows, lost_leaps, switches
from pyro_latentde.solve.torch_engine.trial import given_trial, rms, take_trial

__all__ = ["equal_size", "solve_adaptive"]


@torch.no_grad()
def solve_adaptive(
    f: Callable[..., Tensor],
    y0: Tensor,
    times: Tensor,
    t0: Tensor,
    method: Method,
    rtol: float,
    atol: float,
    max_steps: int,
    step_size: float | None = None,
    events: list[RowEvent] | None = None,
) -> RowSolution:
    """Solve every row with its own step sizes (arguments as ``solve_rows``).

    With ``step_size`` they are equal from one event to the next.
    """
    return _Adaptive(f, y0, times, t0, method, rtol, atol, max_steps, step_size, events).run()


@dataclass
class _Rows:
    """The rows being integrated, one entry per row in every field; ``live`` is False once a row has ended."""

    row: Tensor
    live: Tensor
    t: Tensor
    y: Tensor
    h: Tensor
    k1: Tensor
    error: Tensor
    rejected: Tensor
    broken: Tensor
    stiff: Tensor
    hints: Tensor
    patience: Tensor
    former: Tensor
    kind: Tensor
    cursor: Tensor
    times: Tensor
    direction: Tensor

    def take(self, keep: Tensor) -> "_Rows":
        return _Rows(*(getattr(self, field.name)[keep] for field in fields(self)))


def equal_size(span: Tensor, step_size: float) -> Tensor:
    """The size of equal steps over a span, ``(R,)``."""
    return span / torch.ceil(span.abs() / step_size * (1 - 1e-12)).clamp(min=1)


class _Adaptive:
    """One adaptive solve: what is written (per row of the batch), and the loop."""

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
        step_size: float | None = None,
        events: list[RowEvent] | None = None,
    ) -> None:
        self.f, self.method, self.rtol, self.atol, self.max_steps = f, method, rtol, atol, max_steps
        self.step_size = step_size
        self.n_rows, self.subsets = len(y0), accepts_rows(f)
        self.field = restrict(f, torch.arange(self.n_rows), self.n_rows)
        self.status, self.accepted, self.refused, self.evals = (
            torch.zeros(self.n_rows, dtype=torch.int64, device=y0.device) for _ in range(4)
        )
        self.trials, self.steps = 0, times.new_zeros(self.n_rows, 64, 3)
        self.watch = Watch(f, events, method, y0, t0) if events else None
        at_start = times == t0[:, None]
        self.ys = torch.where(at_start[..., None], y0[:, None], torch.nan)
        self.rows = self._first_rows(y0, times, t0, at_start)

    def run(self) -> RowSolution:
        while (trial := self._next_trial()) is not None:
            self._attempt(*trial)
        longest = int(self.accepted.max()) if self.n_rows else 0
        columns = 3 if self.watch is not None else 2 if self.method.stiff is not None else 1
        steps = self.steps[:, :longest, :columns] if columns > 1 else self.steps[:, :longest, 0]
        found = None if self.watch is None else self.watch.found
        return RowSolution(self.ys, self.status, self.accepted, self.refused, self.evals, steps.contiguous(), found)

    def _first_rows(self, y0: Tensor, times: Tensor, t0: Tensor, at_start: Tensor) -> _Rows:
        k1 = self.field(t0, y0)
        good = torch.isfinite(y0).all(1) & torch.isfinite(k1).all(1)
        self.status[~good] = NON_FINITE
        span = times[:, -1] - t0
        live = good & (span != 0)
        self.evals += 1 + live
        flag = torch.zeros_like(live)
        direction = torch.where(span < 0, -1.0, 1.0).to(times)
        if self.step_size is not None:
            h = equal_size(span, self.step_size)
        else:
            h = direction * self._first_step(t0, y0, k1, span, direction) if bool(live.any()) else span
        if self.watch is not None and self.n_rows:
            every = torch.arange(self.n_rows, device=y0.device)
            lost = good & ~self.watch.begin(every, t0, y0, k1, direction)
            self.status[lost] = NON_FINITE
            live = live & ~lost
        row, one = torch.arange(len(y0), device=y0.device), torch.ones_like(t0)
        zero, kind = torch.zeros_like(row), torch.full_like(t0, 2.0)  # a first stage that is f(t, y)
        changing = flag, zero, torch.full_like(row, LEAST), torch.zeros_like(t0)
        return _Rows(row, live, t0, y0, h, k1, one, flag, flag, *changing, kind, at_start.sum(1), times, direction)

    def _first_step(self, t0: Tensor, y0: Tensor, k1: Tensor, span: Tensor, direction: Tensor) -> Tensor:
        """Size of the first step (Hairer, Norsett, Wanner I, II.4, as in SciPy's ``select_initial_step``).

        Their rule holds for a time of no unit: here that in which the state changes by its own size, or, where it does
        not tell, the span. So the steps do not depend on the user's unit of time.
        """
        span, scale = span.abs(), self.atol + self.rtol * y0.abs()
        d0, d1 = rms(y0 / scale).to(t0), rms(k1 / scale).to(t0)
        still = (d0 < 1e-5) | (d1 * span < 1e-5)
        unit = torch.where(still, span, d0 / d1)
        h0 = torch.minimum(torch.where(still, 1e-6, 0.01) * unit, span)
        ahead = self.field(t0 + direction * h0, y0 + (direction * h0).to(y0)[:, None] * k1)
        d2 = rms((ahead - k1) / scale).to(t0) / h0
        change = unit * torch.maximum(d1, unit * d2)
        h1 = torch.where(change <= 1e-15, h0, unit * (0.01 / change) ** (1 / self.method.error_order))
        h = torch.minimum(torch.minimum(100 * h0, h1), span)
        sound = torch.isfinite(d0) & torch.isfinite(d1) & torch.isfinite(d2) & torch.isfinite(h) & (h > 0)
        return torch.where(sound, h, 1e-6 * span)

    def _next_trial(self) -> tuple[Tensor, Tensor] | None:
        """End rows that may not go on; the steps to try and whether each reaches its row's last time."""
        s = self.rows
        end = s.times[:, -1] if s.times.shape[1] else s.t
        remaining = end - s.t
        final = s.h.abs() >= remaining.abs()
        h = s.h
        if self.step_size is None:
            h = torch.where(2 * s.h.abs() > remaining.abs(), remaining / 2, s.h)
        else:
            final = s.h.abs() >= remaining.abs() * (1 - 1e-9)
        h = torch.where(final, remaining, (s.t + h) - s.t)  # what t moves by, also where t is late and h small
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
            self.field = restrict(self.f, s.row, self.n_rows)
        return torch.where(s.live, h, 0.0), final

    def _attempt(self, h: Tensor, final: Tensor) -> None:
        s, method = self.rows, self.method
        control = (self.rtol, self.atol)
        if self.step_size is None:
            trial = take_trial(self.field, method, s.t, s.y, h, s.k1, s.stiff, control)
        else:
            trial = given_trial(self.field, method, s.t, s.y, h, s.k1)
        k, y_new, error = trial.k, trial.y_new, trial.error
        finite = torch.isfinite(error) & torch.isfinite(y_new).all(1)
        if method.fsal:
            finite &= torch.isfinite(k[-1]).all(1)
        accept = s.live & finite & trial.converged & (error <= 1)
        t_new, tried, fired = torch.where(final, s.times[:, -1], s.t + h), h, None
        if self.watch is not None:
            fired, left = torch.full_like(s.row, -1), torch.zeros_like(h)
            h, t_new, y_new, k = self._happenings(accept, h, t_new, y_new, k, fired, left)
            accept, final = accept & s.live, final & (fired < 0)
        self._write(accept, h, t_new, y_new, k)

        won = s.row[accept]
        self.trials += 1
        if self.trials > self.steps.shape[1]:
            self.steps = torch.cat([self.steps, torch.zeros_like(self.steps)], 1)
        kind = s.kind if method.kind == "implicit" else torch.where(s.stiff, s.kind, 0.0)
        event = torch.zeros_like(h) if fired is None else (fired + 1).to(h)
        self.steps[won, self.accepted[won]] = torch.stack([h, kind.to(h), event], 1)[accept]
        self.accepted[won] += 1
        self.refused[s.row[s.live & ~accept]] += 1
        self.evals[s.row[s.live]] += trial.evals[s.live]

        # A row that stands still keeps everything, whatever its idle stages gave.
        factor = 1.0
        if self.step_size is None:
            factor = self._factor(error, s.error, finite, accept, s.rejected)
            factor = torch.where(trial.converged, factor, 0.25)
        s.h = torch.where(s.live, tried * factor, s.h)
        s.error = torch.where(accept, error.clamp(min=1e-10), s.error)
        s.rejected, s.broken = s.live & ~accept, s.live & ~finite
        change = None
        if method.stiff is not None:
            s.rejected = s.rejected & ~lost_leaps(s, s.rejected)
            change = switches(method, trial, s, h, control, accept)
        s.t = torch.where(accept, t_new, s.t)
        s.y = torch.where(accept[:, None], y_new, s.y)
        s.live = s.live & ~(accept & final)
        s.kind = torch.where(accept, 1.0, s.kind)
        if method.fsal:
            s.k1 = torch.where(accept[:, None], k[-1], s.k1)
            if change is not None and bool(change.any()):
                self._begin_anew(change)
        elif bool((onward := accept & s.live).any()):
            self.evals[s.row[onward]] += 1
            s.k1 = torch.where(onward[:, None], self.field(s.t, s.y), s.k1)
        if fired is not None and bool((fired >= 0).any()):
            self._after_events(fired, tried, left)

    def _happenings(
        self, accept: Tensor, h: Tensor, t_new: Tensor, y_new: Tensor, k: list[Tensor], fired: Tensor, left: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Steps in which something happens end there; fills in which event, and what is left of its condition."""
        s, watch, who = self.rows, self.watch, accept.nonzero()[:, 0]
        if not len(who):
            return h, t_new, y_new, k
        stiff = s.stiff if self.method.stiff is not None else None
        taken = Taken(s.row, s.t, s.y, h, k, y_new, stiff).part(who)
        which, guess, good = watch.look(taken)
        self._lose(who[~good], NON_FINITE)
        hit = good & (which >= 0)
        many = hit & watch.full(taken.rows, which)
        self._lose(who[many], TOO_MANY_EVENTS)
        hit &= ~many
        if not bool(hit.any()):
            return h, t_new, y_new, k
        part, at = taken.part(hit), who[hit]
        landed, fine, rest = watch.land(part, which[hit], guess[hit])
        self._lose(at[~fine], NON_FINITE)
        landed, at, event, rest = landed.part(fine), at[fine], which[hit][fine], rest[fine]
        h, t_new, y_new, k = h.clone(), t_new.clone(), y_new.clone(), [stage.clone() for stage in k]
        h[at], y_new[at], fired[at], left[at] = landed.h, landed.y_new, event, rest
        t_new[at] = landed.t + landed.h
        for stage, new in zip(k, landed.k, strict=False):
            stage[at] = new
        return h, t_new, y_new, k

    def _lose(self, which: Tensor, status: int) -> None:
        s = self.rows
        self.status[s.row[which]] = status
        s.live = s.live.index_fill(0, which, False)

    def _after_events(self, fired: Tensor, tried: Tensor, left: Tensor) -> None:
        """Write the events down; the others go on from a new state with a new slope, as at a start."""
        s, watch = self.rows, self.watch
        at = (fired >= 0).nonzero()[:, 0]
        event, t, y = fired[at], s.t[at], s.y[at]
        watch.write_down(s.row[at], t, y, event)
        ends = watch.ends(event)
        index = torch.arange(s.times.shape[1], device=at.device)
        later = (index >= s.cursor[at, None]) & ends[:, None]
        self.ys[s.row[at]] = torch.where(later[..., None], y[:, None], self.ys[s.row[at]])
        over = ends | ~(s.direction[at] * (s.times[at, -1] - t) > 0)
        s.live = s.live.index_fill(0, at[over], False)
        at, event, t, y = at[~over], event[~over], t[~over], y[~over]
        if not len(at):
            return
        y = reset_states(watch.events, s.row[at], t, y, event)
        k1 = restrict(self.f, s.row[at], self.n_rows)(t, y)
        good = watch.begin(s.row[at], t, y, k1, tried[at], event, left[at])
        self._lose(at[~(good & torch.isfinite(y).all(1) & torch.isfinite(k1).all(1))], NON_FINITE)
        s.y, s.k1 = s.y.index_put((at,), y), s.k1.index_put((at,), k1)
        h = tried[at] if self.step_size is None else equal_size(s.times[at, -1] - t, self.step_size)
        s.h, s.kind, s.error = s.h.index_put((at,), h), s.kind.index_fill(0, at, 2.0), s.error.index_fill(0, at, 1.0)
        s.hints = s.hints.index_fill(0, at, 0)
        self.evals[s.row[at]] += 1

    def _begin_anew(self, change: Tensor) -> None:
        """Rows that switch take the slope at their state, and count again."""
        s = self.rows
        change_rows(s, change)
        s.kind = torch.where(change, 2.0, s.kind)
        onward = change & s.live
        self.evals[s.row[onward]] += 1
        s.k1 = torch.where(onward[:, None], self.field(s.t, s.y), s.k1)

    def _factor(self, error: Tensor, before: Tensor, finite: Tensor, accept: Tensor, rejected: Tensor) -> Tensor:
        k = self.method.error_order
        grow = (0.9 * error.clamp(min=1e-10) ** (-0.7 / k) * before ** (0.4 / k)).clamp(0.2, 10.0)
        grow = torch.where(rejected, grow.clamp(max=1.0), grow)
        shrink = torch.where(finite, (0.9 * error ** (-1 / k)).clamp(min=0.2), 0.2)
        return torch.where(accept, grow, shrink)

    def _write(self, accept: Tensor, h: Tensor, t_new: Tensor, y_new: Tensor, k: list[Tensor]) -> None:
        """Write the outputs that lie in the accepted steps."""
        s, method = self.rows, self.method
        toward = s.direction[:, None]
        reach = torch.searchsorted(toward * s.times, toward * t_new[:, None], right=True)[:, 0]
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
