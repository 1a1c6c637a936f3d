# SPDX-License-Identifier: Apache-2.0
"""Events along given steps, differentiably: a step that ends in an event has the size with which it does.

The size h solves G(h, x) = g(t + h, y_h(t, y, p), p) = 0, with x all that it depends on. A root, which is a constant,
improved by h - G / (dG/dh), dG/dh a constant too, has the derivative -G_x / G_h of the implicit function theorem; m
times, those up to order m. Everything behind the event begins at t + h, and so moves with it.

References:
    Griewank and Walther, Evaluating Derivatives, 2nd ed., SIAM 2008, chapter 15.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_latentde.solve.events.rows import RowEvent, land
from pyro_latentde.solve.events.watch import no_events, reset_states
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.torch_engine.implicit import ORDERS, replayed_stages
from pyro_latentde.solve.torch_engine.runge_kutta import main_stages, restrict

__all__ = ["Course", "ended_rows"]


def ended_rows(events: list[RowEvent], steps: Tensor) -> Tensor:
    """Rows that end in a terminal event, ``(R,)``, from their steps ``(R, N, 3)``."""
    terminal = torch.tensor([False, *(e.traits.terminal for e in events)], device=steps.device)
    return terminal[steps[..., 2].long()].any(1)


class Course:
    """What happens on the way along given steps.

    Attributes:
        origin: The time that offsets of steps count from, ``(R,)``: t0, and behind an event moved with it.
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
        events: list[RowEvent],
        method: Method,
        y0: Tensor,
        t0: Tensor,
        steps: Tensor,
    ) -> None:
        self.f, self.events, self.method, self.n_rows = f, events, method, len(y0)
        self.event, self.settled = steps[..., 2].long(), steps[..., 0].clone()
        self.grid = torch.nn.functional.pad(steps[..., 0].cumsum(1), (1, 0))
        self.origin, self.last, self.ended = t0, y0, ended_rows(events, steps)
        found = no_events([e.traits for e in events], len(y0), y0.detach(), t0.detach())
        self.times, self.states, self.which = found.times, found.states, found.which

    def at_step(self, n: int, rows: Tensor, active: Tensor) -> Tensor | None:
        """The event in which step n ends, ``(N,)``, -1 for none; None if in none of the rows."""
        fired = torch.where(active, self.event[rows, n] - 1, -1)
        return fired if bool((fired >= 0).any()) else None

    def sizes(
        self, n: int, fired: Tensor, rows: Tensor, t: Tensor, y: Tensor, h: Tensor, k1: Tensor, implicit: Tensor | None
    ) -> Tensor:
        """Sizes of step n of these rows, ``(N,)``; those that end in an event depend on all that it does."""
        for e, event in enumerate(self.events):
            mine = (fired == e).nonzero()[:, 0]
            if len(mine):
                kinds = None if implicit is None else implicit[mine]
                size = self._size(event, rows[mine], t[mine], y[mine], h[mine].detach(), k1[mine], kinds)
                self.settled[rows[mine], n] = size.detach()
                h = h.index_put((mine,), size)
        return h

    def _size(
        self, event: RowEvent, rows: Tensor, t: Tensor, y: Tensor, h: Tensor, k1: Tensor, implicit: Tensor | None
    ) -> Tensor:
        field = restrict(self.f, rows, self.n_rows)
        with torch.no_grad():
            constants = (t.detach(), y.detach(), h, k1.detach())
            h = land(field, self.method, event.condition, *constants, implicit, rows).h
        if not torch.is_grad_enabled():
            return h

        def left(t: Tensor, y: Tensor, h: Tensor, k1: Tensor) -> Tensor:
            end = self._end(field, t, y, h, k1, implicit)
            return event.condition(t + h, end, rows).to(h)

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

    def go_on(self, n: int, fired: Tensor, rows: Tensor, t: Tensor, y: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        """Behind step n: events written down; states and first slopes of the step that follows."""
        mine = (fired >= 0).nonzero()[:, 0]
        at, now, state = rows[mine], t[mine], y[mine]
        number = (self.which[at] >= 0).sum(1)
        self.which[at, number] = fired[mine]
        self.times = self.times.index_put((at, number), now)
        self.states = self.states.index_put((at, number), state)
        self.last = self.last.index_put((at,), state)
        self.origin = self.origin.index_put((at,), now - self.grid[at, n + 1])
        onward = ~torch.tensor([e.traits.terminal for e in self.events], device=t.device)[fired[mine]]
        mine, at, now, state = mine[onward], at[onward], now[onward], state[onward]
        if not len(mine):
            return y, k1
        state = reset_states(self.events, at, now, state, fired[mine])
        slope = restrict(self.f, at, self.n_rows)(now, state)
        return y.index_put((mine,), state), k1.index_put((mine,), slope)
