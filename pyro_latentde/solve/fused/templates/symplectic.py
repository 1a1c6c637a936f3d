# SPDX-License-Identifier: Apache-2.0
"""One step of a symplectic method, forward, in reverse and as a tangent.

``solve/torch_engine/symplectic.py`` is the same in torch.

The field is evaluated by halves: ``field_drift`` is dq/dt, ``field_kick`` dp/dt. Slot 0 of the stages holds the slope
at the start of the step, slot 1 that at its end; dq/dt there is only needed for outputs inside the step.
"""

from pyro_latentde.solve.fused.templates.parts import WorkLayout, indent
from pyro_latentde.solve.methods.catalog import Method

__all__ = [
    "hermite_output",
    "hermite_tangent",
    "speeds_at_ends",
    "symplectic_reverse",
    "symplectic_tangent_step",
    "symplectic_trial",
]

_HERMITE = """rise = theta * theta * (3.0 - 2.0 * theta)
first_slope = theta * (1.0 - theta) * (1.0 - theta)
last_slope = theta * theta * (theta - 1.0)"""
_HERMITE_RATES = """per_h = 6.0 * theta * (1.0 - theta) / h if h != 0.0 else 0.0
first_rate = (1.0 - theta) * (1.0 - 3.0 * theta)
last_rate = theta * (3.0 * theta - 2.0)"""


def _evaluate(part: str, node: float, at: WorkLayout, state: int, slot: int) -> str:
    return f"field_{part}(t + {node!r} * h, w, {state}, {slot}, {at.scratch}, p, o)"


def _move(weight: float, d: int, part: str, target: int, slope: int) -> str:
    """A kick of the momenta or a drift of the positions in ``target``."""
    begin = d // 2 if part == "kick" else 0
    return f"for i in range({begin}, {begin + d // 2}):\n    w[{target} + i] += h * {weight!r} * w[{slope} + i]"


def symplectic_trial(method: Method, at: WorkLayout, d: int) -> str:
    """Kicks and drifts, the first with the slope that the step before ended with."""
    last = at.k + d
    lines = [f"for i in range({d}):\n    w[{at.y_new} + i] = w[{at.y} + i]"]
    for n, drift in enumerate(method.drifts):
        lines.append(_move(method.kicks[n], d, "kick", at.y_new, at.k if n == 0 else last))
        lines.append(_evaluate("drift", method.drift_nodes[n], at, at.y_new, last))
        lines.append(_move(drift, d, "drift", at.y_new, last))
        lines.append(_evaluate("kick", method.kick_nodes[n + 1], at, at.y_new, last))
    lines.append(_move(method.kicks[-1], d, "kick", at.y_new, last))
    return (
        "\n".join(lines)
        + f"""
evals += {method.evals}
error = 0.0
total = 0.0
for i in range({d}):
    total += abs(w[{at.y_new} + i]) + abs(w[{last} + i])"""
    )


def speeds_at_ends(at: WorkLayout, d: int) -> str:
    return "\n".join([_evaluate("drift", 0.0, at, at.y, at.k), _evaluate("drift", 1.0, at, at.y_new, at.k + d)])


def hermite_output(at: WorkLayout, d: int) -> str:
    """The state inside a step."""
    return f"""{_HERMITE}
for i in range({d}):
    ys[(r * T + j) * {d} + i] = (
        w[{at.y} + i]
        + rise * (w[{at.y_new} + i] - w[{at.y} + i])
        + h * (first_slope * w[{at.k} + i] + last_slope * w[{at.k + d} + i])
    )"""


def symplectic_reverse(method: Method, at: WorkLayout, d: int) -> str:
    """Cotangents of one recorded step; ``y_dot`` collects what goes to its start past the step."""
    states = [at.ys + n * d for n in range(len(method.kicks))]  # positions at each kick, momenta after it
    return f"""{_states_again(method, at, d, states)}
for i in range({d}):
    w[{at.y_dot} + i] = 0.0
if first <= j:
    {indent(_outputs_reverse(at, d, states[-1]), 1)}
if h != 0.0:
    {indent(_moves_reverse(method, at, d, states), 1)}
for i in range({d}):
    w[{at.lam} + i] += w[{at.y_dot} + i]"""


def _states_again(method: Method, at: WorkLayout, d: int, states: list[int]) -> str:
    lines = [f"for i in range({d}):\n    w[{states[0]} + i] = w[{at.y} + i]"]
    for n, place in enumerate(states):
        lines.append(_evaluate("kick", method.kick_nodes[n], at, place, at.k))
        lines.append(_move(method.kicks[n], d, "kick", place, at.k))
        if n < len(method.drifts):
            lines.append(_evaluate("drift", method.drift_nodes[n], at, place, at.k))
            lines.append(f"for i in range({d}):\n    w[{states[n + 1]} + i] = w[{place} + i]")
            lines.append(_move(method.drifts[n], d, "drift", states[n + 1], at.k))
    return "\n".join(lines)


def _outputs_reverse(at: WorkLayout, d: int, end: int) -> str:
    """Cotangents of the outputs go to both ends and to the slopes there, and through these to the states too."""
    slopes = [(0.0, at.y, at.k, at.k_bar, at.y_dot), (1.0, end, at.k + d, at.k_bar + d, at.lam)]
    lines = [f"field(t + {node!r} * h, w, {y}, {k}, {at.scratch}, p, o)" for node, y, k, _, _ in slopes]
    lines.append(f"for i in range({2 * d}):\n    w[{at.k_bar} + i] = 0.0")
    lines.append(f"""for jj in range(first, j + 1):
    theta = (ts[tt + jj] - t) / h if h != 0.0 else 0.0
    {indent(_HERMITE, 1)}
    {indent(_HERMITE_RATES, 1)}
    slope = 0.0
    for i in range({d}):
        yb = gy[(r * T + jj) * {d} + i]
        w[{at.y_dot} + i] += (1.0 - rise) * yb
        w[{at.lam} + i] += rise * yb
        w[{at.k_bar} + i] += h * first_slope * yb
        w[{at.k_bar + d} + i] += h * last_slope * yb
        slope += yb * (
            per_h * (w[{end} + i] - w[{at.y} + i])
            + first_rate * w[{at.k} + i]
            + last_rate * w[{at.k + d} + i]
        )
    ts_bar[r * T + jj] = slope
    t_bar -= slope""")
    pulled = [
        f"t_bar += field_vjp(t + {node!r} * h, w, {y}, {k_bar}, {at.bar}, {at.scratch}, p, o, g, q)\n"
        f"for i in range({d}):\n    w[{bar} + i] += w[{at.bar} + i]"
        for node, y, _, k_bar, bar in slopes
    ]
    return "\n".join([*lines, f"if h != 0.0:\n    {indent(chr(10).join(pulled), 1)}"])


def _moves_reverse(method: Method, at: WorkLayout, d: int, states: list[int]) -> str:
    half, lines = d // 2, []

    def undo(part: str, weight: float, node: float, place: int) -> str:
        moved, source = (half, 0) if part == "kick" else (0, half)
        return f"""for i in range({moved}, {moved + half}):
    w[{at.k_bar} + i] = h * {weight!r} * w[{at.lam} + i]
t_bar += field_{part}_vjp(t + {node!r} * h, w, {place}, {at.k_bar}, {at.bar}, {at.scratch}, p, o, g, q)
for i in range({source}, {source + half}):
    w[{at.lam} + i] += w[{at.bar} + i]"""

    for n in range(len(method.kicks) - 1, -1, -1):
        lines.append(undo("kick", method.kicks[n], method.kick_nodes[n], states[n]))
        if n:
            lines.append(undo("drift", method.drifts[n - 1], method.drift_nodes[n - 1], states[n - 1]))
    return "\n".join(lines)


def symplectic_tangent_step(method: Method, at: WorkLayout, d: int) -> str:
    """The step and its tangent, in ``ys`` and ``bar``; with outputs inside, slopes at both ends too."""

    def both(part: str, weight: float, node: float) -> str:
        tangent = (
            f"field_{part}_jvp(t + {node!r} * h, t_dot, w, {at.ys}, {at.bar}, {at.k_bar + d}, {at.scratch}, "
            "p, o, pd, od)"
        )
        value = _evaluate(part, node, at, at.ys, at.k + d)
        moves = (_move(weight, d, part, at.ys, at.k + d), _move(weight, d, part, at.bar, at.k_bar + d))
        return "\n".join([value, tangent, *moves])

    lines = [f"for i in range({d}):\n    w[{at.ys} + i] = w[{at.y} + i]\n    w[{at.bar} + i] = w[{at.y_dot} + i]"]
    for n, kick in enumerate(method.kicks):
        lines.append(both("kick", kick, method.kick_nodes[n]))
        if n < len(method.drifts):
            lines.append(both("drift", method.drifts[n], method.drift_nodes[n]))
    slopes = [(0.0, at.y, at.y_dot, 0), (1.0, at.ys, at.bar, d)]
    ends = "\n".join(
        f"field(t + {node!r} * h, w, {y}, {at.k + slot}, {at.scratch}, p, o)\n"
        f"field_jvp(t + {node!r} * h, t_dot, w, {y}, {dot}, {at.k_bar + slot}, {at.scratch}, p, o, pd, od)"
        for node, y, dot, slot in slopes
    )
    lines.append(f"if j < T and (sign * ts[tt + j] <= sign * t_new or n + 1 == end):\n    {indent(ends, 1)}")
    return "\n".join(lines)


def hermite_tangent(at: WorkLayout, d: int) -> str:
    """The tangent of an output inside a step."""
    return f"""{_HERMITE}
{_HERMITE_RATES}
for i in range({d}):
    ys_dot[(r * T + j) * {d} + i] = (
        w[{at.y_dot} + i]
        + rise * (w[{at.bar} + i] - w[{at.y_dot} + i])
        + h * (first_slope * w[{at.k_bar} + i] + last_slope * w[{at.k_bar + d} + i])
        + theta_dot
        * (
            per_h * (w[{at.ys} + i] - w[{at.y} + i])
            + first_rate * w[{at.k} + i]
            + last_rate * w[{at.k + d} + i]
        )
    )"""
