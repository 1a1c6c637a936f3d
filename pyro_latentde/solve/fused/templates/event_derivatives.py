# SPDX-License-Identifier: Apache-2.0
"""Derivatives through steps that end in an event.

The size h of such a step solves g(t + h, y_h) = 0, with y_h the state at its end. Behind it everything begins at t + h
with r(t + h, y_h). With cotangents (z, tau) of (y_h, t + h), all that depends on h is worth z . dy_h/dh + tau; by the
implicit function theorem that goes, times -1 / (g_t + g_y . dy_h/dh), to what g depends on, and h is a constant again.

References:
    Hiskens and Pai, Trajectory sensitivity analysis of hybrid systems, IEEE Trans. Circuits Syst. I 47 (2000) 204.
"""

from pyro_latentde.solve.fused.templates.parts import (
    WorkLayout,
    blend,
    combine,
    for_event,
    indent,
    interpolant,
    stage_rows,
)
from pyro_latentde.solve.methods.catalog import Method

__all__ = [
    "event_reverse",
    "event_tangent",
    "event_tangent_end",
    "not_ended",
    "reverse_begin",
    "reverse_slots",
    "tangent_slots",
]


def reverse_slots(at: WorkLayout) -> str:
    """Further arguments of ``adjoint``: cotangents of times and states of events."""
    return ", eg: Floats, ez: Floats" if at.events else ""


def tangent_slots(at: WorkLayout) -> str:
    """Further arguments of ``tangent``: where the tangents of times and states of events go."""
    return ", et: Floats, ey: Floats" if at.events else ""


def _terminal(at: WorkLayout, mark: str) -> str:
    return " or ".join(f"{mark} == {e + 1}.0" for e, kind in enumerate(at.events) if kind.terminal)


def reverse_begin(at: WorkLayout, d: int) -> str:
    """How many events the row had; outputs behind a terminal one are the state there."""
    if not at.events:
        return ""
    ends = _terminal(at, f"buf[n * {at.width} + {at.event}]")
    held = f"""
n = spans[2 * r + 1] - 1
if n >= begin and ({ends}):
    t = buf[n * {at.width}] + buf[n * {at.width} + 1]
    while j >= 0 and sign * ts[tt + j] > sign * t:
        for i in range({d}):
            w[{at.lam} + i] += gy[(r * T + j) * {d} + i]
        j -= 1"""
    return f"""number = 0
for n in range(begin, spans[2 * r + 1]):
    if buf[n * {at.width} + {at.event}] != 0.0:
        number += 1{held if ends else ""}"""


def _stages_by_size(method: Method, at: WorkLayout, d: int, dense: bool) -> str:
    """dk/dh of every stage, and in ``phi`` that of the end of the step."""
    parts = [f"for i in range({d}):\n    w[{at.k_size} + i] = 0.0"]
    main = len(method.c)
    for s, (c, a) in enumerate(stage_rows(method)):
        if s == 0 or (s >= main and not dense):
            continue
        own = method.kind == "implicit"
        lines = (
            f"for i in range({d}):\n"
            f"    w[{at.spot} + i] = w[{at.y} + i] + h * ({combine(a, str(at.k), d)})\n"
            f"    w[{at.direction} + i] = {combine(a, str(at.k), d)} + h * ({combine(a[:s], str(at.k_size), d)})\n"
            f"field_along(t + {c!r} * h, {c!r}, w, {at.spot}, {at.direction}, {at.k_size + s * d}, {at.scratch}, p, o)"
        )
        if own:
            lines += (
                f"\nfield_jac(t + {c!r} * h, w, {at.spot}, {at.jac}, {at.scratch}, p, o)\n"
                f"newton_matrix(h * {method.gamma!r}, w)\n"
                f"lu_solve(w, {at.lu}, {at.pivots}, {at.k_size + s * d})"
            )
        parts.append(lines)
    parts.append(
        f"for i in range({d}):\n"
        f"    w[{at.y_new} + i] = w[{at.y} + i] + h * ({combine(method.b, str(at.k), d)})\n"
        f"    w[{at.phi} + i] = {combine(method.b, str(at.k), d)} + h * ({combine(method.b, str(at.k_size), d)})"
    )
    return "\n".join(parts)


def event_reverse(method: Method, at: WorkLayout, d: int) -> str:
    """After the stages of a step are there: cotangents from behind an event to its end, with h held fixed."""
    if not at.events:
        return ""
    resets = {
        e: f"t_bar += reset{e}_vjp(t + h, w, {at.y_new}, {at.lam}, {at.spot}, {at.scratch}, p, o, g, q)\n"
        f"for i in range({d}):\n    w[{at.lam} + i] = w[{at.spot} + i]"
        for e, kind in enumerate(at.events)
        if kind.resets
    }
    conditions = {
        e: f"t_bar += condition{e}_vjp(t + h, w, {at.y_new}, {at.left}, {at.spot}, {at.scratch}, p, o, g, q)"
        for e in range(len(at.events))
    }
    weights = "\n".join(interpolant(method, "b") + interpolant(method, "d", derivative=True))
    return f"""happened = int(buf[n * {at.width} + {at.event}]) - 1
if happened >= 0:
    number -= 1
    {indent(_stages_by_size(method, at, d, True), 1)}
    {indent(for_event("happened", resets), 1)}
    t_bar += eg[r * {at.room} + number]
    worth = t_bar
    for i in range({d}):
        w[{at.lam} + i] += ez[(r * {at.room} + number) * {d} + i]
        worth += w[{at.lam} + i] * w[{at.phi} + i]
    for jj in range(first, j + 1):
        theta = (ts[tt + jj] - t) / h
        {indent(weights, 2)}
        for i in range({d}):
            worth += gy[(r * T + jj) * {d} + i] * (
                {blend(method, "b", str(at.k), d)}
                + h * ({blend(method, "b", str(at.k_size), d)})
                - theta * ({blend(method, "d", str(at.k), d)})
            )
    conditions_along(t + h, 1.0, w, {at.y_new}, {at.phi}, {at.g}, {at.scratch}, p, o)
    w[{at.left}] = -worth / w[{at.g} + happened]
    {indent(for_event("happened", conditions), 1)}
    for i in range({d}):
        w[{at.lam} + i] += w[{at.spot} + i]"""


def event_tangent(method: Method, at: WorkLayout, d: int) -> str:
    """After the tangents of the stages at fixed h: that of h, and the stages moved with it."""
    if not at.events:
        return ""
    moved = {
        e: f"condition{e}_jvp(t + h, t_dot, w, {at.y_new}, {at.bar}, {at.left}, {at.scratch}, p, o, pd, od)"
        for e in range(len(at.events))
    }
    return f"""happened = int(buf[n * {at.width} + {at.event}]) - 1
h_dot = 0.0
if happened >= 0:
    {indent(_stages_by_size(method, at, d, True), 1)}
    for i in range({d}):
        w[{at.bar} + i] = w[{at.y_dot} + i] + h * ({combine(method.b, str(at.k_bar), d)})
    {indent(for_event("happened", moved), 1)}
    conditions_along(t + h, 1.0, w, {at.y_new}, {at.phi}, {at.g}, {at.scratch}, p, o)
    h_dot = -w[{at.left}] / w[{at.g} + happened]
    for i in range({at.stages * d}):
        w[{at.k_bar} + i] += h_dot * w[{at.k_size} + i]"""


def event_tangent_end(at: WorkLayout, d: int) -> str:
    """After the step: tangents of the event, and of what is behind it."""
    if not at.events:
        return ""
    resets = {
        e: f"reset{e}_jvp(t + h, t_dot, w, {at.y_new}, {at.y_dot}, {at.spot}, {at.scratch}, p, o, pd, od)\n"
        f"for i in range({d}):\n    w[{at.y_dot} + i] = w[{at.spot} + i]"
        for e, kind in enumerate(at.events)
        if kind.resets
    }
    return f"""if happened >= 0:
    t_dot += h_dot
    et[r * {at.room} + number] = t_dot
    for i in range({d}):
        ey[(r * {at.room} + number) * {d} + i] = w[{at.y_dot} + i]
    {indent(for_event("happened", resets), 1)}
    number += 1"""


def not_ended(at: WorkLayout) -> str:
    """A condition: the step does not end in a terminal event."""
    ends = " or ".join(f"happened == {e}" for e, kind in enumerate(at.events) if kind.terminal)
    return f" and not ({ends})" if ends else ""
