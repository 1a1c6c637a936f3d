# SPDX-License-Identifier: Apache-2.0
"""``method="auto"``: explicit steps until stability bounds them, implicit ones until it would not.

An explicit step says how fast the fastest decay is by two stages at the same time, |f(Y7) - f(Y6)| / |Y7 - Y6|, an
implicit one by a norm of the Jacobian that it has anyway.

References:
    Hairer, Wanner, Solving Ordinary Differential Equations II, 2nd ed., Springer 1996, IV.2 (stiffness detection).
    Shampine, Type-insensitive ODE codes based on implicit A-stable formulas, Math. Comp. 36 (1981) 499.
"""

from pyro_latentde.solve.fused.templates.parts import WorkLayout, combine
from pyro_latentde.solve.methods import Method

__all__ = ["BOUND", "CALM", "PATIENCE", "back_to_explicit", "switch"]

BOUND = 3.0  # step times decay rate from which on stability bounds an explicit step; its limit is about 3.3
CALM = 1.0  # below it an explicit step of this size would be stable with room to spare
PATIENCE = {"explicit": 8, "implicit": 4}  # such steps, one after the other, until a row switches


def switch(method: Method, at: WorkLayout, d: int) -> str:
    """After an accepted step, with the state it began with still there: count the hints, and decide."""
    if method.stiff is None:
        return ""
    sixth, seventh = at.k + 5 * d, at.k + 6 * d
    return f"""switched = False
if mode == 0 and stiff:
    largest = 0.0
    for i in range({d}):
        total = 0.0
        for m in range({d}):
            total += abs(w[{at.jac} + i * {d} + m])
        largest = max(largest, total)
    hints = hints + 1 if abs(h) * largest < {CALM!r} else 0
    switched = hints >= {PATIENCE["implicit"]}
elif mode == 0:
    bend = 0.0
    apart = 0.0
    for i in range({d}):
        bend += (w[{seventh} + i] - w[{sixth} + i]) ** 2
        apart += (w[{at.y_new} + i] - w[{at.y} + i] - h * ({combine(method.a[5], str(at.k), d)})) ** 2
    if bend * h * h > {BOUND!r} ** 2 * apart:
        hints += 1
    else:
        hints = max(0, hints - 1)
    switched = hints >= {PATIENCE["explicit"]}
elif 2 * accepted < hss:
    switched = stiff != (hs[r * hss + 2 * accepted + 1] != 0.0)"""


def back_to_explicit(method: Method, at: WorkLayout) -> str:
    """A row that switches begins anew: with the slope at its state, and without a Jacobian."""
    if method.stiff is None:
        return ""
    return f"""if switched:
    if mode == 0:
        stiff = not stiff
    hints = 0
    stale = True
    taken = 2.0
    if not last:
        field(t, w, {at.y}, {at.k}, {at.scratch}, p, o)
        evals += 1"""
