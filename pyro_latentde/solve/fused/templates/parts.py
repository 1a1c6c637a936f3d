# SPDX-License-Identifier: Apache-2.0
"""Pieces of source that the kernels share: stages, combinations, interpolants, the layout of the work array."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

from pyro_latentde.solve.events.event import EventTraits
from pyro_latentde.solve.events.watch import capacity
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.stops.schedule import Stops

__all__ = [
    "WorkLayout",
    "blend",
    "combine",
    "for_event",
    "indent",
    "lines",
    "interpolant",
    "lines",
    "record_width",
    "stage",
    "stage_rows",
    "work_size",
]


def indent(text: str, levels: int) -> str:
    return text.replace("\n", "\n" + "    " * levels)


def lines(text: str, levels: int) -> str:
    """Text in lines of its own; none where it is empty."""
    return "    " * levels + indent(text, levels) + "\n" if text else ""


def combine(weights: Sequence[float], base: str, d: int, index: str = "i") -> str:
    """``w0 * k0[i] + w1 * k1[i] + ...`` over the stages stored from ``base`` on, ``d`` apart."""
    terms = [f"{weight!r} * w[{base} + {s * d} + {index}]" for s, weight in enumerate(weights) if weight != 0.0]
    return " + ".join(terms) if terms else "0.0"


def _polynomial(coefficients: Sequence[float], derivative: bool) -> str:
    """``b(theta)`` or its derivative, by Horner's rule."""
    coefficients = [c * (q + 1) if derivative else c for q, c in enumerate(coefficients)]
    source = repr(coefficients[-1])
    for c in coefficients[-2::-1]:
        source = f"({c!r} + theta * {source})"
    return source if derivative else f"theta * {source}"


def interpolant(method: Method, name: str, derivative: bool = False) -> list[str]:
    return [f"{name}{s} = {_polynomial(row, derivative)}" for s, row in enumerate(method.interpolant) if any(row)]


def blend(method: Method, name: str, base: str, d: int, index: str = "i") -> str:
    terms = [f"{name}{s} * w[{base} + {s * d} + {index}]" for s, row in enumerate(method.interpolant) if any(row)]
    return " + ".join(terms)


def for_event(which: str, source: dict[int, str]) -> str:
    """``if which == e: ...`` for every event that has some source."""
    parts = [f"{which} == {e}:\n    {indent(text, 1)}" for e, text in source.items()]
    return "if " + "\nelif ".join(parts) if parts else ""


class WorkLayout:
    """Where things lie in the work array, for D states and all stages of a method."""

    def __init__(
        self, method: Method, d: int, stops: Stops | None = None, leaves: int = 0, events: Sequence[EventTraits] = ()
    ) -> None:
        self.events, self.room, self.states = tuple(events), capacity(events), d
        self.stages = len(method.c) + len(method.dense_c)
        self.y, self.y_new, self.lam, self.bar, self.y_dot = (i * d for i in range(5))
        self.k = 5 * d
        self.ys = self.k + self.stages * d
        self.k_bar = self.ys + max(self.stages, len(method.kicks)) * d
        end = self.k_bar + self.stages * d
        self.width = d + 2  # of a record: t, h, y
        self.plan = 1  # numbers of a given step
        if method.uses_newton:
            self.base, self.z, self.delta, self.kap, self.pivots = (end + i * d for i in range(5))
            self.jac = end + 5 * d
            self.lu = self.jac + d * d
            self.info = self.lu + d * d  # iterations, and what the last rate left undone
            end = self.info + 2
            self.width += self.stages * d + 1  # the stages too, and how the step was taken
        if method.kind == "switching":
            self.plan = 2  # h, and how it was taken
        self.stops = stops
        if stops is not None:
            end = self._place_stops(stops, leaves, end)
            self.mark = self.width - (1 if method.kind == "explicit" else 2)
        if events:
            self.plan = 3 if stops is None else 4  # and the event that it ends in, counted from 1
            end = self._place_events(end, d, len(events))
            self.event = self.width - (1 if method.uses_newton else 0)  # how it was taken stays the last
            self.width += 1
        self.scratch = end

    def without_inputs(self) -> "WorkLayout":
        """As functions of events see it, to whose values the constant inputs of states add nothing."""
        at = copy(self)
        at.stops = None if self.stops is None else replace(self.stops, infused=())
        return at

    def _place_events(self, end: int, d: int, n: int) -> int:
        """Sides of conditions, values and rates with which a search begins, and room to work."""
        self.side, self.value, self.pace, self.touch, self.count, self.g, self.right = (end + i * n for i in range(7))
        end += 7 * n
        self.spot, self.direction, self.phi = (end + i * d for i in range(3))
        self.k_size = end + 3 * d
        end = self.k_size + self.stages * d
        self.fired, self.left = end, end + 1
        return end + 2

    def _place_stops(self, stops: Stops, leaves: int, end: int) -> int:
        """The last leaves are those of the stops; bounds of the time, constant inputs and their (co)tangents."""
        self.stop_leaf = leaves - len(stops.names)
        self.dose_leaf, self.rate_leaf = self.stop_leaf + 1, leaves - 1
        self.low, self.high, self.rate = end, end + 1, end + 2
        self.rate_turn = self.rate + len(stops.infused)
        self.width += 1
        self.plan = 3  # h, how it was taken, and where it ended
        return self.rate_turn + len(stops.infused)


def record_width(method: Method, d: int, stops: Stops | None = None, events: Sequence[EventTraits] = ()) -> int:
    """Numbers that are stored for each accepted step."""
    return WorkLayout(method, d, stops, 0, events).width


def work_size(method: Method, d: int, scratch: int, stops: Stops | None = None) -> int:
    """Entries of the work array one thread needs."""
    return WorkLayout(method, d, stops).scratch + scratch


def stage_rows(method: Method) -> list[tuple[float, tuple[float, ...]]]:
    """Node and weights of every stage, the dense ones after the main ones."""
    return [*zip(method.c, method.a, strict=True), *zip(method.dense_c, method.dense_a, strict=True)]


def stage(method: Method, at: WorkLayout, d: int, s: int, keep: bool) -> str:
    """Compute stage s; ``keep`` stores its argument for the reverse pass."""
    c, a = stage_rows(method)[s]
    place = at.ys + s * d if keep else at.ys
    return (
        f"for i in range({d}):\n"
        f"    w[{place} + i] = w[{at.y} + i] + h * ({combine(a, str(at.k), d)})\n"
        f"field(t + {c!r} * h, w, {place}, {at.k + s * d}, {at.scratch}, p, o)"
    )
