# SPDX-License-Identifier: Apache-2.0
"""Size of the first step."""

from pyro_latentde.solve.fused.templates.parts import WorkLayout
from pyro_latentde.solve.methods.catalog import Method

__all__ = ["FIRST_STEP", "first_step"]


def first_step(method: Method, at: WorkLayout, d: int, k: int) -> str:
    """Starting step: Hairer, Norsett and Wanner, section II.4, page 169, in a unit of time that the state or the span
    gives; emitted as a call of a helper."""
    if not method.errors:
        return ""
    return (
        f"elif span != 0.0 and code == 0:\n"
        f"    h = sign * first_step(t, abs(span), sign, rtol, atol, {1.0 / k!r}, {d}, "
        f"w, {at.y}, {at.y_new}, {at.k}, {at.ys}, {at.scratch}, p, o)\n"
        f"    evals += 1"
    )


FIRST_STEP = """
def first_step(t: float, span: float, sign: float, rtol: float, atol: float, power: float, d: int, w: Floats, y: int,
               y1: int, k: int, k1: int, ws: int, p: Floats, o: Ints) -> float:
    d0 = 0.0
    d1 = 0.0
    for i in range(d):
        scale = atol + rtol * abs(w[y + i])
        d0 += (w[y + i] / scale) ** 2
        d1 += (w[k + i] / scale) ** 2
    d0 = math.sqrt(d0 / d)
    d1 = math.sqrt(d1 / d)
    still = d0 < 1e-5 or d1 * span < 1e-5
    unit = span if still else d0 / d1
    h0 = min((1e-6 if still else 0.01) * unit, span)
    for i in range(d):
        w[y1 + i] = w[y + i] + sign * h0 * w[k + i]
    field(t + sign * h0, w, y1, k1, ws, p, o)
    d2 = 0.0
    for i in range(d):
        scale = atol + rtol * abs(w[y + i])
        d2 += ((w[k1 + i] - w[k + i]) / scale) ** 2
    d2 = math.sqrt(d2 / d) / h0
    change = unit * max(d1, unit * d2)
    h1 = h0 if change <= 1e-15 else unit * (0.01 / change) ** power
    h = min(100.0 * h0, h1, span)
    return h if 0.0 < h < np.inf and d2 < np.inf else 1e-6 * span
"""
