# SPDX-License-Identifier: Apache-2.0
"""Functions that kernels call, whatever the method: the first step, and the place of a value in a table."""

__all__ = ["FIRST_STEP", "INSERTION_POINT"]

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
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    h0 = min(h0, span)
    for i in range(d):
        w[y1 + i] = w[y + i] + sign * h0 * w[k + i]
    field(t + sign * h0, w, y1, k1, ws, p, o)
    d2 = 0.0
    for i in range(d):
        scale = atol + rtol * abs(w[y + i])
        d2 += ((w[k1 + i] - w[k + i]) / scale) ** 2
    d2 = math.sqrt(d2 / d) / h0
    h1 = max(1e-6, 1e-3 * h0) if d1 <= 1e-15 and d2 <= 1e-15 else (0.01 / max(d1, d2)) ** power
    h = min(100.0 * h0, h1, span)
    return h if 0.0 < h < np.inf and d2 < np.inf else 1e-6 * span
"""

INSERTION_POINT = """
def insertion_point(p: Floats, start: int, stride: int, size: int, right: bool, value: float) -> int:
    lo = 0
    hi = size
    while lo < hi:
        mid = (lo + hi) >> 1
        knot = p[start + stride * mid]
        if knot < value or (right and knot == value):
            lo = mid + 1
        else:
            hi = mid
    return lo
"""
