# SPDX-License-Identifier: Apache-2.0
"""Times at which every step of a row must end: what happens there, forward and in reverse.

The times lie in a parameter of the kernel, increasing between -inf and inf, so that no row runs past them; ``m`` is the
number of the one ahead. At each of them doses are added to states, constant inputs change, and the slope is computed
anew. A second one at the same time is reached by a step of size 0. A record tells by ``mark`` which stop was ahead of
its step: m if the step ended there, else -m.

Between two stops the field sees times that lie strictly between them (``low`` to ``high``), so that a stage at a stop
belongs to the piece of its own step, whatever way the field is written.

In derivatives the steps between two stops move with the first one, and what is missing up to the second is read off the
last of them: y(stop) = y_n + h b(theta) k at theta = 1. So a stop that moves carries the slope before it, and takes
with it all steps that follow.
"""

from pyro_latentde.solve.fused.templates.parts import WorkLayout, combine, indent
from pyro_latentde.solve.fused.templates.recording import record_end
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.stops.schedule import NUDGE

__all__ = [
    "at_stop_reverse",
    "at_stop_tangent",
    "before_stop_reverse",
    "bounds",
    "constant_input",
    "constant_inputs_reverse",
    "end_slope",
    "field_time",
    "pass_stop_source",
    "start_at_stops",
    "start_of_reverse",
    "start_of_tangent",
    "zero_step",
]


def pass_stop_source(at: WorkLayout) -> str:
    """``between_stops`` sets the times the field may see; ``pass_stop`` lets stop m happen and gives the next one."""
    stops = at.stops
    if stops is None:
        return ""
    changes = [
        f"    w[y + {s}] += p[o[{at.dose_leaf}] + m * {len(stops.dosed)} + {c}]" for c, s in enumerate(stops.dosed)
    ]
    changes += [
        f"    w[{at.rate + c}] += p[o[{at.rate_leaf}] + m * {len(stops.infused)} + {c}]"
        for c in range(len(stops.infused))
    ]
    return "\n".join(
        [
            f"""
def between_stops(m: int, ahead: int, w: Floats, p: Floats, o: Ints) -> float:
    one = p[o[{at.stop_leaf}] + m - ahead]
    two = p[o[{at.stop_leaf}] + m]
    low = min(one, two)
    high = max(one, two)
    w[{at.low}] = low + max({NUDGE!r} * min(abs(low), 1e300), 1e-300)
    w[{at.high}] = high - max({NUDGE!r} * min(abs(high), 1e300), 1e-300)
    return 0.0


def pass_stop(m: int, ahead: int, y: int, w: Floats, p: Floats, o: Ints) -> int:""",
            *changes,
            "    m += ahead",
            "    between_stops(m, ahead, w, p, o)",
            "    return m",
            "",
        ]
    )


def field_time(at: WorkLayout | None) -> list[str]:
    """What a field and its derivatives do first: look at the time between the stops."""
    return [] if at is None or at.stops is None else [f"t = min(max(t, w[{at.low}]), w[{at.high}])"]


def constant_input(at: WorkLayout | None, state: int, turn: bool = False) -> str:
    """What is added to the slope of a state, or (``turn``) to its tangent."""
    if at is None or at.stops is None or state not in at.stops.infused:
        return ""
    return f" + w[{(at.rate_turn if turn else at.rate) + at.stops.infused.index(state)}]"


def constant_inputs_reverse(at: WorkLayout | None) -> list[str]:
    """The cotangent of a slope is that of its constant input."""
    infused = () if at is None or at.stops is None else at.stops.infused
    return [f"w[{at.rate_turn + c}] += w[co + {s}]" for c, s in enumerate(infused)]


def end_slope(method: Method, base: str, d: int) -> str:
    """dy/dt at the end of a step by its interpolant."""
    weights = [sum(x * (q + 1) for q, x in enumerate(row)) for row in method.interpolant[: method.stages]]
    if method.fsal:
        weights = [0.0] * (method.stages - 1) + [1.0]  # f(t + h, y_new); the other weights are rounding
    return combine(weights, base, d)


def zero_step(at: WorkLayout, d: int, stages: str) -> str:
    """The record of a step of size 0 that ends at stop m; ``stages`` stores its first slope where it is needed."""
    return f"""if keep:
    if (pos + 1) * {at.width} > room:
        return r
    buf[pos * {at.width}] = t
    buf[pos * {at.width} + 1] = 0.0
    for i in range({d}):
        buf[pos * {at.width} + 2 + i] = w[{at.y} + i]
    {indent(stages, 1)}
    {indent(record_end(at, f"pos * {at.width}", "m"), 1)}
    pos += 1
accepted += 1
m = pass_stop(m, ahead, {at.y}, w, p, o)"""


def start_at_stops(at: WorkLayout, d: int, stages: str) -> str:
    """The first stop from the start on, and those that lie there."""
    rates = "\n".join(f"w[{at.rate + c}] = 0.0" for c in range(len(at.stops.infused)))
    slope = f"field(t, w, {at.y}, {at.k}, {at.scratch}, p, o)\nevals += 1" if stages else ""
    return f"""stops = o[{at.stop_leaf}]
m = 1
while p[stops + m] < start:
    m += 1
ahead = 1
if span < 0.0:
    ahead = -1
    if p[stops + m] > start:
        m -= 1
    else:
        while p[stops + m + 1] == start:
            m += 1
{rates}
between_stops(m, ahead, w, p, o)
while mode != 2 and p[stops + m] == start:
    {indent(slope, 1)}
    {indent(zero_step(at, d, stages), 1)}"""


def start_of_reverse(at: WorkLayout) -> str:
    """The direction, also where the first step has size 0; constant inputs as they were at the end."""
    infused = len(at.stops.infused)
    lines = [f"w[{at.rate + c}] = 0.0\nw[{at.rate_turn + c}] = 0.0" for c in range(infused)]
    sums = "\n        ".join(
        f"w[{at.rate + c}] += p[o[{at.rate_leaf}] + int(mark) * {infused} + {c}]" for c in range(infused)
    )
    if infused:
        lines.append(
            f"for n in range(begin, spans[2 * r + 1]):\n"
            f"    mark = buf[n * {at.width} + {at.mark}]\n"
            f"    if mark > 0.0:\n        {sums}"
        )
    return "\n".join([_direction(at), *lines])


def start_of_tangent(at: WorkLayout) -> str:
    """The direction; no constant inputs yet."""
    rates = [f"w[{at.rate + c}] = 0.0\nw[{at.rate_turn + c}] = 0.0" for c in range(len(at.stops.infused))]
    return "\n".join([_direction(at), *rates])


def _direction(at: WorkLayout) -> str:
    return f"""ahead = 1
if spans[2 * r + 1] > begin and ts[tt + T - 1] < buf[begin * {at.width}]:
    sign = -1.0
    ahead = -1"""


def bounds(at: WorkLayout) -> str:
    """Of a recorded step: what the field may see, and the stop it ended at, if it did."""
    if at.stops is None:
        return ""
    return f"""mark = buf[n * {at.width} + {at.mark}]
m = int(abs(mark))
between_stops(m, ahead, w, p, o)"""


def before_stop_reverse(at: WorkLayout) -> str:
    """The stop at the end of a step in reverse: cotangents of what happened there and of the steps after it."""
    if at.stops is None:
        return ""
    dosed, infused = at.stops.dosed, at.stops.infused
    lines = [f"g[q[{at.dose_leaf}] + m * {len(dosed)} + {c}] += w[{at.lam + s}]" for c, s in enumerate(dosed)]
    for c in range(len(infused)):
        place = f"m * {len(infused)} + {c}"
        lines.append(f"g[q[{at.rate_leaf}] + {place}] += w[{at.rate_turn + c}]")
        lines.append(f"w[{at.rate + c}] -= p[o[{at.rate_leaf}] + {place}]")
    lines += [f"g[q[{at.stop_leaf}] + m] += t_bar", "t_bar = 0.0"]
    return "\nif mark > 0.0:\n    " + "\n    ".join(lines)


def at_stop_reverse(method: Method, at: WorkLayout, d: int) -> str:
    """The end of a step moves along its slope with the stop, and against the stop before."""
    if at.stops is None:
        return ""
    return f"""if mark > 0.0:
    slope = 0.0
    for i in range({d}):
        slope += w[{at.lam} + i] * ({end_slope(method, str(at.k), d)})
    g[q[{at.stop_leaf}] + m] += slope
    t_bar -= slope
"""


def at_stop_tangent(method: Method, at: WorkLayout, d: int) -> str:
    """Tangents of the state and of the grid behind a stop."""
    dosed, infused = at.stops.dosed, at.stops.infused
    lines = [f"w[{at.y_dot + s}] += pd[od[{at.dose_leaf}] + m * {len(dosed)} + {c}]" for c, s in enumerate(dosed)]
    for c in range(len(infused)):
        place = f"m * {len(infused)} + {c}"
        lines.append(f"w[{at.rate_turn + c}] += pd[od[{at.rate_leaf}] + {place}]")
        lines.append(f"w[{at.rate + c}] += p[o[{at.rate_leaf}] + {place}]")
    return "\n".join(
        [
            f"stop_dot = pd[od[{at.stop_leaf}] + m]",
            f"for i in range({d}):",
            f"    w[{at.y_dot} + i] += (stop_dot - t_dot) * ({end_slope(method, str(at.k), d)})",
            "t_dot = stop_dot",
            *lines,
        ]
    )
