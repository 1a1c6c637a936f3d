# SPDX-License-Identifier: Apache-2.0
"""The forward solve where steps must end at given times: steps from stop to stop.

``stops.py`` tells what a stop is. In fixed mode the steps between two stops are equal; given steps (replayed) say where
they ended, so that a stop that moved since is met by the interpolant of the step before it.
"""

from pyro_latentde.solve.fused.templates.parts import WorkLayout, indent, interpolant
from pyro_latentde.solve.fused.templates.recording import record_end
from pyro_latentde.solve.fused.templates.stops import zero_step
from pyro_latentde.solve.methods.catalog import Method

__all__ = ["after_last_stop", "end_of_given", "given_steps", "landed", "next_step_to_stop", "waiting", "wished"]


def given_steps(at: WorkLayout) -> str:
    """How many steps are given; those of size 0 end at a stop."""
    return f"""offset = 0.0
while {at.plan} * planned < hss and (hs[r * hss + {at.plan} * planned] != 0.0
                                     or hs[r * hss + {at.plan} * planned + 2] > 0.0):
    planned += 1"""


def next_step_to_stop(method: Method, at: WorkLayout, d: int, given_kind: str, stages: str) -> str:
    """How far the next step goes, at most to the next stop; ``landing`` if it ends there."""
    reached = "<=" if at.stops.after else "<"
    slope = f"field(t, w, {at.y}, {at.k}, {at.scratch}, p, o)"
    return f"""        while code == 0 and not last:
            if mode != 2 and accepted + rejected >= max_steps:
                code = 1
                break
            target = t_end
            landing = sign * p[stops + m] {reached} sign * t_end
            if landing:
                target = p[stops + m]
            clipped = False
            if mode == 0:
                remaining = target - t
                wish = h
                ends = abs(h) >= abs(remaining)
                if ends:
                    h = remaining
                elif 2.0 * abs(h) > abs(remaining):
                    h = 0.5 * remaining
                clipped = abs(h) < abs(wish)
                if not ends and abs(h) < max(16.0 * 2.220446049250313e-16 * abs(t), 1e-300):
                    code = 3 if unfinished else 2
                    break
                t_new = target if ends else t + h
            elif mode == 1:
                if done == 0:
                    count = max(1, int(np.ceil(abs(target - t) / step * (1.0 - 1e-12))))
                    h = (target - t) / count
                done += 1
                ends = done == count
                t_new = target if ends else origin + done * h
            else:
                h = hs[r * hss + {at.plan} * accepted]
                {indent(given_kind, 4)}
                landing = hs[r * hss + {at.plan} * accepted + 2] > 0.0
                ends = landing or accepted == planned - 1
                if landing and h == 0.0:
                    apart = p[stops + m] - t
                    {indent(zero_step(at, d, stages), 5)}
                    for i in range({d}):
                        w[{at.y} + i] += apart * w[{at.k} + i]
                    t += apart
                    {slope}
                    evals += 1
                    origin = t
                    offset = 0.0
                    over = accepted == planned
                    last = over
                    continue
                offset += h
                t_new = p[stops + m] if landing else origin + offset
                if ends:  # sums of steps miss a stop and the last output time by rounding
                    rounding = (hss + 4) * 2.220446049250313e-16 * max(abs(start), abs(t_end))
            landing = ends and landing
            last = ends and not landing
"""


def end_of_given(method: Method, at: WorkLayout, d: int) -> str:
    """The state at a stop that has moved since the step was taken."""
    weights = "\n    ".join(interpolant(method, "b"))
    terms = " + ".join(f"b{s} * w[{at.k + s * d} + i]" for s, row in enumerate(method.interpolant) if any(row))
    return f"""if mode == 2 and landing and abs(t_new - t - h) > rounding:
    theta = (t_new - t) / h
    {weights}
    for i in range({d}):
        w[{at.y_new} + i] = w[{at.y} + i] + h * ({terms})"""


def landed(method: Method, at: WorkLayout, d: int, stages: str) -> str:
    """What happens at the stop, and at others at the same time; a slope of its own begins the next step."""
    anew = f"field(t, w, {at.y}, {at.k}, {at.scratch}, p, o)\nevals += 1"
    implicit = "" if method.kind == "explicit" else "\n    taken = 2.0\n    stale = True"
    return f"""if landing:
    m = pass_stop(m, ahead, {at.y}, w, p, o)
    {indent(anew, 1)}{implicit}
    while mode != 2 and p[stops + m] == t:
        {indent(zero_step(at, d, stages), 2)}
        {indent(anew, 2)}
    origin = t
    offset = 0.0
    done = 0
    over = accepted == planned if mode == 2 else t == t_end
    last = over"""


def wished() -> str:
    """A step that was cut short says nothing against the size that was meant; the error before a stop says nothing."""
    return """if clipped and abs(h) < abs(wish):
    h = wish
if landing:
    before = 0.0"""


def waiting(at: WorkLayout) -> str:
    """A condition: outputs at the end of the step wait for what happens at a stop there."""
    return "(landing or fired >= 0 and t_new == p[stops + m])" if at.events else "landing"


def after_last_stop(at: WorkLayout, d: int, stages: str) -> str:
    """Outputs after a stop at the last time: a step of size 0 tells their derivatives."""
    return f"""if over and code == 0:
    if keep:
        if (pos + 1) * {at.width} > room:
            return r
        buf[pos * {at.width}] = t
        buf[pos * {at.width} + 1] = 0.0
        for i in range({d}):
            buf[pos * {at.width} + 2 + i] = w[{at.y} + i]
        {indent(stages, 2)}
        {indent(record_end(at, f"pos * {at.width}", "0.0 - m"), 2)}
        pos += 1
    while j < T:
        for i in range({d}):
            ys[(r * T + j) * {d} + i] = w[{at.y} + i] + (ts[tt + j] - t) * w[{at.k} + i]
        j += 1
"""
