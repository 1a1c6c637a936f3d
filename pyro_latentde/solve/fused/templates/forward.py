# SPDX-License-Identifier: Apache-2.0
"""The adaptive (or fixed, or replayed) solve of each row."""

from collections.abc import Sequence

from pyro_latentde.solve.events.event import EventTraits
from pyro_latentde.solve.fused.templates.events import (
    event_happens,
    event_rows_begin,
    event_search,
    event_slots,
    watched_anew,
)
from pyro_latentde.solve.fused.templates.first_step import first_step
from pyro_latentde.solve.fused.templates.implicit import implicit_trial
from pyro_latentde.solve.fused.templates.landing import (
    after_last_stop,
    end_of_given,
    given_steps,
    landed,
    next_step_to_stop,
    waiting,
    wished,
)
from pyro_latentde.solve.fused.templates.parts import WorkLayout, blend, combine, indent, interpolant, lines, stage
from pyro_latentde.solve.fused.templates.recording import by_kind, record_end, record_stages, zero_stages
from pyro_latentde.solve.fused.templates.stops import start_at_stops
from pyro_latentde.solve.fused.templates.switching import back_to_explicit, leap, lost_leap, start_switching, switch
from pyro_latentde.solve.fused.templates.symplectic import hermite_output, speeds_at_ends, symplectic_trial
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.stops.schedule import Stops

__all__ = ["forward_source"]


def forward_source(
    method: Method, d: int, leaves: int, stops: Stops | None = None, events: Sequence[EventTraits] = ()
) -> str:
    """Source of ``forward``: see the package for what it does; step modes are 0 adaptive, 1 fixed, 2 replayed."""
    at = WorkLayout(method, d, stops, leaves, events)
    return "".join(
        [
            _start_of_row(method, at, d, leaves),
            _plan_of_steps(method, at, d),
            _next_step(method, at, d),
            _trial(method, at, d),
            _accepted_step(method, at, d),
            _end_of_row(method, at, d),
        ]
    )


def _start_of_row(method: Method, at: WorkLayout, d: int, leaves: int) -> str:
    """The state and its slope at t0; outputs there."""
    stops, there, known = "", "", f"w[{at.y} + i]"
    if at.stops is not None:
        stops = start_at_stops(at, d, zero_stages(method, at, d))
        if at.stops.after:
            there = " and p[stops + m] != start"
        else:
            known = "y0[r * y0s + i]"
    return f"""
def forward(lo: int, hi: int, R: int, T: int, y0: FloatsAt, y0s: int, ts: FloatsAt, tss: int, t0: FloatsAt, t0s: int,
            p: FloatsAt, po: Ints, ps: Ints, ys: Floats, report: Ints, rtol: float, atol: float, max_steps: int,
            mode: int, step: float, hs: Floats, hss: int, token: int, buf: Floats, room: int, spans: Ints, w: Floats,
            o: Ints{event_slots(at)}) -> int:
    keep = token != 0
    pos = 0
    for r in range(lo, hi):
        for k in range({leaves}):
            o[k] = po[k] + r * ps[k]
        tt = r * tss
        start = t0[r * t0s]
        t = start
        t_end = ts[tt + T - 1]
        span = t_end - t
        sign = 1.0 if span >= 0.0 else -1.0
        spans[2 * r] = pos
        accepted = 0
        rejected = 0
        evals = 1
        code = 0
        fine = True
        for i in range({d}):
            w[{at.y} + i] = y0[r * y0s + i]
            fine = fine and abs(w[{at.y} + i]) < np.inf
{lines(stops, 2)}        field(t, w, {at.y}, {at.k}, {at.scratch}, p, o)
        for i in range({d}):
            fine = fine and abs(w[{at.k} + i]) < np.inf
{lines(event_rows_begin(at), 2)}        if not fine:
            code = 3
        j = 0
        while j < T and ts[tt + j] == start{there}:  # whatever comes, the state at t0 is known
            for i in range({d}):
                ys[(r * T + j) * {d} + i] = {known}
            j += 1
"""


def _plan_of_steps(method: Method, at: WorkLayout, d: int) -> str:
    """Given steps are counted, fixed ones chosen, the first adaptive one estimated."""
    k = method.error_order or 1
    return f"""        planned = 0
        finish = t_end
        rounding = 0.0
        h = 0.0
        {indent(_chosen_steps(at), 2)}
        {indent(first_step(method, at, d, k), 2)}
        last = planned == 0 if mode == 2 else span == 0.0
        if keep and last and code == 0:  # nothing to do: a record of size 0 tells the derivative by the output times
            if (pos + 1) * {at.width} > room:
                return r
            buf[pos * {at.width}] = t
            buf[pos * {at.width} + 1] = 0.0
            for i in range({d}):
                buf[pos * {at.width} + 2 + i] = w[{at.y} + i]
            {indent(record_stages(method, at, d, "pos * " + str(at.width), 1), 3)}
{lines(record_end(at, "pos * " + str(at.width), "0.0 - m"), 3)}            pos += 1
        {indent(_start_of_implicit(method), 2)}
        before = 0.0
        retry = False
        unfinished = False
"""


def _chosen_steps(at: WorkLayout) -> str:
    """Equal steps, or given ones."""
    if at.stops is not None:
        return f"""origin = start
done = 0
count = 0
over = False
if mode == 2:
    {indent(given_steps(at), 1)}
elif mode == 1:
    h = step"""
    planned = _place("planned", at)
    return f"""if mode == 1:
    planned = int(np.ceil(abs(span) / step * (1.0 - 1e-12)))
    h = span / max(1, planned)
elif mode == 2:
    offset = 0.0
    while {planned} < hss and hs[r * hss + {planned}] != 0.0:
        offset += hs[r * hss + {planned}]
        planned += 1
    finish = start + offset
    offset = 0.0
    if planned > 0:
        sign = 1.0 if hs[r * hss] > 0.0 else -1.0"""


def _place(count: str, at: WorkLayout) -> str:
    """Where a given step lies in its row."""
    return count if at.plan == 1 else f"{at.plan} * {count}"


def _start_of_implicit(method: Method) -> str:
    """No Jacobian yet; 2 says that the first stage is f(t, y), 1 that it is the last of the step before."""
    if not method.uses_newton:
        return ""
    lines = ["stale = True", "fresh = False", "age = 0", "taken = 2.0"]
    return "\n".join(lines + start_switching(method))


def _next_step(method: Method, at: WorkLayout, d: int) -> str:
    """How far the next step goes, or why there is none."""
    if at.stops is not None:
        return next_step_to_stop(method, at, d, _given_kind(method, at), zero_stages(method, at, d))
    start, taken = ("origin", "accepted - base") if at.events else ("start", "accepted")
    return f"""        while code == 0 and not last:
            if mode != 2 and accepted + rejected >= max_steps:
                code = 1
                break
            if mode == 0:
                remaining = t_end - t
                if abs(h) >= abs(remaining):
                    h = remaining
                    last = True
                elif 2.0 * abs(h) > abs(remaining):
                    h = 0.5 * remaining
                if not last and abs(h) < max(16.0 * 2.220446049250313e-16 * abs(t), 1e-300):
                    code = 3 if unfinished else 2
                    break
            else:
                last = {"accepted - (0 if mode == 2 else base)" if at.events else "accepted"} == planned - 1
            if mode == 0:
                t_new = t_end if last else t + h
                h = t_new - t  # what t moves by, also where t is late and h small
            elif mode == 1:
                t_new = t_end if last else {start} + ({taken} + 1) * h
            else:
                h = hs[r * hss + {_place("accepted", at)}]
                {indent(_given_kind(method, at), 4)}
                offset += h
                t_new = {start} + offset
                if last:  # sums of steps miss the last output time by rounding
                    rounding = (hss + 4) * 2.220446049250313e-16 * max(abs(start), abs(t_end))
"""


def _trial(method: Method, at: WorkLayout, d: int) -> str:
    """One step and its error; if it is too large, the step is tried again with a smaller size."""
    if method.kind == "explicit":
        taken = _explicit_trial(method, at, d)
    elif method.kind == "symplectic":
        taken = symplectic_trial(method, at, d)
    elif method.kind == "implicit":
        taken = f"{implicit_trial(method, at, d)}\nerror = 0.0\n{_error_norm(method, at, d)}"
    else:
        implicit = (
            f"{implicit_trial(method.stiff, at, d, lost_leap(method))}\nerror = 0.0\n{_error_norm(method.stiff, at, d)}"
        )
        taken = f"if stiff:\n    {indent(implicit, 1)}\nelse:\n    {indent(_explicit_trial(method, at, d), 1)}"
    k = method.error_order or 1
    return f"""            {indent(taken, 3)}
            fine = error < np.inf and total < np.inf
            if mode == 0 and (not fine or error > 1.0):
                rejected += 1
                unfinished = not fine
{lines(lost_leap(method), 4)}                shrink = 0.2
                if fine:
                    shrink = max(0.2, 0.9 * error ** (-{1.0 / k!r}))
                h = h * shrink
                retry = True
                last = False
                continue
            if not fine:
                rejected += 1
                code = 3
                break
{lines(event_search(method, at, d), 3)}"""


def _explicit_trial(method: Method, at: WorkLayout, d: int) -> str:
    stages = "\n".join(stage(method, at, d, s, False) for s in range(1, len(method.c)))
    return f"""{_fresh_slope(method, at)}
{stages}
evals += {len(method.c) - 1}
total = 0.0
for i in range({d}):
    w[{at.y_new} + i] = w[{at.y} + i] + h * ({combine(method.b, str(at.k), d)})
    total += abs(w[{at.y_new} + i])
{_last_stage(method, at, d)}
error = 0.0
{_error_norm(method, at, d)}"""


def _accepted_step(method: Method, at: WorkLayout, d: int) -> str:
    """Record the step, interpolate the outputs inside it, choose the next size (PI control)."""
    k = method.error_order or 1
    again = (len(method.c) - 1) * d if method.fsal else 0  # where the next first slope is
    stops, moved, stop, goes_on, within = at.stops is not None, "", "", "", "sign * ts[tt + j] <= sign * t_new"
    if stops:
        moved = by_kind(method, lambda one: end_of_given(one, at, d))
        stop, goes_on = landed(method, at, d, zero_stages(method, at, d)), wished()
        if at.stops.after:
            within = f"sign * ts[tt + j] < sign * t_new or (ts[tt + j] == t_new and not {waiting(at)})"
    return f"""            if keep:
                if (pos + 1) * {at.width} > room:
                    return r
                at_record = pos * {at.width}
                buf[at_record] = t
                buf[at_record + 1] = h
                for i in range({d}):
                    buf[at_record + 2 + i] = w[{at.y} + i]
                {indent(record_stages(method, at, d, "at_record", at.stages), 4)}
{lines(record_end(at, "at_record", "m if landing else 0.0 - m", "fired + 1.0"), 4)}                pos += 1
            {indent(_dense_stages(method, at, d), 3)}
{lines(moved, 3)}            while j < T and ({within} or last):
                gap = abs(ts[tt + j] - t_new)
                if mode == 2 and sign * ts[tt + j] > sign * t_new and gap > max(rounding, {_reach(at)} * abs(h)):
                    code = 1  # the given steps do not reach; a little beyond they do, for finite differences
                    break
                if gap <= rounding:
                    for i in range({d}):
                        ys[(r * T + j) * {d} + i] = w[{at.y_new} + i]
                else:
                    theta = (ts[tt + j] - t) / h
                    {indent(_output(method, at, d), 5)}
                j += 1
            {indent(_after_implicit(method), 3)}
            accepted += 1
            {indent(switch(method, at, d), 3)}
            t = t_new
            for i in range({d}):
                w[{at.y} + i] = w[{at.y_new} + i]
                w[{at.k} + i] = w[{at.k + again} + i]
            {indent(back_to_explicit(method, at), 3)}
{lines(stop, 3)}            if mode == 0:
                log_error = math.log(max(error, 1e-10))  # a log and an exp cost less than two powers
                factor = 0.9 * math.exp({0.4 / k!r} * before - {0.7 / k!r} * log_error)
                factor = min(10.0, max(0.2, factor))
                if retry and factor > 1.0:
                    factor = 1.0
                before = log_error
                retry = False
                unfinished = False
                h = h * factor
{lines(goes_on, 4)}{lines(leap(method), 4)}{lines(watched_anew(at), 3)}{lines(event_happens(method, at, d), 3)}"""


def _reach(at: WorkLayout) -> str:
    """How far beyond given steps an output may lie, in units of the last: events move what is behind them."""
    return "0.1" if at.events else "1e-4"


def _output(method: Method, at: WorkLayout, d: int) -> str:
    """The state inside a step."""
    if method.stiff is not None:
        return by_kind(method, lambda one: _output(one, at, d))
    if method.kind == "symplectic":
        return hermite_output(at, d)
    weights = "\n".join(interpolant(method, "b"))
    return f"""{weights}
for i in range({d}):
    ys[(r * T + j) * {d} + i] = w[{at.y} + i] + h * ({blend(method, "b", str(at.k), d)})"""


def _given_kind(method: Method, at: WorkLayout) -> str:
    if method.stiff is None:
        return ""
    return f"stiff = hs[r * hss + {at.plan} * accepted + 1] != 0.0"


def _after_implicit(method: Method) -> str:
    return "" if not method.uses_newton else "fresh = False\nage += 1\ntaken = 1.0"


def _end_of_row(method: Method, at: WorkLayout, d: int) -> str:
    """NaN where the row did not arrive; the report, column by column."""
    stop = "" if at.stops is None else after_last_stop(at, d, zero_stages(method, at, d))
    return f"""{lines(stop, 2)}        if j < T and code == 0:  # no steps were given
            code = 1
        while j < T:
            for i in range({d}):
                ys[(r * T + j) * {d} + i] = np.nan
            j += 1
        report[r] = code
        report[R + r] = accepted
        report[2 * R + r] = rejected
        report[3 * R + r] = evals
        report[4 * R + r] = token + r if keep else 0
        spans[2 * r + 1] = pos
    return hi
"""


def _dense_stages(method: Method, at: WorkLayout, d: int) -> str:
    """Stages that only outputs strictly inside the step need."""
    dense = "\n".join(stage(method, at, d, s, False) for s in range(len(method.c), at.stages))
    if method.kind == "symplectic":
        dense = speeds_at_ends(at, d)
    if not dense:
        return ""
    inside = "j < T and sign * ts[tt + j] < sign * t_new - rounding"
    beyond = "mode == 2 and last and abs(ts[tt + T - 1] - t_new) > rounding"
    if at.stops is not None:
        beyond += " or mode == 2 and landing and abs(t_new - t - h) > rounding"
    return f"if {inside} or {beyond}:\n    {indent(dense, 1)}\n    evals += {method.dense_evals}"


def _last_stage(method: Method, at: WorkLayout, d: int) -> str:
    """The slope at the end of a step must be finite too where the next step begins with it."""
    if not method.fsal:
        return ""
    return f"for i in range({d}):\n    total += abs(w[{at.k + (len(method.c) - 1) * d} + i])"


def _fresh_slope(method: Method, at: WorkLayout) -> str:
    """The first stage of a step that does not begin with the last of the step before."""
    if method.fsal:
        return ""
    begun = "" if at.stops is None else " and p[stops + m - ahead] != t"
    return f"if accepted > 0 and not retry{begun}:\n    field(t, w, {at.y}, {at.k}, {at.scratch}, p, o)\n    evals += 1"


def _error_norm(method: Method, at: WorkLayout, d: int) -> str:
    if not method.errors:
        return ""
    sums = [f"e{n} = 0.0" for n in range(len(method.errors))]
    squares = [f"    e{n} += (h * ({combine(row, str(at.k), d)}) / scale) ** 2" for n, row in enumerate(method.errors)]
    if method.filtered:
        sums.append(f"for i in range({d}):\n    w[{at.delta} + i] = h * ({combine(method.errors[0], str(at.k), d)})")
        sums.append(f"lu_solve(w, {at.lu}, {at.pivots}, {at.delta})")
        squares = [f"    e0 += (w[{at.delta} + i] / scale) ** 2"]
    loop = [
        f"for i in range({d}):",
        f"    scale = atol + rtol * max(abs(w[{at.y} + i]), abs(w[{at.y_new} + i]))",
        *squares,
    ]
    if len(method.errors) == 1:
        end = [f"error = math.sqrt(e0 / {d})"]
    else:  # DOP853: two estimates, Hairer, Norsett and Wanner, section II.10
        end = [
            "mixed = e0 + 0.01 * e1",
            "if mixed > 0.0 or mixed != mixed:",
            f"    error = e0 / math.sqrt(mixed * {d})",
        ]
    return "\n".join(["if mode == 0:", *("    " + indent(line, 1) for line in [*sums, *loop, *end])])
