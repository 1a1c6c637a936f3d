# SPDX-License-Identifier: Apache-2.0
"""Events along given steps, differentiably: a step that ends in an event has the size with which it does.

The size h solves G(h, x) = g(t + h, y_h(t, y, p), p) = 0, with x all that it depends on. A root, which is a constant,
improved by h - G / (dG/dh), dG/dh a constant too, has the derivative -G_x / G_h of the implicit function theorem; m
times, those up to order m. Everything behind the event begins at t + h, and so moves with it.

References:
    Griewank and Walther, Evaluating Derivatives, 2nd ed., SIAM 2008, chapter 15.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_latentde.solve.events.rows import RowEvent, land
from pyro_latentde.solve.events.watch import no_events, reset_states
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.step_record import StepRecord
from pyro_latentde.solve.stops.rows import RowStops
from pyro_latentde.solve.torch_engine.implicit import ORDERS, replayed_stages
from pyro_latentde.solve.torch_engine.runge_kutta import main_stages, restrict

__all__ = ["Course", "ended_rows"]


def ended_rows(events: Sequence[RowEvent], record: StepRecord) -> Tensor:
    """Rows that end in a terminal event, ``(R,)``."""
    terminal = torch.tensor([False, *(e.traits.terminal for e in events)], device=record.event.device)
    return terminal[record.event].any(1)


class Course:
    """What happens on the way along given steps.

    Attributes:
        now: Time of the last event, ``(R,)``, t0 before the first.
        settled: Sizes of the steps as they were taken, ``(R, N)``, constants.
        times: Times of the events, ``(R, E)``, padded with NaN.
        states: States there, before the reset, ``(R, E, D)``.
        which: Which event, ``(R, E)``, padded with -1.
        ended: Rows that end in a terminal event, ``(R,)``.
        last: The state at the last event, ``(R, D)``.
    """

    def __init__(
        self,
        f: Callable[..., Tensor],
        events: Sequence[RowEvent],
        method: Method,
        stops: RowStops,
        y0: Tensor,
        t0: Tensor,
        record: StepRecord,
    ) -> None:
        self.f, self.events, self.method, self.stops, self.n_rows = f, events, method, stops, len(y0)
        self.record, self.settled = record, record.size.clone()
        self.now, self.last, self.ended = t0, y0, ended_rows(events, record)
        found = no_events([e.traits for e in events], len(y0), y0.detach(), t0.detach())
        self.times, self.states, self.which = found.times, found.states, found.which

    def at_step(self, n: int, rows: Tensor, active: Tensor) -> Tensor | None:
        """The event in which step n ends, ``(N,)``, -1 for none; None if in none of the rows."""
        fired = torch.where(active, self.record.event[rows, n] - 1, -1)
        return fired if bool((fired >= 0).any()) else None

    def sizes(
        self, n: int, fired: Tensor, rows: Tensor, t: Tensor, y: Tensor, h: Tensor, k1: Tensor, implicit: Tensor | None
    ) -> Tensor:
        """Sizes of step n of these rows, ``(N,)``; those that end in an event depend on all that it does."""
        for e, event in enumerate(self.events):
            mine = (fired == e).nonzero()[:, 0]
            if len(mine):
                kinds = None if implicit is None else implicit[mine]
                stop = self._stop(n, rows[mine])
                size = self._size(event, rows[mine], stop, t[mine], y[mine], h[mine].detach(), k1[mine], kinds)
                self.settled[rows[mine], n] = size.detach()
                h = h.index_put((mine,), size)
        return h

    def _stop(self, n: int, rows: Tensor) -> Tensor:
        """The stop ahead of step n of these rows."""
        mark = self.record.mark
        return torch.ones_like(rows) if mark is None else mark[rows, n].abs()

    def _size(
        self,
        event: RowEvent,
        rows: Tensor,
        stop: Tensor,
        t: Tensor,
        y: Tensor,
        h: Tensor,
        k1: Tensor,
        implicit: Tensor | None,
    ) -> Tensor:
        field = self.stops.between(restrict(self.f, rows, self.n_rows), rows, stop)
        condition = self.stops.watched(event.condition, rows, stop)
        with torch.no_grad():
            constants = (t.detach(), y.detach(), h, k1.detach())
            h = land(field, self.method, condition, *constants, implicit, rows).h
        if not torch.is_grad_enabled():
            return h

        def left(t: Tensor, y: Tensor, h: Tensor, k1: Tensor) -> Tensor:
            end = self._end(field, t, y, h, k1, implicit)
            return condition(t + h, end, rows).to(h)

        moved = h.detach().requires_grad_()
        (rate,) = torch.autograd.grad(left(t.detach(), y.detach(), moved, k1.detach()).sum(), moved)
        for _ in range(ORDERS):
            h = h - left(t, y, h, k1) / rate
        return h

    def _end(self, field: Callable, t: Tensor, y: Tensor, h: Tensor, k1: Tensor, implicit: Tensor | None) -> Tensor:
        if self.method.kind == "implicit":
            return replayed_stages(field, self.method, t, y, h, k1)[1]
        end = main_stages(field, self.method, t, y, h, k1)[1]
        if implicit is None or not bool(implicit.any()):
            return end
        return torch.where(implicit[:, None], replayed_stages(field, self.method.stiff, t, y, h, k1)[1], end)

    def go_on(self, n: int, fired: Tensor, rows: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Behind step n: events written down; states with which the next step begins."""
        mine = (fired >= 0).nonzero()[:, 0]
        at, now, state = rows[mine], t[mine], y[mine]
        number = (self.which[at] >= 0).sum(1)
        self.which[at, number] = fired[mine]
        self.times = self.times.index_put((at, number), now)
        self.states = self.states.index_put((at, number), state)
        self.last, self.now = self.last.index_put((at,), state), self.now.index_put((at,), now)
        onward = ~torch.tensor([e.traits.terminal for e in self.events], device=t.device)[fired[mine]]
        mine, at, now, state = mine[onward], at[onward], now[onward], state[onward]
        if not len(mine):
            return y
        state = reset_states(self.events, self.stops, at, self._stop(n, at), now, state, fired[mine])
        return y.index_put((mine,), state)
