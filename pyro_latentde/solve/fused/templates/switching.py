# SPDX-License-Identifier: Apache-2.0
"""``method="auto"``: explicit steps until stability bounds them, implicit ones until it would not.

``solve/torch_engine/switching.py`` says how it is told.

References:
    Shampine, Type-insensitive ODE codes based on implicit A-stable formulas, Math. Comp. 36 (1981) 499.
"""

from pyro_latentde.solve.fused.templates.parts import WorkLayout, combine
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.torch_engine.switching import BOUND, CALM, HINT, LEAP, LEAST, MOST, SERENE, STRONG

__all__ = ["back_to_explicit", "leap", "lost_leap", "start_switching", "switch"]


def switch(method: Method, at: WorkLayout, d: int) -> str:
    """After an accepted step, with the state it began with still there: count the hints, and decide."""
    if method.stiff is None:
        return ""
    sixth, seventh = at.k + 5 * d, at.k + 6 * d
    return f"""switched = False
if mode == 0 and stiff:
    if former != 0.0:
        former = 0.0
        patience = {LEAST}
    largest = 0.0
    for i in range({d}):
        total = 0.0
        for m in range({d}):
            total += abs(w[{at.jac} + i * {d} + m])
        largest = max(largest, total)
    hints = hints + 1 if abs(h) * largest < {CALM!r} else 0
    switched = hints >= {SERENE}
elif mode == 0:
    bend = 0.0
    apart = 0.0
    for i in range({d}):
        scale = atol + rtol * max(abs(w[{at.y} + i]), abs(w[{at.y_new} + i]))
        bend += ((w[{seventh} + i] - w[{sixth} + i]) / scale) ** 2
        apart += ((w[{at.y_new} + i] - w[{at.y} + i] - h * ({combine(method.a[5], str(at.k), d)})) / scale) ** 2
    pressed = bend * h * h
    if pressed > {BOUND!r} ** 2 * apart:
        hints += {STRONG}
    elif pressed > {HINT!r} ** 2 * apart:
        hints += 1
    else:
        hints = max(0, hints - {STRONG})
    switched = hints >= patience
elif {at.plan} * accepted < hss:
    switched = stiff != (hs[r * hss + {at.plan} * accepted + 1] != 0.0)"""


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


def start_switching(method: Method) -> list[str]:
    """``former`` is the step that an explicit row would take, while a leap is tried in its place, else 0."""
    return ["stiff = False", "hints = 0", f"patience = {LEAST}", "former = 0.0"] if method.stiff is not None else []


def leap(method: Method) -> str:
    """The first implicit step is several times larger than the explicit one that would follow."""
    if method.stiff is None:
        return ""
    return f"""if switched and stiff:
    former = h
    h = {LEAP!r} * h"""


def lost_leap(method: Method) -> str:
    """Where it fails, the row is explicit again, with the step that it would have taken."""
    if method.stiff is None:
        return ""
    return f"""if former != 0.0:
    h = former
    former = 0.0
    stiff = False
    patience = min(2 * patience, {MOST})
    last = False
    continue"""
