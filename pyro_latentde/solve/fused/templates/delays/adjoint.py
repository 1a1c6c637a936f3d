# SPDX-License-Identifier: Apache-2.0
"""The exact reverse of the recorded steps of each row of a delay equation.

The cotangent of a lagged state belongs to the record it was interpolated in: to the state there and to its stages. It
waits in ``acc``, a number for each of these, until the walk back reaches that record.
"""

from pyro_latentde.solve.fused.templates.delays.parts import DelayLayout, record_blend, weights
from pyro_latentde.solve.fused.templates.parts import blend, combine, indent, stage_rows

__all__ = ["delay_adjoint_source"]


def delay_adjoint_source(at: DelayLayout) -> str:
    """Source of ``adjoint``: cotangents of y0, times, t0 and every parameter, the lags among them."""
    return f"{_pull_back(at)}\n{_walk_back(at)}                {indent(_reverse(at), 4)}\n{_row_done(at)}"


def _pull_back(at: DelayLayout) -> str:
    """The reverse of ``look_back``; what it returns belongs to t0."""
    d, begin_k = at.d, at.d
    history = f"for i in range({d}):\n    w[{at.start_bar} + i] += w[place + i]"
    if at.past:
        history = f"""moved = past_vjp(s, w, {at.ys}, place - {d}, {at.ys_dot}, {at.scratch}, p, o, g, q)
t_bar += moved
g[q[{at.lag}] + l] -= moved"""
    spread = "\n".join(
        f"acc[one + {begin_k + s * d} + i] += buf[rec + 1] * b{s} * v"
        for s, row in enumerate(at.method.interpolant)
        if any(row)
    )
    return f"""
def pull_back(t: float, c: float, h: float, near: float, begin: int, pos: int, w: Floats, buf: Floats, acc: Floats,
              p: Floats, o: Ints, g: Floats, q: Ints) -> float:
    t_bar = 0.0
    for l in range({at.lags}):
        m = record_of(l, t, c, h, near, pos, w, buf, o)
        s = t + c * h - p[o[{at.lag}] + l]
        place = {at.bar + d} + l * {d}
        if m < begin:
            {indent(history, 3)}
        else:
            rec = m * {at.width}
            one = m * {at.moved}
            theta = (s - buf[rec]) / buf[rec + 1]
            {indent(weights(at, "b"), 3)}
            {indent(weights(at, "d", True), 3)}
            slope = 0.0
            for i in range({d}):
                v = w[place + i]
                acc[one + i] += v
                {indent(spread, 4)}
                slope += v * ({record_blend(at, "d", "buf")})
            g[q[{at.lag}] + l] -= slope
    return t_bar
"""


def _walk_back(at: DelayLayout) -> str:
    d = at.d
    return f"""
def adjoint(lo: int, hi: int, chunk: int, T: int, ts: FloatsAt, tss: int, p: FloatsAt, po: Ints, ps: Ints, gy: Floats,
            status: Ints, buf: Floats, acc: Floats, spans: Ints, y0_bar: Floats, ts_bar: Floats, t0_bar: Floats,
            g: Floats, go: Ints, gs: Ints, gc: Ints, w: Floats, o: Ints, q: Ints) -> int:
    for r in range(lo, hi):
        for k in range({at.leaves}):
            o[k] = po[k] + r * ps[k]
            q[k] = go[k] + r * gs[k] + chunk * gc[k]
        tt = r * tss
        for i in range({d}):
            w[{at.lam} + i] = 0.0
            w[{at.start_bar} + i] = 0.0
        t_bar = 0.0
        if status[r] == 0:
            j = T - 1
            begin = spans[2 * r]
            start = buf[begin * {at.width}]
            for i in range({d}):
                w[{at.start} + i] = buf[begin * {at.width} + 2 + i]
            for m in range(begin * {at.moved}, spans[2 * r + 1] * {at.moved}):
                acc[m] = 0.0
            for l in range({at.lags}):
                o[{at.leaves} + l] = spans[2 * r + 1] - 1
                w[{at.chosen} + l] = buf[begin * {at.width} + {at.record_lags} + l]
            for pos in range(spans[2 * r + 1] - 1, begin - 1, -1):
                rec = pos * {at.width}
                one = pos * {at.moved}
                t = buf[rec]
                h = buf[rec + 1]
                for i in range({d}):
                    w[{at.y} + i] = buf[rec + 2 + i]
                for i in range({at.stages * d}):
                    w[{at.k} + i] = buf[rec + {2 + d} + i]
                first = j + 1
                while first > 0 and (pos == begin or ts[tt + first - 1] > t):
                    first -= 1
                near = nearness(t, h, start)
                seek(t, near, begin, pos, w, buf, o)
"""


def _reverse(at: DelayLayout) -> str:
    """Cotangents of the outputs, of later looks and of the step's end go to the slopes, then stage by stage back."""
    d, method = at.d, at.method
    b = [*method.b, *([0.0] * len(method.dense_c))]
    seed = "\n".join(
        f"w[{at.k_bar + s * d} + i] = acc[one + {d + s * d} + i]" + (f" + h * {one!r} * lam" if one else "")
        for s, one in enumerate(b)
    )
    spread = "\n".join(
        f"w[{at.k_bar + s * d} + i] += h * b{s} * yb" for s, row in enumerate(method.interpolant) if any(row)
    )
    back = "\n".join(_reverse_stage(at, s) for s in range(at.stages - 1, -1, -1))
    return f"""for i in range({d}):
    lam = w[{at.lam} + i]
    {indent(seed, 1)}
    w[{at.lam} + i] += acc[one + i]
for jj in range(first, j + 1):
    theta = (ts[tt + jj] - t) / h if h != 0.0 else 0.0
    {indent(weights(at, "b"), 1)}
    {indent(weights(at, "d", True), 1)}
    slope = 0.0
    for i in range({d}):
        yb = gy[(r * T + jj) * {d} + i]
        w[{at.lam} + i] += yb
        {indent(spread, 2)}
        slope += yb * ({blend(method, "d", str(at.k), d)})
    ts_bar[r * T + jj] = slope
    t_bar -= slope
if h != 0.0:
    {indent(back, 1)}"""


def _reverse_stage(at: DelayLayout, s: int) -> str:
    """A stage that nothing asks about (the repeated last one, often) is left out."""
    d = at.d
    c, a = stage_rows(at.method)[s]
    pull = "\n        ".join(f"w[{at.k_bar + n * d} + i] += h * {one!r} * yb" for n, one in enumerate(a) if one)
    pull = f"\n        {pull}" if pull else ""
    return f"""size = 0.0
for i in range({d}):
    size += abs(w[{at.k_bar + s * d} + i])
    w[{at.ys} + i] = w[{at.y} + i] + h * ({combine(a, str(at.k), d)})
if size != 0.0:
    look_back(t, {float(c)!r}, h, near, begin, pos, w, {at.ys}, buf, p, o)
    t_bar += field_vjp(t + {c!r} * h, w, {at.ys}, {at.k_bar + s * d}, {at.bar}, {at.scratch}, p, o, g, q)
    for i in range({d}):
        yb = w[{at.bar} + i]
        w[{at.lam} + i] += yb{pull}
    t_bar += pull_back(t, {float(c)!r}, h, near, begin, pos, w, buf, acc, p, o, g, q)"""


def _row_done(at: DelayLayout) -> str:
    """What is left belongs to the history at t0."""
    d = at.d
    rest = f"for i in range({d}):\n    y0_bar[r * {d} + i] = w[{at.lam} + i] + w[{at.start_bar} + i]"
    if at.past:
        rest = f"""for i in range({d}):
    y0_bar[r * {d} + i] = 0.0
if status[r] == 0:
    t = buf[spans[2 * r] * {at.width}]
    t_bar += past_vjp(t, w, {at.ys}, {at.lam - d}, {at.ys_dot}, {at.scratch}, p, o, g, q)"""
    return f"""                j = first - 1
        {indent(rest, 2)}
        t0_bar[r] = t_bar
    return 0
"""
