# SPDX-License-Identifier: Apache-2.0
"""Every coefficient against the order conditions (Butcher's rooted trees) and against SciPy's tables."""

import functools
import itertools
import math

import numpy as np
import pytest
from scipy.integrate._ivp import dop853_coefficients, rk

from pyro_latentde.errors import SolveError
from pyro_latentde.solve.methods.catalog import METHODS, Method, get_method

INTERPOLANT_ORDER = {
    "tsit5": 4,
    "dopri5": 4,
    "dopri8": 7,
    "bosh3": 3,
    "rk4": 3,
    "heun": 2,
    "midpoint": 2,
    "euler": 1,
    "kvaerno5": 4,
    "kvaerno3": 3,
    "trbdf2": 2,
}
ERROR_ROWS = {
    "tsit5": (4,),
    "dopri5": (4,),
    "dopri8": (5, 3),
    "bosh3": (2,),
    "heun": (1,),
    "kvaerno5": (4,),
    "kvaerno3": (2,),
}
SINGLE = {name: method for name, method in METHODS.items() if method.stiff is None}
methods = pytest.mark.parametrize("method", SINGLE.values(), ids=SINGLE)


@functools.cache
def trees(order: int) -> tuple:
    """All rooted trees with ``order`` vertices, each a sorted tuple of its subtrees."""
    found = set()
    for parts in partitions(order - 1):
        for children in itertools.product(*(trees(part) for part in parts)):
            found.add(tuple(sorted(children)))
    return tuple(sorted(found))


def partitions(n: int, largest: int | None = None) -> list:
    if n == 0:
        return [()]
    top = min(n, largest or n)
    return [(first, *rest) for first in range(top, 0, -1) for rest in partitions(n - first, first)]


def size(tree: tuple) -> int:
    return 1 + sum(size(child) for child in tree)


def density(tree: tuple) -> int:
    return size(tree) * math.prod(density(child) for child in tree)


def elementary_weight(tree: tuple, a: np.ndarray) -> np.ndarray:
    """Vector Φ_i(tree): the product over children of (A Φ(child))_i."""
    out = np.ones(len(a))
    for child in tree:
        out = out * (a @ elementary_weight(child, a))
    return out


def full_tableau(method: Method) -> tuple[np.ndarray, np.ndarray]:
    rows = (*method.a, *method.dense_a)
    a = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        assert len(row) == i + (method.kind == "implicit" and i > 0)
        a[i, : len(row)] = row
    return a, np.array((*method.c, *method.dense_c))


def test_the_number_of_rooted_trees():
    assert [len(trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]


@methods
def test_shapes_nodes_and_flags(method):
    a, c = full_tableau(method)
    s = method.stages
    assert len(method.a) == len(method.b) == s
    assert len(method.interpolant) == len(c)
    assert len({len(row) for row in method.interpolant}) == 1
    assert all(len(row) == s for row in method.errors)
    np.testing.assert_allclose(a.sum(1), c, atol=2e-14)
    assert method.adaptive == bool(method.errors) == (method.error_order is not None)
    if method.fsal:
        assert method.c[-1] == 1.0
        assert (*method.a[-1], 0.0)[: len(method.b)] == method.b


@methods
def test_solution_weights_meet_every_order_condition_and_not_the_next(method):
    a, _ = full_tableau(method)
    s = method.stages
    a, b = a[:s, :s], np.array(method.b)
    for order in range(1, method.order + 1):
        for tree in trees(order):
            assert abs(b @ elementary_weight(tree, a) * density(tree) - 1) < 1e-12, (order, tree)
    broken = [abs(b @ elementary_weight(t, a) * density(t) - 1) for t in trees(method.order + 1)]
    assert max(broken) > 1e-3


@methods
@pytest.mark.parametrize("theta", [0.0, 0.13, 0.5, 0.77, 1.0])
def test_interpolant_meets_its_order_conditions(method, theta):
    a, _ = full_tableau(method)
    p = np.array(method.interpolant)
    weights = p @ theta ** np.arange(1, p.shape[1] + 1)
    for order in range(1, INTERPOLANT_ORDER[method.name] + 1):
        for tree in trees(order):
            expected = theta**order / density(tree)
            assert abs(weights @ elementary_weight(tree, a) - expected) < 2e-13, (order, tree)
    if theta == 1.0:
        padded = np.array((*method.b, *(0.0 for _ in method.dense_c)))
        np.testing.assert_allclose(weights, padded, rtol=0, atol=4e-16 * (1 + np.abs(p).max()))


def test_interpolants_lose_at_most_one_order():
    assert set(INTERPOLANT_ORDER) == set(SINGLE)
    for name, order in INTERPOLANT_ORDER.items():
        assert order >= METHODS[name].order - 1


@methods
def test_interpolant_starts_with_the_slope_of_the_first_stage(method):
    first = [row[0] for row in method.interpolant]
    assert first == [1.0, *([0.0] * (len(first) - 1))]


@pytest.mark.parametrize("name", ERROR_ROWS)
def test_error_rows_belong_to_embedded_formulas_of_lower_order(name):
    method = METHODS[name]
    a, _ = full_tableau(method)
    a = a[: method.stages, : method.stages]
    for row, embedded in zip(method.errors, ERROR_ROWS[name], strict=True):
        for order in range(1, embedded + 1):
            for tree in trees(order):
                assert abs(np.array(row) @ elementary_weight(tree, a)) < 2e-14, (order, tree)
        next_order = [abs(np.array(row) @ elementary_weight(tree, a)) for tree in trees(embedded + 1)]
        assert max(next_order) > 1e-5


@pytest.mark.parametrize(("name", "scipy_method"), [("dopri5", rk.RK45), ("bosh3", rk.RK23)])
def test_same_tables_as_scipy(name, scipy_method):
    method = METHODS[name]
    a, c = full_tableau(method)
    n = scipy_method.n_stages
    np.testing.assert_allclose(a[:n, : scipy_method.A.shape[1]], scipy_method.A, rtol=1e-15)
    np.testing.assert_allclose(c[:n], scipy_method.C, rtol=1e-15)
    np.testing.assert_allclose(method.b[:n], scipy_method.B, rtol=1e-15)
    # SciPy's sign is bhat - b.
    np.testing.assert_allclose(method.errors[0], -scipy_method.E, rtol=1e-13, atol=1e-16)
    np.testing.assert_allclose(method.interpolant, scipy_method.P, rtol=1e-15)


def test_dopri8_has_scipys_dop853_tables():
    method, ref = METHODS["dopri8"], dop853_coefficients
    a, c = full_tableau(method)
    np.testing.assert_array_equal(a, ref.A)
    np.testing.assert_allclose(c, ref.C, rtol=1e-15)
    np.testing.assert_array_equal(method.b[:12], ref.B)
    np.testing.assert_allclose(method.errors[0], ref.E5, rtol=1e-15)
    np.testing.assert_allclose(method.errors[1], ref.E3, rtol=1e-14, atol=1e-16)


def test_dopri8_dense_output_is_scipys():
    method = METHODS["dopri8"]
    rng = np.random.default_rng(0)
    k = rng.normal(size=(16, 3))
    h, y_old = 0.3, rng.normal(size=3)
    y_new = y_old + h * np.array(method.b) @ k[:13]
    f = np.empty((7, 3))
    f[0] = y_new - y_old
    f[1] = h * k[0] - f[0]
    f[2] = 2 * f[0] - h * (k[12] + k[0])
    f[3:] = h * dop853_coefficients.D @ k
    theirs = rk.Dop853DenseOutput(0.0, h, y_old, f)
    p = np.array(method.interpolant)
    for theta in (0.1, 0.4, 0.9, 1.0):
        ours = y_old + h * (p @ theta ** np.arange(1, 8)) @ k
        np.testing.assert_allclose(ours, theirs(theta * h), rtol=0, atol=1e-12)


def integrate(method: Method, n: int, theta: float) -> np.ndarray:
    """Error of n equal steps on [0, 2] and of the output at fraction theta of the middle step's interval."""
    a, c = full_tableau(method)
    main, p = method.stages, np.array(method.interpolant)

    def field(t: float, y: np.ndarray) -> np.ndarray:
        return np.array([y[1], -y[0]]) * (1 + np.cos(t))

    def exact(t: float) -> np.ndarray:
        angle = t + np.sin(t)
        return np.array([np.sin(angle), np.cos(angle)])

    h, y, inside = 2.0 / n, exact(0.0), []
    for step in range(n):
        k = np.zeros((len(c), 2))
        for i in range(len(c)):
            for _ in range(60 if a[i, i] else 1):  # of an implicit stage the fixed point, as the field is not stiff
                k[i] = field(step * h + c[i] * h, y + h * a[i, : i + 1] @ k[: i + 1])
        between = y + h * (p @ theta ** np.arange(1, p.shape[1] + 1)) @ k
        inside.append(np.abs(between - exact((step + theta) * h)).max())
        y = y + h * np.array(method.b) @ k[:main]
    return np.array([np.abs(y - exact(2.0)).max(), max(inside)])


@methods
@pytest.mark.parametrize("theta", [0.31, 0.7])
def test_observed_order_at_the_end_and_between_steps(method, theta):
    coarse = {8: 6, 5: 20, 4: 30, 3: 40}.get(method.order, 80)
    slopes = np.log2(integrate(method, coarse, theta) / integrate(method, 2 * coarse, theta))
    assert (slopes > method.order - 0.3).all(), slopes
    assert slopes[0] < method.order + 0.8


def test_unknown_name_lists_the_names_and_suggests_the_closest():
    with pytest.raises(SolveError, match=r"tsit5, dopri5, .*got 'dopri6'.*Did you mean 'dopri"):
        get_method("dopri6")
    assert get_method("euler") is METHODS["euler"]
