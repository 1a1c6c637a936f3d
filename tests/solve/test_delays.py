# SPDX-License-Identifier: Apache-2.0
"""Delay equations against closed forms and SciPy's method of steps; order, states of other kinds, failures."""

import numpy as np
import pytest
import torch
from delay_problems import (
    DOUBLE,
    ENGINES,
    MACKEY_GLASS,
    ONE,
    TIGHT,
    TIMES,
    WEIGHTS,
    by_scipy,
    decay,
    decay_solution,
    leaves,
    logistic,
    mackey_glass,
    tensor,
    two_lags,
    wave,
)
from ode_fields import central_difference

import pyro_latentde as lde

# ---- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_linear_equation_and_its_gradients_in_closed_form(engine):
    inputs = leaves(tensor(1.0)[0], ONE * 1.3, tensor(0.8)[0], TIMES, tensor(0.0)[0])

    def exact(lag, start, rate, times, t0):
        return (WEIGHTS * decay_solution(times, lag, start, rate, t0)).sum()

    def solved(lag, start, rate, times, t0):
        ys = lde.ddesolve(decay, start, lag, times, rate, t0=t0, engine=engine, **TIGHT).ys
        return (WEIGHTS * ys[:, 0]).sum()

    torch.testing.assert_close(solved(*inputs), exact(*inputs), rtol=0, atol=1e-12)
    got = torch.autograd.grad(solved(*inputs), inputs)
    expected = torch.autograd.grad(exact(*inputs), inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_with_lags_and_starts_of_their_own(engine):
    lags, starts, t0 = tensor([0.4], [1.0], [2.9]), tensor([1.0], [-0.5], [2.0]), tensor(0.0, 0.3, -1.0)
    times = t0[:, None] + TIMES
    together = lde.ddesolve(decay, starts, lags, times, tensor(0.8)[0], engine=engine, **TIGHT)
    expected = decay_solution(times, lags, starts, 0.8, t0[:, None])
    torch.testing.assert_close(together.ys[..., 0], expected, rtol=0, atol=1e-11)
    for r in range(3):
        alone = lde.ddesolve(decay, starts[r], lags[r], times[r], tensor(0.8)[0], engine=engine, **TIGHT)
        if engine == "fused":
            assert torch.equal(alone.ys, together.ys[r])
        torch.testing.assert_close(alone.ys, together.ys[r], rtol=0, atol=1e-14)


@pytest.mark.parametrize("method", ["tsit5", "dopri8"])
def test_delayed_logistic_growth(method):
    """Hutchinson's equation with r lag = 2.1, beyond the Hopf bifurcation at pi / 2."""
    engine = "fused"
    p, times = {"r": tensor(1.4)[0], "K": tensor(2.0)[0]}, torch.linspace(0, 12, 25, dtype=DOUBLE)
    expected = by_scipy(logistic, lambda t: np.array([0.3]), [1.5], times, p)
    ys = lde.ddesolve(logistic, 0.3 * ONE, 1.5, times, p, engine=engine, method=method, rtol=1e-10, atol=1e-12).ys
    torch.testing.assert_close(ys, expected, rtol=1e-8, atol=1e-9)
    loose = lde.ddesolve(logistic, 0.3 * ONE, 1.5, times, p, engine=engine, method=method)
    torch.testing.assert_close(loose.ys, expected, rtol=1e-4, atol=1e-5)
    between = lde.ddesolve(logistic, 0.3 * ONE, 1.5, times[-1:], p, t0=0.0, engine=engine, method=method)
    torch.testing.assert_close(between.at(times), loose.ys, rtol=0, atol=1e-14)


def test_mackey_glass():
    times = torch.linspace(0, 120, 13, dtype=DOUBLE)
    expected = by_scipy(mackey_glass, lambda t: np.array([1.2]), [17.0], times, MACKEY_GLASS)
    ys = lde.ddesolve(mackey_glass, 1.2 * ONE, 17.0, times, MACKEY_GLASS, engine="fused", **TIGHT).ys
    torch.testing.assert_close(ys, expected, rtol=1e-8, atol=1e-8)


def test_two_lags_and_a_history_with_parameters():
    p, lags, times = tensor(1.0, 0.7, 0.4, 0.3), tensor(0.7, 1.9), torch.linspace(0.5, 6.0, 12, dtype=DOUBLE)

    def field(t, y, lagged, p):
        return two_lags(t, y, lagged, p[:3])

    def history(t, p):
        return wave(t, p[2:])

    expected = by_scipy(
        field, lambda t: history(torch.tensor(t, dtype=DOUBLE), p).numpy(), [0.7, 1.9], times, p, t0=0.5
    )
    solution = lde.ddesolve(field, history, lags, times, p, engine="fused", **TIGHT)
    torch.testing.assert_close(solution.ys, expected, rtol=1e-9, atol=1e-9)
    assert solution.shape_of_state.size == 2


@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 2), ("bosh3", 3), ("rk4", 4), ("tsit5", 5)])
def test_order_across_breaking_points(method, order):
    """Equal steps that do not divide the sums of lags; without breaking points rk4 has 2.3 and tsit5 none."""
    times, lags, p = tensor(0.0, 1.13, 2.7), tensor(0.5713, 0.9371), tensor(1.0, 0.7, 0.4)

    def field(t, y, lagged, p):
        return 3.0 * two_lags(t, y, lagged, p) * torch.exp(-y[:1])

    start, engine = tensor(0.4, -0.2), "fused"
    exact = lde.ddesolve(field, start, lags, times, p, engine=engine, method="dopri8", rtol=1e-13, atol=1e-14).ys
    errors = []
    for size in (0.05, 0.025, 0.0125):
        ys = lde.ddesolve(field, start, lags, times, p, engine=engine, method=method, step_size=size).ys
        errors.append(float((ys - exact).abs().max()))
    observed = np.log2(errors[0] / errors[-1]) / 2  # over two halvings, since pieces hold whole numbers of steps
    assert order - 0.5 < observed < order + 1, (errors, observed)


def test_stiff_equation_on_the_torch_engine():
    """dy/dt = -200 (y - cos t) + y(t - 1): an implicit method takes lagged states as known."""
    times = torch.linspace(0, 2, 5, dtype=DOUBLE)

    def field(t, y, lagged, p):
        return -p * (y - torch.cos(t)) + lagged[0]

    rate = tensor(200.0)[0]
    expected = by_scipy(field, lambda t: np.array([1.0]), [1.0], times, rate)
    solution = lde.ddesolve(field, ONE, 1.0, times, rate, method="kvaerno5", rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(solution.ys, expected, rtol=1e-5, atol=1e-6)
    assert solution.engine == "torch" and int(solution.stats["n_accepted"]) < 300
    (r,) = leaves(rate)
    times = tensor(0.0, 1.1)
    first = lde.ddesolve(field, ONE, 1.0, times, rate, method="kvaerno3", rtol=1e-3)
    (got,) = torch.autograd.grad(lde.ddesolve(field, ONE, 1.0, times, r, replay=first).ys.sum(), r)

    def total(rate):
        return float(lde.ddesolve(field, ONE, 1.0, times, rate, replay=first).ys.sum())

    torch.testing.assert_close(got, central_difference(total, rate, 1e-3), rtol=1e-7, atol=0)
    with pytest.raises(lde.errors.SolveError, match="fused.*cannot solve this.*implicit"):
        lde.ddesolve(field, ONE, 1.0, times, rate, method="kvaerno5", engine="fused")


# ---- states of other kinds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_dict_states(engine):
    def field(t, y, lagged, p):
        return {"prey": y["prey"] * (1 - lagged[0]["prey"]) - y["prey"] * y["cat"], "cat": lagged[0]["prey"] - y["cat"]}

    def flat(t, y, lagged, p):
        return torch.stack([y[0] * (1 - lagged[0][0]) - y[0] * y[1], lagged[0][0] - y[1]])

    start = {"prey": tensor(0.6, 0.9), "cat": tensor(0.2)[0]}
    solution = lde.ddesolve(field, start, 0.8, TIMES, engine=engine)
    expected = lde.ddesolve(flat, tensor([0.6, 0.2], [0.9, 0.2]), 0.8, TIMES, engine=engine)
    torch.testing.assert_close(solution.ys["prey"], expected.ys[..., 0], rtol=0, atol=1e-14)
    torch.testing.assert_close(solution.ys["cat"], expected.ys[..., 1], rtol=0, atol=1e-14)

    def history(t, p):
        return {"prey": p + 0.1 * t, "cat": 0.2 * torch.ones_like(t)}

    by_function = lde.ddesolve(field, history, 0.8, TIMES, tensor(0.6, 0.9), engine=engine)
    assert by_function.ys["cat"].shape == (2, 8)
    torch.testing.assert_close(by_function.ys["prey"][:, 0], tensor(0.6, 0.9))


def test_lags_are_given_in_several_ways():
    p = tensor(1.0, 0.7, 0.4)
    expected = lde.ddesolve(two_lags, tensor(0.4, -0.2), tensor(0.7, 1.6), TIMES, p).ys
    for lags in ([0.7, 1.6], (tensor(0.7)[0], 1.6), np.array([0.7, 1.6])):
        assert torch.equal(lde.ddesolve(two_lags, tensor(0.4, -0.2), lags, TIMES, p).ys, expected)
    rows = lde.ddesolve(two_lags, tensor(0.4, -0.2), [tensor(0.7, 0.9), tensor(1.6, 1.2)], TIMES, p).ys
    assert rows.shape == (2, 8, 2) and torch.equal(rows[0], expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_times_in_any_order_and_replicates(engine):
    times = tensor(2.0, 0.0, 1.0, 2.0, 3.7, 0.5)
    solution = lde.ddesolve(decay, ONE, 1.0, times, tensor(0.8)[0], t0=0.0, engine=engine, **TIGHT)
    expected = decay_solution(times, 1.0, 1.0, 0.8)
    torch.testing.assert_close(solution.ys[:, 0], expected, rtol=0, atol=1e-11)
    alone = lde.ddesolve(decay, ONE, 1.0, tensor(0.0), tensor(0.8)[0], engine=engine)
    assert alone.ys.tolist() == [[1.0]] and int(alone.stats["n_accepted"]) == 0
    (moment,) = leaves(tensor(0.0))
    still = lde.ddesolve(decay, ONE, 1.0, moment, tensor(0.8)[0], t0=0.0, engine=engine)
    assert torch.autograd.grad(still.ys.sum(), moment)[0].tolist() == [-0.8]


@pytest.mark.parametrize("engine", ENGINES)
def test_single_precision(engine):
    ys = lde.ddesolve(decay, ONE.float(), 1.0, TIMES.float(), torch.tensor(0.8), engine=engine).ys
    assert ys.dtype == torch.float32
    torch.testing.assert_close(ys[:, 0].double(), decay_solution(TIMES, 1.0, 1.0, 0.8), rtol=0, atol=1e-5)


# ---- failures and refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_fail_alone(engine):
    lags, starts = (
        tensor([1.0], [-0.5], [float("nan")], [1.0], [1e-5]),
        tensor([1.0], [1.0], [1.0], [float("nan")], [1.0]),
    )
    lags, starts = leaves(lags, starts)
    settings = {"engine": engine, "on_failure": "nan", "max_steps": 60}
    solution = lde.ddesolve(decay, starts, lags, TIMES, 1.0, **settings)
    names = [lde.Status(int(s)).name for s in solution.status]
    assert names == ["OK", "BAD_LAG", "BAD_LAG", "NON_FINITE", "MAX_STEPS"]
    torch.testing.assert_close(solution.ys[0], lde.ddesolve(decay, ONE, 1.0, TIMES, 1.0, engine=engine).ys)
    assert torch.isnan(solution.ys[1:, 1:]).all(), "but for the state at t0, nothing is known"
    gradients = torch.autograd.grad(solution.ys[..., -1].nan_to_num().sum(), [lags, starts])
    for g in gradients:
        assert torch.isfinite(g).all() and g[0].abs().sum() > 0 and (g[1:] == 0).all()


def test_errors_teach():
    def refused(error, match, f=decay, history=ONE, lags=1.0, times=TIMES, p=1.0, **settings):
        with pytest.raises(error, match=match):
            lde.ddesolve(f, history, lags, times, p, **settings)

    errors = lde.errors
    refused(errors.DataError, r"lag 0 is 0, in units of time; a lag of 0 makes an ODE: use lde.ode", lags=0.0)
    refused(errors.DataError, r"lag 0 of row \[1\] is -2", lags=tensor([1.0], [-2.0]))
    refused(errors.DataError, r"lag 1 is nan", lags=tensor(1.0, float("nan")))
    refused(errors.SolveError, "lags that depend on time or on the state", lags=lambda t, y: 1.0)
    refused(errors.ShapeError, "there are none", lags=tensor())
    refused(errors.DataError, "times lie before t0", times=TIMES.flip(0))
    refused(errors.DataError, "times lie before t0", times=TIMES, t0=1.0)
    refused(
        errors.ShapeError,
        r"history returned shape \(2,\), expected \(1,\)|vector field returned shape",
        history=lambda t, p: tensor(1.0, 2.0) * t,
        f=lambda t, y, lagged, p: -lagged[0][:1],
    )
    refused(errors.ShapeError, r"history\(t, p\) returned shape \(1, 2\)", history=lambda t, p: tensor([1.0, 2.0]))
    refused(errors.ShapeError, r"f\(t, y, lagged, p\)", f=lambda t, y: -y)
    refused(
        errors.ShapeError, r"y and 1 lagged state\(s\) of shape \(1,\).*IndexError", f=lambda t, y, lagged, p: lagged[1]
    )
    refused(errors.ShapeError, "takes only", f=lambda t, y, lagged: -lagged[0])
    refused(errors.GradientPathError, "only the discrete gradient", gradient="adjoint")
    refused(errors.SolveError, "does not solve delay equations", engine="torchdiffeq")
    for method in ("auto", "leapfrog"):
        refused(
            errors.SolveError,
            'give "tsit5", or "kvaerno5"',
            method=method,
            step_size=0.1 if method == "leapfrog" else None,
        )
    refused(errors.SolveError, r"history is not finite at t = -1\.", history=lambda t, p: ONE * torch.sqrt(t + 0.5))
    refused(errors.SolveError, r"Lags of this row: \[0.001\].* 3700 steps", lags=0.001, max_steps=100)
    ordinary = lde.odesolve(lambda t, y: -y, ONE, TIMES)
    refused(errors.SolveError, r"a solution of a delay equation with 1 lag\(s\)", replay=ordinary)
    delayed = lde.ddesolve(decay, ONE, 1.0, TIMES, 1.0)
    with pytest.raises(errors.SolveError, match="a solution of an equation without lags"):
        lde.odesolve(lambda t, y: -y, ONE, TIMES, replay=delayed)
    with pytest.raises(errors.SolveError, match="before t0 the state is the history"):
        delayed.at(-0.5)


def test_what_a_solution_tells():
    solution = lde.ddesolve(decay, ONE, 1.0, TIMES, 1.0)
    assert solution.steps.shape == (int(solution.stats["n_accepted"]),)
    assert float(solution.steps.max()) <= 1.0
    ends = solution.steps.cumsum(0)
    for point in (1.0, 2.0, 3.0):
        assert float((ends - point).abs().min()) < 1e-14, "breaking points are ends of steps"
    assert "tsit5" in str(solution) and not solution.implicit.any()
