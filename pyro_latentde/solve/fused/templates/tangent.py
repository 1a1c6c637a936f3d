# SPDX-License-Identifier: Apache-2.0
"""The exact forward derivative along the recorded steps of each row."""

from collections.abc import Sequence

from pyro_latentde.solve.events.event import EventTraits
from pyro_latentde.solve.fused.templates.event_derivatives import (
    event_tangent,
    event_tangent_end,
    not_ended,
    tangent_slots,
)
from pyro_latentde.solve.fused.templates.implicit import implicit_tangent_step
from pyro_latentde.solve.fused.templates.parts import (
    WorkLayout,
    blend,
    combine,
    indent,
    interpolant,
    lines,
    stage_rows,
)
from pyro_latentde.solve.fused.templates.stops import at_stop_tangent, bounds, start_of_tangent
from pyro_latentde.solve.fused.templates.symplectic import hermite_tangent, symplectic_tangent_step
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.stops.schedule import Stops

__all__ = ["tangent_source"]


def tangent_source(
    method: Method, d: int, leaves: int, stops: Stops | None = None, events: Sequence[EventTraits] = ()
) -> str:
    """Source of ``tangent``: directional derivative of the outputs along given tangents of all inputs."""
    at = WorkLayout(method, d, stops, leaves, events)
    stages, end = _stages(method, at, d), _end(method, at, d)
    moved, only = event_tangent(method, at, d), not_ended(at)
    if method.stiff is not None and at.events:
        moved = _by_kind(at, moved, event_tangent(method.stiff, at, d))
    moved += _end_of_terminal(at)
    within, setup = "sign * ts[tt + j] <= sign * t_new", ""
    if at.stops is not None:
        setup = start_of_tangent(at)
        if at.stops.after:
            within = f"sign * ts[tt + j] < sign * t_new or (ts[tt + j] == t_new and not {_waiting(at)})"
    return f"""
def tangent(lo: int, hi: int, T: int, ts: FloatsAt, tss: int, p: FloatsAt, po: Ints, ps: Ints, pd: Floats,
            pdo: Ints, pds: Ints, status: Ints, buf: Floats, spans: Ints, y0_dot: Floats, ts_dot: Floats,
            t0_dot: Floats, ys_dot: Floats, w: Floats, o: Ints, od: Ints{tangent_slots(at)}) -> int:
    for r in range(lo, hi):
        for k in range({leaves}):
            o[k] = po[k] + r * ps[k]
            od[k] = pdo[k] + r * pds[k]
        tt = r * tss
        t_dot = t0_dot[r]
        for i in range({d}):
            w[{at.y_dot} + i] = y0_dot[r * {d} + i]
        j = 0
{lines("number = 0" if at.events else "", 2)}        begin = spans[2 * r]
        end = spans[2 * r + 1] if status[r] == 0 else begin
        sign = 1.0
        if end > begin and buf[begin * {at.width} + 1] < 0.0:
            sign = -1.0
{lines(setup, 2)}        for n in range(begin, end):
            t = buf[n * {at.width}]
            h = buf[n * {at.width} + 1]
            t_new = buf[(n + 1) * {at.width}] if n + 1 < end else ts[tt + T - 1]
            for i in range({d}):
                w[{at.y} + i] = buf[n * {at.width} + 2 + i]
{lines(bounds(at), 3)}            {indent(stages, 3)}
{lines(moved, 3)}            while j < T and ({within} or n + 1 == end{only}):
                theta = (ts[tt + j] - t) / h if h != 0.0 else 0.0
                theta_dot = ts_dot[r * T + j] - t_dot{" - theta * h_dot" if at.events else ""}
                {indent(_output(method, at, d), 4)}
                j += 1
            for i in range({d}):
                {indent(end, 4)}
{lines(_at_stop(method, at, d), 3)}{lines(event_tangent_end(at, d), 3)}        while j < T:
            for i in range({d}):
                ys_dot[(r * T + j) * {d} + i] = w[{at.y_dot} + i] if status[r] == 0 else 0.0
            j += 1
    return 0
"""


def _waiting(at: WorkLayout) -> str:
    """A condition: outputs at the end of the step wait for the stop there, also where an event comes first."""
    if not at.events:
        return "mark > 0.0"
    record = f"buf[(n + 1) * {at.width}"
    return f"(mark > 0.0 or happened >= 0 and n + 1 < end and {record} + 1] == 0.0 and {record} + {at.mark}] > 0.0)"


def _at_stop(method: Method, at: WorkLayout, d: int) -> str:
    if at.stops is None:
        return ""
    passed = at_stop_tangent(method, at, d)
    if method.stiff is not None:
        passed = _by_kind(at, passed, at_stop_tangent(method.stiff, at, d))
    return f"if mark > 0.0:\n    {indent(passed, 1)}"


def _end(method: Method, at: WorkLayout, d: int) -> str:
    """The tangent of the state at the end of a step."""
    k_dot = at.k_bar
    end = f"w[{at.y_dot} + i] += h * ({combine(method.b, str(k_dot), d)})"
    if method.kind == "symplectic":
        end = f"w[{at.y_dot} + i] = w[{at.bar} + i]"
    if at.events:
        end += f" + h_dot * ({combine(method.b, str(at.k), d)})"
    if method.stiff is not None:
        other = f"w[{at.y_dot} + i] += h * ({combine(method.stiff.b, str(k_dot), d)})"
        if at.events:
            other += f" + h_dot * ({combine(method.stiff.b, str(at.k), d)})"
        end = _by_kind(at, end, other)
    if method.uses_newton:
        end += f"\nw[{k_dot} + i] = w[{k_dot + (at.stages - 1) * d} + i]"
    return end


def _stages(method: Method, at: WorkLayout, d: int) -> str:
    """Stages of a step and their tangents."""
    if method.kind == "implicit":
        return implicit_tangent_step(method, at, d)
    if method.kind == "symplectic":
        return symplectic_tangent_step(method, at, d)
    parts = []
    for s, (c, a) in enumerate(stage_rows(method)):
        parts.append(
            f"for i in range({d}):\n"
            f"    w[{at.ys} + i] = w[{at.y} + i] + h * ({combine(a, str(at.k), d)})\n"
            f"    w[{at.bar} + i] = w[{at.y_dot} + i] + h * ({combine(a, str(at.k_bar), d)})\n"
            f"field(t + {c!r} * h, w, {at.ys}, {at.k + s * d}, {at.scratch}, p, o)\n"
            f"field_jvp(t + {c!r} * h, t_dot, w, {at.ys}, {at.bar}, {at.k_bar + s * d}, {at.scratch}, p, o, pd, od)"
        )
    explicit = "\n".join(parts)
    if method.stiff is None:
        return explicit
    return _by_kind(at, explicit, _stages(method.stiff, at, d))


def _output(method: Method, at: WorkLayout, d: int) -> str:
    """The tangent of an output inside a step."""
    if method.kind == "symplectic":
        return hermite_tangent(at, d)
    weights = "\n".join(interpolant(method, "b") + interpolant(method, "d", derivative=True))
    moved = f"\n        + h_dot * ({blend(method, 'b', str(at.k), d)})" if at.events else ""
    inside = f"""{weights}
for i in range({d}):
    ys_dot[(r * T + j) * {d} + i] = (
        w[{at.y_dot} + i]
        + h * ({blend(method, "b", str(at.k_bar), d)})
        + theta_dot * ({blend(method, "d", str(at.k), d)}){moved}
    )"""
    return inside if method.stiff is None else _by_kind(at, inside, _output(method.stiff, at, d))


def _end_of_terminal(at: WorkLayout) -> str:
    """The last step of a row may end before the last output."""
    only = not_ended(at).replace("and not", "and")
    return f"\nif n + 1 == end{only}:\n    t_new = t + h" if only else ""


def _by_kind(at: WorkLayout, explicit: str, implicit: str) -> str:
    kind = f"buf[n * {at.width} + {at.width - 1}]"
    return f"if {kind} == 0.0:\n    {indent(explicit, 1)}\nelse:\n    {indent(implicit, 1)}"
