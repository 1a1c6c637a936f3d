# SPDX-License-Identifier: Apache-2.0
"""Functions of vectors in kernels: right to a few units in the last place, at the ends of their domain too."""

import mpmath
import numpy as np
import pytest

from pyro_latentde.solve.fused.kernel_cache import load_kernel
from pyro_latentde.solve.fused.lanes.math import lane_math

LANES = 4
EDGES = (0.0, -0.0, 5e-324, -1e-310, 1e-300, 0.84375, 1.25, -6.0, 20.0, 709.78, -745.1, -746.0, 1e300)


def evaluate(body, x):
    """``out = body`` for every entry, four at a time."""
    source = lane_math() + (
        "def kernel(n: int, w: Floats, out: Floats) -> int:\n"
        "    for i in range(n):\n"
        "        x = w[i, :]\n"
        f"        out[i, :] = {body}\n"
        "    return 0\n"
    )
    kernel = load_kernel(source, "kernel", 60, LANES)
    padded = np.concatenate([x, np.zeros(-len(x) % LANES)])
    out = np.empty_like(padded)
    assert kernel(len(padded) // LANES, padded, out) == 0
    return out[: len(x)]


def arguments(lowest):
    """Of every size, from ``lowest`` on."""
    random = np.random.default_rng(3)
    parts = [scale * random.normal(size=200) for scale in (1e-8, 1e-3, 0.3, 1.0, 5.0, 60.0)]
    x = np.concatenate([*parts, 10.0 ** random.uniform(-300, 300, 200), EDGES])
    return x[x > lowest]


@pytest.mark.parametrize(
    ("name", "lowest", "units"),
    [("exp", -np.inf, 1.5), ("expm1", -np.inf, 2.5), ("tanh", -np.inf, 3.0)]
    + [("log", 0.0, 1.5), ("log1p", -1.0, 2.0), ("erf", -np.inf, 1.5)],
)
def test_functions_against_exact_values(name, lowest, units):
    x = arguments(lowest)
    found = evaluate(f"math.{name}(x)", x)
    with mpmath.workprec(150):
        for value, argument in zip(found, x, strict=True):
            exact = getattr(mpmath, name)(mpmath.mpf(float(argument)))
            if mpmath.isinf(exact) or abs(exact) > 1.797e308:
                assert value == float(exact)
                continue
            assert abs(mpmath.mpf(float(value)) - exact) <= units * np.spacing(abs(float(exact))), argument


def test_what_is_not_finite():
    x = np.array([np.inf, -np.inf, np.nan])
    results = {name: evaluate(f"math.{name}(x)", x) for name in ("exp", "expm1", "tanh", "erf", "log", "log1p")}
    expected = {
        "exp": [np.inf, 0.0, np.nan],
        "expm1": [np.inf, -1.0, np.nan],
        "tanh": [1.0, -1.0, np.nan],
        "erf": [1.0, -1.0, np.nan],
        "log": [np.inf, np.nan, np.nan],
        "log1p": [np.inf, np.nan, np.nan],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(results[name], values, err_msg=name)
    np.testing.assert_array_equal(evaluate("math.log(x)", np.array([0.0, -1.0])), [-np.inf, np.nan])


def test_every_lane_chooses_for_itself():
    x = np.array([-2.0, -0.5, 0.5, 3.0, np.nan])
    found = evaluate("(2.0 * x if x > 0.0 and x < 2.0 or x < -1.0 else -x)", x)
    np.testing.assert_array_equal(found, [-4.0, 0.5, 1.0, -3.0, np.nan])
    np.testing.assert_array_equal(evaluate("min(max(x, -1.0), 1.0)", x[:4]), [-1.0, -0.5, 0.5, 1.0])
    np.testing.assert_allclose(
        evaluate("math.sin(x) + math.atan2(x, 2.0)", x[:4]), np.sin(x[:4]) + np.arctan2(x[:4], 2)
    )


def test_lanes_are_added_up():
    kernel = load_kernel(
        "def kernel(w: Floats) -> int:\n    w[4, :] = sums_of(w[0, :], w[1, :], w[2, :], w[3, :])\n    return 0\n",
        "kernel",
        60,
        LANES,
    )
    w = np.concatenate([np.random.default_rng(0).normal(size=16), np.zeros(4)])
    kernel(w)
    np.testing.assert_allclose(w[16:], w[:16].reshape(4, 4).sum(1), rtol=1e-15)
