# SPDX-License-Identifier: Apache-2.0
"""What the torch engine keeps of the events of its rows, and what it does when one happens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_latentde.solve.events.event import EventTraits
from pyro_latentde.solve.events.rows import RowEvent, bracketed_root, land, rate_of
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.torch_engine.runge_kutta import dense_stages, interpolate, restrict

__all__ = ["SAMPLES", "RowEvents", "Taken", "Watch", "capacity", "no_events", "reset_states"]

SAMPLES = (0.25, 0.5, 0.75, 1.0)  # where in a step signs are looked at
NOISE = 64.0  # a condition is zero within so many roundings of time


@dataclass
class RowEvents:
    """Events that were found: times ``(R, E)``, which ``(R, E)``, states ``(R, E, D)``."""

    times: Tensor
    which: Tensor
    states: Tensor


def capacity(traits: Sequence[EventTraits]) -> int:
    """E, the largest number of events of a row."""
    return sum(kind.limit for kind in traits)


def no_events(traits: Sequence[EventTraits], rows: int, y0: Tensor, times: Tensor) -> RowEvents:
    """Nothing found yet."""
    size = capacity(traits)
    return RowEvents(
        times.new_full((rows, size), torch.nan),
        torch.full((rows, size), -1, dtype=torch.int64, device=times.device),
        y0.new_full((rows, size, y0.shape[-1]), torch.nan),
    )


@dataclass
class Taken:
    """Accepted steps of some rows: their numbers, start, size, stages, end, and which are implicit."""

    rows: Tensor
    t: Tensor
    y: Tensor
    h: Tensor
    k: list[Tensor]
    y_new: Tensor
    implicit: Tensor | None

    def part(self, keep: Tensor) -> "Taken":
        implicit = None if self.implicit is None else self.implicit[keep]
        k = [stage[keep] for stage in self.k]
        return Taken(self.rows[keep], self.t[keep], self.y[keep], self.h[keep], k, self.y_new[keep], implicit)


class Watch:
    """On which side of zero every condition is, per row of the batch; how often it fired; what was found."""

    def __init__(self, f: Callable[..., Tensor], events: list[RowEvent], method: Method, y0: Tensor, t: Tensor) -> None:
        self.f, self.events, self.method, self.n_rows = f, events, method, len(y0)
        shape = (len(y0), len(events))
        self.side, self.value, self.rate = (t.new_zeros(shape) for _ in range(3))
        self.touching = torch.zeros(shape, dtype=torch.bool, device=t.device)
        self.count = torch.zeros(shape, dtype=torch.int64, device=t.device)
        self.found = no_events([e.traits for e in events], len(y0), y0, t)

    def begin(
        self,
        rows: Tensor,
        t: Tensor,
        y: Tensor,
        slope: Tensor,
        size: Tensor,
        fired: Tensor | None = None,
        left: Tensor | None = None,
    ) -> Tensor:
        """Sides at a start: of the sign, or where an event has just been, of the way the condition leaves zero.

        Args:
            size: A step from here, ``(N,)``, whose sign is the direction of time.
            fired: The event that has just happened, ``(N,)``, and what was ``left`` of its condition.

        Returns:
            Rows whose conditions are finite.
        """
        good = torch.ones_like(rows, dtype=torch.bool)
        for e, event in enumerate(self.events):
            g = event.condition(t, y, rows).to(t)
            rate = rate_of(event.condition, t, y, slope, rows)
            good &= torch.isfinite(g)
            noise, own = torch.zeros_like(g), torch.ones_like(good)
            if fired is not None:
                own = fired == e
                rounding = NOISE * torch.finfo(t.dtype).eps * torch.maximum(t.abs(), size.abs())
                noise = rounding * rate.abs() + torch.where(own, 16 * left, 0.0)
            zero = g.abs() <= noise
            away = torch.sign(rate * size)
            side = torch.where(zero, torch.where(own, away, self.side[rows, e]), torch.sign(g))
            self.side[rows, e], self.touching[rows, e] = side, zero & own & (side != 0)
            self.value[rows, e] = torch.where(zero, side * torch.finfo(t.dtype).tiny, g)
            self.rate[rows, e] = rate
        return good

    def look(self, s: Taken) -> tuple[Tensor, Tensor, Tensor]:
        """The first event in steps, -1 for none; the size of the step that ends there, roughly; where g is finite."""
        fired, size = torch.full_like(s.rows, -1), torch.full_like(s.h, torch.inf)
        good = torch.ones_like(fired, dtype=torch.bool)
        if self.method.dense_c:
            field = restrict(self.f, s.rows, self.n_rows)
            s.k = dense_stages(field, self.method, s.t, s.y, s.h, s.k)
        a = 0.0
        for b in SAMPLES:
            open_ = fired < 0
            g = self._values(s, torch.full_like(s.h, b))
            good &= torch.isfinite(g).all(1) | ~open_ if b == 1.0 else True
            side = self.side[s.rows]
            crossed = (side * g <= 0) & (side != 0) & open_[:, None]
            for e, event in enumerate(self.events):
                direction = event.traits.direction
                hit = crossed[:, e] & (direction * side[:, e] <= 0)
                if bool(hit.any()):
                    theta = self._root(s.part(hit), e, a, b, g[hit, e])
                    earlier = theta < size[hit]
                    size[hit] = torch.where(earlier, theta, size[hit])
                    fired[hit] = torch.where(earlier, e, fired[hit])
            quiet = fired < 0
            moved = quiet[:, None] & (g != 0) & torch.isfinite(g)
            rows = s.rows[:, None].expand_as(g)[moved]
            at = torch.arange(len(self.events), device=g.device).expand_as(g)[moved]
            self.side[rows, at], self.value[rows, at] = torch.sign(g)[moved], g[moved]
            self.touching[rows, at] = False
            a = b
        return fired, torch.where(fired >= 0, size * s.h, s.h), good

    def _values(self, s: Taken, theta: Tensor) -> Tensor:
        """All conditions inside steps, ``(N, E)``."""
        inside = self._state(s, theta)
        return torch.stack([e.condition(s.t + theta * s.h, inside, s.rows).to(s.t) for e in self.events], 1)

    def _state(self, s: Taken, theta: Tensor) -> Tensor:
        every = torch.arange(len(s.rows), device=s.h.device)
        inside = interpolate(self.method, theta, s.y, s.h, s.k, every, s.implicit)
        return torch.where((theta == 1.0)[:, None], s.y_new, inside)

    def _root(self, s: Taken, e: int, a: float, b: float, right: Tensor) -> Tensor:
        """Where in (a, b] of their steps condition e is zero; a zero at the very start is divided out."""
        touching = self.touching[s.rows, e]
        condition = self.events[e].condition

        def value(theta: Tensor) -> Tensor:
            g = condition(s.t + theta * s.h, self._state(s, theta), s.rows).to(s.t)
            return torch.where(touching, g / theta, g)

        left = torch.where(touching, self.rate[s.rows, e] * s.h, self.value[s.rows, e])
        low, high = torch.full_like(s.h, a), torch.full_like(s.h, b)
        return bracketed_root(value, low, high, left, torch.where(touching, right / b, right))

    def land(self, s: Taken, fired: Tensor, guess: Tensor) -> tuple[Taken, Tensor, Tensor]:
        """The steps of rows with an event, taken again to end there; whether they could; what is left of g."""
        sizes, ends, stages = guess.clone(), s.y_new.clone(), [stage.clone() for stage in s.k]
        good, left = torch.zeros_like(fired, dtype=torch.bool), torch.zeros_like(guess)
        for e, event in enumerate(self.events):
            mine = fired == e
            if not bool(mine.any()):
                continue
            p = s.part(mine)
            field = restrict(self.f, p.rows, self.n_rows)
            out = land(field, self.method, event.condition, p.t, p.y, guess[mine], p.k[0], p.implicit, p.rows, p.h)
            sizes[mine], ends[mine], good[mine], left[mine] = out.h, out.y_new, out.converged, out.left
            for stage, new in zip(stages, out.k, strict=False):
                stage[mine] = new
        kept = stages[: len(self.method.c)]
        return Taken(s.rows, s.t, s.y, sizes, kept, ends, s.implicit), good, left

    def write_down(self, rows: Tensor, t: Tensor, y: Tensor, fired: Tensor) -> None:
        """An event of each of these rows."""
        number = (self.found.which[rows] >= 0).sum(1)
        self.found.times[rows, number], self.found.states[rows, number] = t, y
        self.found.which[rows, number] = fired
        self.count[rows, fired] += 1

    def full(self, rows: Tensor, fired: Tensor) -> Tensor:
        """Whether an event has happened as often as it may, ``(N,)``."""
        limit = torch.tensor([e.traits.limit for e in self.events], device=rows.device)
        return self.count[rows, fired] >= limit[fired]

    def ends(self, fired: Tensor) -> Tensor:
        """Whether an event is terminal, ``(N,)``."""
        return torch.tensor([e.traits.terminal for e in self.events], device=fired.device)[fired]


def reset_states(events: Sequence[RowEvent], rows: Tensor, t: Tensor, y: Tensor, fired: Tensor) -> Tensor:
    """States behind events, ``(N, D)``; every reset sees only its own rows."""
    for e, event in enumerate(events):
        mine = (fired == e).nonzero()[:, 0]
        if event.reset is not None and len(mine):
            y = y.index_put((mine,), event.reset(t[mine], y[mine], rows[mine]))
    return y
