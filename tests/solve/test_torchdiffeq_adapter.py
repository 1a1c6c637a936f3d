# SPDX-License-Identifier: Apache-2.0
"""torchdiffeq behind the contract: values and gradients against closed forms, failures as status."""

import math

import pytest
import torch

from pyro_latentde.errors import GradientPathError, SolveError
from pyro_latentde.solve.adapters.torchdiffeq import solve_torchdiffeq
from pyro_latentde.solve.methods.catalog import METHODS

DOUBLE = torch.float64
T0 = (0.0, 1.0, 2.0)
OWN = ((0.5, 0.5, 1.0), (1.0, 1.4, 2.0), (1.5, 0.0, -1.0))
SHARED = ((1.5, 2.5, 2.5),) * 3


def problem(own):
    """y' = -rate (y - cos t) + 0.1: each row its rate; closed form by variation of constants."""
    rate = torch.tensor([0.5, 1.3, 0.2], dtype=DOUBLE, requires_grad=True)
    y0 = torch.tensor([[1.0, -1.0], [2.0, 0.0], [0.5, 3.0]], dtype=DOUBLE, requires_grad=True)
    times = torch.tensor(OWN if own else SHARED, dtype=DOUBLE, requires_grad=True)
    t0 = torch.tensor(T0 if own else (0.5,) * 3, dtype=DOUBLE, requires_grad=True)

    def f(t, y, rows=None):
        return -rate[:, None] * (y - torch.cos(t)[:, None]) + 0.1

    def exact():
        r, z = rate[:, None, None], times[..., None]

        def steady(t):
            return (r * r * torch.cos(t) + r * torch.sin(t)) / (1 + r * r) + 0.1 / r

        begin = t0[:, None, None]
        return steady(z) + (y0[:, None] - steady(begin)) * torch.exp(-r * (z - begin))

    return f, (y0, rate, times, t0), exact


def solve(f, inputs, method, adjoint, tolerance=1e-9, **more):
    y0, rate, times, t0 = inputs
    return solve_torchdiffeq(f, y0, times, t0, (rate,), method, tolerance, tolerance / 10, 10_000, adjoint, **more)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize("name", ["dopri5", "dopri8", "bosh3"])
def test_values_and_every_gradient(name, adjoint, own):
    f, inputs, exact = problem(own)
    # A record from the table is as good as a name.
    out = solve(f, inputs, METHODS[name], adjoint, 1e-7 if name == "bosh3" else 1e-9)
    assert out.status.tolist() == [0, 0, 0]
    torch.testing.assert_close(out.ys, exact(), rtol=1e-6, atol=1e-7)
    weights = torch.linspace(-1.0, 2.0, out.ys.numel(), dtype=DOUBLE).reshape(out.ys.shape)
    ours = torch.autograd.grad((weights * out.ys).sum(), inputs)
    theirs = torch.autograd.grad((weights * exact()).sum(), inputs)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
        assert expected.count_nonzero() == expected.numel()


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize("name", ["rk4", "heun", "midpoint", "euler"])
def test_fixed_steps_have_their_order_between_grid_points_too(name, adjoint, own):
    f, inputs, exact = problem(own)
    errors = []
    for step_size in (0.11, 0.055):
        out = solve(f, inputs, name, adjoint, step_size=step_size)
        gradient = torch.autograd.grad(out.ys.sum(), inputs[1])[0]
        expected = torch.autograd.grad(exact().sum(), inputs[1])[0]
        errors.append([(out.ys - exact()).abs().max().item(), (gradient - expected).abs().max().item()])
    order = METHODS[name].order
    for coarse, fine in zip(*errors, strict=True):
        assert math.log2(coarse / fine) > order - 0.5


def test_adaptive_heun_and_backward_shared_times():
    f, inputs, exact = problem(False)
    y0, rate, _, t0 = inputs
    times = torch.tensor([[0.5, 0.1, -1.0]] * 3, dtype=DOUBLE)
    ys = solve(f, (y0, rate, times, t0), "heun", False, 1e-6).ys
    reference = solve(f, (y0, rate, times, t0), "dopri8", False, 1e-11).ys
    torch.testing.assert_close(ys, reference, rtol=1e-4, atol=1e-5)
    assert (ys[:, 0] == y0).all()


@pytest.mark.parametrize("own", [True, False])
def test_statistics(own):
    f, inputs, _ = problem(own)
    calls = 0

    def counting(t, y):
        nonlocal calls
        calls += 1
        return f(t, y)

    with torch.no_grad():
        inputs = tuple(x.detach() for x in inputs)
        out = solve(counting, inputs, "dopri5", False)
    assert out.n_evals.tolist() == [calls] * 3
    assert out.steps.shape == (3, out.n_accepted[0])
    span = inputs[2][:, -1] - inputs[3]
    assert (out.steps.sum(1) / span > 0.999).all()


def test_all_output_times_at_the_start():
    f, inputs, _ = problem(False)
    y0, rate, _, t0 = inputs
    for times in (t0.detach()[:, None].repeat(1, 2), torch.tensor([[0.5], [0.5], [0.5]], dtype=DOUBLE)):
        out = solve(f, (y0, rate, times, t0), "dopri5", True)
        assert (out.ys == y0[:, None]).all()
        assert out.status.tolist() == [0, 0, 0]


class TestFailures:
    def fail(self, f, adjoint, times=((0.5, 2.0),), max_steps=200, **more):
        rate = torch.tensor(1.0, dtype=DOUBLE, requires_grad=True)
        y0 = torch.ones(1, 1, dtype=DOUBLE, requires_grad=True)
        times, t0 = torch.tensor(times, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE)
        method = "rk4" if more else "dopri5"
        out = solve_torchdiffeq(
            lambda t, y: rate * f(t, y),
            y0,
            times,
            t0,
            (rate,),
            method,
            1e-8,
            1e-8,
            max_steps,
            adjoint,
            **more,
        )
        if torch.isnan(out.ys).all():
            gradients = torch.autograd.grad(out.ys.sum(), (rate, y0))
            assert all((g == 0).all() for g in gradients)
        return out

    @pytest.mark.parametrize("adjoint", [True, False])
    def test_each_becomes_a_status_with_nan(self, adjoint):
        slow = self.fail(lambda t, y: torch.cos(500 * t)[:, None] + 0 * y, adjoint, max_steps=20)
        explosion = self.fail(lambda t, y: y**2, adjoint, max_steps=100_000)
        nothing = self.fail(lambda t, y: torch.sqrt(1 - t)[:, None] + 0 * y, adjoint)
        fixed = self.fail(lambda t, y: -y, adjoint, max_steps=5, step_size=0.01)
        assert [x.status.item() for x in (slow, fixed)] == [1, 1]
        assert explosion.status.item() in (2, 3)
        assert nothing.status.item() in (2, 3)
        for out in (slow, explosion, nothing, fixed):
            assert torch.isnan(out.ys).all()

    def test_a_users_own_assertion_is_not_swallowed(self):
        def f(t, y):
            assert (t < 1).all(), "the drug is not given after day 1"
            return -y

        with pytest.raises(AssertionError, match="drug"):
            self.fail(f, False)


def test_methods_it_lacks_are_refused_by_name():
    f, inputs, _ = problem(True)
    with pytest.raises(SolveError, match=r"dopri5, dopri8, bosh3, heun; got 'tsit5'.*engine 'torch'"):
        solve(f, inputs, "tsit5", False)
    with pytest.raises(SolveError, match="'rk4'.*step_size"):
        solve(f, inputs, "rk4", False)
    with pytest.raises(SolveError, match="got 'dopri5'"):
        solve(f, inputs, "dopri5", False, step_size=0.1)
    with pytest.raises(SolveError, match="positive"):
        solve(f, inputs, "rk4", False, step_size=-1.0)


def test_the_adjoint_refuses_to_lose_a_gradient():
    f, inputs, _ = problem(True)
    hidden = torch.tensor([0.1, 0.2], dtype=DOUBLE, requires_grad=True)
    with pytest.raises(GradientPathError, match=r"shape \(2,\).*params"):
        solve(lambda t, y: f(t, y) + hidden.exp(), inputs, "dopri5", True)
    # A parameter that is itself computed is fine, also through views.
    y0, rate, times, t0 = inputs
    double = 2 * rate
    out = solve_torchdiffeq(
        lambda t, y: -double[:, None] * y, y0, times, t0, (double,), "dopri5", 1e-8, 1e-9, 1000, True
    )
    span = (times - t0[:, None]).detach()[..., None]
    expected = (-2 * span * y0[:, None] * torch.exp(-2 * rate[:, None, None] * span)).sum((1, 2))
    torch.testing.assert_close(torch.autograd.grad(out.ys.sum(), rate)[0], expected, rtol=1e-5, atol=1e-6)
