# SPDX-License-Identifier: Apache-2.0
"""steady_state_solve: closed forms, SciPy, gradients of all orders, failures, fallback."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from ode_fields import DOUBLE, ENGINES, central_difference, tensor
from scipy.integrate import solve_ivp
from scipy.optimize import brentq, root
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import pyro_latentde as lde
from pyro_latentde.errors import DataError, ShapeError, SolveError

GUESS = tensor(1.0, 1.0)
RATES = tensor([1.0, 0.5, 0.3], [2.0, 0.7, 0.1], [0.5, 1.5, 0.9])


def brew(t, y, p):
    a, b = y
    return torch.stack([p[0] - a - p[1] * a * b + 0.1 * t, p[1] * a * b + p[2] - b * (1 + b)])


def switch(t, y, p):
    """Goldbeter-Koshland: a protein that one enzyme modifies and another restores, both saturated."""
    rest = 1 - y
    return p["v1"] * rest / (p["j1"] + rest) - p["v2"] * y / (p["j2"] + y)


def switch_state(p):
    b = p["v2"] - p["v1"] + p["v2"] * p["j1"] + p["v1"] * p["j2"]
    return 2 * p["v1"] * p["j2"] / (b + (b**2 - 4 * (p["v2"] - p["v1"]) * p["v1"] * p["j2"]).sqrt())


def no_root_below_zero(t, y, p):
    """The roots +-sqrt(p) are lost where p < 0, and the trajectory falls for ever."""
    return p[0] - p[1] * y**2


def toggle(t, y, p):
    u, v = y
    return torch.stack([p[0] / (1 + v**4) - u, p[1] / (1 + u**4) - v])


def state(p, engine="fused", f=brew, guess=GUESS, **keywords):
    return lde.steady_state_solve(f, guess, p, engine=engine, **keywords).y


def loss(p, engine="fused", **keywords):
    return (state(p, engine, **keywords) * tensor(1.0, -0.5)).square().sum()


# ---- values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_a_switch_against_its_closed_form(engine):
    p = {"v1": tensor(0.4, 0.9, 1.05, 2.0), "v2": torch.ones((), dtype=DOUBLE), "j1": tensor(0.05), "j2": tensor(0.1)}
    p = {name: value.requires_grad_() for name, value in p.items()}
    dims = {"j1": 1, "j2": 1, "v1": 0, "v2": 0}
    found = lde.steady_state_solve(switch, tensor(0.5), p, engine=engine, event_dims=dims)
    expected = switch_state(p)
    assert found.ok.all() and found.y.shape == (4, 1) and found.settings["engine"] == engine
    assert_close(found.y[:, 0], expected, rtol=1e-12, atol=0)
    seed = tensor(1.0, -2.0, 0.5, 3.0)
    for got, want in zip(
        torch.autograd.grad(found.y[:, 0] @ seed, list(p.values())),
        torch.autograd.grad(expected @ seed, list(p.values())),
        strict=True,
    ):
        assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_an_infusion_into_two_compartments():
    class Amounts(NamedTuple):
        blood: torch.Tensor
        tissue: torch.Tensor

    def field(t, y, p):
        flow = p["k12"] * y.blood - p["k21"] * y.tissue
        return Amounts(p["rate"] - p["k10"] * y.blood - flow, flow)

    p = {name: torch.tensor(x, dtype=DOUBLE) for name, x in {"rate": 3.0, "k10": 0.6, "k12": 0.5, "k21": 0.2}.items()}
    zero = torch.zeros((), dtype=DOUBLE)
    slopes = jacrev(lambda p: torch.stack(lde.steady_state_solve(field, Amounts(zero, zero), p).y))(p)
    found = lde.steady_state_solve(field, Amounts(zero, zero), p)
    assert isinstance(found.y, Amounts) and found.iterations == 1
    assert_close(torch.stack(found.y), tensor(5.0, 12.5), rtol=1e-13, atol=0)
    expected = {"rate": (5 / 3, 12.5 / 3), "k10": (-5 / 0.6, -12.5 / 0.6), "k12": (0, 25.0), "k21": (0, -62.5)}
    for name, want in expected.items():
        assert_close(slopes[name], tensor(*want), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_nonlinear_system_against_scipy(engine):
    for p, y in zip(RATES, state(RATES, engine), strict=True):
        found = root(lambda y, p=p: brew(torch.zeros(()), torch.from_numpy(y), p).numpy(), GUESS.numpy(), tol=1e-13)
        assert found.success
        assert_close(y, torch.from_numpy(found.x), rtol=1e-11, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_to_parameters_time_captured_tensors_and_weights(engine):
    def of_parameters(p):
        return loss(p, engine)

    def of_time(t):
        return loss(RATES[0], engine, t=t[0])

    def of_captured(p):
        return (lde.steady_state_solve(lambda t, y: brew(t, y, p), GUESS, engine=engine).y ** 2).sum()

    for function, x in ((of_parameters, RATES[0]), (of_time, tensor(0.3)), (of_captured, RATES[1])):
        assert_close(grad(function)(x), central_difference(function, x), rtol=1e-8, atol=1e-9)

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()

    def of_weights():
        return lde.steady_state_solve(lambda t, y: 0.3 * net(y) + 1.0 - y, GUESS, engine=engine).y.square().sum()

    of_weights().backward()

    def moved(w):
        with torch.no_grad():
            net[0].weight.copy_(w)
        return of_weights().detach()

    before = net[0].weight.detach().clone()
    assert_close(net[0].weight.grad, central_difference(moved, before), rtol=1e-8, atol=1e-9)


def test_times_of_rows_shared_and_own_parameters():
    t, p = tensor(0.0, 1.0, 2.0).requires_grad_(), RATES[0].clone().requires_grad_()
    y = lde.steady_state_solve(brew, GUESS, p, t=t).y
    assert y.shape == (3, 2)
    gt, gp = torch.autograd.grad(y.sum(), (t, p))
    rows = [grad(lambda t, p: state(p, t=t).sum(), argnums=(0, 1))(x, p.detach()) for x in t.detach()]
    assert_close(gt, torch.stack([a for a, _ in rows]), rtol=1e-12, atol=0)
    assert_close(gp, sum(b for _, b in rows), rtol=1e-12, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_higher_derivatives(engine):
    def one(p):
        return loss(p, engine)

    expected = torch.stack([central_difference(lambda p, i=i: grad(one)(p)[i], RATES[0]) for i in range(3)])
    for second in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))):
        assert_close(second(one)(RATES[0]), expected, rtol=1e-8, atol=1e-8)
    third = torch.stack([central_difference(lambda p, i=i: hessian(one)(p)[i, 2], RATES[0]) for i in range(3)])
    assert_close(jacrev(hessian(one))(RATES[0])[:, 2], third, rtol=1e-7, atol=1e-7)
    p = RATES[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(one(p), p, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), p)
    assert_close(second, 2 * expected @ first.detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("engine", ENGINES)
def test_vmap_make_fx_and_compile(engine):
    function = vmap(grad(lambda p: loss(p, engine, on_failure="nan")))
    expected = torch.stack([grad(lambda p: loss(p, engine))(p) for p in RATES])
    assert_close(function(RATES), expected, rtol=1e-11, atol=1e-13)
    traced = make_fx(function)(RATES)
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    for rates in (RATES, 1.1 * RATES):
        assert_close(traced(rates), function(rates), rtol=1e-12, atol=1e-14)
        assert_close(compiled(rates), function(rates), rtol=1e-12, atol=1e-14)
    with torch.inference_mode():
        assert_close(traced(RATES), expected, rtol=1e-11, atol=1e-13)
    nested = vmap(lambda y: vmap(lambda p: state(p, engine, guess=y))(RATES))(torch.stack([GUESS, 2 * GUESS]))
    assert_close(nested, state(RATES, engine).expand(2, 3, 2), rtol=1e-9, atol=1e-11)


def test_batches_dicts_single_precision_and_no_rows():
    p = RATES.expand(2, 3, 3)
    assert_close(state(p), state(RATES).expand(2, 3, 2))
    assert state(RATES[:0]).shape == (0, 2)

    def field(t, y, k):
        return {"u": k - y["u"], "v": y["u"].sum() - 2 * y["v"]}

    guess = {"u": torch.zeros(2), "v": torch.zeros(2)}
    y = lde.steady_state_solve(field, guess, torch.tensor([1.0, 3.0]), event_dims={"p": 0}).y
    assert y["v"].dtype == torch.float32
    assert_close(y["v"], torch.tensor([0.5, 1.5]))


def test_no_gradient_to_the_guess():
    guess = GUESS.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(state(RATES[0], guess=guess).sum(), guess)[0], torch.zeros_like(GUESS))


# ---- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_a_failed_row_is_nan_and_touches_no_other(engine):
    p = tensor([4.0, 1.0], [-1.0, 1.0], [9.0, 1.0]).requires_grad_()
    scale = torch.ones((), dtype=DOUBLE, requires_grad=True)
    keywords = {"engine": engine, "on_failure": "nan"}
    found = lde.steady_state_solve(lambda t, y, p: scale * no_root_below_zero(t, y, p), tensor(1.0), p, **keywords)
    assert found.ok.tolist() == [True, False, True]
    alone = lde.steady_state_solve(no_root_below_zero, tensor(1.0), p[[0, 2]], engine=engine).y
    assert torch.equal(found.y[[0, 2]], alone) and found.y[1].isnan().all()
    assert_close(alone[:, 0].detach(), tensor(2.0, 3.0))
    gp, gs = torch.autograd.grad(found.y.sum(), (p, scale))
    assert_close(gp, tensor([0.25, -1.0], [0.0, 0.0], [1 / 6, -1.5]))
    assert gs.isfinite() and gs.abs() < 1e-12
    none = lde.steady_state_solve(no_root_below_zero, tensor(1.0), p[1], **keywords)
    assert torch.equal(torch.autograd.grad(none.y.sum(), p)[0], torch.zeros_like(p))
    mapped = vmap(grad(lambda p: state(p, engine, no_root_below_zero, tensor(1.0), on_failure="nan").sum()))(p.detach())
    assert_close(mapped, gp)


def test_the_error_says_which_row_and_what_to_try():
    with pytest.raises(SolveError, match=r"1 of 3 steady states failed.*row \[1\].*y_guess \[1\].*p: \[-1, 1\].*Try"):
        state(tensor([4.0, 1.0], [-1.0, 1.0], [9.0, 1.0]), f=no_root_below_zero, guess=tensor(1.0))
    with pytest.raises(SolveError, match=r"non-finite.*make the initial state finite, y_guess\[0\] is nan"):
        state(RATES[0], guess=tensor(torch.nan, 1.0))
    with pytest.raises(SolveError, match="max_steps reached.*oscillate"):
        lde.steady_state_solve(lambda t, y: torch.stack([y[1], -y[0]]), GUESS, stable=True, max_steps=200)


@pytest.mark.parametrize("engine", ENGINES)
def test_where_newton_fails_the_trajectory_helps(engine):
    """From 0 Newton's method goes 0, 1, 0, 1, ..., and damped it ends in the minimum of |f| at sqrt(2/3)."""

    def cycle(t, y, p):
        return -(y**3) + 2 * y - p

    y, p = tensor(0.0, requires_grad=True), tensor(2.0)
    for expected in (1.0, 0.0, 1.0):
        (slope,) = torch.autograd.grad(cycle(0, y, p), y)
        y = (y - cycle(0, y, p) / slope).detach().requires_grad_()
        assert y.item() == expected
    p = tensor(2.0, 2.5).requires_grad_()
    found = lde.steady_state_solve(cycle, tensor(0.0), p, engine=engine, event_dims={"p": 0})
    assert (found.n_steps > 0).all()
    expected = tensor(*([brentq(lambda x, p=p: -(x**3) + 2 * x - p, -3, 0, xtol=1e-15)] for p in (2.0, 2.5)))
    assert_close(found.y.detach(), expected, rtol=1e-13, atol=0)
    (slope,) = torch.autograd.grad(found.y.sum(), p)
    assert_close(slope, 1 / (2 - 3 * expected[:, 0] ** 2), rtol=1e-12, atol=0)


def test_steep_fields_need_damping_only():
    found = lde.steady_state_solve(lambda t, y: -torch.atan(y), tensor(20.0), engine="torch")
    assert found.n_steps == 0 and found.y.abs() < 1e-12


def test_units_make_no_difference():
    """Seconds or years, moles or molecules: the same iterations, and the same state in other units."""

    def scaled(t, y, p):
        units = tensor(1e9, 1e-6)
        return 1e7 * units * brew(t, y / units, p)

    plain = lde.steady_state_solve(brew, GUESS, RATES, atol=0.0)
    other = lde.steady_state_solve(scaled, GUESS * tensor(1e9, 1e-6), RATES, atol=0.0, rtol=1e-7)
    assert_close(other.y / tensor(1e9, 1e-6), plain.y, rtol=1e-12, atol=0)
    assert (other.iterations - plain.iterations).abs().max() <= 1


def test_stable_is_where_the_trajectory_goes():
    torch.manual_seed(0)
    guesses, p = 4 * torch.rand(40, 2, dtype=DOUBLE), tensor(3.0, 2.8)
    found = lde.steady_state_solve(toggle, guesses, p, stable=True)

    def slope(t, y):
        return [3.0 / (1 + y[1] ** 4) - y[0], 2.8 / (1 + y[0] ** 4) - y[1]]

    ends = np.array([solve_ivp(slope, (0, 300), g.numpy(), rtol=1e-9, atol=1e-11).y[:, -1] for g in guesses])
    assert_close(found.y, torch.from_numpy(ends), rtol=1e-6, atol=1e-7)
    middle = lde.steady_state_solve(toggle, tensor(1.3, 1.3), p).y
    slopes = torch.linalg.eigvals(jacrev(lambda y: toggle(0, y, p))(middle)).real
    assert slopes.max() > 0  # Newton's method does not ask
    at_rest = lde.steady_state_solve(toggle, middle, p, stable=True, on_failure="nan")
    assert at_rest.status in (lde.Status.NO_STEADY_STATE, lde.Status.OK)  # rounding may push it off


def test_a_saturated_elimination_has_none_rather_than_one_below_zero():
    """Michaelis-Menten elimination: input k, capacity V; for k > V f has a root, behind the pole at -2."""
    p = tensor([1.0, 1.5], [2.0, 1.5])
    found = lde.steady_state_solve(lambda t, y, p: p[0] - p[1] * y / (2.0 + y), tensor(3.0), p, on_failure="nan")
    assert found.ok.tolist() == [True, False]
    assert_close(found.y[0], tensor(4.0))


# ---- what is given badly --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "error", "match"),
    [
        ({"engine": "torchdiffeq"}, SolveError, "engine: expected one of auto, fused, torch"),
        ({"max_iterations": 0}, SolveError, "max_iterations = 0; expected a whole number"),
        ({"max_steps": 0}, SolveError, "max_steps = 0"),
        ({"rtol": -1.0}, SolveError, "rtol = -1.0; expected a positive number"),
        ({"rtol": 0.0, "atol": 0.0}, SolveError, "both 0"),
        ({"method": "rk4"}, SolveError, "no error estimate"),
        ({"on_failure": "ignore"}, SolveError, "on_failure"),
        ({"t": torch.nan}, DataError, "t = nan; the time"),
        ({"t": "noon"}, DataError, "t of type str cannot be read"),
        ({"conserved": [1, 1, 1]}, ShapeError, r"conserved has shape \(1, 3\); expected one row of 2 numbers"),
        ({"conserved": {"a": 1}}, ShapeError, r"conserved names \['a'\]; the states are \['y\[0\]', 'y\[1\]'\]"),
        ({"conserved": "all"}, ShapeError, "cannot be read"),
        ({"conserved": [[1, 2], [2, 4]]}, SolveError, "depend on each other, only 1"),
        ({"conserved": [1, torch.inf]}, SolveError, "finite numbers"),
        ({"conserved": [1, 1]}, SolveError, r"not conserved: \[1.0, 1.0\] y changes at the rate -1.7"),
        ({"guess": [1.0, 2.0]}, ShapeError, "y_guess is of type list"),
        ({"guess": torch.ones(3)}, ShapeError, "too many values to unpack"),
        ({"guess": torch.tensor([1, 2])}, ShapeError, "y_guess has dtype torch.int64"),
        ({"f": 3.0}, ShapeError, "must be callable"),
        ({"f": lambda y: y}, ShapeError, r"called as f\(t, y, p\)"),
        ({"f": lambda t, y, p: y[0]}, ShapeError, r"returned shape \(\), expected \(2,\)"),
    ],
)
def test_bad_input(keywords, error, match):
    with pytest.raises(error, match=match):
        state(RATES[0], **{"engine": "auto", **keywords})
