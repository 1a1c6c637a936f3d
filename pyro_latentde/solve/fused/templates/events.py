# SPDX-License-Identifier: Apache-2.0
"""Events in the forward kernels: the search for the first of a step, the step that ends there, and what comes after.

``solve/events/rows.py`` and ``solve/events/watch.py`` are the same algorithm in plain torch; read those first.
"""

from dataclasses import replace

from pyro_latentde.solve.events.rows import LANDINGS, NARROW
from pyro_latentde.solve.events.watch import NOISE, SAMPLES
from pyro_latentde.solve.fused.templates.implicit import exact_stages
from pyro_latentde.solve.fused.templates.parts import WorkLayout, blend, combine, for_event, indent, interpolant, stage
from pyro_latentde.solve.methods.catalog import Method

__all__ = ["event_functions", "event_happens", "event_rows_begin", "event_search", "event_slots", "watched_anew"]

EPS = 2.220446049250313e-16
TINY = 2.2250738585072014e-308


def event_slots(at: WorkLayout) -> str:
    """Further arguments of ``forward``: where times, states and numbers of events go."""
    return "" if not at.events else ", et: Floats, ey: Floats, ew: Ints"


def event_functions(method: Method, at: WorkLayout, d: int) -> str:
    """``take_step``, ``sample``, ``event_root``, ``crossing``, ``land`` and ``event_sides``."""
    return "\n".join(
        [
            _take_step(method, at, d),
            _sample(method, at, d),
            _root(at),
            _crossing(at),
            _land(method, at, d),
            _sides(at),
        ]
    )


def _take_step(method: Method, at: WorkLayout, d: int) -> str:
    """A step of size h from (t, y) with its first slope in place; not finite where it fails."""
    return f"""
def take_step(t: float, h: float, stiff: bool, w: Floats, p: Floats, o: Ints) -> float:
    total = 0.0
    {indent(_step(method, at, d), 1)}
    for i in range({d}):
        total += abs(w[{at.y_new} + i]) + abs(w[{at.k + (len(method.c) - 1) * d} + i])
    return total
"""


def _step(method: Method, at: WorkLayout, d: int) -> str:
    if method.kind == "switching":
        inner, outer = _step(method.stiff, at, d), _step(replace(method, stiff=None, kind="explicit"), at, d)
        return f"if stiff:\n    {indent(inner, 1)}\nelse:\n    {indent(outer, 1)}"
    if method.kind == "implicit":
        return f"""{exact_stages(method, at, d)}
if rate < 0.0:
    return np.nan
for i in range({d}):
    w[{at.y_new} + i] = w[{at.ys} + i]"""
    stages = "\n".join(stage(method, at, d, s, False) for s in range(1, len(method.c)))
    return f"""{stages}
for i in range({d}):
    w[{at.y_new} + i] = w[{at.y} + i] + h * ({combine(method.b, str(at.k), d)})"""


def _sample(method: Method, at: WorkLayout, d: int) -> str:
    """All conditions at a place inside the step."""
    return f"""
def sample(theta: float, t: float, h: float, stiff: bool, w: Floats, p: Floats, o: Ints) -> float:
    if theta == 1.0:
        for i in range({d}):
            w[{at.spot} + i] = w[{at.y_new} + i]
    else:
        {indent(_inside(method, at, d), 2)}
    conditions(t + theta * h, w, {at.spot}, {at.g}, {at.scratch}, p, o)
    return 0.0
"""


def _inside(method: Method, at: WorkLayout, d: int) -> str:
    if method.stiff is not None:
        inner, outer = _inside(method.stiff, at, d), _inside(replace(method, stiff=None), at, d)
        return f"if stiff:\n    {indent(inner, 1)}\nelse:\n    {indent(outer, 1)}"
    weights = "\n".join(interpolant(method, "b"))
    return f"""{weights}
for i in range({d}):
    w[{at.spot} + i] = w[{at.y} + i] + h * ({blend(method, "b", str(at.k), d)})"""


def _root(at: WorkLayout) -> str:
    return f"""
def event_root(e: int, a: float, b: float, right: float, t: float, h: float, stiff: bool, w: Floats, p: Floats,
               o: Ints) -> float:
    touching = w[{at.touch} + e] != 0.0
    fa = w[{at.value} + e]
    fb = right
    if touching:  # a zero at the very start is divided out
        fa = w[{at.pace} + e] * h
        fb = right / b
    last = 0
    turn = 0
    for m in range(60):
        c = 0.5 * (a + b)
        turn = turn + 1 if turn < 3 else 1
        if turn < 3 and fb != fa:
            c = (a * fb - b * fa) / (fb - fa)
            if not (c >= a and c <= b):
                c = 0.5 * (a + b)
        sample(c, t, h, stiff, w, p, o)
        fc = w[{at.g} + e]
        if touching:
            fc = fc / c
        if fc * fb > 0.0 or fc == 0.0:
            if last > 0:
                fa = 0.5 * fa
            b = c
            fb = fc
            last = 1
        else:
            if last < 0:
                fb = 0.5 * fb
            a = c
            fa = fc
            last = -1
        if b - a <= {NARROW!r} * b or fb == 0.0:
            break
    if fb == 0.0 or fb == fa:
        return b
    return (a * fb - b * fa) / (fb - fa)
"""


def _crossing(at: WorkLayout) -> str:
    """Where in the step the first event is, and in ``fired`` which; 2 without one, NaN if a condition is not finite."""
    count = len(at.events)
    tests = []
    for e, kind in enumerate(at.events):
        side = f"w[{at.side + e}]"
        way = {0: f"{side} != 0.0", 1: f"{side} < 0.0", -1: f"{side} > 0.0"}[kind.direction]
        tests.append(
            f"if {way} and {side} * w[{at.right + e}] <= 0.0:\n"
            f"    theta = event_root({e}, a, b, w[{at.right + e}], t, h, stiff, w, p, o)\n"
            f"    if theta < earliest:\n"
            f"        earliest = theta\n"
            f"        w[{at.fired}] = {float(e)!r}"
        )
    look = "\n".join(tests)
    landing, at_stop = ("", "") if at.stops is None else (", landing: bool", f"\n            {indent(_at_stop(at), 3)}")
    return f"""
def crossing(t: float, h: float, stiff: bool{landing}, w: Floats, p: Floats, o: Ints) -> float:
    earliest = 2.0
    a = 0.0
    for n in range(1, {len(SAMPLES) + 1}):
        b = n * {1.0 / len(SAMPLES)!r}
        sample(b, t, h, stiff, w, p, o)
        for e in range({count}):
            w[{at.right} + e] = w[{at.g} + e]
            if n == {len(SAMPLES)} and not abs(w[{at.g} + e]) < np.inf:
                return np.nan{at_stop}
        {indent(look, 2)}
        if earliest <= 1.0:
            return earliest
        for e in range({count}):
            if abs(w[{at.right} + e]) < np.inf and w[{at.right} + e] != 0.0:
                w[{at.side} + e] = 1.0 if w[{at.right} + e] > 0.0 else -1.0
                w[{at.value} + e] = w[{at.right} + e]
                w[{at.touch} + e] = 0.0
        a = b
    return earliest
"""


def _at_stop(at: WorkLayout) -> str:
    """What is zero, to rounding, where the step lands on a stop happens before what does there."""
    reach = f"{NOISE * EPS / (SAMPLES[-1] - SAMPLES[-2])!r} * max(abs(t) / abs(h), 1.0)"
    change = f"abs(w[{at.right} + e] - w[{at.value} + e])"
    return f"""if landing and n == {len(SAMPLES)} and w[{at.touch} + e] == 0.0:
    if abs(w[{at.right} + e]) <= {reach} * {change}:
        w[{at.right} + e] = 0.0"""


def _land(method: Method, at: WorkLayout, d: int) -> str:
    """The size of the step at whose end condition e is zero; the step is in place. NaN where it fails."""
    slope, end = str(at.k + (len(method.c) - 1) * d), ""
    if not method.fsal:
        slope = str(at.direction)
        end = f"\n        field(t + h, w, {at.y_new}, {at.direction}, {at.scratch}, p, o)"
    return f"""
def land(e: int, t: float, h: float, furthest: float, stiff: bool, w: Floats, p: Floats, o: Ints) -> float:
    toward = 1.0 if h > 0.0 else -1.0
    before = np.inf
    for m in range(1, {LANDINGS + 1}):
        smallest = {4 * EPS!r} * abs(t) + {TINY!r}
        if abs(h) < smallest:
            h = toward * smallest
        if not take_step(t, h, stiff, w, p, o) < np.inf:
            return np.nan{end}
        conditions(t + h, w, {at.y_new}, {at.g}, {at.scratch}, p, o)
        conditions_along(t + h, 1.0, w, {at.y_new}, {slope}, {at.right}, {at.scratch}, p, o)
        left = w[{at.g} + e]
        rate = w[{at.right} + e]
        w[{at.left}] = abs(left)
        if not abs(left) < np.inf:
            return np.nan
        rest = {4 * EPS!r} * max(abs(t + h), abs(h)) * abs(rate)
        if abs(left) <= rest or rate == 0.0 or (m > 3 and abs(left) >= 0.5 * before) or m == {LANDINGS}:
            return h
        before = abs(left)
        there = h - left / rate
        if toward * there <= 0.0:
            there = 0.5 * h
        if toward * there > toward * furthest:
            there = 0.5 * (h + furthest)
        h = there
    return h
"""


def _sides(at: WorkLayout) -> str:
    """On which side of zero conditions start, fired = -1 at t0, else after that event; NaN where one is not finite.

    Behind a stop, fired = -2 unless an event has been at the same time.
    """
    start, later = ("fired < 0", "fired >= 0") if at.stops is None else ("fired == -1", "fired != -1")
    return f"""
def event_sides(fired: int, t: float, size: float, w: Floats, p: Floats, o: Ints) -> float:
    conditions(t, w, {at.y}, {at.g}, {at.scratch}, p, o)
    conditions_along(t, 1.0, w, {at.y}, {at.k}, {at.right}, {at.scratch}, p, o)
    for e in range({len(at.events)}):
        value = w[{at.g} + e]
        rate = w[{at.right} + e]
        if not abs(value) < np.inf:
            return np.nan
        own = {start} or fired == e
        noise = 0.0
        if {later}:
            noise = {NOISE * EPS!r} * max(abs(t), abs(size)) * abs(rate)
            if own:
                noise += 16.0 * w[{at.left}]
        w[{at.touch} + e] = 0.0
        w[{at.pace} + e] = rate
        if abs(value) <= noise:
            if own:
                w[{at.side} + e] = 0.0
                if rate * size != 0.0:
                    w[{at.side} + e] = 1.0 if rate * size > 0.0 else -1.0
                    w[{at.touch} + e] = 1.0
            w[{at.value} + e] = w[{at.side} + e] * {TINY!r}
        else:
            w[{at.side} + e] = 1.0 if value > 0.0 else -1.0
            w[{at.value} + e] = value
    return 0.0
"""


def event_rows_begin(at: WorkLayout) -> str:
    """At t0: no events yet, and the sides."""
    if not at.events:
        return ""
    behind = "" if at.stops is None else "latest = -1\nmoment = np.nan\n"
    return f"""found = 0
fired = -1
origin = start
base = 0
full = 0.0
{behind}for e in range({len(at.events)}):
    w[{at.count} + e] = 0.0
for e in range({at.room}):
    et[r * {at.room} + e] = np.nan
    ew[r * {at.room} + e] = -1
for e in range({at.room} * {at.states}):
    ey[r * {at.room} * {at.states} + e] = np.nan
if fine and not event_sides(-1, t, sign, w, p, o) < np.inf:
    fine = False"""


def event_search(method: Method, at: WorkLayout, d: int) -> str:
    """After a step that was good: end it at its first event, or where a given one was."""
    if not at.events:
        return ""
    stiff = "stiff" if method.stiff is not None else "False"
    dense = "\n".join(stage(method, at, d, s, False) for s in range(len(method.c), at.stages))
    limits = for_event(
        "fired", {e: f"full_up = w[{at.count + e}] >= {kind.limit}.0" for e, kind in enumerate(at.events)}
    )
    dense = f"{indent(dense, 1)}\n    " if dense else ""
    meant, moving, landing, snapped, column = "", "else", "", "", 2
    if at.stops is not None:
        meant, moving, landing, snapped = "\nif mode == 0:\n    full = wish", "elif h != 0.0", ", landing", _snapped()
        column = 3
    return f"""full = h{meant}
fired = -1
furthest = h
if mode == 2:
    fired = int(hs[r * hss + {at.plan} * accepted + {column}]) - 1
    furthest = 2.0 * h
{moving}:
    {dense}theta = crossing(t, h, {stiff}{landing}, w, p, o)
    if not theta < np.inf:
        code = 3
        break
    if theta <= 1.0:
        fired = int(w[{at.fired}])
        h = theta * h
        full_up = False
        {indent(limits, 2)}
        if full_up:
            code = 6
            break
if fired >= 0:
    h = land(fired, t, h, furthest, {stiff}, w, p, o)
    if not abs(h) < np.inf:
        code = 3
        break
    t_new = t + h
    last = False{indent(snapped, 1)}"""


def _snapped() -> str:
    """An event within rounding of a stop is at its time."""
    return f"""
landing = False
if abs(t_new - p[stops + m]) <= {NOISE * EPS!r} * max(abs(t), abs(h)):
    t_new = p[stops + m]"""


def watched_anew(at: WorkLayout) -> str:
    """Behind a stop conditions are watched from the new state."""
    if at.stops is None or not at.events:
        return ""
    return """if landing and not last and mode != 2:
    if moment != t:
        latest = -2
    if not event_sides(latest, t, h, w, p, o) < np.inf:
        code = 3
        break"""


def event_happens(method: Method, at: WorkLayout, d: int) -> str:
    """At the end of a step that ends in an event: write it down; the row ends, or begins anew."""
    if not at.events:
        return ""
    terminal = [e for e, kind in enumerate(at.events) if kind.terminal]
    ends = " or ".join(f"fired == {e}" for e in terminal) or "False"
    resets = for_event(
        "fired",
        {
            e: f"reset{e}(t, w, {at.y}, {at.spot}, {at.scratch}, p, o)\n"
            f"for i in range({d}):\n    w[{at.y} + i] = w[{at.spot} + i]"
            for e, kind in enumerate(at.events)
            if kind.resets
        },
    )
    implicit = "" if not method.uses_newton else "\n    stale = True\n    fresh = False\n    taken = 2.0"
    if method.stiff is not None:
        implicit += "\n    hints = 0"
    anew = """planned = int(np.ceil(abs(t_end - t) / step * (1.0 - 1e-12)))
h = (t_end - t) / max(1, planned)"""
    left, here = "not sign * (t_end - t) > 0.0", ""
    if at.stops is not None:
        anew, here = "done = 0", "\n    latest = fired\n    moment = t"
        left = f"not (sign * (t_end - t) > 0.0{' or p[stops + m] == t' if at.stops.after else ''})"
    return f"""if fired >= 0:
    h = full
    et[r * {at.room} + found] = t
    ew[r * {at.room} + found] = fired
    for i in range({d}):
        ey[(r * {at.room} + found) * {d} + i] = w[{at.y} + i]
    found += 1
    w[{at.count} + fired] += 1.0
    if {ends}:
        while j < T:
            for i in range({d}):
                ys[(r * T + j) * {d} + i] = w[{at.y} + i]
            j += 1
        last = True
        continue
    {indent(resets, 1)}
    field(t, w, {at.y}, {at.k}, {at.scratch}, p, o)
    evals += 1
    total = 0.0
    for i in range({d}):
        total += abs(w[{at.y} + i]) + abs(w[{at.k} + i])
    if not total < np.inf or not event_sides(fired, t, full, w, p, o) < np.inf:
        code = 3
        break
    before = 0.0
    origin = t
    base = accepted
    if mode == 1:
        {indent(anew, 2)}
    elif mode == 2:
        offset = 0.0
    last = accepted == planned if mode == 2 else {left}{here}{implicit}"""
