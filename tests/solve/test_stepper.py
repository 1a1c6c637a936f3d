# SPDX-License-Identifier: Apache-2.0
"""The plain-torch engine against SciPy, closed forms and finite differences; rows against each other."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from pyro_latentde.errors import SolveError
from pyro_latentde.solve.methods.catalog import METHODS
from pyro_latentde.solve.torch_engine.stepper import replay_rows, solve_rows

DOUBLE = torch.float64
ADAPTIVE = [name for name, method in METHODS.items() if method.adaptive]
EXPLICIT = [name for name, method in METHODS.items() if method.kind == "explicit"]
SETTINGS = {"rtol": 1e-7, "atol": 1e-9, "max_steps": 20_000}
OK, MAX_STEPS, UNDERFLOW, NON_FINITE = range(4)


def tensor(*values):
    return torch.tensor(values, dtype=DOUBLE)


def prey_and_predator(p):
    """Lotka-Volterra with a push that depends on time, one parameter row per row."""

    def f(t, y, rows=None):
        a, b, c, d = (p if rows is None else p[rows]).unbind(1)
        x, z = y.unbind(1)
        return torch.stack([a * x - b * x * z + 0.1 * torch.sin(t), d * x * z - c * z], 1)

    return f


def without_rows(f):
    return lambda t, y: f(t, y)


@pytest.fixture
def problem():
    p = tensor([1.5, 1.0, 3.0, 1.0], [1.2, 0.8, 2.0, 0.9], [0.9, 1.1, 1.0, 0.4])
    y0 = tensor([1.0, 1.0], [2.0, 0.5], [0.3, 0.9])
    t0 = tensor(0.0, 1.0, 2.0)
    times = torch.stack([torch.linspace(0, 4, 9), torch.linspace(1, 2, 9), torch.linspace(2, -1, 9)]).to(DOUBLE)
    return prey_and_predator(p), p, y0, times, t0


def scipy_solution(p, y0, times, t0):
    rows = []
    for i in range(len(y0)):
        f = prey_and_predator(p[i : i + 1])

        def field(t, y, f=f):
            return f(tensor(t), torch.from_numpy(y)[None])[0].numpy()

        span = (t0[i].item(), times[i, -1].item())
        out = solve_ivp(field, span, y0[i].numpy(), "DOP853", times[i].numpy(), rtol=1e-12, atol=1e-13)
        rows.append(torch.from_numpy(out.y.T.copy()))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_agrees_with_scipy_forward_and_backward(name, problem):
    f, p, y0, times, t0 = problem
    tolerance = {"heun": 1e-5, "trbdf2": 1e-5, "bosh3": 1e-6}.get(name, 1e-8)
    out = solve_rows(f, y0, times, t0, METHODS[name], rtol=tolerance, atol=tolerance / 10, max_steps=20_000)
    assert out.status.tolist() == [OK, OK, OK]
    error = (out.ys - scipy_solution(p, y0, times, t0)).abs().max().item()
    assert error < 200 * tolerance
    assert (out.ys[:, 0] == y0).all()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.stiff is None])
def test_fixed_steps_converge_with_the_methods_order_at_and_between_steps(name, problem):
    f, p, y0, times, t0 = problem
    exact, order = scipy_solution(p, y0, times, t0), METHODS[name].order
    size = 0.025 if name == "kvaerno5" else {8: 0.2, 5: 0.05, 4: 0.02}.get(order, 0.01)
    errors = []
    for step_size in (size, size / 2):
        # The first row's fifth output falls inside a step, its last is the end of one.
        shifted = times.clone()
        shifted[:, 1:-1] += 0.0037 * (times[:, -1:] - t0[:, None])
        truth = scipy_solution(p, y0, shifted, t0) if step_size == size else truth  # noqa: F821
        out = solve_rows(f, y0, shifted, t0, METHODS[name], step_size=step_size, **SETTINGS)
        gap = (out.ys - truth).abs()
        errors.append([gap[:, 1:-1].max().item(), gap[:, -1].max().item()])
    assert (np.log2(np.array(errors[0]) / np.array(errors[1])) > order - 0.4).all()
    assert torch.isfinite(exact).all()


def test_fixed_steps_are_equal_and_no_longer_than_asked():
    y0, times, t0 = (
        torch.ones(3, 1, dtype=DOUBLE),
        tensor([1.0], [0.35], [-0.3]),
        torch.zeros(3, dtype=DOUBLE),
    )
    out = solve_rows(lambda t, y: -y, y0, times, t0, METHODS["rk4"], step_size=0.1, **SETTINGS)
    assert out.n_accepted.tolist() == [10, 4, 3]
    torch.testing.assert_close(out.steps[1, :4], torch.full((4,), 0.0875, dtype=DOUBLE))
    torch.testing.assert_close(out.steps.sum(1), times[:, 0])
    assert (out.steps[2] <= 0).all()
    assert out.n_evals.tolist() == [40, 16, 12]


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("subsets", [True, False])
def test_a_row_does_not_feel_a_stiff_and_an_exploding_neighbour(name, subsets):
    rates = tensor(1.0, 2000.0, -1.0, 0.3)

    def f(t, y, rows=None):
        rate = rates if rows is None else rates[rows]
        growth = torch.where(rate < 0, y[:, 0] ** 2, -rate * (y[:, 0] - torch.cos(t)))
        return growth[:, None]

    field = f if subsets else without_rows(f)
    y0, t0 = tensor([2.0], [2.0], [2.0], [2.0]), torch.zeros(4, dtype=DOUBLE)
    times = torch.linspace(0.0, 1.3, 7, dtype=DOUBLE).repeat(4, 1)
    settings = {"rtol": 3e-3 if name == "heun" else 1e-4, "atol": 1e-5, "max_steps": 3000}
    together = solve_rows(field, y0, times, t0, METHODS[name], **settings)
    assert together.status[[0, 1, 3]].tolist() == [OK] * 3
    assert together.status[2] in (UNDERFLOW, NON_FINITE, MAX_STEPS)  # y = 2 / (1 - 2t) is over at t = 1/2
    assert torch.isnan(together.ys[2, 3:]).all()
    torch.testing.assert_close(together.ys[2, :2, 0], 2 / (1 - 2 * times[2, :2]), rtol=1e-2, atol=0)
    for i in range(4):
        rate, one = rates[i : i + 1], slice(i, i + 1)

        def single(t, y, rate=rate):
            growth = torch.where(rate < 0, y[:, 0] ** 2, -rate * (y[:, 0] - torch.cos(t)))
            return growth[:, None]

        alone = solve_rows(single, y0[one], times[one], t0[one], METHODS[name], **settings)
        for count in ("status", "n_accepted", "n_rejected", "n_evals"):
            assert getattr(alone, count).tolist() == getattr(together, count)[one].tolist(), count
        torch.testing.assert_close(together.ys[one], alone.ys, rtol=1e-12, atol=0, equal_nan=True)
        n = int(alone.n_accepted)
        torch.testing.assert_close(together.steps[one, :n], alone.steps, rtol=1e-12, atol=0)
        assert (together.steps[i, n:] == 0).all()


def test_finished_rows_are_dropped_when_fewer_than_half_are_active(problem):
    f, _, y0, times, t0 = problem
    seen = []

    def spy(t, y, rows=None):
        seen.append(None if rows is None else rows.tolist())
        assert len(y) == (3 if rows is None else len(rows))
        return f(t, y, rows)

    times = torch.stack([times[0], times[1] * 0 + 1.01, times[2] * 0 + 2])
    out = solve_rows(spy, y0, times, t0, METHODS["tsit5"], **SETTINGS)
    assert None in seen and [0] in seen
    seen.clear()
    replay_rows(spy, y0, times, t0, out.steps, METHODS["tsit5"])
    assert [0] in seen
    plain = solve_rows(without_rows(f), y0, times, t0, METHODS["tsit5"], **SETTINGS)
    torch.testing.assert_close(out.ys, plain.ys, rtol=1e-13, atol=0)


def test_repeated_times_and_t0_among_them_are_exact(problem):
    f, _, y0, _, t0 = problem
    times = tensor([0, 0, 1, 1, 1, 3, 3], [1, 1, 1, 1.5, 1.5, 2, 2], [2, 2, 1, 1, 0, -1, -1])
    for name in ("tsit5", "dopri8"):
        out = solve_rows(f, y0, times, t0, METHODS[name], **SETTINGS)
        again = replay_rows(f, y0, times, t0, out.steps, METHODS[name])
        for ys in (out.ys, again):
            assert (ys[:, :2] == y0[:, None]).all()
            assert (ys[0, 2] == ys[0, 4]).all()
            assert (ys[:, 5] == ys[:, 6]).all()


def test_a_row_that_ends_where_it_starts_takes_no_step():
    y0, t0 = tensor([1.0], [1.0]), tensor(0.5, 0.0)
    out = solve_rows(lambda t, y: -y, y0, tensor([0.5, 0.5], [0.5, 1.0]), t0, METHODS["tsit5"], **SETTINGS)
    assert out.n_accepted[0] == 0 and out.n_accepted[1] > 0
    assert out.status.tolist() == [OK, OK]
    assert out.ys[0, :, 0].tolist() == [1.0, 1.0]
    assert out.n_evals[0] == 1


def test_statistics_count_what_was_evaluated():
    calls = 0

    def f(t, y):
        nonlocal calls
        calls += 1
        return torch.stack([y[:, 1], 5 * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], 1)

    y0, t0, times = tensor([2.0, 0.0]), tensor(0.0), tensor([5.0, 6.1, 20.0])
    for name in set(ADAPTIVE) & set(EXPLICIT):
        calls = 0
        out = solve_rows(f, y0, times, t0, METHODS[name], **{**SETTINGS, "rtol": 1e-4})
        assert out.status.item() == OK
        assert out.n_evals.item() == calls, name
        assert out.n_rejected.item() > 0 or name == "heun"
    for name in EXPLICIT:
        calls = 0
        out = solve_rows(f, y0, times, t0, METHODS[name], step_size=0.05, **SETTINGS)
        assert out.n_evals.item() == calls, name


def steps_by_the_book(f, y, t, end, method, rtol, atol):
    """The documented controller once more, for one row, in NumPy: all accepted steps and the rejections."""
    weights, k_order = np.array(method.errors), method.error_order

    def norm(x, scale):
        return np.sqrt(np.mean((x / scale) ** 2))

    sign, first = np.sign(end - t), f(t, y)
    scale = atol + rtol * np.abs(y)
    d0, d1 = norm(y, scale), norm(first, scale)
    # Hairer, Norsett and Wanner's first step, in the time in which the state changes by its own size
    unit = abs(end - t) if (still := d0 < 1e-5 or d1 * abs(end - t) < 1e-5) else d0 / d1
    h0 = min((1e-6 if still else 0.01) * unit, abs(end - t))
    d2 = norm(f(t + sign * h0, y + sign * h0 * first) - first, scale) / h0
    d1, d2 = unit * d1, unit**2 * d2
    h1 = h0 if max(d1, d2) <= 1e-15 else unit * (0.01 / max(d1, d2)) ** (1 / k_order)
    h, before, accepted, rejections, after_rejection = min(100 * h0, h1, abs(end - t)), 1.0, [], 0, False
    while t != end:
        left = abs(end - t)
        h = left if h >= left else left / 2 if 2 * h > left else h
        k = [f(t, y)]
        for c, row in zip(method.c[1:], method.a[1:], strict=True):
            k.append(f(t + sign * c * h, y + sign * h * np.array(row) @ np.array(k)))
        new = y + sign * h * np.array(method.b) @ np.array(k)
        scale = atol + rtol * np.maximum(np.abs(y), np.abs(new))
        e = [norm(h * row @ np.array(k), scale) for row in weights]
        e = e[0] if len(e) == 1 else e[0] ** 2 / np.sqrt(e[0] ** 2 + 0.01 * e[1] ** 2)
        if e <= 1:
            e, was = max(e, 1e-10), h
            factor = np.clip(0.9 * e ** (-0.7 / k_order) * before ** (0.4 / k_order), 0.2, 10)
            h *= min(factor, 1.0) if after_rejection else factor
            accepted.append(sign * was)
            t, y, before, after_rejection = end if was == left else t + sign * was, new, e, False
        else:
            h *= max(0.2, 0.9 * e ** (-1 / k_order))
            rejections, after_rejection = rejections + 1, True
    return accepted, rejections


@pytest.mark.parametrize("end", [12.0, -7.0])
@pytest.mark.parametrize("name", [name for name in ADAPTIVE if name in EXPLICIT])
def test_steps_are_those_of_the_documented_controller(name, end):
    def book(t, y):
        return np.array([y[1], 5 * (1 - y[0] ** 2) * y[1] - y[0] + (3 if t > 3 else 0)])

    def f(t, y):
        pull = 5 * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0] + 3.0 * (t > 3)
        return torch.stack([y[:, 1], pull], 1)

    y0 = [2.0, 0.5] if end > 0 else [0.1, 0.2]
    tolerance = 1e-3 if name == "heun" else 1e-5
    expected, rejections = steps_by_the_book(book, np.array(y0), 0.5, end, METHODS[name], tolerance, tolerance / 10)
    out = solve_rows(
        f,
        tensor(y0),
        tensor([end]),
        tensor(0.5),
        METHODS[name],
        rtol=tolerance,
        atol=tolerance / 10,
        max_steps=10_000,
    )
    assert out.n_rejected.item() == rejections
    if end > 0:
        assert rejections > 1
    # Rounding grows where the slope jumps at t = 3.
    np.testing.assert_allclose(out.steps[0].numpy(), expected, rtol=1e-3)


class TestFailures:
    def test_max_steps(self):
        y0, t0, times = tensor([1.0], [1.0]), tensor(0.0, 0.0), tensor([0.001, 0.001], [0.001, 50.0])
        settings = {**SETTINGS, "max_steps": 5}
        out = solve_rows(lambda t, y: torch.cos(9 * t)[:, None], y0, times, t0, METHODS["tsit5"], **settings)
        assert out.status.tolist() == [OK, MAX_STEPS]
        assert (out.n_accepted + out.n_rejected)[1] == 5
        assert torch.isfinite(out.ys[1, 0]).all() and torch.isnan(out.ys[1, 1]).all()
        fixed = solve_rows(lambda t, y: -y, y0, times, t0, METHODS["rk4"], step_size=0.1, **settings)
        assert fixed.status.tolist() == [OK, MAX_STEPS]
        assert fixed.n_accepted.tolist() == [1, 5]

    def test_underflow_at_a_jump_the_error_estimate_cannot_pass(self):
        # A jump of 1e12 in the state's slope at t = 1/3: every step across it is wrong, none non-finite.
        def f(t, y):
            return torch.where(t < 1 / 3, 1.0, 1e12 * torch.sign(torch.sin(1e18 * t)))[:, None]

        out = solve_rows(f, tensor([0.0]), tensor([[0.2, 1.0]])[0], tensor(0.0), METHODS["dopri5"], **SETTINGS)
        assert out.status.tolist() == [UNDERFLOW]
        assert out.ys[0, 0, 0].item() == pytest.approx(0.2)
        assert torch.isnan(out.ys[0, 1])

    def test_non_finite_on_the_way(self):
        # sqrt(1 - t) has no value after t = 1.
        def f(t, y):
            return torch.sqrt(1 - t)[:, None]

        times = tensor([0.5, 2.0])
        out = solve_rows(f, tensor([0.0]), times, tensor(0.0), METHODS["tsit5"], **SETTINGS)
        assert out.status.tolist() == [NON_FINITE]
        assert out.ys[0, 0, 0].item() == pytest.approx(2 / 3 * (1 - 0.5**1.5), rel=1e-6)
        assert torch.isnan(out.ys[0, 1])
        assert out.steps.sum() == pytest.approx(1.0)
        fixed = solve_rows(f, tensor([0.0]), times, tensor(0.0), METHODS["rk4"], step_size=0.1, **SETTINGS)
        assert fixed.status.tolist() == [NON_FINITE]
        assert fixed.n_accepted.item() == 10
        assert torch.isnan(fixed.ys[0, 1])

    @pytest.mark.parametrize("step_size", [None, 0.1])
    def test_non_finite_at_once(self, step_size):
        y0, times, t0 = (
            tensor([0.0], [1.0], [math.nan]),
            tensor([0.0, 1.0], [0.0, 1.0], [0.0, 1.0]),
            torch.zeros(3),
        )
        method = METHODS["tsit5"]
        out = solve_rows(lambda t, y: 1 / y, y0, times, t0.to(DOUBLE), method, step_size=step_size, **SETTINGS)
        assert out.status.tolist() == [NON_FINITE, OK, NON_FINITE]
        assert out.n_accepted[[0, 2]].tolist() == [0, 0]
        assert out.n_evals[[0, 2]].tolist() == [1, 1]
        assert out.ys[0, 0] == 0.0 and torch.isnan(out.ys[0, 1])
        assert out.ys[1, 1].item() == pytest.approx(math.sqrt(3.0), rel=1e-5)

    def test_too_short_given_steps(self):
        steps, times = torch.full((1, 3), 0.1, dtype=DOUBLE), tensor([0.25, 1.0])
        out = solve_rows(lambda t, y: -y, tensor([1.0]), times, tensor(0.0), METHODS["rk4"], steps=steps, **SETTINGS)
        assert out.status.tolist() == [MAX_STEPS]
        assert out.ys[0, 0, 0].item() == pytest.approx(math.exp(-0.25), rel=1e-5)
        assert torch.isnan(out.ys[0, 1])

    def test_a_method_without_error_estimate_needs_a_step_size(self):
        arguments = (lambda t, y: -y, tensor([1.0]), tensor([1.0]), tensor(0.0))
        with pytest.raises(SolveError, match="rk4.*step_size"):
            solve_rows(*arguments, METHODS["rk4"], **SETTINGS)
        with pytest.raises(SolveError, match="positive"):
            solve_rows(*arguments, METHODS["rk4"], step_size=0.0, **SETTINGS)


def test_single_precision_keeps_its_accuracy():
    y0, t0 = torch.ones(1, 2), torch.zeros(1)
    times = torch.linspace(0.1, 3.0, 17)[None]
    for name in ("tsit5", "dopri8"):
        out = solve_rows(
            lambda t, y: torch.stack([-y[:, 1], y[:, 0]], 1),
            y0,
            times,
            t0,
            METHODS[name],
            rtol=1e-5,
            atol=1e-6,
            max_steps=1000,
        )
        assert out.ys.dtype == torch.float32
        angle = times + math.pi / 4
        exact = math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], -1)
        assert (out.ys - exact).abs().max() < 3e-5
