# SPDX-License-Identifier: Apache-2.0
"""One step of an ESDIRK method, forward and in reverse.

The first stage is the slope with which the step before ended, and so is its cotangent handed back: f(t, y) computed
anew would multiply the small error of Newton's method in y by the stiffness.

Reverse: k = f(t, Y) with Y = y + h sum_j a_j k_j + h gamma k is an equation for k, so that by the implicit function
theorem its cotangent is first solved with (I - h gamma J)^T, J at Y, and then goes through f.

References:
    Hairer, Wanner, Solving Ordinary Differential Equations II, 2nd ed., Springer 1996, IV.6, IV.8.
"""

from pyro_latentde.solve.fused.templates.event_derivatives import event_reverse
from pyro_latentde.solve.fused.templates.parts import WorkLayout, blend, combine, indent, interpolant, lines
from pyro_latentde.solve.fused.templates.stops import at_stop_reverse
from pyro_latentde.solve.methods.catalog import Method

__all__ = ["exact_stages", "implicit_reverse", "implicit_tangent_step", "implicit_trial"]

# Errors of Newton's method, in units of the tolerance, stay well below those of the method.
GOAL = 1e-3
SLOW = 1e-2  # rates above it ask for a new Jacobian in the next step
OLDEST = 20  # steps


def implicit_trial(method: Method, at: WorkLayout, d: int, lost: str = "") -> str:
    """All stages; sets ``fine``, ``total`` and the error, or goes on with a smaller step or a new Jacobian."""
    stages = "\n".join(_stage(method, at, d, s) for s in range(1, len(method.c)))
    last = at.k + (len(method.c) - 1) * d
    return f"""newton_rtol = rtol
newton_atol = atol
w[{at.info}] = 0.0
rate = 0.0
worst = 0.0
hg = h * {method.gamma!r}
if mode == 0:
    if stale or age >= {OLDEST}:
        if not fresh:
            field_jac(t, w, {at.y}, {at.jac}, {at.scratch}, p, o)
            w[{at.info} + 1] = 1.0
        fresh = True
        stale = False
        age = 0
    if newton_matrix(hg, w) == 0.0:
        rate = -1.0
else:  # given steps are solved down to rounding
    newton_rtol = 1e-12
    newton_atol = 0.0
    for i in range({d}):
        newton_atol = max(newton_atol, 1e-12 * abs(w[{at.y} + i]))
    newton_atol = max(newton_atol, 1e-300)
{stages}
evals += int(w[{at.info}])
if rate < 0.0:
    rejected += 1
    unfinished = False
    for i in range({d}):
        unfinished = unfinished or not abs(w[{at.ys} + i]) < np.inf
    if mode != 0:
        code = 5
        break
{lines(lost, 1)}    if fresh:
        h = 0.25 * h
    else:
        stale = True
    retry = True
    last = False
    continue
total = 0.0
for i in range({d}):
    w[{at.y_new} + i] = w[{at.ys} + i]
    total += abs(w[{at.ys} + i]) + abs(w[{last} + i])
stale = worst > {SLOW}"""


def exact_stages(method: Method, at: WorkLayout, d: int) -> str:
    """The stages of a step of given size, down to rounding; the rate is -1 where Newton's method fails."""
    stages = "\n".join(_stage(method, at, d, s, exact="True") for s in range(1, len(method.c)))
    return f"""{_ROUNDING.replace("DIM", str(d)).replace("STATE", str(at.y))}
w[{at.info}] = 0.0
rate = 0.0
worst = 0.0
hg = h * {method.gamma!r}
{stages}"""


_ROUNDING = """newton_rtol = 1e-12
newton_atol = 0.0
for i in range(DIM):
    newton_atol = max(newton_atol, 1e-12 * abs(w[STATE + i]))
newton_atol = max(newton_atol, 1e-300)"""


def _stage(method: Method, at: WorkLayout, d: int, s: int, exact: str = "mode != 0") -> str:
    c, a = method.c[s], method.a[s]
    guess = combine([method.gamma * x for x in method.predictor[s]], str(at.k), d)
    return f"""if rate >= 0.0:
    for i in range({d}):
        w[{at.base} + i] = w[{at.y} + i] + h * ({combine(a[:s], str(at.k), d)})
        w[{at.z} + i] = h * ({guess})
    rate = newton(t + {c!r} * h, hg, {at.k + s * d}, {exact}, newton_rtol, newton_atol, {GOAL!r}, w, p, o)
    worst = max(worst, rate)"""


def implicit_reverse(method: Method, at: WorkLayout, d: int) -> str:
    """Cotangents of one recorded step; ``kap`` carries that of the slope with which it began to the step before."""
    happened = event_reverse(method, at, d)
    stages = len(method.c)
    read = "\n".join(
        f"for i in range({d}):\n    w[{at.k + s * d} + i] = buf[n * {at.width} + {2 + (s + 1) * d} + i]"
        for s in range(stages)
    )
    seed = "\n".join(f"w[{at.k_bar + s * d} + i] = h * {b!r} * lam" for s, b in enumerate(method.b))
    weights = "\n".join(interpolant(method, "b") + interpolant(method, "d", derivative=True))
    spread = "\n".join(
        f"w[{at.k_bar + s * d} + i] += h * b{s} * yb" for s, row in enumerate(method.interpolant) if any(row)
    )
    back = "\n".join(_reverse_stage(method, at, d, s) for s in range(stages - 1, 0, -1))
    return f"""{read}
{lines(happened, 0)}{at_stop_reverse(method, at, d)}for i in range({d}):
    lam = w[{at.lam} + i]
    {indent(seed, 1)}
    w[{at.k_bar + (stages - 1) * d} + i] += w[{at.kap} + i]
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
    {indent(back, 1)}
for i in range({d}):
    w[{at.kap} + i] = w[{at.k_bar} + i]
if buf[n * {at.width} + {at.width - 1}] == 2.0:  # the step began with f(t, y)
    if h != 0.0:
        t_bar += field_vjp(t, w, {at.y}, {at.kap}, {at.bar}, {at.scratch}, p, o, g, q)
        for i in range({d}):
            w[{at.lam} + i] += w[{at.bar} + i]
    for i in range({d}):
        w[{at.kap} + i] = 0.0"""


def _reverse_stage(method: Method, at: WorkLayout, d: int, s: int) -> str:
    c, a, place = method.c[s], method.a[s], at.k_bar + s * d
    pull = "\n    ".join(f"w[{at.k_bar + n * d} + i] += h * {x!r} * yb" for n, x in enumerate(a[:s]) if x)
    return f"""for i in range({d}):
    w[{at.ys} + i] = w[{at.y} + i] + h * ({combine(a, str(at.k), d)})
field_jac(t + {c!r} * h, w, {at.ys}, {at.jac}, {at.scratch}, p, o)
newton_matrix(h * {method.gamma!r}, w)
lu_solve_transposed(w, {at.lu}, {at.pivots}, {place})
t_bar += field_vjp(t + {c!r} * h, w, {at.ys}, {place}, {at.bar}, {at.scratch}, p, o, g, q)
for i in range({d}):
    yb = w[{at.bar} + i]
    w[{at.lam} + i] += yb
    {pull}"""


def implicit_tangent_step(method: Method, at: WorkLayout, d: int) -> str:
    """Stages of a recorded step and their tangents."""
    k_dot, parts = at.k_bar, []
    for s, (c, a) in enumerate(zip(method.c, method.a, strict=True)):
        read = f"for i in range({d}):\n    w[{at.k + s * d} + i] = buf[n * {at.width} + {2 + (s + 1) * d} + i]"
        if s == 0:
            begin = (
                f"if buf[n * {at.width} + {at.width - 1}] == 2.0:\n"
                f"    field_jvp(t, t_dot, w, {at.y}, {at.y_dot}, {k_dot}, {at.scratch}, p, o, pd, od)"
            )
            parts.append(f"{read}\n{begin}")
            continue
        parts.append(
            f"{read}\n"
            f"for i in range({d}):\n"
            f"    w[{at.ys} + i] = w[{at.y} + i] + h * ({combine(a, str(at.k), d)})\n"
            f"    w[{at.bar} + i] = w[{at.y_dot} + i] + h * ({combine(a[:s], str(k_dot), d)})\n"
            f"field_jvp(t + {c!r} * h, t_dot, w, {at.ys}, {at.bar}, {k_dot + s * d}, {at.scratch}, p, o, pd, od)\n"
            f"field_jac(t + {c!r} * h, w, {at.ys}, {at.jac}, {at.scratch}, p, o)\n"
            f"newton_matrix(h * {method.gamma!r}, w)\n"
            f"lu_solve(w, {at.lu}, {at.pivots}, {k_dot + s * d})"
        )
    return "\n".join(parts)
