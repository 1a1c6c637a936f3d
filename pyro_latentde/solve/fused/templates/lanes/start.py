# SPDX-License-Identifier: Apache-2.0
"""How rows begin in the kernels of several rows: each lane's state, first slope and first step."""

from pyro_latentde.solve.fused.templates.lanes.parts import LaneLayout, lane_record
from pyro_latentde.solve.fused.templates.parts import indent

__all__ = ["fill", "head"]


def head(at: LaneLayout) -> str:
    width = at.d + 2
    return f"""
def forward(lo: int, hi: int, R: int, T: int, y0: FloatsAt, y0s: int, ts: FloatsAt, tss: int, t0: FloatsAt, t0s: int,
            p: FloatsAt, po: Ints, ps: Ints, ys: Floats, report: Ints, rtol: float, atol: float, max_steps: int,
            mode: int, step: float, hs: Floats, hss: int, token: int, buf: Floats, room: int, spans: Ints, w: Floats,
            o: Ints) -> int:
    keep = token != 0
    most = room // ({width} * (hi - lo))
    done = hi
    upcoming = lo
    for k in range({len(at.sizes)}):
        o[k] = po[k]
    for i in range({at.free}):
        w[i, :] = 0.0
    for l in range({at.lanes}):
        {at.count("row")} = -1
    while True:
        idle = 0
        for l in range({at.lanes}):
            if {at.count("row")} < 0:
                idle += 1
        if upcoming == hi and idle == {at.lanes}:
            break
"""


def fill(at: LaneLayout) -> str:
    """Idle lanes take rows, half of them at once, since the slope at the start is found for all lanes together."""
    d, k = at.d, at.method.error_order or 1
    copies = "".join(
        f"""
                    for m in range({at.sizes[n]}):
                        {at.lane(place, "m")} = p[po[{n}] + r * ps[{n}] + m]"""
        for n, place in at.copies.items()
    )
    zeros = ("accepted", "rejected", "code", "last", "retry", "unfinished", "planned")
    return f"""        if upcoming < hi and 2 * idle >= {at.lanes}:
            for l in range({at.lanes}):
                {at.count("fresh")} = 0
                {at.lane(at.chosen)} = 0.0
                if {at.count("row")} < 0 and upcoming < hi:
                    r = upcoming
                    upcoming += 1
                    {at.count("row")} = r
                    {at.count("fresh")} = 1
                    {at.lane(at.chosen)} = 1.0
                    {indent(chr(10).join(f"{at.count(name)} = 0" for name in zeros), 5)}
                    {at.count("evals")} = 1
                    start = t0[r * t0s]
                    {at.lane(at.start)} = start
                    {at.lane(at.t)} = start
                    {at.lane(at.end)} = ts[r * tss + T - 1]
                    {at.lane(at.sign)} = 1.0 if {at.lane(at.end)} - start >= 0.0 else -1.0
                    {at.lane(at.before)} = 0.0
                    {at.lane(at.offset)} = 0.0
                    {at.lane(at.rounding)} = 0.0
                    {at.lane(at.h)} = 0.0
                    for i in range({d}):
                        {at.lane(at.y, "i")} = y0[r * y0s + i]{copies}
                    j = 0
                    while j < T and ts[r * tss + j] == start:  # whatever comes, the state at t0 is known
                        for i in range({d}):
                            ys[(r * T + j) * {d} + i] = {at.lane(at.y, "i")}
                        j += 1
                    {at.count("j")} = j
            fresh = w[{at.chosen}, :] > 0.5
            t = w[{at.t}, :]
            field(t, w, {at.y}, {at.temp}, {at.free}, p, o)
            total = Lanes(0.0)
            for i in range({d}):
                total = total + (0.0 if abs(w[{at.y} + i, :]) < np.inf and abs(w[{at.temp} + i, :]) < np.inf else 1.0)
                w[{at.k} + i, :] = w[{at.temp} + i, :] if fresh else w[{at.k} + i, :]
            w[{at.total}, :] = total
            {indent(_first_step(at, k), 3)}
            for l in range({at.lanes}):
                if {at.count("fresh")} == 1:
                    r = {at.count("row")}
                    span = {at.lane(at.end)} - {at.lane(at.start)}
                    {at.count("last")} = 1 if span == 0.0 else 0
                    if {at.lane(at.total)} > 0.0:
                        {at.count("code")} = 3
                    {indent(_planned(at), 5)}
                    if keep and {at.count("last")} == 1 and {at.count("code")} == 0:
                        {indent(lane_record(at, "0.0"), 6)}
"""


def _first_step(at: LaneLayout, k: int) -> str:
    """Starting step, as the ``first_step`` of single rows."""
    if not at.method.errors:
        return ""
    d = at.d
    return f"""if mode == 0:
    way = w[{at.sign}, :]
    whole = abs(w[{at.end}, :] - t)
    d0 = Lanes(0.0)
    d1 = Lanes(0.0)
    for i in range({d}):
        scale = atol + rtol * abs(w[{at.y} + i, :])
        d0 = d0 + (w[{at.y} + i, :] / scale) ** 2
        d1 = d1 + (w[{at.temp} + i, :] / scale) ** 2
    d0 = math.sqrt(d0 / {d})
    d1 = math.sqrt(d1 / {d})
    still = d0 < 1e-5 or d1 * whole < 1e-5
    unit = whole if still else d0 / d1
    h0 = min(1e-6 * unit if still else 0.01 * unit, whole)
    for i in range({d}):
        w[{at.ys} + i, :] = w[{at.y} + i, :] + way * h0 * w[{at.temp} + i, :]
    field(t + way * h0, w, {at.ys}, {at.ys + d}, {at.free}, p, o)
    d2 = Lanes(0.0)
    for i in range({d}):
        scale = atol + rtol * abs(w[{at.y} + i, :])
        d2 = d2 + ((w[{at.ys + d} + i, :] - w[{at.temp} + i, :]) / scale) ** 2
    d2 = math.sqrt(d2 / {d}) / h0
    change = unit * max(d1, unit * d2)
    h1 = h0 if change <= 1e-15 else unit * math.exp({1.0 / k!r} * math.log(0.01 / change))
    first = min(100.0 * h0, h1, whole)
    first = first if 0.0 < first < np.inf and d2 < np.inf else 1e-6 * whole
    w[{at.h}, :] = way * first if fresh else w[{at.h}, :]
    for l in range({at.lanes}):
        if {at.count("fresh")} == 1 and {at.lane(at.total)} == 0.0 and {at.lane(at.end)} != {at.lane(at.start)}:
            {at.count("evals")} += 1"""


def _planned(at: LaneLayout) -> str:
    """Equal steps are counted, given ones too."""
    return f"""if mode == 1:
    {at.count("planned")} = int(np.ceil(abs(span) / step * (1.0 - 1e-12)))
    {at.lane(at.h)} = span / max(1, {at.count("planned")})
elif mode == 2:
    planned = 0
    while planned < hss and hs[r * hss + planned] != 0.0:
        planned += 1
    {at.count("planned")} = planned
    if planned > 0:
        {at.lane(at.sign)} = 1.0 if hs[r * hss] > 0.0 else -1.0
    {at.count("last")} = 1 if planned == 0 else 0"""
