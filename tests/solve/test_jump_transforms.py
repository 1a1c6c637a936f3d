# SPDX-License-Identifier: Apache-2.0
"""Doses, inputs and events under second derivatives and make_fx, against closed forms."""

import pytest
import torch
from ode_fields import DOUBLE, ENGINES, tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_latentde as lde

TIMES = tensor(0.5, 3.0, 7.0, 11.0)
ONE = torch.ones(1, dtype=DOUBLE)
FINE = {"t0": 0.0, "method": "dopri8", "step_size": 0.7}


def scalar(function):
    """All outputs in one number, nonlinearly."""
    weights = torch.cos(torch.arange(4, dtype=DOUBLE))
    return lambda x, *more: (weights * function(x, *more) + 0.3 * function(x, *more).square()).sum()


def decay(t, y, k):
    return -k * y


def dosed(x, engine="fused", **settings):
    """Rate; amounts, times and durations of two boluses and two drips, of which the first begin at t0."""
    k, amounts, times, durations = x[0], x[1:3], x[3:5], x[5:7]
    doses = [lde.Dose(times, amounts, 0), lde.Dose(times, 0.7 * amounts, 0, duration=durations)]
    return lde.odesolve(decay, ONE, TIMES, k, doses=doses, engine=engine, **{**FINE, **settings}).ys[:, 0]


def dosed_law(x):
    k, amounts, times, durations = x[0], x[1:3], x[3:5], x[5:7]
    since = TIMES[:, None] - times
    bolus = amounts * torch.exp(-k * since) * (since >= 0)
    on, off = since.clamp(min=0.0), (since - durations).clamp(min=0.0)
    drip = 0.7 * amounts / durations / k * (torch.exp(-k * off) - torch.exp(-k * on))
    return torch.exp(-k * TIMES) + (bolus + drip).sum(1)


DOSED = tensor(0.4, 2.0, 3.0, 0.0, 5.0, 1.3, 1.7)


def driven(x, engine="fused", **settings):
    """Rate, values and knots of a stepwise input; the first knot is at t0."""

    def field(t, y, p):
        return p["u"](t) - p["k"] * y

    p = {"u": lde.Input(x[4:7], x[1:4], "previous"), "k": x[0]}
    return lde.odesolve(field, ONE, TIMES, p, engine=engine, **{**FINE, **settings}).ys[:, 0]


def driven_law(x):
    k, values, knots = x[0], x[1:4], x[4:7]
    edges = torch.cat([tensor(0.0), knots[1:], tensor(1e9)])
    ends = torch.minimum(TIMES[:, None], edges)
    parts = torch.exp(-k * (TIMES[:, None] - ends[:, 1:])) - torch.exp(-k * (TIMES[:, None] - ends[:, :-1]))
    return torch.exp(-k * TIMES) + (values / k * parts).sum(1)


DRIVEN = tensor(0.4, 1.0, 2.0, -1.0, 0.0, 2.0, 8.0)
PAIRS = {"doses": (dosed, dosed_law, DOSED), "input": (driven, driven_law, DRIVEN)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", PAIRS)
def test_hessians(name, engine):
    """Also where something happens at the very start, and its time moves."""
    solve, law, x = PAIRS[name]
    right = hessian(scalar(law))(x)
    torch.testing.assert_close(hessian(scalar(solve))(x, engine), right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_other_ways_to_second_derivatives(name):
    solve, law, x = PAIRS[name]
    right = hessian(scalar(law))(x)
    found = torch.autograd.functional.hessian(scalar(solve), x)
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(jacrev(jacrev(scalar(solve)))(x), right, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(jacfwd(jacfwd(scalar(solve)))(x), right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["kvaerno5", "auto"])
def test_hessian_of_an_implicit_solve_with_a_dose_at_the_start(method):
    x, rest = DOSED[[0, 1, 3]], DOSED.clone()

    def filled(x):
        return torch.cat([x[:2], rest[2:3], x[2:], rest[4:]])

    def tight(x):
        settings = {"method": method, "step_size": None, "rtol": 1e-10, "atol": 1e-10}
        return scalar(lambda x: dosed(x, **settings))(filled(x))

    right = hessian(lambda x: scalar(dosed_law)(filled(x)))(x)
    torch.testing.assert_close(hessian(tight)(x), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_recorded_and_replayed_elsewhere(name):
    """make_fx: the recorded graph is right at other numbers."""
    solve, law, x = PAIRS[name]
    move = 1.0 + 0.02 * torch.arange(len(x), dtype=DOUBLE)  # what happens at t0 stays there
    rows = torch.stack([x, x * move, x * move.square()])
    mapped = vmap(grad(scalar(solve)))
    recorded = make_fx(mapped)(rows)
    torch.testing.assert_close(recorded(rows * move), mapped(rows * move), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(recorded(rows * move), vmap(grad(scalar(law)))(rows * move), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        make_fx(hessian(scalar(solve)))(x)(x * move), hessian(scalar(law))(x * move), rtol=1e-6, atol=1e-6
    )


# ---- events ----------------------------------------------------------------------------------------------------


def bounces(x, engine="fused"):
    """Gravity, height, restitution: the first two times at the ground, and the height at two times."""

    def fall(t, y, p):
        return torch.stack([y[1], -p[0]])

    ground = lde.Event(
        lambda t, y, p: y[0], lambda t, y, p: torch.stack([0.0 * y[0], -p[1] * y[1]]), direction=-1, max_events=9
    )
    y0, p = torch.stack([x[1], 0.0 * x[1]]), torch.stack([x[0], x[2]])
    found = lde.odesolve(fall, y0, tensor(0.3, 1.0), p, t0=0.0, events=ground, engine=engine, rtol=1e-10, atol=1e-10)
    return torch.cat([found.events.times[:1], found.ys[:, 0], found.ys[1:, 1]])


def bounces_law(x):
    g, height, e = x
    first = (2 * height / g).sqrt()
    up, since = e * (2 * g * height).sqrt(), 1.0 - first
    return torch.stack([first, height - 0.045 * g, up * since - 0.5 * g * since**2, up - g * since])


@pytest.mark.parametrize("engine", ENGINES)
def test_events_under_hessian_and_make_fx(engine):
    x = tensor(9.81, 2.0, 0.8)
    f, law = (lambda x: scalar(bounces)(x, engine)), scalar(bounces_law)
    torch.testing.assert_close(bounces(x, engine), bounces_law(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(hessian(f)(x), hessian(law)(x), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.autograd.functional.hessian(f, x), hessian(law)(x), rtol=1e-8, atol=1e-8)
    rows = torch.stack([x, 0.9 * x])
    recorded = make_fx(vmap(grad(f)))(rows)
    torch.testing.assert_close(recorded(rows * 1.03), vmap(grad(law))(rows * 1.03), rtol=1e-8, atol=1e-8)
