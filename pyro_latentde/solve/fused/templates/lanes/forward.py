# SPDX-License-Identifier: Apache-2.0
"""The solve of many rows, several side by side: vectors for the field, numbers of each row for the step control.

A lane takes the next row when its row has ended; every row goes through the same arithmetic as in ``forward.py``.
"""

from pyro_latentde.solve.fused.templates.lanes.parts import (
    LaneLayout,
    lane_blend,
    lane_combine,
    lane_record,
    lane_stage,
)
from pyro_latentde.solve.fused.templates.lanes.start import fill, head
from pyro_latentde.solve.fused.templates.parts import indent, interpolant
from pyro_latentde.solve.methods.catalog import Method

__all__ = ["lanes_forward_source"]


def lanes_forward_source(at: LaneLayout) -> str:
    """Source of ``forward``, with the arguments of the one of single rows; step modes are 0 adaptive, 1 fixed, 2 given.

    Each row has room for as many records as the next; what is returned is the first row that needed more.
    """
    return "".join([head(at), fill(at), _next_step(at), _trial(at), _decision(at), _outputs(at), _onward(at)])


def _next_step(at: LaneLayout) -> str:
    """How far each lane's next step goes, or why there is none; then the row has ended."""
    return f"""        live = 0
        for l in range({at.lanes}):
            {at.lane(at.tried)} = 0.0
            if {at.count("row")} >= 0:
                r = {at.count("row")}
                t1 = {at.lane(at.t)}
                t_end = {at.lane(at.end)}
                over = {at.count("last")} == 1 or {at.count("code")} != 0
                if not over and mode != 2 and {at.count("accepted")} + {at.count("rejected")} >= max_steps:
                    {at.count("code")} = 1
                if not over and {at.count("code")} == 0:
                    {indent(_size(at), 5)}
                if over or {at.count("code")} != 0:
                    {indent(_end_of_row(at), 5)}
                else:
                    live += 1
        if live == 0:
            continue
"""


def _size(at: LaneLayout) -> str:
    h = at.lane(at.h)
    return f"""if mode == 0:
    remaining = t_end - t1
    if abs({h}) >= abs(remaining):
        {h} = remaining
        {at.count("last")} = 1
    elif 2.0 * abs({h}) > abs(remaining):
        {h} = 0.5 * remaining
    if {at.count("last")} == 0 and abs({h}) < max(16.0 * 2.220446049250313e-16 * abs(t1), 1e-300):
        {at.count("code")} = 3 if {at.count("unfinished")} == 1 else 2
    {at.lane(at.t_new)} = t_end if {at.count("last")} == 1 else t1 + {h}
    {h} = {at.lane(at.t_new)} - t1
else:
    {at.count("last")} = 1 if {at.count("accepted")} == {at.count("planned")} - 1 else 0
    if mode == 1:
        reached = {at.lane(at.start)} + ({at.count("accepted")} + 1) * {h}
        {at.lane(at.t_new)} = t_end if {at.count("last")} == 1 else reached
    else:
        {h} = hs[r * hss + {at.count("accepted")}]
        {at.lane(at.offset)} = {at.lane(at.offset)} + {h}
        {at.lane(at.t_new)} = {at.lane(at.start)} + {at.lane(at.offset)}
        if {at.count("last")} == 1:  # sums of steps miss the last output time by rounding
            {at.lane(at.rounding)} = (hss + 4) * 2.220446049250313e-16 * max(abs({at.lane(at.start)}), abs(t_end))
{at.lane(at.tried)} = {h}"""


def _end_of_row(at: LaneLayout) -> str:
    """NaN where the row did not arrive; the report, column by column."""
    return f"""j = {at.count("j")}
if j < T and {at.count("code")} == 0:  # no steps were given
    {at.count("code")} = 1
while j < T:
    for i in range({at.d}):
        ys[(r * T + j) * {at.d} + i] = np.nan
    j += 1
report[r] = {at.count("code")}
report[R + r] = {at.count("accepted")}
report[2 * R + r] = {at.count("rejected")}
report[3 * R + r] = {at.count("evals")}
report[4 * R + r] = token + r if keep else 0
if {at.count("accepted")} == 0 and ({at.count("code")} != 0 or not keep):
    spans[2 * r] = (r - lo) * most  # no records, but the next row's lie behind
    spans[2 * r + 1] = spans[2 * r]
{at.count("row")} = -1"""


def _trial(at: LaneLayout) -> str:
    """One step of every lane and its error; the step of an idle lane is 0."""
    method, d = at.method, at.d
    scratch = str(at.free)
    stages = "\n".join(lane_stage(at, s, at.ys, scratch) for s in range(1, len(method.c)))
    last = f"\n    total = total + abs(w[{at.k + (len(method.c) - 1) * d} + i, :])" if method.fsal else ""
    fresh = "" if method.fsal else _slope(at)
    return f"""        {indent(fresh, 2)}
        t = w[{at.t}, :]
        h = w[{at.tried}, :]
        {indent(stages, 2)}
        total = Lanes(0.0)
        for i in range({d}):
            w[{at.y_new} + i, :] = w[{at.y} + i, :] + h * ({lane_combine(method.b, at.k, d)})
            total = total + abs(w[{at.y_new} + i, :]){indent(last, 2)}
        w[{at.total}, :] = total
        w[{at.error}, :] = 0.0
        {indent(_error(at), 2)}
"""


def _slope(at: LaneLayout) -> str:
    """The first stage, where it is not the last one of the step before."""
    return f"""needed = False
for l in range({at.lanes}):
    {at.lane(at.chosen)} = 0.0
    if {at.count("row")} >= 0 and {at.count("accepted")} > 0 and {at.count("retry")} == 0:
        {at.lane(at.chosen)} = 1.0
        {at.count("evals")} += 1
        needed = True
if needed:
    chosen = w[{at.chosen}, :] > 0.5
    field(w[{at.t}, :], w, {at.y}, {at.temp}, {at.free}, p, o)
    for i in range({at.d}):
        w[{at.k} + i, :] = w[{at.temp} + i, :] if chosen else w[{at.k} + i, :]"""


def _error(at: LaneLayout) -> str:
    if not at.method.errors:
        return ""
    d, rows = at.d, at.method.errors
    squares = "\n".join(
        f"        e{n} = e{n} + (h * ({lane_combine(row, at.k, d)}) / scale) ** 2" for n, row in enumerate(rows)
    )
    if len(rows) == 1:
        end = f"w[{at.error}, :] = math.sqrt(e0 / {d})"
    else:  # DOP853: two estimates, Hairer, Norsett and Wanner, section II.10
        end = (
            "mixed = e0 + 0.01 * e1\n"
            f"    w[{at.error}, :] = Lanes(0.0) if mixed == 0.0 else e0 / math.sqrt(mixed * {d})"
        )
    zeros = "\n    ".join(f"e{n} = Lanes(0.0)" for n in range(len(rows)))
    return f"""if mode == 0:
    {zeros}
    for i in range({d}):
        scale = atol + rtol * max(abs(w[{at.y} + i, :]), abs(w[{at.y_new} + i, :]))
{squares}
    {end}"""


def _decision(at: LaneLayout) -> str:
    """Accept or try again with a smaller step, each lane by itself."""
    k = at.method.error_order or 1
    h = at.lane(at.h)
    return f"""        for l in range({at.lanes}):
            {at.lane(at.chosen)} = 0.0
            if {at.count("row")} >= 0:
                r = {at.count("row")}
                error = {at.lane(at.error)}
                fine = error < np.inf and {at.lane(at.total)} < np.inf
                {at.count("evals")} += {len(at.method.c) - 1}
                if mode == 0 and (not fine or error > 1.0):
                    {at.count("rejected")} += 1
                    {at.count("unfinished")} = 0 if fine else 1
                    shrink = 0.2
                    if fine:
                        shrink = max(0.2, 0.9 * error ** (-{1.0 / k!r}))
                    {h} = {h} * shrink
                    {at.count("retry")} = 1
                    {at.count("last")} = 0
                elif not fine:
                    {at.count("rejected")} += 1
                    {at.count("code")} = 3
                else:
                    {at.lane(at.chosen)} = 1.0
                    if keep:
                        {indent(lane_record(at, at.lane(at.tried)), 6)}
                    if {at.count("row")} < 0:
                        {at.lane(at.chosen)} = 0.0
"""


def _outputs(at: LaneLayout) -> str:
    """Outputs that lie in the accepted steps: one of each lane at a time."""
    d, tj, last = at.d, "ts[r * tss + j]", f"{at.count('last')} == 1"
    return f"""        {indent(_dense(at), 2)}
        going = True
        while going:
            going = False
            for l in range({at.lanes}):
                {at.count("out")} = -1
                if {at.lane(at.chosen)} == 1.0 and {at.count("code")} == 0:
                    r = {at.count("row")}
                    sign = {at.lane(at.sign)}
                    t_new = {at.lane(at.t_new)}
                    rounding = {at.lane(at.rounding)}
                    j = {at.count("j")}
                    while j < T and {at.count("out")} < 0 and (sign * {tj} <= sign * t_new or {last}):
                        gap = abs({tj} - t_new)
                        ahead = sign * {tj} > sign * t_new
                        if mode == 2 and ahead and gap > max(rounding, 1e-4 * abs({at.lane(at.h)})):
                            {at.count("code")} = 1  # the given steps do not reach; a little beyond they do
                            break
                        if gap <= rounding:
                            for i in range({d}):
                                ys[(r * T + j) * {d} + i] = {at.lane(at.y_new, "i")}
                        else:
                            {at.lane(at.theta)} = ({tj} - {at.lane(at.t)}) / {at.lane(at.tried)}
                            {at.count("out")} = j
                            going = True
                        j += 1
                    {at.count("j")} = j
            if going:
                theta = w[{at.theta}, :]
                {indent(_weights(at.method), 4)}
                for i in range({d}):
                    w[{at.temp} + i, :] = w[{at.y} + i, :] + h * ({lane_blend(at.method, "b", at.k, d)})
                for l in range({at.lanes}):
                    if {at.count("out")} >= 0:
                        for i in range({d}):
                            ys[({at.count("row")} * T + {at.count("out")}) * {d} + i] = {at.lane(at.temp, "i")}
"""


def _weights(method: Method) -> str:
    return "\n".join(interpolant(method, "b"))


def _dense(at: LaneLayout) -> str:
    """Stages that only outputs strictly inside the step need."""
    method = at.method
    if not method.dense_c:
        return ""
    stages = "\n".join(lane_stage(at, s, at.ys, str(at.free)) for s in range(len(method.c), at.stages))
    return f"""needed = False
for l in range({at.lanes}):
    if {at.lane(at.chosen)} == 1.0:
        r = {at.count("row")}
        j = {at.count("j")}
        sign = {at.lane(at.sign)}
        t_new = {at.lane(at.t_new)}
        inside = j < T and sign * ts[r * tss + j] < sign * t_new - {at.lane(at.rounding)}
        gap = abs(ts[r * tss + T - 1] - t_new)
        if inside or (mode == 2 and {at.count("last")} == 1 and gap > {at.lane(at.rounding)}):
            {at.count("evals")} += {len(method.dense_c)}
            needed = True
if needed:
    {indent(stages, 1)}"""


def _onward(at: LaneLayout) -> str:
    """Accepted lanes move on and choose their next size (PI control)."""
    d, k = at.d, at.method.error_order or 1
    again = (len(at.method.c) - 1) * d if at.method.fsal else 0
    return f"""        chosen = w[{at.chosen}, :] > 0.5
        for i in range({d}):
            w[{at.y} + i, :] = w[{at.y_new} + i, :] if chosen else w[{at.y} + i, :]
            w[{at.k} + i, :] = w[{at.k + again} + i, :] if chosen else w[{at.k} + i, :]
        for l in range({at.lanes}):
            if {at.lane(at.chosen)} == 1.0:
                {at.count("accepted")} += 1
                {at.lane(at.t)} = {at.lane(at.t_new)}
                if mode == 0:
                    log_error = math.log(max({at.lane(at.error)}, 1e-10))
                    factor = 0.9 * math.exp({0.4 / k!r} * {at.lane(at.before)} - {0.7 / k!r} * log_error)
                    factor = min(10.0, max(0.2, factor))
                    if {at.count("retry")} == 1 and factor > 1.0:
                        factor = 1.0
                    {at.lane(at.before)} = log_error
                    {at.count("unfinished")} = 0
                    {at.lane(at.h)} = {at.lane(at.h)} * factor
                {at.count("retry")} = 0
    return done
"""
