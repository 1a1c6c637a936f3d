# SPDX-License-Identifier: Apache-2.0
"""The exact forward derivative along the recorded steps of each row of a delay equation.

``acc`` remembers the derivative of every record: of its state, of its stages.
"""

from pyro_latentde.solve.fused.templates.delays.parts import DelayLayout, record_blend, weights
from pyro_latentde.solve.fused.templates.parts import blend, combine, indent, stage_rows

__all__ = ["delay_tangent_source"]


def delay_tangent_source(at: DelayLayout) -> str:
    """Source of ``tangent``: directional derivative of the outputs along given tangents of all inputs."""
    return f"{_look_back_dot(at)}\n{_start_of_row(at)}{_steps(at)}"


def _start_of_row(at: DelayLayout) -> str:
    """The history's tangent at t0."""
    d = at.d
    start = f"for i in range({d}):\n    w[{at.start_dot} + i] = y0_dot[r * {d} + i]"
    if at.past:
        start = f"past_jvp(start, t_dot, w, {at.ys}, {at.ys_dot}, {at.start_dot - d}, {at.scratch}, p, o, pd, od)"
    return f"""
def tangent(lo: int, hi: int, T: int, ts: FloatsAt, tss: int, p: FloatsAt, po: Ints, ps: Ints, pd: Floats,
            pdo: Ints, pds: Ints, status: Ints, buf: Floats, acc: Floats, spans: Ints, y0_dot: Floats, ts_dot: Floats,
            t0_dot: Floats, ys_dot: Floats, w: Floats, o: Ints, od: Ints) -> int:
    for r in range(lo, hi):
        for k in range({at.leaves}):
            o[k] = po[k] + r * ps[k]
            od[k] = pdo[k] + r * pds[k]
        tt = r * tss
        t_dot = t0_dot[r]
        j = 0
        begin = spans[2 * r]
        end = spans[2 * r + 1] if status[r] == 0 else begin
        start = 0.0
        if end > begin:
            start = buf[begin * {at.width}]
            for i in range({d}):
                w[{at.start} + i] = buf[begin * {at.width} + 2 + i]
            for l in range({at.lags}):
                o[{at.leaves} + l] = begin - 1
                w[{at.chosen} + l] = buf[begin * {at.width} + {at.record_lags} + l]
            {indent(start, 3)}
            for i in range({d}):
                w[{at.y_dot} + i] = w[{at.start_dot} + i]
"""


def _steps(at: DelayLayout) -> str:
    """From record to record, with the outputs that lie in each."""
    d = at.d
    stages = "\n".join(_stage(at, s) for s in range(at.stages))
    k_dot = str(at.k_bar)
    return f"""        for pos in range(begin, end):
            rec = pos * {at.width}
            t = buf[rec]
            h = buf[rec + 1]
            t_new = buf[rec + {at.width}] if pos + 1 < end else ts[tt + T - 1]
            for i in range({d}):
                w[{at.y} + i] = buf[rec + 2 + i]
            for i in range({at.stages * d}):
                w[{at.k} + i] = buf[rec + {2 + d} + i]
                w[{at.k_bar} + i] = 0.0
            near = nearness(t, h, start)
            seek(t, near, begin, pos, w, buf, o)
            {indent(stages, 3)}
            one = pos * {at.moved}
            for i in range({d}):
                acc[one + i] = w[{at.y_dot} + i]
            for i in range({at.stages * d}):
                acc[one + {d} + i] = w[{at.k_bar} + i]
            while j < T and (ts[tt + j] <= t_new or pos + 1 == end):
                theta = (ts[tt + j] - t) / h if h != 0.0 else 0.0
                theta_dot = ts_dot[r * T + j] - t_dot
                {indent(weights(at, "b"), 4)}
                {indent(weights(at, "d", True), 4)}
                for i in range({d}):
                    ys_dot[(r * T + j) * {d} + i] = (
                        w[{at.y_dot} + i]
                        + h * ({blend(at.method, "b", k_dot, d)})
                        + theta_dot * ({blend(at.method, "d", str(at.k), d)})
                    )
                j += 1
            for i in range({d}):
                w[{at.y_dot} + i] += h * ({combine(at.method.b, k_dot, d)})
        while j < T:
            for i in range({d}):
                ys_dot[(r * T + j) * {d} + i] = 0.0
            j += 1
    return 0
"""


def _look_back_dot(at: DelayLayout) -> str:
    """Tangents of the lagged states of a stage, behind that of its state."""
    d = at.d
    history = f"for i in range({d}):\n    w[place + i] = w[{at.start_dot} + i]"
    if at.past:
        history = f"past_jvp(s, t_dot - lag_dot, w, {at.ys}, {at.ys_dot}, place - {d}, {at.scratch}, p, o, pd, od)"
    return f"""
def look_back_dot(t: float, t_dot: float, c: float, h: float, near: float, begin: int, pos: int, w: Floats,
                  buf: Floats, acc: Floats, p: Floats, o: Ints, pd: Floats, od: Ints) -> int:
    for l in range({at.lags}):
        m = record_of(l, t, c, h, near, pos, w, buf, o)
        s = t + c * h - p[o[{at.lag}] + l]
        lag_dot = pd[od[{at.lag}] + l]
        place = {at.ys_dot + d} + l * {d}
        if m < begin:
            {indent(history, 3)}
        else:
            rec = m * {at.width}
            one = m * {at.moved}
            theta = (s - buf[rec]) / buf[rec + 1]
            {indent(weights(at, "b"), 3)}
            {indent(weights(at, "d", True), 3)}
            for i in range({d}):
                w[place + i] = (
                    acc[one + i]
                    + buf[rec + 1] * ({record_blend(at, "b", "acc", "one", d)})
                    - lag_dot * ({record_blend(at, "d", "buf")})
                )
    return 0
"""


def _stage(at: DelayLayout, s: int) -> str:
    d = at.d
    c, a = stage_rows(at.method)[s]
    return f"""for i in range({d}):
    w[{at.ys} + i] = w[{at.y} + i] + h * ({combine(a, str(at.k), d)})
    w[{at.ys_dot} + i] = w[{at.y_dot} + i] + h * ({combine(a, str(at.k_bar), d)})
look_back(t, {float(c)!r}, h, near, begin, pos, w, {at.ys}, buf, p, o)
look_back_dot(t, t_dot, {float(c)!r}, h, near, begin, pos, w, buf, acc, p, o, pd, od)
field_jvp(t + {c!r} * h, t_dot, w, {at.ys}, {at.ys_dot}, {at.k_bar + s * d}, {at.scratch}, p, o, pd, od)"""
