# SPDX-License-Identifier: Apache-2.0
"""Rows that choose their own steps: error control, first step, outputs between steps, failures.

Error norm: e = sqrt(mean_D((err / (atol + rtol max(|y|, |y_new|)))^2)); DOP853: e5^2 / sqrt(e5^2 + .01 e3^2).
A trial is accepted iff e <= 1 and everything it computed is finite. Controller, with k = error_order:

    accepted   h *= 0.9 e^(-0.7/k) e_prev^(0.4/k), within [0.2, 10]; at most 1 after a rejection
    rejected   h *= max(0.2, 0.9 e^(-1/k)); 0.2 if the trial was not finite, 0.25 if Newton's method did not converge

What happens on the way: a step ends at the stop ahead of its row at the latest, and earlier if an event happens in it.
An event at the very time of a stop comes first. Behind either, conditions of events are watched from the new state.

References:
    Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, 2nd ed., Springer 1993, II.4.
    Gustafsson, Control theoretic techniques for stepsize selection, ACM Trans. Math. Softw. 17 (1991) 533.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_latentde.solve.events.rows import RowEvent
from pyro_latentde.solve.events.watch import Taken, Watch, reset_states
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.row_solution import MAX_STEPS, NON_FINITE, TOO_MANY_EVENTS, UNDERFLOW, RowSolution
from pyro_latentde.solve.step_record import StepLog
from pyro_latentde.solve.stops.rows import RowStops
from pyro_latentde.solve.torch_engine.runge_kutta import accepts_rows, dense_stages, interpolate, restrict
from pyro_latentde.solve.torch_engine.switching import change_rows, lost_leaps, switches
from pyro_latentde.solve.torch_engine.trial import Trial, given_trial, rms, take_trial
from pyro_latentde.solve.torch_engine.work_rows import WorkRows

__all__ = ["AdaptiveRows"]


class AdaptiveRows:
    """One adaptive solve: what is written (per row of the batch), and the loop; arguments as ``solve_rows``.

    With ``step_size`` steps are equal from one event or stop to the next. No gradient: ``solve_rows`` switches it off.
    """

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
        stops: RowStops | None = None,
        events: list[RowEvent] | None = None,
    ) -> None:
        self.f, self.method, self.rtol, self.atol, self.max_steps = f, method, rtol, atol, max_steps
        self.step_size, self.n_rows, self.subsets = step_size, len(y0), accepts_rows(f)
        self.stops = RowStops.of(None, (), times, t0) if stops is None else stops
        self.watch = Watch(f, events or [], method, self.stops, y0, t0)
        self.whole_field = restrict(f, torch.arange(self.n_rows), self.n_rows)
        self.status, self.refused, self.evals = (
            torch.zeros(self.n_rows, dtype=torch.int64, device=y0.device) for _ in range(3)
        )
        self.log = StepLog(self.n_rows, times)
        self.rows = WorkRows.at(y0, times, t0, self.stops.first(t0))
        self._stop_at_start()
        known = self.rows.y if self.stops.stops.after else y0
        self.ys = torch.where((times == t0[:, None])[..., None], known[:, None], torch.nan)
        self._begin()

    @property
    def field(self) -> Callable[[Tensor, Tensor], Tensor]:
        return self.stops.between(self.whole_field, self.rows.row, self.rows.stop)

    def run(self) -> RowSolution:
        while (trial := self._next_trial()) is not None:
            self._attempt(*trial)
        found = self.watch.found if self.watch.events else None
        steps = self.log.packed(self.method.stiff is not None, self.stops.any, found is not None)
        return RowSolution(self.ys, self.status, self.log.count, self.refused, self.evals, steps, found)

    def _stop_at_start(self) -> None:
        s = self.rows
        while bool((there := self.stops.time(s.row, s.stop) == s.t).any()):
            self._log(there, torch.zeros_like(s.t), s.kind, s.stop)
            self._pass(there)

    def _begin(self) -> None:
        """The slope at the start, and the size of the first step."""
        s = self.rows
        s.k1, span = self.field(s.t, s.y), s.times[:, -1] - s.t
        good = torch.isfinite(s.y).all(1) & torch.isfinite(s.k1).all(1)
        self.status[~good] = NON_FINITE
        s.live = good & (span != 0)
        self.evals += 1 + s.live
        if self.step_size is not None:
            s.h = self._equal_size(s)
        elif bool(s.live.any()):
            s.h = s.direction * self._first_step(s.t, s.y, s.k1, span, s.direction)
        if self.watch.events and self.n_rows:
            fine = self.watch.begin(s.row, s.stop, s.t, s.y, s.k1, s.direction, first=True)
            self._lose((good & ~fine).nonzero()[:, 0], NON_FINITE)

    def _equal_size(self, s: WorkRows) -> Tensor:
        """The size of equal steps to where these rows have to stop, ``(R,)``."""
        span = self._target(s)[0] - s.t
        return span / torch.ceil(span.abs() / self.step_size * (1 - 1e-12)).clamp(min=1)

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

    def _target(self, s: WorkRows) -> tuple[Tensor, Tensor]:
        """Where the next steps have to end at the latest, and whether that is a stop."""
        end = s.times[:, -1] if s.times.shape[1] else s.t
        return self.stops.before(s.row, s.stop, end, s.direction) if self.stops.any else (end, torch.zeros_like(s.live))

    def _next_trial(self) -> tuple[Tensor, Tensor] | None:
        """End rows that may not go on; the steps to try, and whether each reaches its target."""
        s = self.rows
        remaining = self._target(s)[0] - s.t
        h, final = self._sized(remaining)
        if self._none_left(h, final):
            return None
        if self.subsets and 2 * int(s.live.sum()) < len(s.live):
            h, final = h[s.live], final[s.live]
            self.rows = s = s.take(s.live)
            self.whole_field = restrict(self.f, s.row, self.n_rows)
        return torch.where(s.live, h, 0.0), final

    def _sized(self, remaining: Tensor) -> tuple[Tensor, Tensor]:
        """Sizes of the next steps, and which reach their targets."""
        s = self.rows
        if self.step_size is not None:
            h, final = s.h, s.h.abs() >= remaining.abs() * (1 - 1e-9)
        else:
            h, final = torch.where(2 * s.h.abs() > remaining.abs(), remaining / 2, s.h), s.h.abs() >= remaining.abs()
        return torch.where(final, remaining, (s.t + h) - s.t), final  # what t moves by, also where t is late, h small

    def _none_left(self, h: Tensor, final: Tensor) -> bool:
        """End rows with too many steps, or too small ones; whether no row goes on."""
        s = self.rows
        smallest = (16 * torch.finfo(s.t.dtype).eps * s.t.abs()).clamp(min=torch.finfo(s.t.dtype).tiny)
        spent = s.live & (self.log.count[s.row] + self.refused[s.row] >= self.max_steps)
        stuck = s.live & ~spent & ~final & (h.abs() < smallest)
        self.status[s.row[spent]] = MAX_STEPS
        self.status[s.row[stuck]] = torch.where(s.broken[stuck], NON_FINITE, UNDERFLOW)
        s.live = s.live & ~spent & ~stuck
        return not bool(s.live.any())

    def _attempt(self, h: Tensor, final: Tensor) -> None:
        s, method = self.rows, self.method
        if self.step_size is None:
            trial = take_trial(self.field, method, s.t, s.y, h, s.k1, s.stiff, (self.rtol, self.atol))
        else:
            trial = given_trial(self.field, method, s.t, s.y, h, s.k1)
        finite = torch.isfinite(trial.error) & torch.isfinite(trial.y_new).all(1)
        if method.fsal:
            finite &= torch.isfinite(trial.k[-1]).all(1)
        accept = s.live & finite & trial.converged & (trial.error <= 1)
        step = self._taken(trial, h, final)
        if self.watch.events:
            self._cut_at_events(step, accept)
            accept = accept & s.live
        self._write(accept, step)
        kind = s.kind if method.kind == "implicit" else torch.where(s.stiff, s.kind, 0.0)
        self._log(accept, step.h, kind, torch.where(step.landing, s.stop, -s.stop), step.fired + 1)
        self.refused[s.row[s.live & ~accept]] += 1
        self.evals[s.row[s.live]] += trial.evals[s.live]
        meant = s.h if self.stops.any else h
        change = self._control(trial, h, accept, finite)
        self._move(step, accept, accept & final & (step.fired < 0) & ~step.landing, change)
        if bool((accept & step.landing).any()):
            self._after_stops(accept & step.landing)
        if bool((step.fired >= 0).any()):
            self._after_events(step, meant)

    def _taken(self, trial: Trial, h: Tensor, final: Tensor) -> Taken:
        """The steps that were tried, as they end if no event happens."""
        s = self.rows
        target, stop = self._target(s)
        implicit, none = s.stiff if self.method.stiff is not None else None, torch.full_like(s.row, -1)
        t_new, left = torch.where(final, target, s.t + h), torch.zeros_like(h)
        start, end = (s.row, s.t, s.y, h, trial.k), (t_new, trial.y_new)
        return Taken(*start, *end, implicit, s.stop, final & stop, none, left)

    def _cut_at_events(self, step: Taken, accept: Tensor) -> None:
        """Steps in which something happens end there."""
        watch, who = self.watch, (accept & (step.h != 0)).nonzero()[:, 0]
        if not len(who):
            return
        taken = step.part(who)
        which, guess, good = watch.look(taken)
        self._lose(who[~good], NON_FINITE)
        hit = good & (which >= 0)
        many = hit & watch.full(taken.rows, which)
        self._lose(who[many], TOO_MANY_EVENTS)
        hit &= ~many
        if not bool(hit.any()):
            return
        landed, fine = watch.land(taken.part(hit), which[hit], guess[hit])
        self._lose(who[hit][~fine], NON_FINITE)
        step.put(who[hit][fine], landed.part(fine))

    def _lose(self, which: Tensor, status: int) -> None:
        s = self.rows
        self.status[s.row[which]] = status
        s.live = s.live.index_fill(0, which, False)

    def _log(self, rows: Tensor, h: Tensor, kind: Tensor, mark: Tensor, event: Tensor | None = None) -> None:
        """One more step of these of the rows, a mask."""
        event = torch.zeros_like(mark) if event is None else event
        self.log.write(self.rows.row[rows], h[rows], kind[rows], mark[rows], event[rows])

    def _control(self, trial: Trial, h: Tensor, accept: Tensor, finite: Tensor) -> Tensor | None:
        """The size that is meant for the next steps; rows that change between explicit and implicit."""
        s, method = self.rows, self.method
        chosen = h
        if self.step_size is None:
            factor = self._factor(trial.error, s.error, finite, accept, s.rejected)
            chosen = h * torch.where(trial.converged, factor, 0.25)
        if self.stops.any:  # a step that was cut short says nothing against the size that was meant
            cut = 2 * s.h.abs() > (self._target(s)[0] - s.t).abs()
            shortened = accept & cut & (h.abs() < s.h.abs()) & (chosen.abs() < s.h.abs())
            chosen = torch.where(shortened, s.h, chosen)
        # A row that stands still keeps everything, whatever its idle stages gave.
        s.h = torch.where(s.live, chosen, s.h)
        s.error = torch.where(accept, trial.error.clamp(min=1e-10), s.error)
        s.rejected, s.broken = s.live & ~accept, s.live & ~finite
        if method.stiff is None:
            return None
        s.rejected = s.rejected & ~lost_leaps(s, s.rejected)
        return switches(method, trial, s, h, (self.rtol, self.atol), accept)

    def _move(self, step: Taken, accept: Tensor, over: Tensor, change: Tensor | None) -> None:
        """Rows at the ends of their accepted steps."""
        s, method = self.rows, self.method
        s.t = torch.where(accept, step.t_new, s.t)
        s.y = torch.where(accept[:, None], step.y_new, s.y)
        s.live = s.live & ~over
        s.kind = torch.where(accept, 1.0, s.kind)
        if method.fsal:
            s.k1 = torch.where(accept[:, None], step.k[-1], s.k1)
            if change is not None and bool(change.any()):
                self._begin_anew(change)
        elif bool((onward := accept & s.live).any()):
            self.evals[s.row[onward]] += 1
            s.k1 = torch.where(onward[:, None], self.field(s.t, s.y), s.k1)

    def _pass(self, landed: Tensor) -> None:
        s = self.rows
        s.y = torch.where(landed[:, None], self.stops.dose(s.y, s.row, s.stop), s.y)
        s.stop = torch.where(landed, s.stop + self.stops.ahead[s.row], s.stop)

    def _after_stops(self, landed: Tensor) -> None:
        """Let it happen, and others at the same time; the next step begins with a slope of its own."""
        s, at = self.rows, landed
        while bool(at.any()):
            self._pass(at)
            s.k1 = torch.where(at[:, None], self.field(s.t, s.y), s.k1)
            self.evals[s.row[at]] += 1
            at = at & (self.stops.time(s.row, s.stop) == s.t)
            self._log(at, torch.zeros_like(s.t), torch.full_like(s.t, 2.0), s.stop)
        s.kind, s.error = torch.where(landed, 2.0, s.kind), torch.where(landed, 1.0, s.error)
        over = landed & (s.t == s.times[:, -1])
        s.live = s.live & ~over
        index = torch.arange(s.times.shape[1], device=s.t.device)
        at, j = (over[:, None] & (index >= s.cursor[:, None])).nonzero(as_tuple=True)
        self.ys[s.row[at], j] = s.y[at]
        if self.step_size is not None:
            s.h = torch.where(landed, self._equal_size(s), s.h)
        if self.watch.events:
            self._watch_anew((landed & s.live).nonzero()[:, 0])

    def _watch_anew(self, at: Tensor) -> None:
        """Behind an event or a stop."""
        s = self.rows
        if not len(at):
            return
        good = self.watch.begin(s.row[at], s.stop[at], s.t[at], s.y[at], s.k1[at], s.h[at])
        self._lose(at[~(good & torch.isfinite(s.y[at]).all(1) & torch.isfinite(s.k1[at]).all(1))], NON_FINITE)

    def _after_events(self, step: Taken, meant: Tensor) -> None:
        """Write the events down; the others go on from a new state with a new slope, as at a start."""
        s, watch = self.rows, self.watch
        at = (step.fired >= 0).nonzero()[:, 0]
        event, t, y = step.fired[at], s.t[at], s.y[at]
        watch.write_down(s.row[at], t, y, event, step.left[at])
        ends, here = watch.ends(event), s.take(at)
        later = (torch.arange(s.times.shape[1], device=at.device) >= here.cursor[:, None]) & ends[:, None]
        self.ys[here.row] = torch.where(later[..., None], y[:, None], self.ys[here.row])
        target, stop = self._target(here)
        over = ends | ~((here.direction * (target - t) > 0) | stop)
        s.live = s.live.index_fill(0, at[over], False)
        at, event = at[~over], event[~over]
        if not len(at):
            return
        here = s.take(at)
        y = reset_states(watch.events, self.stops, here.row, here.stop, here.t, here.y, event)
        field = self.stops.between(restrict(self.f, here.row, self.n_rows), here.row, here.stop)
        s.y, s.k1 = s.y.index_put((at,), y), s.k1.index_put((at,), field(here.t, y))
        s.h = s.h.index_put((at,), meant[at] if self.step_size is None else self._equal_size(here))
        s.kind, s.error = s.kind.index_fill(0, at, 2.0), s.error.index_fill(0, at, 1.0)
        s.hints = s.hints.index_fill(0, at, 0)
        self.evals[here.row] += 1
        self._watch_anew(at)

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

    def _write(self, accept: Tensor, step: Taken) -> None:
        """Write the outputs that lie in the accepted steps."""
        s, method, h, k = self.rows, self.method, step.h, step.k
        reach = torch.where(accept, torch.maximum(self._reached(step), s.cursor), s.cursor)
        if bool((reach > s.cursor).any()):
            index = torch.arange(s.times.shape[1], device=reach.device)
            at, j = ((index >= s.cursor[:, None]) & (index < reach[:, None])).nonzero(as_tuple=True)
            theta = (s.times[at, j] - s.t[at]) / h[at]
            ends = (theta >= 1) | (s.times[at, j] == step.t_new[at])
            if method.dense_c and not bool(ends.all()):
                k = dense_stages(self.field, method, s.t, s.y, h, k)
                self.evals[s.row[at[~ends].unique()]] += len(method.dense_c)
            value = interpolate(method, theta, s.y, h, k, at, step.implicit)
            self.ys[s.row[at], j] = torch.where(ends[:, None], step.y_new[at], value)
        s.cursor = reach

    def _reached(self, step: Taken) -> Tensor:
        """How many outputs the steps reach; those at a stop may have to wait for what happens there."""
        s, toward = self.rows, self.rows.direction[:, None]
        grid, end = (toward * s.times).contiguous(), toward * step.t_new[:, None]
        reach = torch.searchsorted(grid, end, right=True)[:, 0]
        if not (self.stops.any and self.stops.stops.after):
            return reach
        target, stop = self._target(s)
        return torch.where(stop & (step.t_new == target), torch.searchsorted(grid, end)[:, 0], reach)
