# SPDX-License-Identifier: Apache-2.0
"""Kernel source with its types written out means what the CPU's machine code does, in float64 and in float32."""

import ast
import math

import numpy as np
import pytest

from pyro_latentde.solve.fused.cuda.source import _HELPERS
from pyro_latentde.solve.fused.kernel_cache import load_kernel
from pyro_latentde.solve.fused.typed import PRECISION, typed_functions

SOURCE = """
def half(x: float, n: int) -> float:
    return n / 2 if x > 0.0 else x

def kernel(a: float, b: float, n: int, yes: bool, out: Floats, marks: Ints) -> int:
    out[0] = half(n, 3) + half(-a, n) + (n + 1) * a - n / (n + 1)
    out[1] = max(a, b, 0.5) - min(n, b)
    out[2] = a ** 2 + abs(b) ** 1.5 - (-a) / n
    out[3] = (n >> 1) * abs(-n) + int(a) - int(yes) + max(n, 2)
    out[4] = float(yes) + (1.0 if 0.0 < a < b else 0.0) - (not yes)
    out[5] = np.floor(a) + np.rint(b) + np.ceil(a) + np.trunc(b) + math.sqrt(abs(a))
    out[6] = 1.0 if a == b or n else np.nan
    out[7] = 1.0 / (a - a)
    out[8] = max(a, np.nan) + max(np.inf, b)
    k = 0
    while k < n and not k == 3:
        k += 1
        if k == 2:
            continue
        out[9] += k
    for i in range(n - 1, -1, -1):
        marks[i] = i
    marks[0] = int(np.nan)
    marks[1] = k
    if yes:
        marks[2] = 7
    return k
"""


def as_python(source, real):
    """``kernel`` as the CUDA engine would have it compiled, with numbers of one kind."""
    functions = typed_functions(source, single=real is np.float32)
    names = {"math": math, "real": real, "inf": real(np.inf), "nan": real(np.nan), "index": np.int64}
    names |= {name: getattr(np, name) for name in ("floor", "ceil", "rint", "trunc")}
    exec(_HELPERS + "\n".join(ast.unparse(f) for f in functions), names)
    return names["kernel"]


@pytest.mark.parametrize("real", [np.float64, np.float32])
@pytest.mark.parametrize(("a", "b", "yes"), [(0.25, 1.75, False), (1.75, 0.25, True), (-1.25, -1.25, True)])
def test_the_same_numbers(real, a, b, yes):
    right, whole = np.zeros(10), np.zeros(5, dtype=np.int64)
    steps = load_kernel(SOURCE, "kernel", 5)(a, b, 5, yes, right, whole)
    out, own = np.zeros(10, dtype=real), np.zeros(5, dtype=np.int64)
    with np.errstate(all="ignore"):
        assert as_python(SOURCE, real)(real(a), real(b), 5, yes, out, own) == steps
    np.testing.assert_allclose(out, right, rtol=4 * np.finfo(real).eps)
    assert np.array_equal(own[1:], whole[1:]) and own[0] == 0


def test_every_number_has_its_type():
    """No literal that would widen float32 is left, and no whole number meets a floating one."""
    kept = []
    for function in typed_functions(SOURCE, single=True):
        wrapped = {
            id(node.args[0])
            for node in ast.walk(function)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "real"
        }
        literals = [x for x in ast.walk(function) if isinstance(x, ast.Constant) and isinstance(x.value, float)]
        kept += [x.value for x in literals if id(x) not in wrapped]
        assert literals
    assert kept == []
    with np.errstate(all="ignore"):
        out = np.zeros(10, dtype=object)  # keeps what is put in as it is
        as_python(SOURCE, np.float32)(np.float32(0.3), np.float32(0.7), 5, True, out, np.zeros(5, dtype=np.int64))
    assert {type(x) for x in out[:9]} == {np.float32}


def test_literals_that_stand_for_the_resolution():
    source = "def kernel(x: float) -> float:\n    return x * 2.220446049250313e-16 + 1e-300\n"
    assert as_python(source, np.float64)(np.float64(2.0)) == 2 * np.finfo(np.float64).eps
    found = as_python(source, np.float32)(np.float32(2.0))
    assert found == np.float32(2.0) * np.finfo(np.float32).eps and found.dtype == np.float32
    assert all(np.float32(x) > 0 for x in PRECISION.values())


def test_names_that_the_compiler_needs():
    with pytest.raises(NameError, match="larger"):
        typed_functions("def kernel(x: float) -> float:\n    larger = x\n    return larger\n")
