# SPDX-License-Identifier: Apache-2.0
"""Derivatives of delay equations: along the same steps, at tight tolerance, forward, transforms, second ones."""

import pytest
import torch
from delay_problems import (
    DOUBLE,
    ENGINES,
    ONE,
    TIGHT,
    TIMES,
    WEIGHTS,
    decay,
    decay_solution,
    leaves,
    tensor,
    two_lags,
    wave,
)
from ode_fields import central_difference
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_latentde as lde


def weighed(ys):
    return (torch.cos(torch.arange(ys.numel(), dtype=DOUBLE)).reshape(ys.shape) * ys).sum()


# ---- gradients ---------------------------------------------------------------------------------------------------


def field_with_shares(t, y, lagged, p):
    return two_lags(t, y, lagged, p["rates"])


RATES = {"rates": tensor([1.0, 0.7, 0.4], [0.8, 0.9, 0.6]), "shape": tensor(0.3, 0.5)}
LAGS = tensor([0.7, 1.6], [0.45, 1.1])


@pytest.mark.parametrize("method", ["tsit5", "bosh3", "dopri8"])
def test_gradients_along_the_same_steps(method):
    """Every input moved, with the steps and the records of lagged times held: exact at any tolerance."""
    span, times = tensor(0.0, 3.1), tensor(0.4, 1.3, 2.6)
    settings = {"engine": "fused", "method": method}

    def solve(rates, shape, lags, times, t0, **more):
        def history(t, p):
            return wave(t, p["shape"])

        p = {"rates": rates, "shape": shape}
        return lde.ddesolve(field_with_shares, history, lags, times, p, t0=t0, **settings, **more)

    first = solve(RATES["rates"], RATES["shape"], LAGS, span, tensor(0.0)[0], rtol=1e-4, atol=1e-5)
    inputs = [RATES["rates"], RATES["shape"], LAGS, times, tensor(0.0)[0]]

    def loss(*inputs):
        return weighed(solve(*inputs, replay=first).ys)

    variables = leaves(*inputs)
    gradients = torch.autograd.grad(loss(*variables), variables)
    for i, gradient in enumerate(gradients):
        expected = central_difference(
            lambda x, i=i: float(loss(*[x if j == i else v for j, v in enumerate(inputs)])), inputs[i], 2e-4
        )
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-8, msg=lambda m, i=i: f"input {i}: {m}")


def test_gradients_of_a_constant_history_at_tight_tolerance():
    start, lags, times, p = tensor(0.4, -0.2), tensor(0.7, 1.6), tensor(0.4, 1.3, 2.6), RATES["rates"][0]

    def loss(start, lags, p):
        ys = lde.ddesolve(two_lags, start, lags, times, p, t0=0.0, engine="fused", rtol=1e-12, atol=1e-13).ys
        return weighed(ys)

    inputs = [start, lags, p]
    variables = leaves(*inputs)
    gradients = torch.autograd.grad(loss(*variables), variables)
    for i, gradient in enumerate(gradients):
        expected = central_difference(
            lambda x, i=i: float(loss(*[x if j == i else v for j, v in enumerate(inputs)])), inputs[i], 1e-3
        )
        torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-7, msg=lambda m, i=i: f"input {i}: {m}")


@pytest.mark.parametrize("settings", [{}, {"method": "dopri8"}, {"method": "rk4", "step_size": 0.3}])
def test_engines_agree(settings):
    """Values, counts, steps and gradients; two lags per row, a history with parameters, times of each row."""
    found = []
    for engine in ENGINES:
        inputs = leaves(
            RATES["rates"], RATES["shape"], LAGS, tensor([0.4, 1.3, 2.6], [0.3, 0.4, 2.9]), tensor(0.1, 0.2)
        )
        rates, shape, lags, times, t0 = inputs
        p = {"rates": rates, "shape": shape}
        solution = lde.ddesolve(
            field_with_shares, lambda t, p: wave(t, p["shape"]), lags, times, p, t0=t0, engine=engine, **settings
        )
        gradients = torch.autograd.grad(weighed(solution.ys), inputs)
        found.append((solution.ys, solution.counts, solution.steps, gradients))
    (ys, counts, steps, gradients), (other_ys, other_counts, other_steps, other_gradients) = found
    assert torch.equal(counts, other_counts)
    torch.testing.assert_close(ys, other_ys, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(steps, other_steps, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradients, other_gradients, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_field_and_history_capture_has_gradients(engine):
    rate, size = leaves(tensor(0.8)[0], tensor(1.3)[0])
    ys = lde.ddesolve(
        lambda t, y, lagged: -rate * lagged[0], lambda t: size * ONE, 1.0, TIMES, engine=engine, **TIGHT
    ).ys
    expected = decay_solution(TIMES, 1.0, size, rate)
    got = torch.autograd.grad((WEIGHTS * ys[:, 0]).sum(), [rate, size])
    wanted = torch.autograd.grad((WEIGHTS * expected).sum(), [rate, size])
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_forward_sensitivities(engine):
    lag, rate = tensor(1.0)[0], tensor(0.8)[0]
    found = []
    for gradient in ("discrete", "forward"):
        x = leaves(lag, rate)
        ys = lde.ddesolve(decay, ONE, x[0], TIMES, x[1], engine=engine, gradient=gradient).ys
        found.append(torch.autograd.grad(weighed(ys), x))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-13)


# ---- transforms --------------------------------------------------------------------------------------------------

SMALL = {"method": "bosh3", "step_size": 0.4}
THETA = tensor(0.7, 0.8, 1.1)


def loss_of(theta, engine, **settings):
    lag, rate, size = theta
    history = lambda t, p: (size + 0.3 * torch.sin(t)) * ONE  # noqa: E731
    ys = lde.ddesolve(decay, history, lag, tensor(0.0, 0.9, 2.2), rate, engine=engine, **(settings or SMALL)).ys
    return ys.square().sum()


@pytest.mark.parametrize("engine", ENGINES)
def test_transforms(engine):
    def loss(theta):
        return loss_of(theta, engine)

    (x,) = leaves(THETA)
    plain = torch.autograd.grad(loss(x), x)[0]
    torch.testing.assert_close(grad(loss)(THETA), plain, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(jacfwd(loss)(THETA), plain, rtol=1e-11, atol=1e-12)
    move = tensor(0.3, -1.0, 0.5)
    torch.testing.assert_close(jvp(loss, (THETA,), (move,))[1], plain @ move, rtol=1e-11, atol=1e-12)
    rows = torch.stack([THETA, THETA * 1.1, THETA * tensor(2.0, 1.0, 0.5)])
    mapped = vmap(grad(loss))(rows)
    torch.testing.assert_close(mapped, torch.stack([grad(loss)(row) for row in rows]), rtol=1e-12, atol=1e-13)
    traced = make_fx(vmap(grad(loss)))(rows)
    torch.testing.assert_close(traced(rows * 1.05), vmap(grad(loss))(rows * 1.05), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("engine", ENGINES)
def test_second_derivatives(engine):
    """With a lag's second derivative too: the first is the slope of the interpolant, its is the curvature."""

    def loss(theta):
        return loss_of(theta, engine)

    found = [make(loss)(THETA) for make in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f)))]
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(found[0], found[0].T, rtol=1e-10, atol=1e-11)
    first = lde.ddesolve(decay, ONE, THETA[0], tensor(0.0, 0.9, 2.2), THETA[1], engine=engine, **SMALL)

    def slope(rate):
        (r,) = leaves(rate)
        ys = lde.ddesolve(decay, ONE, THETA[0], tensor(0.0, 0.9, 2.2), r, engine=engine, replay=first).ys
        return float(torch.autograd.grad(ys.square().sum(), r)[0])

    def same(rate):
        return lde.ddesolve(decay, ONE, THETA[0], tensor(0.0, 0.9, 2.2), rate, engine=engine, **SMALL).ys.square().sum()

    torch.testing.assert_close(hessian(same)(THETA[1]), central_difference(slope, THETA[1], 1e-3), rtol=1e-8, atol=0)
