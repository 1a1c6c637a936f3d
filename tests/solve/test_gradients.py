# SPDX-License-Identifier: Apache-2.0
"""Gradients against central differences (fixed and replayed steps, adaptive solves), torchdiffeq and each other."""

import pytest
import torch
from ode_fields import DOUBLE, ENGINES, RATES, STARTS, central_difference, prey_predator, solve, tensor
from torch import nn
from torchdiffeq import odeint

import pyro_latentde as lde
from pyro_latentde.solve.methods.catalog import METHODS

TIMES = tensor(0.33, 0.71, 1.2, 1.5)
LONGER = tensor(0.0, 1.0, 1.8)  # steps to replay reach beyond TIMES, which central differences move
START = torch.zeros((), dtype=DOUBLE)


def loss_of(ys):
    return (torch.cos(torch.arange(ys.numel(), dtype=DOUBLE)).reshape(ys.shape) * ys).sum()


def check(loss, inputs, rtol=1e-8):
    """``loss(*inputs)``: the gradient of every input against central differences."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(loss(*inputs), inputs)
    for i, (x, gradient) in enumerate(zip(inputs, gradients, strict=True)):

        def one(value, i=i):
            with torch.no_grad():
                return float(loss(*[value if j == i else other for j, other in enumerate(inputs)]))

        expected = central_difference(one, x.detach(), 2e-4)
        scale = float(expected.abs().max())
        assert scale > 0
        torch.testing.assert_close(
            gradient, expected, rtol=rtol, atol=rtol * scale, msg=lambda m, i=i: f"input {i}: {m}"
        )


# ---- against central differences, steps held -------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.stiff is None])
def test_fixed_steps(name):
    settings = {"method": name, "step_size": 0.11}
    check(lambda y0, p: loss_of(solve(y0=y0, p=p, times=TIMES, t0=0.0, **settings).ys), [STARTS, RATES])
    first = solve(times=LONGER, **settings)
    check(
        lambda times, t0: loss_of(solve(times=times, t0=t0, replay=first).ys),
        [TIMES.repeat(3, 1), torch.zeros(3, dtype=DOUBLE)],
    )


@pytest.mark.parametrize("engine, rtol", [("fused", 1e-3), ("fused", 1e-5), ("fused", 1e-8), ("torch", 1e-3)])
def test_replayed_steps_at_any_tolerance(engine, rtol):
    first = solve(times=LONGER, rtol=rtol, atol=rtol)
    check(
        lambda y0, times, t0, p: loss_of(solve(engine, y0=y0, times=times, t0=t0, p=p, replay=first).ys),
        [STARTS, TIMES, START, RATES],
    )


def test_replayed_dopri8_whose_interpolant_has_stages_of_its_own():
    first = solve(times=LONGER, rtol=1e-4, method="dopri8")
    check(
        lambda y0, times, t0, p: loss_of(solve(y0=y0, times=times, t0=t0, p=p, replay=first).ys),
        [STARTS, TIMES, START, RATES],
    )


def test_backward_in_time_and_parameters_shared_by_rows():
    first = solve(times=-LONGER, p=RATES[0], rtol=1e-5)
    check(
        lambda y0, times, p: loss_of(solve(y0=y0, times=times, t0=0.0, p=p, replay=first).ys),
        [STARTS, -TIMES, RATES[0]],
    )


def matrix_field(t, y, p):
    return p["a"] @ y + p["b"] * torch.sin(t)


def test_a_matrix_and_a_dict():
    generator = torch.Generator().manual_seed(3)
    y0, a, b = (torch.randn(*s, generator=generator, dtype=DOUBLE) for s in ((4, 2), (2, 2), (4, 2)))
    settings = {"rtol": 1e-4, "event_dims": {"b": 1}, "engine": "fused", "method": "midpoint", "step_size": 0.1}
    first = lde.odesolve(matrix_field, y0, TIMES, {"a": a, "b": b}, **settings)
    check(
        lambda y0, a, b: loss_of(lde.odesolve(matrix_field, y0, TIMES, {"a": a, "b": b}, replay=first, **settings).ys),
        [y0, a, b],
    )


def test_module_weights_and_captured_tensors():
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    weights = [p.detach() for p in net.parameters()]
    shift = tensor(0.3, -0.2)

    def run(y0, shift, *weights, replay=None):
        def f(t, y):
            return torch.func.functional_call(net, dict(zip(names, weights, strict=True)), (y,)) + shift

        names = [name for name, _ in net.named_parameters()]
        return lde.odesolve(f, y0, TIMES, engine="fused", method="midpoint", step_size=0.1, replay=replay)

    y0 = tensor([0.5, -0.1], [1.0, 0.4])
    first = run(y0, shift, *weights)
    check(lambda *inputs: loss_of(run(*inputs, replay=first).ys), [y0, shift, *weights])


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_without_steps_move_with_their_times(engine):
    times = torch.zeros(2, dtype=DOUBLE, requires_grad=True)
    t0 = torch.zeros((), dtype=DOUBLE, requires_grad=True)
    solution = solve(engine, times=times, t0=t0)
    slope = torch.stack([prey_predator(t0.detach(), y, p) for y, p in zip(STARTS, RATES, strict=True)])
    seed = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
    bars = torch.autograd.grad((seed * solution.ys).sum(), [times, t0])
    expected = (seed * slope[:, None]).sum((0, 2))
    torch.testing.assert_close(bars[0], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(bars[1], -expected.sum(), rtol=1e-12, atol=0)
    moved = torch.func.jvp(lambda s: solve(engine, times=s, t0=0.0).ys, (times.detach(),), (tensor(1.0, -2.0),))[1]
    torch.testing.assert_close(moved, slope[:, None] * tensor(1.0, -2.0)[:, None], rtol=1e-12, atol=0)


# ---- adaptive --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tsit5", "dopri5", "dopri8"])
def test_adaptive_solves_at_a_tight_tolerance(name):
    def loss(y0, times, p):
        return loss_of(solve(y0=y0, times=times, t0=0.0, p=p, method=name, rtol=1e-10, atol=1e-12).ys)

    check(loss, [STARTS, TIMES, RATES], rtol=1e-6)


def test_adaptive_solves_against_torchdiffeq():
    y0, p = STARTS[0].clone().requires_grad_(), RATES[0].clone().requires_grad_()
    times = torch.cat([START.reshape(1), TIMES])
    ours = torch.autograd.grad(loss_of(solve(y0=y0, p=p, times=times, rtol=1e-10, atol=1e-12).ys), [y0, p])
    ys = odeint(lambda t, y: prey_predator(t, y, p), y0, times, rtol=1e-10, atol=1e-12, method="dopri5")
    theirs = torch.autograd.grad(loss_of(ys), [y0, p])
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


def test_fixed_steps_against_torchdiffeq():
    y0, p = STARTS[0].clone().requires_grad_(), RATES[0].clone().requires_grad_()
    times = torch.linspace(0, 1.5, 16, dtype=DOUBLE)
    settings = {"method": "midpoint", "step_size": 0.1}
    ours = solve(y0=y0, p=p, times=times, **settings).ys
    theirs = odeint(lambda t, y: prey_predator(t, y, p), y0, times, method="midpoint")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    bars = [torch.autograd.grad(loss_of(ys), [y0, p]) for ys in (ours, theirs)]
    torch.testing.assert_close(*bars, rtol=1e-11, atol=1e-12)


def test_engines_agree_in_every_gradient():
    results = []
    for engine in ENGINES:
        inputs = [x.clone().requires_grad_() for x in (STARTS, TIMES, START, RATES)]
        solution = solve(engine, y0=inputs[0], times=inputs[1], t0=inputs[2], p=inputs[3], rtol=1e-5)
        results.append(torch.autograd.grad(loss_of(solution.ys), inputs))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shared", [True, False])
def test_forward_sensitivities_are_the_discrete_gradient(shared):
    bars = []
    for gradient in ("discrete", "forward"):
        p = (RATES[0] if shared else RATES).clone().requires_grad_()
        inputs = [STARTS.clone().requires_grad_(), TIMES.clone().requires_grad_(), p]
        solution = solve(y0=inputs[0], times=inputs[1], t0=0.0, p=p, gradient=gradient, rtol=1e-5)
        bars.append(torch.autograd.grad(loss_of(solution.ys), inputs))
    torch.testing.assert_close(*bars, rtol=1e-12, atol=1e-12)


def test_times_on_both_sides_of_t0():
    times = tensor(-0.4, 0.5, 0.9)
    p = RATES[0].clone().requires_grad_()
    both = loss_of(solve(times=times, t0=0.1, p=p, rtol=1e-10, atol=1e-12).ys)
    bar = torch.autograd.grad(both, p)[0]

    def value(q):
        with torch.no_grad():
            return float(loss_of(solve(times=times, t0=0.1, p=q, rtol=1e-11, atol=1e-13).ys))

    torch.testing.assert_close(bar, central_difference(value, RATES[0], 1e-3), rtol=1e-6, atol=1e-6)


# ---- bookkeeping of steps --------------------------------------------------------------------------------------


def test_steps_that_were_evicted_are_solved_again(monkeypatch):
    from pyro_latentde.solve import step_store

    def run(evict):
        p = RATES.clone().requires_grad_()
        solution = solve(p=p, rtol=1e-5)
        if evict:
            monkeypatch.setattr(step_store, "_BUDGET", 0)
            for _ in range(20):
                solve(p=RATES.clone().requires_grad_(), rtol=1e-3)
        return torch.autograd.grad(loss_of(solution.ys), p)[0]

    assert torch.equal(run(False), run(True))


def test_steps_live_as_long_as_their_gradient():
    from pyro_latentde.solve import step_store

    before = len(step_store._store)
    kept = [solve(p=RATES.clone().requires_grad_()) for _ in range(3)]
    assert len(step_store._store) == before + 3
    del kept
    assert len(step_store._store) == before
    with torch.no_grad():
        solve(p=RATES.clone().requires_grad_())
    solve()
    assert len(step_store._store) == before


def test_a_gradient_may_be_asked_for_twice():
    p = RATES.clone().requires_grad_()
    ys = solve(p=p).ys
    first = torch.autograd.grad(ys[0].sum(), p, retain_graph=True)[0]
    second = torch.autograd.grad(ys.sum(), p)[0]
    assert torch.equal(first[0], second[0])
    assert (first[1:] == 0).all()
