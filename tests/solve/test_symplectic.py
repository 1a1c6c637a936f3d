# SPDX-License-Identifier: Apache-2.0
"""Symplectic methods: order, energy over long times, reversibility, engines, derivatives, fields they refuse."""

import collections

import numpy as np
import pytest
import torch
from ode_fields import DOUBLE, ENGINES, central_difference, scipy_solution, tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_latentde as lde
from pyro_latentde.errors import ShapeError, SolveError
from pyro_latentde.solve.methods.catalog import METHODS, SYMPLECTIC

TIMES = tensor(0.0, 0.5, 1.23, 2.0)
START = tensor([0.8, -0.3, 0.2, 0.5], [0.1, 0.6, -0.4, 0.0], [1.1, 0.2, 0.3, -0.7])
RATES = tensor([1.3, 0.4], [0.9, 0.7], [2.0, 0.1])
methods = pytest.mark.parametrize("method", SYMPLECTIC)


def two_pendulums(t, y, p):
    """Coupled and pushed: H = |v|^2 / 2 - a sum cos q + b (q1 - q2)^2 / 2 - .3 q1 sin t + .2 v2 cos 2t."""
    q, v = y[:2], y[2:]
    pull = p[1] * (q[0] - q[1])
    push = torch.stack([0.3 * torch.sin(t) - pull, pull])
    drift = torch.stack([v[0], v[1] + 0.2 * torch.cos(2 * t)])
    return torch.cat([drift, push - p[0] * torch.sin(q)])


def oscillator(t, y):
    return torch.stack([y[1], -y[0]])


def kepler(t, y):
    q, v = y[:2], y[2:]
    return torch.cat([v, -q / q.square().sum() ** 1.5])


def solve(engine="fused", y0=START, times=TIMES, p=RATES, f=two_pendulums, **settings):
    solution = lde.odesolve(f, y0, times, p, engine=engine, **settings)
    assert solution.engine == engine
    return solution


@methods
def test_engines_agree_to_rounding(method):
    times = torch.stack([TIMES, TIMES * 1.1, -TIMES])  # the last row goes backward
    fused, plain = (solve(e, times=times, method=method, step_size=0.13) for e in ENGINES)
    torch.testing.assert_close(fused.ys, plain.ys, rtol=1e-13, atol=1e-14)
    for name, count in fused.stats.items():
        assert torch.equal(count, plain.stats[name])
    torch.testing.assert_close(fused.steps, plain.steps, rtol=1e-13, atol=0)
    again = solve("torch", times=times, replay=fused)
    torch.testing.assert_close(again.ys, fused.ys, rtol=1e-12, atol=1e-13)
    alone = solve(y0=START[1], times=times[1], p=RATES[1], method=method, step_size=0.13)
    assert torch.equal(alone.ys, fused.ys[1])


@methods
def test_converges_with_its_order_at_and_between_steps(method):
    order, steps = SYMPLECTIC[method].order, 48
    between = (tensor(9.5, 20.5, 36.5)) * 2.0 / steps  # also the middle of a step of a third of the size
    times = torch.cat([tensor(0.0), between, tensor(2.0)])
    truth = torch.stack([scipy_solution(two_pendulums, y, times, p) for y, p in zip(START, RATES, strict=True)])
    errors = []
    for size in (2.0 / steps, 2.0 / (3 * steps)):
        gap = (solve(times=times, method=method, step_size=size).ys - truth).abs()
        errors.append([gap[:, 1:-1].norm().item(), gap[:, -1].norm().item()])
    observed = np.log(np.array(errors[0]) / np.array(errors[1])) / np.log(3.0)
    assert (np.abs(observed - order) < 0.4).all(), observed


@methods
def test_step_against_the_published_composition(method):
    kicks, drifts = SYMPLECTIC[method].kicks, SYMPLECTIC[method].drifts
    assert sum(kicks) == pytest.approx(1, abs=1e-15) and sum(drifts) == pytest.approx(1, abs=1e-15)
    assert kicks == kicks[::-1] and drifts == drifts[::-1]
    q, v, h = 0.3, -0.2, 0.4
    for i, kick in enumerate(kicks):
        v -= kick * h * np.sin(q)
        q += drifts[i] * h * v if i < len(drifts) else 0.0
    ys = lde.odesolve(
        lambda t, y: torch.stack([y[1], -torch.sin(y[0])]),
        tensor(0.3, -0.2),
        tensor(0.0, 0.4),
        method=method,
        step_size=h,
    ).ys
    torch.testing.assert_close(ys[-1], tensor(q, v), rtol=1e-14, atol=0)


@methods
@pytest.mark.parametrize("engine", ENGINES)
def test_there_and_back_again(method, engine):
    there = solve(engine, method=method, step_size=0.05).ys[:, -1]
    back = solve(engine, y0=there, times=TIMES.flip(0), method=method, step_size=0.05).ys[:, -1]
    torch.testing.assert_close(back, START, rtol=0, atol=2e-14)
    other = solve(engine, y0=there, times=TIMES.flip(0), method="rk4", step_size=0.05).ys[:, -1]
    assert (other - START).abs().max() > 1e-9


@methods
def test_energy_of_an_oscillator_is_bounded_over_a_hundred_thousand_steps(method):
    size, count = 0.2, 100_000
    times = torch.arange(0, count + 1, 10, dtype=DOUBLE) * size
    ys = lde.odesolve(oscillator, tensor(1.0, 0.0), times, method=method, step_size=size, max_steps=2 * count).ys
    error = (ys.square().sum(1) - 1) / 2
    first, last = error[: len(error) // 10], error[-len(error) // 10 :]
    bound = {"leapfrog": size**2 / 7, "blanes_moan4": 1e-6}[method]
    assert 0 < error.abs().max() < bound
    assert last.abs().max() < 1.01 * first.abs().max()
    assert abs(last.mean() - first.mean()) < 0.01 * first.abs().max()
    fourth = lde.odesolve(oscillator, tensor(1.0, 0.0), times, method="rk4", step_size=size, max_steps=2 * count).ys
    assert (fourth[-1].square().sum() - 1).abs() > 0.08  # a method of order 4 that is not symplectic loses energy


@methods
def test_energy_of_a_planet_on_an_ellipse(method):
    eccentricity = 0.5
    start = tensor(1 - eccentricity, 0.0, 0.0, ((1 + eccentricity) / (1 - eccentricity)) ** 0.5)
    times = torch.arange(0, 400, dtype=DOUBLE) * 0.5 * torch.pi  # 100 orbits
    ys = lde.odesolve(kepler, start, times, method=method, step_size=torch.pi / 300, max_steps=100_000).ys
    q, v = ys[:, :2], ys[:, 2:]
    energy = v.square().sum(1) / 2 - 1 / q.norm(dim=1)
    turn = q[:, 0] * v[:, 1] - q[:, 1] * v[:, 0]
    torch.testing.assert_close(turn, turn[:1].expand_as(turn), rtol=1e-12, atol=0)  # kept by kicks and drifts alike
    error = (energy + 0.5).abs()
    assert error.max() < {"leapfrog": 1e-3, "blanes_moan4": 2e-7}[method]
    assert error[-40:].max() < 1.1 * error[:40].max()


@methods
@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_against_central_differences_along_the_same_steps(method, engine):
    inside = tensor(0.0, 0.31, 0.5, 1.23, 1.9)
    first = solve(times=torch.cat([inside, tensor(2.0)]), t0=0.0, method=method, step_size=0.11)

    def loss(y0, times, t0, p, engine="fused"):
        ys = solve(engine, y0=y0, times=times, t0=t0, p=p, replay=first).ys
        return (ys.square() * tensor(1.0, -0.5, 0.3, 2.0)).sum()

    inputs = [START, inside.repeat(3, 1), torch.zeros(3, dtype=DOUBLE), RATES]
    leaves = [x.clone().requires_grad_() for x in inputs]
    found = torch.autograd.grad(loss(*leaves, engine), leaves)
    for i, gradient in enumerate(found):
        expected = central_difference(lambda x, i=i: float(loss(*inputs[:i], x, *inputs[i + 1 :])), inputs[i], 2e-4)
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


@methods
def test_gradients_by_any_way_are_the_same(method):
    settings = {"method": method, "step_size": 0.2}

    def loss(p, engine="fused", **more):
        return (solve(engine, y0=START[0], p=p, **settings, **more).ys * tensor(1.0, -0.5, 0.3, 2.0)).square().sum()

    p = RATES[0]
    expected = torch.autograd.grad(loss(q := p.clone().requires_grad_(), "torch"), q)[0]
    sensitivities = torch.autograd.grad(loss(q := p.clone().requires_grad_(), gradient="forward"), q)[0]
    for found in (
        grad(loss)(p),
        jacrev(loss)(p),
        jacfwd(loss)(p),
        sensitivities,
        make_fx(lambda p: grad(loss)(p))(p)(p),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    mapped = vmap(grad(loss))(RATES)
    torch.testing.assert_close(mapped, torch.stack([grad(loss)(r) for r in RATES]), rtol=1e-13, atol=0)
    traced = make_fx(lambda p: vmap(grad(loss))(p))(RATES)
    torch.testing.assert_close(traced(RATES * 1.1), vmap(grad(loss))(RATES * 1.1), rtol=1e-13, atol=0)
    curvature = hessian(loss)(p)
    for i in range(2):
        step = 1e-5 * torch.eye(2, dtype=DOUBLE)[i]
        slope = (grad(loss)(p + step) - grad(loss)(p - step)) / 2e-5
        torch.testing.assert_close(curvature[i], slope, rtol=1e-7, atol=1e-8)


def test_a_failed_row_has_no_gradient_and_its_neighbour_does_not_notice():
    def f(t, y, p):
        return torch.stack([y[1], p * y[0] ** 3])

    start, times = tensor([1.0, 1.0], [0.1, 0.1]), tensor(0.0, 1.0, 3.0)
    for engine in ENGINES:
        p = tensor(5.0, 0.5).requires_grad_()
        out = solve(engine, start, times, p, f, method="leapfrog", step_size=0.1, on_failure="nan")
        assert out.status.tolist() == [lde.Status.NON_FINITE, 0]
        slope = torch.autograd.grad(out.ys[1].sum() + out.ys.nansum(), p)[0]
        alone = tensor(0.5).requires_grad_()
        one = solve(engine, start[1:], times, alone, f, method="leapfrog", step_size=0.1)
        assert slope[0] == 0
        torch.testing.assert_close(slope[1:], 2 * torch.autograd.grad(one.ys.sum(), alone)[0], rtol=1e-12, atol=0)


def test_states_with_names_are_halves_in_their_order():
    Body = collections.namedtuple("Body", ["x", "y", "vx", "vy"])

    def f(t, s, p):
        return Body(s.vx, s.vy, -p[0] * s.x, -p[1] * s.y)

    start = Body(*tensor(1.0, 0.5, 0.2, 0.1))
    for engine in ENGINES:
        out = solve(engine, start, TIMES, RATES[0], f, method="leapfrog", step_size=0.05)
        torch.testing.assert_close(
            out.ys.x,
            start.x * torch.cos(1.3**0.5 * TIMES) + 0.2 / 1.3**0.5 * torch.sin(1.3**0.5 * TIMES),
            atol=1e-3,
            rtol=0,
        )
    assert "Symplectic" in str(out)


def test_a_field_that_cannot_be_traced():
    def f(t, y, p):
        p = p * 2 if float(p.sum()) > 1e9 else p  # a branch on a value
        return torch.stack([y[1], -p[0] * y[0]])

    start = tensor([1.0, 0.0])
    out = lde.odesolve(f, start, TIMES, RATES[:1], method="leapfrog", step_size=0.01)
    assert out.engine == "torch"
    torch.testing.assert_close(out.ys[0, :, 0], torch.cos(1.3**0.5 * TIMES), atol=1e-3, rtol=0)

    def damped(t, y, p):
        return f(t, y, p) - 0.1 * torch.stack([torch.zeros(()).double(), y[1]])

    with pytest.raises(SolveError, match=r"d\(y\[1\]\)/dt depends on y\[1\]"):
        lde.odesolve(damped, start, TIMES, RATES[:1], method="leapfrog", step_size=0.01)


def test_what_is_refused_and_why():
    settings = {"method": "leapfrog", "step_size": 0.1}
    with pytest.raises(SolveError, match="leapfrog.*no error estimate: give step_size="):
        lde.odesolve(oscillator, START[0, :2], TIMES, method="leapfrog")
    with pytest.raises(ShapeError, match="positions and then all momenta: expected an even number of states, got 3"):
        lde.odesolve(lambda t, y: -y, tensor(1.0, 2.0, 3.0), TIMES, **settings)
    with pytest.raises(
        SolveError, match=r"q = \(y\[0\]\), p = \(y\[1\]\), and d\(y\[1\]\)/dt depends on y\[1\]\. Friction"
    ):
        lde.odesolve(lambda t, y: torch.stack([y[1], -y[0] - 0.1 * y[1]]), START[0, :2], TIMES, **settings)

    def interleaved(t, s):
        return {"x": s["vx"], "vx": -s["x"], "y": s["vy"], "vy": -s["y"]}

    start = dict(zip(("x", "vx", "y", "vy"), tensor(1.0, 0.0, 0.5, 0.2), strict=True))
    for engine in ENGINES:
        with pytest.raises(SolveError, match=r"d\(x\)/dt depends on vx.*positions \(x, y\), then momenta \(vx, vy\)"):
            lde.odesolve(interleaved, start, TIMES, engine=engine, **settings)
    with pytest.raises(SolveError, match="torchdiffeq"):
        lde.odesolve(oscillator, START[0, :2], TIMES, gradient="adjoint", **settings)
    assert not set(METHODS) & set(SYMPLECTIC)
