# SPDX-License-Identifier: Apache-2.0
"""Functions that kernels call, whatever the method: the place of a value in a table."""

__all__ = ["INSERTION_POINT"]

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
