# SPDX-License-Identifier: Apache-2.0
"""Replayed steps: the values of the solve again; derivatives against finite differences and closed forms."""

import pytest
import torch

from pyro_latentde import odesolve
from pyro_latentde.solve.methods.catalog import METHODS
from pyro_latentde.solve.torch_engine.stepper import replay_rows, solve_rows

DOUBLE = torch.float64
ADAPTIVE = [name for name, method in METHODS.items() if method.adaptive]
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


@pytest.mark.parametrize("name", METHODS)
def test_replay_gives_the_same_values(name, problem):
    f, _, y0, times, t0 = problem
    step_size = None if name in ADAPTIVE[:4] else 0.05
    out = solve_rows(f, y0, times, t0, METHODS[name], step_size=step_size, **{**SETTINGS, "rtol": 1e-5})
    assert out.status.tolist() == [OK] * 3
    for field in (f, without_rows(f)):
        again = replay_rows(field, y0, times, t0, out.steps, METHODS[name])
        torch.testing.assert_close(again, out.ys, rtol=1e-11, atol=1e-12)
        given = solve_rows(field, y0, times, t0, METHODS[name], steps=out.steps, **SETTINGS)
        torch.testing.assert_close(given.ys, out.ys, rtol=1e-11, atol=1e-12)
        assert given.n_accepted.tolist() == out.n_accepted.tolist()
        assert given.status.tolist() == [OK] * 3


def replayed(name, subsets=True):
    """Three rows: one forward, one backward, one that does not move; returns a function of four tensors."""
    y0 = tensor([1.0, 0.8], [2.0, 0.5], [0.3, 0.9])
    t0, p = tensor(0.0, 1.0, 2.0), tensor([1.5, 1.0, 3.0, 1.0], [1.2, 0.8, 2.0, 0.9], [0.9, 1.1, 1.0, 0.4])
    times = tensor([0.11, 0.23, 0.5], [0.93, 0.7, 0.6], [2.0, 2.0, 2.0])
    step_size = 0.17 if name in ("rk4", "heun", "midpoint", "euler") else None
    settings = {"rtol": 1e-3, "atol": 1e-4, "max_steps": 1000, "step_size": step_size}
    steps = solve_rows(prey_and_predator(p), y0, times, t0, METHODS[name], **settings).steps
    assert steps.shape[1] >= 2

    def run(y0, p, times, t0):
        f = prey_and_predator(p)
        return replay_rows(f if subsets else without_rows(f), y0, times, t0, steps, METHODS[name])

    return run, [x.requires_grad_() for x in (y0, p, times, t0)]


@pytest.mark.parametrize("subsets", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_replay_are_those_of_finite_differences(name, subsets):
    run, inputs = replayed(name, subsets)
    # The row at rest is reached only at t0 itself; its derivative by time has its own test below.
    times, t0 = inputs[2].detach(), inputs[3].detach()

    def moving(y0, p, moving_times, moving_t0):
        return run(y0, p, torch.cat([moving_times, times[2:]]), torch.cat([moving_t0, t0[2:]]))

    arguments = (*inputs[:2], times[:2].clone().requires_grad_(), t0[:2].clone().requires_grad_())
    assert torch.autograd.gradcheck(moving, arguments, eps=1e-6, atol=1e-7, rtol=1e-5)
    if name in ("tsit5", "dopri8", "heun"):
        assert torch.autograd.gradgradcheck(moving, arguments, eps=1e-6, atol=1e-5, rtol=1e-4)


def test_derivative_by_output_times_is_the_slope_at_ends_and_at_rest():
    run, inputs = replayed("tsit5")
    ys = run(*inputs)
    slopes = prey_and_predator(inputs[1])
    for row, rtol in ((0, 2e-2), (1, 2e-2), (2, 1e-12)):
        gradient = torch.autograd.grad(ys[row, 2].sum(), inputs[2], retain_graph=True)[0]
        at_times = torch.where(torch.arange(3) == row, inputs[2][:, 2], inputs[3])
        expected = slopes(at_times, ys[:, 2])[row].sum().item()
        assert gradient[row, 2].item() == pytest.approx(expected, rel=rtol)
        assert gradient.count_nonzero() == 1


# PyTorch compiles some forward-mode formulas with its own deprecated compiler on first use.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_mode_and_functional_transforms_agree_with_reverse_mode():
    run, inputs = replayed("tsit5")
    inputs = tuple(x.detach() for x in inputs)
    ys, pull = torch.func.vjp(run, *inputs)
    generator = torch.Generator().manual_seed(0)
    tangents = tuple(torch.randn(x.shape, generator=generator, dtype=DOUBLE) for x in inputs)
    cotangent = torch.randn(ys.shape, generator=generator, dtype=DOUBLE)
    _, pushed = torch.func.jvp(run, inputs, tangents)
    left = sum((a * b).sum() for a, b in zip(pull(cotangent), tangents, strict=True))
    torch.testing.assert_close(left, (pushed * cotangent).sum(), rtol=1e-10, atol=1e-10)
    jacobian = torch.func.jacfwd(run, argnums=1)(*inputs)
    torch.testing.assert_close(jacobian, torch.func.jacrev(run, argnums=1)(*inputs), rtol=1e-9, atol=1e-10)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(x, v) for x, v in zip(inputs, tangents, strict=True)]
        tangent = torch.autograd.forward_ad.unpack_dual(run(*duals)).tangent
    torch.testing.assert_close(tangent, pushed)


@pytest.mark.parametrize("subsets", [True, False])
def test_failed_rows_leave_zero_gradients_and_no_nan(subsets):
    rate = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    kinds = torch.tensor([0, 1, 2, 0])

    def f(t, y, rows=None):
        kind = kinds if rows is None else kinds[rows]
        explode = y[:, 0] ** 2 * 4 * rate
        outside = rate * torch.log(y[:, 0])
        decay = -rate * torch.sqrt(y[:, 0])
        return torch.where(kind == 0, decay, torch.where(kind == 1, explode, outside))[:, None]

    # Row 1 explodes, row 2 cannot start (log of 0, whose derivative is infinite), row 3 has most steps.
    y0 = tensor([1.0], [1.0], [0.0], [1.5]).requires_grad_()
    times, t0 = tensor([0.1, 0.2], [0.1, 1.0], [0.0, 1.0], [0.1, 1.2]), torch.zeros(4, dtype=DOUBLE)
    field = f if subsets else without_rows(f)
    out = solve_rows(field, y0, times, t0, METHODS["tsit5"], **{**SETTINGS, "max_steps": 200})
    assert out.status[0] == OK and out.status[1] != OK and out.status[2] == NON_FINITE and out.status[3] == OK
    ys = replay_rows(field, y0, times, t0, out.steps, METHODS["tsit5"])
    torch.testing.assert_close(ys, out.ys, rtol=1e-10, atol=0, equal_nan=True)
    good = ~torch.isnan(ys)
    assert good[:, 0].all() and not good[1, 1].any() and not good[2, 1].any()
    by_rate, by_y0 = torch.autograd.grad(torch.where(good, ys, 0.0).sum(), (rate, y0), retain_graph=True)
    # Closed forms: sqrt(y) = sqrt(y0) - rate t / 2, and y = y0 / (1 - 4 rate y0 t); row 2 stands at y0.
    with torch.enable_grad():
        r, z = rate.detach().requires_grad_(), y0.detach()[:, 0].requires_grad_()
        decay = (z[[0, 3], None].sqrt() - r * times[[0, 3]] / 2) ** 2
        exact = decay.sum() + z[1] / (1 - 4 * r * z[1] * 0.1) + z[2]
        expected_rate, expected_y0 = torch.autograd.grad(exact, (r, z))
    torch.testing.assert_close(by_rate, expected_rate, rtol=1e-5, atol=0)
    torch.testing.assert_close(by_y0[:, 0], expected_y0, rtol=1e-5, atol=0)
    nothing = torch.autograd.grad(ys[1:3, 1].sum(), (rate, y0), allow_unused=True)
    assert all(x is None or (x == 0).all() for x in nothing)


def test_scalar_rounding_of_the_grid_never_loses_the_last_output():
    generator = torch.Generator().manual_seed(1)
    t0 = torch.randn(200, generator=generator, dtype=DOUBLE)
    times = t0[:, None] + torch.rand(200, 5, generator=generator, dtype=DOUBLE).cumsum(1)
    y0 = torch.ones(200, 1, dtype=DOUBLE)
    for extra in ({}, {"step_size": 0.013}):
        out = solve_rows(lambda t, y: -y, y0, times, t0, METHODS["dopri5"], **extra, **SETTINGS)
        again = replay_rows(lambda t, y: -y, y0, times, t0, out.steps, METHODS["dopri5"])
        assert torch.isfinite(again).all()
        torch.testing.assert_close(again, out.ys, rtol=1e-12, atol=0)


@pytest.mark.parametrize("engine", ["fused", "torch"])
def test_steps_are_taken_again_inside_a_transform(engine):
    """Of a solve outside it, and of one inside: both find their steps where no transform is active."""
    y0, times, rate = torch.ones(1).double(), torch.tensor([0.0, 0.5]).double(), torch.tensor(2.0).double()
    decay = lambda t, y, k: -k * y  # noqa: E731
    before = odesolve(decay, y0, times, rate, engine=engine)

    def last(k, steps=None):
        steps = steps or odesolve(decay, y0, times, k.detach(), engine=engine)
        return odesolve(decay, y0, times, k, engine=engine, replay=steps).ys[-1, 0]

    expected = -0.5 * torch.exp(tensor(-1.0))[0]
    torch.testing.assert_close(torch.func.grad(lambda k: last(k, before))(rate), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.func.grad(last)(rate), expected, rtol=1e-6, atol=0)
