# SPDX-License-Identifier: Apache-2.0
"""The subset of Python in which kernels are written means the same as machine code and as Python."""

import math

import numpy as np
import pytest

from pyro_latentde.solve.fused.kernel_cache import load_kernel

KINDS = "Floats = Ints = None\n"

LOOPS = """
def total(x: Floats, begin: int, end: int) -> float:
    s = 0.0
    for i in range(begin, end):
        if x[i] < 0.0:
            continue
        if x[i] == np.inf:
            break
        s += x[i]
    return s

def kernel(n: int, x: Floats, out: Floats, whole: Ints) -> int:
    k = 0
    for i in range(n - 1, -1, -1):
        whole[k] = i
        k += 1
    while k > 0 and x[k - 1] != 2.0:
        k -= 1
    out[0] = total(x, 0, n)
    out[1] = k
    return k
"""

SCALARS = """
def kernel(a: float, b: float, n: int, yes: bool, out: Floats) -> int:
    out[0] = a if yes or a > b else b
    out[1] = max(a, b, 0.5) - min(a, b)
    out[2] = a ** 2 + abs(b) ** 1.5 - (-a) / n
    out[3] = (n >> 1) * abs(-n) + int(a) - int(yes)
    out[4] = float(yes) + (1.0 if 0.0 < a < b else 0.0) - (not yes)
    out[5] = math.tanh(a) + math.exp(b) + math.atan2(a, b) + np.floor(a) + np.rint(b) + math.erf(a) + math.log1p(b)
    out[6] = 1.0 if a == b else 0.0
    out[7] = 1.0 if a != b else 0.0
    out[8] = 1.0 if abs(a) < np.inf else 0.0
    return 0
"""


def both(source, *arguments):
    """Results of ``kernel`` as machine code and as Python, with what each wrote into its arrays."""
    names = {"math": math, "np": np}
    exec(KINDS + source, names)
    results = []
    for function in (load_kernel(source, "kernel", 5), names["kernel"]):
        own = [x.copy() if isinstance(x, np.ndarray) else x for x in arguments]
        results.append((function(*own), *(x for x in own if isinstance(x, np.ndarray))))
    return results


@pytest.mark.parametrize("values", [[1.0, 2.0, -1.0, 3.0], [2.0, np.inf, 1.0, 1.0], [-1.0, 5.0, np.nan, 0.0]])
def test_loops_and_calls(values):
    compiled, python = both(LOOPS, 4, np.array(values), np.zeros(2), np.zeros(4, dtype=np.int64))
    assert compiled[0] == python[0]
    for x, y in zip(compiled[1:], python[1:], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-15)


@pytest.mark.parametrize("yes", [False, True])
@pytest.mark.parametrize(("a", "b"), [(0.3, 1.7), (1.7, 0.3), (1.2, 1.2)])
def test_scalars(a, b, yes):
    compiled, python = both(SCALARS, a, b, 5, yes, np.zeros(9))
    np.testing.assert_allclose(compiled[1], python[1], rtol=1e-14)


@pytest.mark.parametrize("a", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_compare_as_in_python(a):
    out = np.zeros(9)
    load_kernel(SCALARS, "kernel", 5)(a, a, 5, True, out)
    assert list(out[6:]) == [float(a == a), float(a != a), 0.0]


@pytest.mark.parametrize("bad", [np.zeros(4, dtype=np.float32), np.zeros(8)[::2], np.zeros(4, dtype=np.int64)])
def test_an_array_of_another_kind_is_refused(bad):
    kernel = load_kernel(LOOPS, "kernel", 5)
    with pytest.raises(TypeError, match="contiguous arrays"):
        kernel(4, bad, np.zeros(2), np.zeros(4, dtype=np.int64))


def test_what_is_no_kernel_source_is_refused():
    with pytest.raises(TypeError, match="wanted"):
        load_kernel("def kernel(n: int) -> int:\n    n = 0.5\n    return n\n", "kernel", 5)
    with pytest.raises(NameError, match="gamma"):
        load_kernel("def kernel(x: float) -> float:\n    return math.gamma(x)\n", "kernel", 5)
