# SPDX-License-Identifier: Apache-2.0
"""The solve of each row of a delay equation: adaptive, or along given steps."""

from pyro_latentde.solve.fused.templates.delays.parts import (
    CLOSENESS,
    EPS,
    DelayLayout,
    lagged_stage,
    next_break,
    weights,
)
from pyro_latentde.solve.fused.templates.first_step import FIRST_STEP
from pyro_latentde.solve.fused.templates.parts import blend, combine, indent
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.row_solution import BAD_LAG

__all__ = ["delay_forward_source"]


def delay_forward_source(at: DelayLayout) -> str:
    """Source of ``forward``; step modes are 0 adaptive, 2 given."""
    parts = [_first_step, next_break, _row, _start_of_row, _first_size, _next_step, _trial, _accepted_step, _end_of_row]
    return "".join(part(at) for part in parts)


def _first_step(at: DelayLayout) -> str:
    """As for other equations; within one least lag of t0 every lagged state is the history's."""
    there = "field(t + sign * h0, w, y1, k1, ws, p, o)"
    back = f"look_back(t, 1.0, h0, 0.0, begin, begin, w, y1, buf, p, o)\n    {there}"
    return FIRST_STEP.replace("p: Floats, o: Ints)", "p: Floats, o: Ints, begin: int, buf: Floats)").replace(
        there, back
    )


def _row(at: DelayLayout) -> str:
    """A row and its lags; steps are told apart by those for which they were chosen."""
    return f"""
def forward(lo: int, hi: int, R: int, T: int, y0: FloatsAt, y0s: int, ts: FloatsAt, tss: int, t0: FloatsAt, t0s: int,
            p: FloatsAt, po: Ints, ps: Ints, ys: Floats, report: Ints, rtol: float, atol: float, max_steps: int,
            mode: int, hs: Floats, hss: int, token: int, buf: Floats, room: int, spans: Ints, w: Floats,
            o: Ints) -> int:
    keep = token != 0
    pos = 0
    for r in range(lo, hi):
        for k in range({at.leaves}):
            o[k] = po[k] + r * ps[k]
        tt = r * tss
        start = t0[r * t0s]
        t = start
        t_end = ts[tt + T - 1]
        span = t_end - t
        begin = pos
        spans[2 * r] = pos
        accepted = 0
        rejected = 0
        evals = 1
        code = 0
        fine = True
        least = np.inf
        for l in range({at.lags}):
            o[{at.leaves} + l] = begin - 1
            lag = p[o[{at.lag}] + l]
            w[{at.chosen} + l] = lag
            if mode == 2 and hss > l + 1:
                w[{at.chosen} + l] = hs[r * hss + 1 + l]
            least = min(least, lag)
            if not (lag > 0.0 and lag < np.inf):
                code = {BAD_LAG}
"""


def _start_of_row(at: DelayLayout) -> str:
    """The state and its slope at t0; outputs there."""
    d = at.d
    history = f"for i in range({d}):\n    w[{at.start} + i] = y0[r * y0s + i]"
    if at.past:
        history = f"past(t, w, {at.ys}, {at.start - d}, {at.scratch}, p, o)"
    return f"""        {indent(history, 2)}
        for i in range({d}):
            w[{at.y} + i] = w[{at.start} + i]
            w[{at.ys} + i] = w[{at.start} + i]
            fine = fine and abs(w[{at.y} + i]) < np.inf
        look_back(t, 0.0, 0.0, 0.0, begin, begin, w, {at.ys}, buf, p, o)
        field(t, w, {at.ys}, {at.k}, {at.scratch}, p, o)
        for i in range({d}):
            fine = fine and abs(w[{at.k} + i]) < np.inf
        if not fine and code == 0:
            code = 3
        j = 0
        while j < T and ts[tt + j] == start:  # whatever comes, the state at t0 is known
            for i in range({d}):
                ys[(r * T + j) * {d} + i] = w[{at.y} + i]
            j += 1
"""


def _first_size(at: DelayLayout) -> str:
    """Given steps are counted, the first adaptive one estimated."""
    d, first = at.d, ""
    if at.method.errors:
        power = 1.0 / (at.method.error_order or 1)
        first = f"""
        if mode == 0 and span > 0.0 and code == 0:
            h = first_step(t, min(span, least), 1.0, rtol, atol, {power!r}, {d}, w, {at.y}, {at.ys}, {at.k}, {at.k_bar},
                           {at.scratch}, p, o, begin, buf)
            evals += 1"""
    return f"""        planned = 0
        offset = 0.0
        rounding = 0.0
        h = 0.0
        if mode == 2:
            while {at.lags + 1} * planned < hss and hs[r * hss + {at.lags + 1} * planned] != 0.0:
                planned += 1{first}
        last = planned == 0 if mode == 2 else span == 0.0
        if last and code == 0:  # nothing to do: a record of size 0 tells the derivative by the output times
            if (pos + 1) * {at.width} > room:
                return r
            buf[pos * {at.width}] = t
            buf[pos * {at.width} + 1] = 0.0
            for i in range({d}):
                buf[pos * {at.width} + 2 + i] = w[{at.y} + i]
                buf[pos * {at.width} + {2 + d} + i] = w[{at.k} + i]
            for i in range({2 + 2 * d}, {at.width}):
                buf[pos * {at.width} + i] = 0.0
            pos += 1
        before = 0.0
        stop = start
        final = False
        arrived = True
        retry = False
        unfinished = False
"""


def _next_step(at: DelayLayout) -> str:
    """How far the next step goes: at most the least lag, and to the next breaking point."""
    return f"""        while code == 0 and not last:
            if mode != 2 and accepted + rejected >= max_steps:
                code = 1
                break
            if mode == 0:
                if arrived:
                    close = {CLOSENESS}
                    stop = start + next_break(t - start, close, p, o)
                    final = stop >= t_end - close
                    if final:
                        stop = t_end
                remaining = stop - t
                h = min(h, least)
                arrived = h * 1.000000001 >= remaining
                if arrived:
                    h = remaining
                elif 2.0 * h > remaining:
                    h = 0.5 * remaining
                if not arrived and h < max(16.0 * {EPS} * abs(t), 1e-300):
                    code = 3 if unfinished else 2
                    break
                last = final and arrived
                t_new = stop if arrived else t + h
            else:
                last = accepted == planned - 1
                h = hs[r * hss + {at.lags + 1} * accepted]
                offset += h
                t_new = start + offset
                if last:  # sums of steps miss the last output time by rounding
                    rounding = (planned + 4) * {EPS} * max(abs(start), abs(t_end))
            near = nearness(t, h, start)
            seek(t, near, begin, pos, w, buf, o)
"""


def _trial(at: DelayLayout) -> str:
    """One step and its error; if it is too large, the step is tried again with a smaller size."""
    method, d = at.method, at.d
    main = len(method.c)
    stages = "\n".join(lagged_stage(at, s) for s in range(1, main))
    needed = "mode == 2 and accepted > 0" if method.fsal else "accepted > 0 and not retry"
    # a first slope that looks ahead from a breaking point, where the lags are not those the steps were chosen for
    fresh = f"if {needed}:\n    {indent(lagged_stage(at, 0), 1)}\n    evals += 1\n"
    ahead = f"for i in range({d}):\n    total += abs(w[{at.k + (main - 1) * d} + i])\n" if method.fsal else ""
    power = 1.0 / (method.error_order or 1)
    taken = f"""{fresh}{stages}
evals += {main - 1}
total = 0.0
for i in range({d}):
    w[{at.y_new} + i] = w[{at.y} + i] + h * ({combine(method.b, str(at.k), d)})
    total += abs(w[{at.y_new} + i])
{ahead}error = 0.0
{_error_norm(method, at)}"""
    return f"""            {indent(taken, 3)}
            fine = error < np.inf and total < np.inf
            if mode == 0 and (not fine or error > 1.0):
                rejected += 1
                unfinished = not fine
                shrink = 0.2
                if fine:
                    shrink = max(0.2, 0.9 * error ** (-{power!r}))
                h = h * shrink
                retry = True
                last = False
                arrived = True
                continue
            if not fine:
                rejected += 1
                code = 3
                break
"""


def _error_norm(method: Method, at: DelayLayout) -> str:
    if not method.errors:
        return ""
    d = at.d
    sums = [f"    e{n} = 0.0" for n in range(len(method.errors))]
    squares = [
        f"        e{n} += (h * ({combine(row, str(at.k), d)}) / scale) ** 2" for n, row in enumerate(method.errors)
    ]
    end = f"    error = math.sqrt(e0 / {d})"
    if len(method.errors) == 2:  # DOP853: two estimates, Hairer, Norsett and Wanner, section II.10
        end = f"""    mixed = e0 + 0.01 * e1
    if mixed > 0.0 or mixed != mixed:
        error = e0 / math.sqrt(mixed * {d})"""
    scale = f"        scale = atol + rtol * max(abs(w[{at.y} + i]), abs(w[{at.y_new} + i]))"
    return "\n".join(["if mode == 0:", *sums, f"    for i in range({d}):", scale, *squares, end])


def _accepted_step(at: DelayLayout) -> str:
    """Record the step, interpolate the outputs inside it, choose the next size (PI control)."""
    method, d = at.method, at.d
    k = method.error_order or 1
    main = len(method.c)
    again = (main - 1) * d if method.fsal else 0
    dense = "\n".join(lagged_stage(at, s) for s in range(main, at.stages))
    dense = f"{dense}\nevals += {len(method.dense_c)}" if dense else ""
    return f"""            if (pos + 1) * {at.width} > room:
                return r
            {indent(dense, 3)}
            rec = pos * {at.width}
            buf[rec] = t
            buf[rec + 1] = h
            for i in range({d}):
                buf[rec + 2 + i] = w[{at.y} + i]
            for i in range({at.stages * d}):
                buf[rec + {2 + d} + i] = w[{at.k} + i]
            for l in range({at.lags}):
                buf[rec + {at.record_lags} + l] = w[{at.chosen} + l]
            pos += 1
            while j < T and (ts[tt + j] <= t_new or last):
                gap = abs(ts[tt + j] - t_new)
                if mode == 2 and ts[tt + j] > t_new and gap > max(rounding, 1e-4 * abs(h)):
                    code = 1  # the given steps do not reach; a little beyond they do, for finite differences
                    break
                if gap <= rounding:
                    for i in range({d}):
                        ys[(r * T + j) * {d} + i] = w[{at.y_new} + i]
                else:
                    theta = (ts[tt + j] - t) / h
                    {indent(weights(at, "b"), 5)}
                    for i in range({d}):
                        ys[(r * T + j) * {d} + i] = w[{at.y} + i] + h * ({blend(method, "b", str(at.k), d)})
                j += 1
            accepted += 1
            t = t_new
            for i in range({d}):
                w[{at.y} + i] = w[{at.y_new} + i]
                w[{at.k} + i] = w[{at.k + again} + i]
            if mode == 0:
                log_error = math.log(max(error, 1e-10))
                factor = 0.9 * math.exp({0.4 / k!r} * before - {0.7 / k!r} * log_error)
                factor = min(10.0, max(0.2, factor))
                if retry and factor > 1.0:
                    factor = 1.0
                before = log_error
                retry = False
                unfinished = False
                h = h * factor
"""


def _end_of_row(at: DelayLayout) -> str:
    """NaN where the row did not arrive; the report, column by column."""
    d = at.d
    return f"""        if j < T and code == 0:  # no steps were given
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
        if not keep:
            pos = begin
    return hi
"""
