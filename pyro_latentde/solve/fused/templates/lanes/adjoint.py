# SPDX-License-Identifier: Apache-2.0
"""The exact reverse of the recorded steps of many rows, several side by side; compare ``adjoint.py``."""

from pyro_latentde.solve.fused.templates.lanes.parts import LaneLayout, lane_blend, lane_stage
from pyro_latentde.solve.fused.templates.parts import indent, interpolant, stage_rows

__all__ = ["lanes_adjoint_source"]


def lanes_adjoint_source(at: LaneLayout, sums: dict[int, int], free: int, scratch: int) -> str:
    """Source of ``adjoint``, with the arguments of the one of single rows.

    Args:
        sums: Where the gradients of parameters are summed that rows do not share.
        free: First vector behind all sums.
        scratch: Vectors that each stage keeps from its forward to its reverse pass.
    """
    return "".join([_head(at, free), _fill(at), _load(at), _step(at, free, scratch), _done(at, sums)])


def _head(at: LaneLayout, free: int) -> str:
    return f"""
def adjoint(lo: int, hi: int, chunk: int, T: int, ts: FloatsAt, tss: int, p: FloatsAt, po: Ints, ps: Ints, gy: Floats,
            status: Ints, buf: Floats, spans: Ints, y0_bar: Floats, ts_bar: Floats, t0_bar: Floats, g: Floats,
            go: Ints, gs: Ints, gc: Ints, w: Floats, o: Ints, q: Ints) -> int:
    upcoming = lo
    for k in range({len(at.sizes)}):
        o[k] = po[k]
        q[k] = go[k] + chunk * gc[k]
    for i in range({free}):
        w[i, :] = 0.0
    for l in range({at.lanes}):
        {at.count("row")} = -1
        {at.count("begin")} = -1
    while True:
        live = 0
"""


def _fill(at: LaneLayout) -> str:
    """Idle lanes take the next rows that have a gradient."""
    copies = "".join(
        f"""
                    for m in range({at.sizes[n]}):
                        {at.lane(place, "m")} = p[po[{n}] + r * ps[{n}] + m]"""
        for n, place in at.copies.items()
    )
    return f"""        for l in range({at.lanes}):
            while {at.count("row")} < 0 and upcoming < hi:
                r = upcoming
                upcoming += 1
                if status[r] == 0 and spans[2 * r + 1] > spans[2 * r]:
                    {at.count("row")} = r
                    {at.count("begin")} = spans[2 * r]
                    {at.count("n")} = spans[2 * r + 1] - 1
                    {at.count("j")} = T - 1
                    {at.lane(at.sign)} = -1.0 if buf[spans[2 * r] * {at.d + 2} + 1] < 0.0 else 1.0
                    {at.lane(at.t_bar)} = 0.0
                    for i in range({at.d}):
                        {at.lane(at.lam, "i")} = 0.0{copies}
            if {at.count("row")} >= 0:
                live += 1
        if live == 0:
            break
"""


def _load(at: LaneLayout) -> str:
    """Each lane's step from its record; idle lanes stand still where a field is known to be finite."""
    width = at.d + 2
    return f"""        for l in range({at.lanes}):
            {at.count("out")} = 0
            if {at.count("row")} >= 0:
                r = {at.count("row")}
                place = {at.count("n")} * {width}
                {at.lane(at.t)} = buf[place]
                {at.lane(at.h)} = buf[place + 1]
                for i in range({at.d}):
                    {at.lane(at.y, "i")} = buf[place + 2 + i]
                first = {at.count("j")} + 1
                sign = {at.lane(at.sign)}
                edge = sign * buf[place]
                while first > 0 and ({at.count("n")} == {at.count("begin")} or sign * ts[r * tss + first - 1] > edge):
                    first -= 1
                {at.count("out")} = first
                seen = place
                stand = l
            else:
                {at.lane(at.h)} = 0.0
        for l in range({at.lanes}):
            if {at.count("begin")} < 0:  # never had a row
                {at.lane(at.t)} = buf[seen]
                for i in range({at.d}):
                    {at.lane(at.y, "i")} = buf[seen + 2 + i]
                {indent(_borrow(at), 4)}
"""


def _borrow(at: LaneLayout) -> str:
    """Parameters of a lane that has a row."""
    lines = []
    for n, place in at.copies.items():
        there = f"w[({place} + m) * {at.lanes} + stand]"
        lines += [f"for m in range({at.sizes[n]}):", f"    {at.lane(place, 'm')} = {there}"]
    return "\n".join(lines)


def _step(at: LaneLayout, base: int, scratch: int) -> str:
    """Stages again; cotangents of the outputs and of the step's end go to the slopes, then stage by stage back."""
    method, d = at.method, at.d
    cheap = len(method.c) - 1 if method.fsal else len(method.c)  # the repeated last stage serves outputs only
    stages = [lane_stage(at, s, at.ys + s * d, str(base + s * scratch)) for s in range(1, at.stages)]
    start = f"for i in range({d}):\n    w[{at.ys} + i, :] = w[{at.y} + i, :]\nfield(t, w, {at.y}, {at.k}, {base}, p, o)"
    stages = [start, *stages]
    extra = "\n".join(stages[cheap:])
    extra = f"if outputs:\n    {indent(extra, 1)}" if extra else ""
    padded = [*method.b, *([0.0] * len(method.dense_c))]
    seed = "\n".join(
        f"w[{at.k_bar + s * d} + i, :] = {f'h * {b!r} * lam' if b else '0.0'}" for s, b in enumerate(padded)
    )
    back = "\n".join(_reverse_stage(at, s, base + s * scratch) for s in range(cheap - 1, -1, -1))
    back_extra = "\n".join(_reverse_stage(at, s, base + s * scratch) for s in range(at.stages - 1, cheap - 1, -1))
    back_extra = f"if outputs:\n    {indent(back_extra, 1)}" if back_extra else ""
    return f"""        t = w[{at.t}, :]
        h = w[{at.h}, :]
        outputs = False
        for l in range({at.lanes}):
            if {at.count("row")} >= 0 and {at.count("out")} <= {at.count("j")}:
                outputs = True
        {indent(chr(10).join(stages[:cheap]), 2)}
        {indent(extra, 2)}
        for i in range({d}):
            lam = w[{at.lam} + i, :]
            {indent(seed, 3)}
        {indent(_outputs(at), 2)}
        t_bar = w[{at.t_bar}, :]
        {indent(back_extra, 2)}
        {indent(back, 2)}
        w[{at.t_bar}, :] = t_bar
        accumulate(w, {base}, {scratch}, {at.stages} if outputs else {cheap})
"""


def _outputs(at: LaneLayout) -> str:
    """Cotangents of the outputs in these steps, the latest of each lane at a time."""
    d = at.d
    weights = "\n".join(interpolant(at.method, "b") + interpolant(at.method, "d", derivative=True))
    spread = "\n".join(
        f"w[{at.k_bar + s * d} + i, :] = w[{at.k_bar + s * d} + i, :] + h * b{s} * yb"
        for s, row in enumerate(at.method.interpolant)
        if any(row)
    )
    return f"""going = outputs
while going:
    going = False
    for l in range({at.lanes}):
        {at.lane(at.theta)} = 0.0
        {at.lane(at.chosen)} = 0.0
        for i in range({d}):
            {at.lane(at.temp, "i")} = 0.0
        if {at.count("row")} >= 0 and {at.count("j")} >= {at.count("out")}:
            going = True
            r = {at.count("row")}
            j = {at.count("j")}
            {at.lane(at.chosen)} = 1.0
            if {at.lane(at.h)} != 0.0:
                {at.lane(at.theta)} = (ts[r * tss + j] - {at.lane(at.t)}) / {at.lane(at.h)}
            for i in range({d}):
                {at.lane(at.temp, "i")} = gy[(r * T + j) * {d} + i]
    if going:
        theta = w[{at.theta}, :]
        {indent(weights, 2)}
        slope = Lanes(0.0)
        for i in range({d}):
            yb = w[{at.temp} + i, :]
            w[{at.lam} + i, :] = w[{at.lam} + i, :] + yb
            {indent(spread, 3)}
            slope = slope + yb * ({lane_blend(at.method, "d", at.k, d)})
        w[{at.slope}, :] = slope
        for l in range({at.lanes}):
            if {at.lane(at.chosen)} == 1.0:
                ts_bar[{at.count("row")} * T + {at.count("j")}] = {at.lane(at.slope)}
                {at.lane(at.t_bar)} = {at.lane(at.t_bar)} - {at.lane(at.slope)}
                {at.count("j")} -= 1"""


def _reverse_stage(at: LaneLayout, s: int, scratch: int) -> str:
    c, a = stage_rows(at.method)[s]
    d = at.d
    pull = "".join(
        f"\n    w[{at.k_bar + n * d} + i, :] = w[{at.k_bar + n * d} + i, :] + h * {weight!r} * yb"
        for n, weight in enumerate(a)
        if weight
    )
    return (
        f"t_bar = t_bar + field_vjp(t + {c!r} * h, w, {at.ys + s * d}, {at.k_bar + s * d}, {at.bar}, {scratch}, p, o)\n"
        f"for i in range({d}):\n"
        f"    yb = w[{at.bar} + i, :]\n"
        f"    w[{at.lam} + i, :] = w[{at.lam} + i, :] + yb" + pull
    )


def _done(at: LaneLayout, sums: dict[int, int]) -> str:
    """Rows that are back at their start: what is left belongs to y0, t0 and their own parameters."""
    own = "".join(
        f"""
                    for m in range({at.sizes[n]}):
                        g[go[{n}] + r * gs[{n}] + m] = {at.lane(sums[n], "m")}
                        {at.lane(sums[n], "m")} = 0.0"""
        for n in sums
    )
    return f"""        for l in range({at.lanes}):
            if {at.count("row")} >= 0:
                {at.count("n")} -= 1
                if {at.count("n")} < {at.count("begin")}:
                    r = {at.count("row")}
                    for i in range({at.d}):
                        y0_bar[r * {at.d} + i] = {at.lane(at.lam, "i")}
                        {at.lane(at.lam, "i")} = 0.0
                    t0_bar[r] = {at.lane(at.t_bar)}{own}
                    {at.count("row")} = -1
    hand_over(w, g, q)
    return 0
"""
