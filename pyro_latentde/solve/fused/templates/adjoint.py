# SPDX-License-Identifier: Apache-2.0
"""The exact reverse of the recorded steps of each row."""

from collections.abc import Sequence

from pyro_latentde.solve.events.event import EventTraits
from pyro_latentde.solve.fused.templates.event_derivatives import event_reverse, reverse_begin, reverse_slots
from pyro_latentde.solve.fused.templates.implicit import implicit_reverse
from pyro_latentde.solve.fused.templates.parts import (
    WorkLayout,
    blend,
    indent,
    interpolant,
    lines,
    stage,
    stage_rows,
)
from pyro_latentde.solve.fused.templates.stops import (
    at_stop_reverse,
    before_stop_reverse,
    bounds,
    start_of_reverse,
)
from pyro_latentde.solve.fused.templates.symplectic import symplectic_reverse
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.stops.schedule import Stops

__all__ = ["adjoint_source"]


def adjoint_source(
    method: Method, d: int, leaves: int, stops: Stops | None = None, events: Sequence[EventTraits] = ()
) -> str:
    """Source of ``adjoint``: cotangents of y0, times, t0 and every parameter, from those of the outputs.

    The recorded steps h are constants and the grid starts at t0, so t0 shifts every t_n, and an output time moves along
    the interpolant of its step.
    """
    at = WorkLayout(method, d, stops, leaves, events)
    if method.kind == "implicit":
        step = implicit_reverse(method, at, d)
    elif method.kind == "symplectic":
        step = symplectic_reverse(method, at, d)
    elif method.stiff is None:
        step = _explicit_reverse(method, at, d)
    else:
        explicit, implicit = _explicit_reverse(method, at, d), implicit_reverse(method.stiff, at, d)
        kind = f"buf[n * {at.width} + {at.width - 1}]"
        step = f"if {kind} == 0.0:\n    {indent(explicit, 1)}\nelse:\n    {indent(implicit, 1)}"
    begin = lines(bounds(at) + before_stop_reverse(at), 4)
    return _walk_back(method, at, d, leaves) + begin + f"                {indent(step, 4)}\n" + _row_done(at, d)


def _walk_back(method: Method, at: WorkLayout, d: int, leaves: int) -> str:
    """From the last recorded step of a row to its first, each with the outputs that lie in it."""
    slope = "" if not method.uses_newton else f"\n            w[{at.kap} + i] = 0.0"
    setup, here = "", ""
    if at.stops is not None:
        setup = start_of_reverse(at)
        if at.stops.after:  # outputs at a stop belong to the step after it
            here = f" or (buf[(n - 1) * {at.width} + {at.mark}] > 0.0 and ts[tt + first - 1] == t)"
    return f"""
def adjoint(lo: int, hi: int, chunk: int, T: int, ts: FloatsAt, tss: int, p: FloatsAt, po: Ints, ps: Ints, gy: Floats,
            status: Ints, buf: Floats, spans: Ints, y0_bar: Floats, ts_bar: Floats, t0_bar: Floats, g: Floats,
            go: Ints, gs: Ints, gc: Ints, w: Floats, o: Ints, q: Ints{reverse_slots(at)}) -> int:
    for r in range(lo, hi):
        for k in range({leaves}):
            o[k] = po[k] + r * ps[k]
            q[k] = go[k] + r * gs[k] + chunk * gc[k]
        tt = r * tss
        for i in range({d}):
            w[{at.lam} + i] = 0.0{slope}
        t_bar = 0.0
        if status[r] == 0:
            j = T - 1
            begin = spans[2 * r]
            sign = 1.0
            if spans[2 * r + 1] > begin and buf[begin * {at.width} + 1] < 0.0:
                sign = -1.0
{lines(setup, 3)}{lines(reverse_begin(at, d), 3)}            for n in range(spans[2 * r + 1] - 1, begin - 1, -1):
                t = buf[n * {at.width}]
                h = buf[n * {at.width} + 1]
                for i in range({d}):
                    w[{at.y} + i] = buf[n * {at.width} + 2 + i]
                first = j + 1
                while first > 0 and (n == begin or sign * ts[tt + first - 1] > sign * t{here}):
                    first -= 1
"""


def _explicit_reverse(method: Method, at: WorkLayout, d: int) -> str:
    """Stages again; cotangents of the outputs and of the step's end go to the slopes, then stage by stage back."""
    main = len(method.c)
    cheap = main - 1 if method.fsal else main  # the repeated last stage serves outputs only
    stages = [stage(method, at, d, s, True) for s in range(at.stages)]
    stages[0] = (
        f"for i in range({d}):\n    w[{at.ys} + i] = w[{at.y} + i]\nfield(t, w, {at.y}, {at.k}, {at.scratch}, p, o)"
    )
    forward = "\n".join(stages[:cheap])
    extra = "\n".join(stages[cheap:])
    wanted = "first <= j" if at.stops is None else "first <= j or mark > 0.0"
    extra = f"if {wanted}:\n    {indent(extra, 1)}" if extra else ""
    weights = "\n".join(interpolant(method, "b") + interpolant(method, "d", derivative=True))
    spread = "\n".join(
        f"w[{at.k_bar + s * d} + i] += h * b{s} * yb" for s, row in enumerate(method.interpolant) if any(row)
    )
    seed = "\n".join(
        f"w[{at.k_bar + s * d} + i] = {f'h * {b!r} * lam' if b else '0.0'}" for s, b in enumerate(_padded(method))
    )
    back = "\n".join(_reverse_stage(method, at, d, s) for s in range(cheap - 1, -1, -1))
    back_extra = "\n".join(_reverse_stage(method, at, d, s) for s in range(at.stages - 1, cheap - 1, -1))
    back_extra = f"if first <= j:\n    {indent(back_extra, 1)}" if back_extra else ""
    return f"""{forward}
{extra}
{lines(event_reverse(method, at, d), 0)}{at_stop_reverse(method, at, d)}for i in range({d}):
    lam = w[{at.lam} + i]
    {indent(seed, 1)}
for jj in range(first, j + 1):
    theta = (ts[tt + jj] - t) / h if h != 0.0 else 0.0
    {indent(weights, 1)}
    slope = 0.0
    for i in range({d}):
        yb = gy[(r * T + jj) * {d} + i]
        w[{at.lam} + i] += yb
        {indent(spread, 2)}
        slope += yb * ({blend(method, "d", str(at.k), d)})
    ts_bar[r * T + jj] = slope
    t_bar -= slope
if h != 0.0:
    {indent(back_extra, 1)}
    {indent(back, 1)}"""


def _row_done(at: WorkLayout, d: int) -> str:
    """Outputs of a row without steps; what is left belongs to y0 and t0."""
    return f"""                j = first - 1
            while j >= 0:
                for i in range({d}):
                    w[{at.lam} + i] += gy[(r * T + j) * {d} + i]
                j -= 1
        for i in range({d}):
            y0_bar[r * {d} + i] = w[{at.lam} + i]
        t0_bar[r] = t_bar
    return 0
"""


def _padded(method: Method) -> list[float]:
    return [*method.b, *([0.0] * len(method.dense_c))]


def _reverse_stage(method: Method, at: WorkLayout, d: int, s: int) -> str:
    c, a = stage_rows(method)[s]
    pull = "\n    ".join(f"w[{at.k_bar + n * d} + i] += h * {weight!r} * yb" for n, weight in enumerate(a) if weight)
    return (
        f"t_bar += field_vjp(t + {c!r} * h, w, {at.ys + s * d}, {at.k_bar + s * d}, {at.bar}, {at.scratch}, "
        f"p, o, g, q)\n"
        f"for i in range({d}):\n"
        f"    yb = w[{at.bar} + i]\n"
        f"    w[{at.lam} + i] += yb" + (f"\n    {pull}" if pull else "")
    )
