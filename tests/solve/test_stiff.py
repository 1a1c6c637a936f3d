# SPDX-License-Identifier: Apache-2.0
"""Implicit methods: stiff problems against SciPy, order, gradients, engines, switching, failures."""

import numpy as np
import pytest
import torch
from stiff_problems import PROBLEMS, ROBER, VAN_DER_POL

from pyro_latentde import odesolve
from pyro_latentde.errors import SolveError
from pyro_latentde.solve.methods.catalog import METHODS, get_method
from pyro_latentde.solve.solution import Status

IMPLICIT = ("kvaerno5", "kvaerno3", "trbdf2")
STIFF = (*IMPLICIT, "auto")
rober, van_der_pol = ROBER.f, VAN_DER_POL.f


def tensor(x):
    return torch.as_tensor(x, dtype=torch.float64)


def solve(problem, method, **settings):
    p = settings.pop("p", tensor(problem.p))
    return odesolve(problem.f, tensor(problem.y0), tensor(problem.times), p, method=method, **settings)


@pytest.fixture(scope="module")
def references():
    return {name: problem.reference() for name, problem in PROBLEMS.items()}


# errors at outputs against the solution at 1e-11, as multiples of 1e-6 + 1e-3 times each state's largest value; the
# second-order method loses most where a small error moves the time of a jump
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", STIFF)
def test_stiff_problems_against_radau(method, name, references):
    right = references[name]
    found = solve(PROBLEMS[name], method, rtol=1e-7, atol=1e-11, max_steps=100_000, engine="fused").ys.numpy()
    scale = np.abs(right) + 1e-6 * np.abs(right).max(0)
    limit = {"trbdf2": 5e-3}.get(method, 3e-4)
    assert (np.abs(found - right) / scale).max() < limit


@pytest.mark.parametrize("method", STIFF)
def test_error_follows_the_tolerance(method, references):
    """A hundredth of the tolerance: at most a fifth of the error, for orders 2 to 5 of an error per step."""
    right = references["orego"]
    errors = [
        np.abs(
            solve(PROBLEMS["orego"], method, rtol=rtol, atol=1e-3 * rtol, max_steps=100_000).ys.numpy() / right - 1
        ).max()
        for rtol in (1e-5, 1e-7)
    ]
    assert errors[1] < 0.2 * errors[0]


def swing(t, y, p):
    return torch.stack([y[1], -p * torch.sin(y[0]) + torch.cos(3 * t)])


@pytest.mark.parametrize("engine", ["fused", "torch"])
@pytest.mark.parametrize("method", IMPLICIT)
def test_order_of_convergence(method, engine):
    """At the last step, and at outputs between steps (at most one order less)."""
    times, y0, p = torch.linspace(0, 2, 24).double(), tensor([1.0, 0.3]), tensor(2.0)
    right = odesolve(swing, y0, times, p, method="dopri8", rtol=1e-13, atol=1e-13).ys
    sizes = (0.1, 0.05, 0.025)
    wrong = [(odesolve(swing, y0, times, p, method=method, step_size=h, engine=engine).ys - right).abs() for h in sizes]
    order = get_method(method).order
    for at, least in ((slice(-1, None), order), (slice(None), min(order, max(order - 1, 3)))):
        errors = [float(e[at].max()) for e in wrong]
        assert np.log2(errors[1] / errors[2]) > least - 0.35, errors


def test_interpolants_meet_both_ends_with_the_slopes_there():
    for name in IMPLICIT:
        method = METHODS[name]
        table = np.array(method.interpolant)
        np.testing.assert_allclose(table.sum(1), method.b, atol=1e-12)
        powers = np.arange(1, table.shape[1] + 1)
        np.testing.assert_allclose(table[:, 0], np.eye(method.stages)[0], atol=1e-12)
        np.testing.assert_allclose(table @ powers, np.eye(method.stages)[-1], atol=1e-12)


@pytest.mark.parametrize("method", STIFF)
def test_gradients_of_rober_against_central_differences_at_a_finer_tolerance(method):
    """Also of outputs between steps, and of the initial state."""
    times, order = tensor([0.0, 0.4, 40.0, 4e3, 1e5]), get_method(method).order
    fine = {"rtol": 1e-12, "atol": 1e-16, "method": "kvaerno5", "max_steps": 1_000_000}

    def last(k, y0, **settings):
        return odesolve(rober, y0, times, k, **settings).ys[[2, 4]][:, [0, 1]]

    k, y0 = tensor(ROBER.p), tensor(ROBER.y0)
    rtol = 1e-9 if order > 2 else 1e-8
    settings = {"method": method, "rtol": rtol, "atol": 1e-4 * rtol, "max_steps": 1_000_000}
    by_k, by_y0 = torch.autograd.functional.jacobian(lambda k, y: last(k, y, **settings), (k, y0))
    moves = [(i, 1e-4 * float(k[i]), by_k[..., i]) for i in range(3)]
    moves += [(3, 1e-5, by_y0[..., 0]), (5, 1e-4, by_y0[..., 2])]  # the second state is too small to be moved
    for i, step, found in moves:
        move = torch.zeros(6, dtype=torch.float64)
        move[i] = step
        up, down = ((k + sign * move[:3], y0 + sign * move[3:]) for sign in (1, -1))
        expected = (last(*up, **fine) - last(*down, **fine)) / (2 * step)
        close = (1e-5 if i < 3 else 2e-4) if order > 2 else 1e-3
        torch.testing.assert_close(found, expected, rtol=close, atol=0.0)


@pytest.mark.parametrize("method", STIFF)
def test_gradients_are_exact_for_the_steps_and_the_engines_agree(method):
    """Loose tolerance, the same steps: central differences to 1e-7, forward mode and the other engine to 1e-11."""
    mu, y0 = tensor([3.0, 30.0]), tensor([[2.0, 0.0], [2.0, 0.0]])
    times = torch.linspace(0, 4, 5).double()
    steps = odesolve(van_der_pol, y0, times, mu, method=method, rtol=1e-4)

    def value(mu, y0, engine="fused", gradient="discrete"):
        return odesolve(van_der_pol, y0, times, mu, replay=steps, engine=engine, gradient=gradient).ys[:, [2, 4]].sum()

    def gradient(*options):
        inputs = (mu.clone().requires_grad_(), y0.clone().requires_grad_())
        return torch.autograd.grad(value(*inputs, *options), inputs)

    found = gradient()
    for i in range(2):
        move = torch.zeros(2, dtype=torch.float64)
        move[i] = 1e-6
        expected = (value(mu + move, y0) - value(mu - move, y0)) / 2e-6
        assert float(found[0][i]) == pytest.approx(float(expected), rel=1e-7, abs=1e-8)
    for other in (gradient("torch"), gradient("fused", "forward")):
        for a, b in zip(found, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_gradients_to_times_and_start():
    """The derivative by an output time is the slope there; by the start of an autonomous system minus their sum."""
    times, t0 = tensor([0.5, 1.7, 3.0]).requires_grad_(), tensor(0.0).requires_grad_()
    mu, y0 = tensor(20.0), tensor([2.0, 0.0])
    ys = odesolve(van_der_pol, y0, times, mu, t0=t0, method="kvaerno5", rtol=1e-9, atol=1e-11).ys
    by_times, by_start = torch.autograd.grad(ys[:, 0].sum(), (times, t0))
    torch.testing.assert_close(by_times, ys[:, 1].detach(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(by_start, -by_times.sum(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["kvaerno5", "auto"])
def test_second_derivatives(method):
    steps = odesolve(van_der_pol, tensor([2.0, 0.0]), tensor([0.0, 1.0, 2.0]), tensor(5.0), method=method, rtol=1e-5)

    def value(mu):
        return odesolve(van_der_pol, tensor([2.0, 0.0]), tensor([0.0, 1.0, 2.0]), mu, replay=steps).ys[-1, 0]

    def slope(mu):
        mu = tensor(mu).requires_grad_()
        return float(torch.autograd.grad(value(mu), mu)[0])

    mu = tensor(5.0).requires_grad_()
    (first,) = torch.autograd.grad(value(mu), mu, create_graph=True)
    second = float(torch.autograd.grad(first, mu)[0])
    assert second == pytest.approx((slope(5 + 1e-4) - slope(5 - 1e-4)) / 2e-4, rel=1e-6)


def test_transforms_and_recording():
    """vmap, grad of vmap and a recorded graph give what a loop gives."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def loss(mu):
        ys = odesolve(van_der_pol, tensor([2.0, 0.0]), tensor([0.0, 1.0, 3.0]), mu, method="kvaerno5").ys
        return ys[-1].sum()

    mus = tensor([1.0, 10.0, 100.0])
    gradients = torch.func.vmap(torch.func.grad(loss))
    alone = torch.stack([torch.func.grad(loss)(mu) for mu in mus])
    assert torch.equal(gradients(mus), alone)
    assert torch.equal(make_fx(gradients)(mus)(mus), alone)


def test_a_row_alone_and_in_a_batch():
    mu = torch.logspace(-1, 3, 40).double()
    for method in STIFF:
        together = odesolve(van_der_pol, tensor([2.0, 0.0]).expand(40, 2), tensor([0.0, 5.0]), mu, method=method).ys
        alone = odesolve(van_der_pol, tensor([2.0, 0.0]), tensor([0.0, 5.0]), mu[31], method=method).ys
        assert torch.equal(together[31], alone)


def test_auto_leaves_easy_rows_explicit_and_switches_stiff_ones():
    mu, times = tensor([0.5, 1000.0]), tensor([0.0, 10.0])
    y0 = tensor([[2.0, 0.0], [2.0, 0.0]])
    solution = odesolve(van_der_pol, y0, times, mu, method="auto")
    easy = odesolve(van_der_pol, y0[0], times, mu[0], method="tsit5")
    stiff = odesolve(van_der_pol, y0[1], times, mu[1], method="tsit5")
    torch.testing.assert_close(solution.ys[0], easy.ys, rtol=1e-11, atol=1e-11)
    assert not solution.implicit[0].any() and solution.implicit[1].any()
    assert 5 * int(solution.stats["n_accepted"][1]) < int(stiff.stats["n_accepted"])


def test_auto_comes_back():
    """Stiff at first, and not at all after t = 1: a rate that falls by six orders of magnitude."""
    fast = lambda t, y, k: -(k * torch.exp(-14 * t) + 1) * (y - torch.cos(10 * t))  # noqa: E731
    solution = odesolve(fast, tensor([1.0]), tensor([0.0, 6.0]), tensor(1e6), method="auto")
    kinds = solution.implicit.int()
    assert kinds.sum() > 10 and int(kinds[-1]) == 0
    assert int(kinds.diff().abs().sum()) == 2
    right = odesolve(fast, tensor([1.0]), tensor([0.0, 6.0]), tensor(1e6), method="kvaerno5", rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(solution.ys, right.ys, rtol=1e-4, atol=1e-5)


def test_float32_and_structured_states():
    y0 = {"x": torch.tensor([2.0, 2.0]), "v": torch.zeros(2)}
    field = lambda t, y, mu: {"x": y["v"], "v": mu * (1 - y["x"] ** 2) * y["v"] - y["x"]}  # noqa: E731
    ys = odesolve(field, y0, torch.tensor([0.0, 2.0]), torch.tensor([10.0, 100.0]), method="kvaerno5").ys
    right = odesolve(van_der_pol, tensor([2.0, 0.0]), tensor([0.0, 2.0]), tensor(100.0), method="kvaerno5").ys
    assert ys["x"].dtype == torch.float32
    torch.testing.assert_close(ys["x"][1].double(), right[:, 0], rtol=1e-3, atol=1e-3)


def test_a_failed_row_leaves_its_neighbours_alone():
    blow_up = lambda t, y, k: k * y * y  # noqa: E731
    k = tensor([0.5, 2.0]).requires_grad_()
    for engine in ("fused", "torch"):
        times = tensor([0.0, 1.0])
        solution = odesolve(
            blow_up, torch.ones(2, 1).double(), times, k, method="kvaerno5", on_failure="nan", engine=engine
        )
        assert solution.ok.tolist() == [True, False]
        assert solution.ys[0, -1].item() == pytest.approx(2.0, rel=1e-5)  # 1 / (1 - k t)
        (gradient,) = torch.autograd.grad(solution.ys[:, -1].nansum(), k)
        assert gradient.tolist() == pytest.approx([4.0, 0.0], rel=1e-4)


@pytest.mark.parametrize("engine", ["fused", "torch"])
def test_newton_that_does_not_converge_is_told(engine):
    """Equal steps of 2 for y' = y^2 from 1: y_new = 1 + 2 y_new^2 has no solution."""
    f, y0, times = lambda t, y: y * y, torch.ones(1).double(), tensor([0.0, 4.0])
    found = odesolve(f, y0, times, method="trbdf2", step_size=4.0, on_failure="nan", engine=engine)
    assert int(found.status) == Status.NO_CONVERGENCE
    with pytest.raises(SolveError, match=r"Newton's method did not converge.*smaller steps"):
        odesolve(f, y0, times, method="trbdf2", step_size=4.0, engine=engine)


def test_auto_takes_no_step_size():
    with pytest.raises(SolveError, match="takes no step_size=. Give 'kvaerno5'"):
        odesolve(van_der_pol, tensor([2.0, 0.0]), tensor([0.0, 1.0]), tensor(1.0), method="auto", step_size=0.1)


def test_a_solution_explains_itself():
    mu, times = tensor([0.5, 200.0]), tensor([0.0, 10.0])
    y0 = tensor([[2.0, 0.0], [2.0, 0.0]])
    told = str(odesolve(van_der_pol, y0, times, mu, method="tsit5"))
    explicit = odesolve(van_der_pol, y0[1], times, mu[1], method="tsit5")
    assert f"{int(explicit.stats['n_accepted'])} of a row (most: row 1)" in told
    assert "Stability bounds the steps: in row 1" in told and 'method="auto"' in told
    # the fastest decay is mu (y^2 - 1), 600 at y = 2
    assert "the fastest decay (600 per unit of time)" in told
    easy = str(odesolve(van_der_pol, y0[0], times, mu[0], method="tsit5"))
    assert "Stability" not in easy and "1 row(s), all solved" in easy
    both = odesolve(van_der_pol, y0, times, mu, method="auto")
    assert "in 1 row(s), 1 switches" in str(both)
    smallest = both.steps[both.steps != 0].abs().min()
    assert f"Smallest step: {float(smallest):.3g} at t = " in str(both)
