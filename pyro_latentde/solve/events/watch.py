# SPDX-License-Identifier: Apache-2.0
"""What the torch engine keeps of the events of its rows, and what it does when one happens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pyro_latentde.solve.events.event import EventTraits
from pyro_latentde.solve.events.rows import RowEvent, bracketed_root, land, rate_of
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.stops.rows import RowStops
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
    """Steps of some rows: numbers, start, size, stages, end, which are implicit, the stop ahead, and how they end.

    ``fired`` is the event in which a step ends, -1 for none, and ``left`` what is left of its condition there.
    """

    rows: Tensor
    t: Tensor
    y: Tensor
    h: Tensor
    k: list[Tensor]
    t_new: Tensor
    y_new: Tensor
    implicit: Tensor | None
    stop: Tensor
    landing: Tensor
    fired: Tensor
    left: Tensor

    def part(self, keep: Tensor) -> "Taken":
        """Those of some of the rows, a mask or numbers."""
        return Taken(*(_part(getattr(self, field.name), keep) for field in fields(self)))

    def put(self, at: Tensor, part: "Taken") -> None:
        """Other sizes and ends of these of the rows."""
        for name in ("h", "t_new", "y_new", "landing", "fired", "left"):
            setattr(self, name, getattr(self, name).index_put((at,), getattr(part, name)))
        self.k = [stage.index_put((at,), new) for stage, new in zip(self.k, part.k, strict=False)]


def _part(x: Any, keep: Tensor) -> Any:
    if isinstance(x, list):
        return [one[keep] for one in x]
    return None if x is None else x[keep]


class Watch:
    """On which side of zero every condition is, per row of the batch; how often it fired; what was found."""

    def __init__(
        self,
        f: Callable[..., Tensor],
        events: Sequence[RowEvent],
        method: Method,
        stops: RowStops,
        y0: Tensor,
        t: Tensor,
    ) -> None:
        self.f, self.events, self.method, self.stops, self.n_rows = f, events, method, stops, len(y0)
        shape = (len(y0), len(events))
        self.side, self.value, self.rate = (t.new_zeros(shape) for _ in range(3))
        self.touching = torch.zeros(shape, dtype=torch.bool, device=t.device)
        self.count = torch.zeros(shape, dtype=torch.int64, device=t.device)
        self.found = no_events([e.traits for e in events], len(y0), y0, t)
        self.latest = torch.full_like(t, -1, dtype=torch.int64)
        self.moment, self.left = torch.full_like(t, torch.nan), torch.zeros_like(t)

    def begin(
        self, rows: Tensor, stop: Tensor, t: Tensor, y: Tensor, slope: Tensor, size: Tensor, first: bool = False
    ) -> Tensor:
        """Sides at a start, behind an event or a stop: of the sign, or of the way the condition leaves zero.

        A condition that is zero where the solve starts, or because its own event has just been, is on the side to which
        it goes; another that is zero within rounding stays on its side, so that what is about to happen is not missed.

        Args:
            stop: Stop ahead, ``(N,)``.
            size: A step from here, ``(N,)``, whose sign is the direction of time.
            first: Whether the solve starts here.

        Returns:
            Rows whose conditions are finite.
        """
        good = torch.ones_like(rows, dtype=torch.bool)
        latest = torch.where(self.moment[rows] == t, self.latest[rows], -1)
        rounding = NOISE * torch.finfo(t.dtype).eps * torch.maximum(t.abs(), size.abs())
        for e, event in enumerate(self.events):
            condition = self.stops.watched(event.condition, rows, stop)
            g = condition(t, y, rows).to(t)
            rate = rate_of(condition, t, y, slope, rows)
            good &= torch.isfinite(g)
            own = torch.ones_like(good) if first else latest == e
            noise = 0.0 if first else rounding * rate.abs() + torch.where(own, 16 * self.left[rows], 0.0)
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
            field = self.stops.between(restrict(self.f, s.rows, self.n_rows), s.rows, s.stop)
            s.k = dense_stages(field, self.method, s.t, s.y, s.h, s.k)
        a = 0.0
        for b in SAMPLES:
            open_ = fired < 0
            g = self._values(s, torch.full_like(s.h, b))
            good &= torch.isfinite(g).all(1) | ~open_ if b == 1.0 else True
            side = self.side[s.rows]
            g = torch.where(self._at_stop(s, g, b), 0.0, g)
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

    def _at_stop(self, s: Taken, g: Tensor, b: float) -> Tensor:
        """Conditions that are zero, to rounding, where steps land on a stop: they happen before what does there."""
        at = s.landing & (b == SAMPLES[-1])
        change = (g - self.value[s.rows]).abs() / (b - SAMPLES[-2])
        reach = NOISE * torch.finfo(s.t.dtype).eps * torch.maximum(s.t.abs() / s.h.abs(), torch.ones_like(s.h))
        return at[:, None] & (g.abs() <= reach[:, None] * change) & ~self.touching[s.rows]

    def _values(self, s: Taken, theta: Tensor) -> Tensor:
        """All conditions inside steps, ``(N, E)``."""
        t, inside = s.t + theta * s.h, self._state(s, theta)
        conditions = [self.stops.watched(e.condition, s.rows, s.stop) for e in self.events]
        return torch.stack([condition(t, inside, s.rows).to(s.t) for condition in conditions], 1)

    def _state(self, s: Taken, theta: Tensor) -> Tensor:
        every = torch.arange(len(s.rows), device=s.h.device)
        inside = interpolate(self.method, theta, s.y, s.h, s.k, every, s.implicit)
        return torch.where((theta == 1.0)[:, None], s.y_new, inside)

    def _root(self, s: Taken, e: int, a: float, b: float, right: Tensor) -> Tensor:
        """Where in (a, b] of their steps condition e is zero; a zero at the very start is divided out."""
        touching = self.touching[s.rows, e]
        condition = self.stops.watched(self.events[e].condition, s.rows, s.stop)

        def value(theta: Tensor) -> Tensor:
            g = condition(s.t + theta * s.h, self._state(s, theta), s.rows).to(s.t)
            return torch.where(touching, g / theta, g)

        left = torch.where(touching, self.rate[s.rows, e] * s.h, self.value[s.rows, e])
        low, high = torch.full_like(s.h, a), torch.full_like(s.h, b)
        return bracketed_root(value, low, high, left, torch.where(touching, right / b, right))

    def land(self, s: Taken, fired: Tensor, guess: Tensor) -> tuple[Taken, Tensor]:
        """The steps of rows with an event, taken again to end there, and whether they could."""
        s, good = s.part(torch.ones_like(fired, dtype=torch.bool)), torch.zeros_like(fired, dtype=torch.bool)
        for e, event in enumerate(self.events):
            mine = (fired == e).nonzero()[:, 0]
            if not len(mine):
                continue
            p = s.part(mine)
            field = self.stops.between(restrict(self.f, p.rows, self.n_rows), p.rows, p.stop)
            condition = self.stops.watched(event.condition, p.rows, p.stop)
            out = land(field, self.method, condition, p.t, p.y, guess[mine], p.k[0], p.implicit, p.rows, p.h)
            p.h, p.k, p.y_new, p.left = out.h, out.k, out.y_new, out.left
            p.t_new, p.fired, p.landing = self._end(p, out.h), fired[mine], torch.zeros_like(p.landing)
            good[mine] = out.converged
            s.put(mine, p)
        return s, good

    def _end(self, s: Taken, h: Tensor) -> Tensor:
        """When steps of sizes h end; within rounding of a stop that is the time of the stop."""
        t, stop = s.t + h, self.stops.time(s.rows, s.stop)
        rounding = NOISE * torch.finfo(t.dtype).eps * torch.maximum(s.t.abs(), s.h.abs())
        return torch.where((t - stop).abs() <= rounding, stop, t)

    def write_down(self, rows: Tensor, t: Tensor, y: Tensor, fired: Tensor, left: Tensor) -> None:
        """An event of each of these rows."""
        number = (self.found.which[rows] >= 0).sum(1)
        self.found.times[rows, number], self.found.states[rows, number] = t, y
        self.found.which[rows, number] = fired
        self.count[rows, fired] += 1
        self.latest[rows], self.moment[rows], self.left[rows] = fired, t, left

    def full(self, rows: Tensor, fired: Tensor) -> Tensor:
        """Whether an event has happened as often as it may, ``(N,)``."""
        limit = torch.tensor([e.traits.limit for e in self.events], device=rows.device)
        return self.count[rows, fired] >= limit[fired]

    def ends(self, fired: Tensor) -> Tensor:
        """Whether an event is terminal, ``(N,)``."""
        return torch.tensor([e.traits.terminal for e in self.events], device=fired.device)[fired]


def reset_states(
    events: Sequence[RowEvent], stops: RowStops, rows: Tensor, stop: Tensor, t: Tensor, y: Tensor, fired: Tensor
) -> Tensor:
    """States behind events, ``(N, D)``; every reset sees only its own rows, on their way to this ``stop``, ``(N,)``."""
    for e, event in enumerate(events):
        mine = (fired == e).nonzero()[:, 0]
        if event.reset is not None and len(mine):
            reset = stops.watched(event.reset, rows[mine], stop[mine])
            y = y.index_put((mine,), reset(t[mine], y[mine], rows[mine]))
    return y
