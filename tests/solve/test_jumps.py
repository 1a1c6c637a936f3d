# SPDX-License-Identifier: Apache-2.0
"""Known jumps of the field: steps end there; order, gradients by the times of jumps, transforms."""

import pytest
import torch
from ode_fields import DOUBLE, ENGINES, tensor
from torch.func import hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_latentde import odesolve
from pyro_latentde.errors import DataError, SolveError

TIMES = tensor(0.5, 1.0, 1.7, 2.2, 3.0)
THETA = tensor(-1.0, -0.3, 1.0, 2.2)  # rates before and after the first jump, times of both
ADAPTIVE = ("tsit5", "dopri8", "bosh3", "kvaerno5", "trbdf2", "auto")


def switched(t, y, p):
    """dy/dt = a y before the first jump, b y after it, and + 1 after the second."""
    a, b, first, second = p
    return torch.where(t > first, b, a) * y + torch.where(t > second, 1.0, 0.0)


def exact(theta, times=TIMES):
    a, b, first, second = theta.unbind(-1)
    at_first = torch.exp(a * first)
    at_second = at_first * torch.exp(b * (second - first))
    late = at_second * torch.exp(b * (times - second)) + torch.expm1(b * (times - second)) / b
    early = torch.exp(a * torch.minimum(times, first) + b * (times - first).clamp(min=0))
    return torch.where(times > second, late, early)[:, None]


def solve(theta=THETA, engine="fused", **settings):
    settings = {"rtol": 1e-10, "atol": 1e-12, "t0": 0.0, "jumps": theta[..., 2:], "max_steps": 100_000, **settings}
    y0 = settings.pop("y0", torch.ones(1, dtype=DOUBLE))
    solution = odesolve(switched, y0, settings.pop("times", TIMES), theta, engine=engine, **settings)
    assert solution.engine == engine
    return solution


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_values(method, engine):
    loose = {"rtol": 1e-6, "atol": 1e-9} if method in ("trbdf2", "bosh3") else {}
    found = solve(engine=engine, method=method, **loose)
    torch.testing.assert_close(found.ys, exact(THETA), rtol=1e-4 if loose else 1e-9, atol=0)
    # a jump that nobody told of costs rejections: here there are next to none
    assert int(found.stats["n_rejected"]) <= 2


@pytest.mark.parametrize(("method", "order"), [("tsit5", 5), ("rk4", 4), ("heun", 2), ("kvaerno3", 3)])
@pytest.mark.parametrize("engine", ENGINES)
def test_order_is_kept(engine, method, order):
    errors = []
    for step in (0.2, 0.1):
        ys = solve(engine=engine, method=method, step_size=step).ys
        errors.append((ys - exact(THETA))[-1].abs().item())
    assert errors[0] / errors[1] > 0.8 * 2**order
    blind = odesolve(switched, torch.ones(1).double(), TIMES, THETA, t0=0.0, method=method, step_size=0.17)
    assert (blind.ys - exact(THETA))[-1].abs() > 100 * errors[1]


@pytest.mark.parametrize("method", ADAPTIVE)
def test_engines_agree(method):
    fused, plain = (solve(engine=engine, method=method, rtol=1e-6, atol=1e-9) for engine in ENGINES)
    torch.testing.assert_close(fused.ys, plain.ys, rtol=1e-10, atol=1e-12)
    assert torch.equal(fused.counts[:2], plain.counts[:2])
    torch.testing.assert_close(fused.steps, plain.steps, rtol=1e-6, atol=1e-9)


WEIGHTS = tensor(0.3, 0.0, 1.0, 0.0, -2.0)  # outputs at a jump have a derivative from each side


def loss(theta, engine="fused", **settings):
    return (solve(theta, engine, **settings).ys[:, 0] * WEIGHTS).sum()


def differences(function, x, step):
    return torch.stack([(function(x + e) - function(x - e)) / (2 * step) for e in step * torch.eye(len(x)).double()])


@pytest.mark.parametrize(
    ("engine", "method"), [*(("fused", method) for method in ADAPTIVE), ("torch", "tsit5"), ("torch", "trbdf2")]
)
def test_gradient_by_parameters_and_jump_times(method, engine):
    """Against the closed form, and against central differences along the same steps."""
    tolerance = 1e-4 if method in ("trbdf2", "bosh3") else 1e-9
    settings = {"method": method, "rtol": tolerance, "atol": 1e-2 * tolerance}
    theta = THETA.clone().requires_grad_()
    solution = solve(theta, engine, **settings)
    (found,) = torch.autograd.grad((solution.ys[:, 0] * WEIGHTS).sum(), theta)
    along = differences(lambda x: loss(x, engine, replay=solution, **settings), THETA, 1e-7)
    torch.testing.assert_close(found, along, rtol=1e-6, atol=3e-8)
    right = torch.func.grad(lambda x: (exact(x)[:, 0] * WEIGHTS).sum())(THETA)
    torch.testing.assert_close(found, right, rtol=1e-2 if tolerance > 1e-6 else 1e-7, atol=1e-8)
    direction = tensor(0.3, -1.0, 0.7, 2.0)
    _, turn = jvp(lambda x: loss(x, engine, **settings), (THETA,), (direction,))
    torch.testing.assert_close(turn, found @ direction, rtol=1e-9, atol=1e-11)
    if engine == "fused":
        (again,) = torch.autograd.grad(loss(theta, engine, gradient="forward", **settings), theta)
        torch.testing.assert_close(again, found, rtol=1e-9, atol=1e-11)


def test_second_derivatives():
    right = hessian(lambda x: (exact(x)[:, 0] * WEIGHTS).sum())(THETA)
    for engine in ENGINES:
        found = hessian(lambda x, engine=engine: loss(x, engine, rtol=1e-5, atol=1e-7))(THETA)
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3)


def test_two_jumps_at_the_same_time():
    """A step of size 0 lies between them; the derivative is that of moving both."""
    theta = tensor(-1.0, -0.3, 1.0, 1.0, requires_grad=True)
    for engine in ENGINES:
        solution = solve(theta, engine)
        assert int((solution.steps == 0).sum()) == 1
        (found,) = torch.autograd.grad((solution.ys[:, 0] * WEIGHTS).sum(), theta)
        right = torch.func.grad(lambda t: (exact(torch.stack([*THETA[:2], t, t]))[:, 0] * WEIGHTS).sum())(
            tensor(1.0)[0]
        )
        torch.testing.assert_close(found[2] + found[3], right, rtol=1e-7, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_backward_in_time(engine):
    times = tensor(3.0, 2.2, 1.7, 1.0, 0.5, 0.0)
    start = exact(THETA)[-1]
    theta = THETA.clone().requires_grad_()
    solution = solve(theta, engine, y0=start, times=times, t0=None)
    right = torch.cat([exact(THETA).flip(0), torch.ones(1, 1, dtype=DOUBLE)])
    torch.testing.assert_close(solution.ys, right, rtol=1e-8, atol=0)
    (found,) = torch.autograd.grad(solution.ys[-1, 0], theta)
    step = differences(lambda x: solve(x, engine, y0=start, times=times, t0=None).ys[-1, 0], THETA, 1e-5)
    torch.testing.assert_close(found, step, rtol=1e-6, atol=1e-8)


def test_both_sides_of_the_start():
    times = tensor(0.5, 3.0, 1.7, 1.4)
    found = solve(times=times, t0=1.5, y0=exact(THETA, tensor(1.5))[0])
    torch.testing.assert_close(found.ys, exact(THETA, times), rtol=1e-8, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_have_jumps_of_their_own(engine):
    """Also fewer than others, or none before the end; a row alone gives the same bits in the fused engine."""
    theta = tensor([-1.0, -0.3, 1.0, 2.2], [-0.5, 0.2, 0.4, 0.9], [-1.5, -1.0, 2.9, 8.0])
    jumps = theta[:, 2:].clone()
    jumps[2, 1] = torch.nan
    fine = {"rtol": 1e-8, "atol": 1e-10}
    batch = solve(theta, engine, jumps=jumps, event_dims={"p": 1}, **fine)
    assert batch.ys.shape == (3, 5, 1)
    for r in range(3):
        torch.testing.assert_close(batch.ys[r], exact(theta[r]), rtol=1e-6, atol=0)
        alone = solve(theta[r], engine, **fine)
        if engine == "fused":
            assert torch.equal(batch.ys[r], alone.ys)
        assert (batch.steps[r] != 0).sum() == (alone.steps != 0).sum()


def test_shared_jumps_collect_the_gradient_of_all_rows():
    y0, theta = tensor([1.0], [2.0]), THETA.clone().requires_grad_()
    for engine in ENGINES:
        ys = odesolve(switched, y0, TIMES, theta, t0=0.0, jumps=theta[2:], rtol=1e-9, atol=1e-11, engine=engine).ys
        (found,) = torch.autograd.grad((ys[..., 0] * WEIGHTS).sum(), theta)
        step = differences(
            lambda x: (
                odesolve(switched, y0, TIMES, x, t0=0.0, jumps=x[2:], rtol=1e-9, atol=1e-11).ys[..., 0] * WEIGHTS
            ).sum(),
            THETA,
            1e-5,
        )
        torch.testing.assert_close(found, step, rtol=1e-5, atol=1e-7)


def test_under_vmap_and_make_fx():
    grid = THETA + 0.1 * torch.arange(3, dtype=DOUBLE)[:, None] * tensor(1.0, 1.0, 0.5, -0.5)
    for engine in ENGINES:

        def one(theta, engine=engine):
            return torch.func.grad(lambda x: loss(x, engine, rtol=1e-7, atol=1e-9))(theta)

        alone = torch.stack([one(theta) for theta in grid])
        torch.testing.assert_close(vmap(one)(grid), alone, rtol=1e-12, atol=1e-13)
        graph = make_fx(lambda theta: one(theta))(grid[0])
        torch.testing.assert_close(graph(grid[1]), alone[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("engine", ENGINES)
def test_jumps_at_the_start_and_at_the_end(engine):
    theta = tensor(-1.0, -0.3, 0.0, 3.0)
    solution = solve(theta, engine, times=torch.cat([tensor(0.0), TIMES]))
    right = torch.exp(-0.3 * torch.cat([tensor(0.0), TIMES]))[:, None]
    torch.testing.assert_close(solution.ys, right, rtol=1e-8, atol=0)
    assert torch.equal(solution.at(tensor(0.0, 3.0)), solution.ys[[0, -1]])


def test_solution_between_and_at_jumps():
    solution = solve()
    t = tensor(1.0, 1.3, 2.2, 2.9)
    torch.testing.assert_close(solution.at(t), exact(THETA, t), rtol=1e-8, atol=0)


def test_a_failed_row_leaves_the_others_alone():
    theta = tensor([-1.0, -0.3, 1.0, 2.2], [torch.nan, -0.3, 1.0, 2.2]).requires_grad_()
    for engine in ENGINES:
        solution = solve(theta, engine, on_failure="nan", event_dims={"p": 1})
        assert solution.ok.tolist() == [True, False]
        (found,) = torch.autograd.grad(solution.ys.nan_to_num().sum(), theta)
        assert torch.isfinite(found).all() and (found[1] == 0).all() and (found[0] != 0).all()


def test_bad_input():
    with pytest.raises(DataError, match="infinite"):
        solve(jumps=[1.0, torch.inf])
    with pytest.raises(DataError, match="jumps of type str"):
        solve(jumps="noon")
    with pytest.raises(SolveError, match="torchdiffeq knows no"):
        odesolve(switched, torch.ones(1).double(), TIMES, THETA, t0=0.0, jumps=THETA[2:], engine="torchdiffeq")
    with pytest.raises(SolveError, match="equal steps through one smooth motion"):
        motion = {"method": "leapfrog", "step_size": 0.1, "jumps": [0.5]}
        odesolve(lambda t, y: torch.stack([y[1], -y[0]]), torch.ones(2).double(), TIMES, t0=0.0, **motion)
    smooth = odesolve(switched, torch.ones(1).double(), TIMES, THETA, t0=0.0)
    with pytest.raises(SolveError, match="expects a solution of"):
        solve(replay=smooth)
