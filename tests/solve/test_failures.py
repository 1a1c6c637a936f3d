# SPDX-License-Identifier: Apache-2.0
"""Failure is data: statuses, zero gradients, untouched neighbours, messages; forks and threads."""

import logging
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ode_fields import DOUBLE, ENGINES, RATES, STARTS, prey_predator, solve, tensor

import pyro_latentde as lde
from pyro_latentde.errors import SolveError

OK, MAX_STEPS, UNDERFLOW, NON_FINITE, NON_FINITE_GRADIENT, *_ = lde.Status
TIMES = tensor(0.0, 0.3, 1.0)


def fragile(t, y, p):
    """y' = a y**2 - b sqrt(y) - c: explodes, or leaves the domain of its root, or has no slope at 0."""
    a, b, c = p["a"], p["b"], p["c"]
    return a * y**2 - b * torch.sqrt(y) - c


GOOD, EXPLODES, LEAVES, ROOT = (0.1, 0.2, 0.1, 1.5), (1.0, 0.1, 0.0, 2.5), (0.1, 0.1, 2.0, 1.0), (0.1, 1.0, 0.0, 0.0)


def problem(*rows):
    a, b, c, y0 = tensor(*rows).unbind(-1)
    return y0[:, None], {"a": a, "b": b, "c": c}


SCALARS = {"a": 0, "b": 0, "c": 0}


def run(engine, *rows, times=TIMES, **settings):
    y0, p = problem(*rows)
    inputs = [x.requires_grad_() for x in (y0, *p.values())]
    solution = lde.odesolve(fragile, y0, times, p, engine=engine, event_dims=SCALARS, on_failure="nan", **settings)
    assert solution.engine == engine
    return solution, inputs


@pytest.mark.parametrize("engine", ENGINES)
def test_failed_rows_have_a_status_nan_and_zero_gradients(engine):
    solution, inputs = run(engine, GOOD, EXPLODES, LEAVES, GOOD)
    assert solution.status.tolist() == [OK, UNDERFLOW, NON_FINITE, OK]
    assert solution.ok.tolist() == [True, False, False, True]
    assert solution.ys[:, :2].isfinite().all()  # what was reached is kept
    assert solution.ys[1:3, 2].isnan().all()
    exact = 2.5 / (1 - 2.5 * 0.3)
    assert abs(solution.ys[1, 1, 0].item() / exact - 1) < 0.2
    gradients = torch.autograd.grad(solution.ys.nan_to_num().square().sum(), inputs)
    alone, own = run(engine, GOOD)
    expected = torch.autograd.grad(alone.ys.square().sum(), own)
    for gradient, one in zip(gradients, expected, strict=True):
        assert (gradient[1:3] == 0).all()
        torch.testing.assert_close(gradient[[0, 3]], one.expand(2, *one.shape[1:]), rtol=1e-12, atol=0)
        if engine == "fused":
            assert torch.equal(gradient[0], one[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_nan_cotangents_of_failed_rows_stay_there(engine):
    """``nansum`` or a masked likelihood sends NaN back into rows that are NaN themselves."""
    solution, inputs = run(engine, GOOD, EXPLODES)
    seed = torch.ones_like(solution.ys).masked_fill(solution.ys.isnan(), torch.nan)
    for gradient in torch.autograd.grad(solution.ys, inputs, seed):
        assert gradient.isfinite().all() and (gradient[1] == 0).all() and (gradient[0] != 0).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_max_steps_counts_every_trial(engine):
    solution = solve(engine, rtol=1e-8, max_steps=5, on_failure="nan")
    assert solution.status.tolist() == [MAX_STEPS] * 3
    trials = solution.stats["n_accepted"] + solution.stats["n_rejected"]
    assert trials.tolist() == [5] * 3
    assert torch.equal(solution.ys[:, 0], STARTS)
    enough = solve(engine, rtol=1e-8)
    trials = enough.stats["n_accepted"] + enough.stats["n_rejected"]
    assert (solve(engine, rtol=1e-8, max_steps=int(trials.max())).status == OK).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_start_that_is_not_finite(engine):
    y0 = STARTS.clone()
    y0[1, 0] = torch.nan
    solution = solve(engine, y0=y0, on_failure="nan")
    assert solution.status.tolist() == [OK, NON_FINITE, OK]
    assert torch.equal(solution.ys[1, 0].isnan(), tensor(1.0, 0.0) == 1)  # y0 as given
    assert solution.ys[1, 1:].isnan().all()
    torch.testing.assert_close(solution.ys[0], solve(engine).ys[0], rtol=1e-12, atol=0)
    with pytest.raises(SolveError, match="non-finite"):
        solve(engine, y0=y0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_slope_that_is_not_finite_at_the_start(engine):
    solution, inputs = run(engine, GOOD, (0.1, 0.1, 0.0, -1.0))
    assert solution.status.tolist() == [OK, NON_FINITE]
    assert solution.ys[1, 0, 0] == -1.0 and solution.ys[1, 1:].isnan().all()
    assert solution.stats["n_accepted"][1] == 0
    for gradient in torch.autograd.grad(solution.ys.nan_to_num().sum(), inputs):
        assert gradient[1] == 0 and gradient[0] != 0


@pytest.mark.parametrize("settings", [{"method": "midpoint", "step_size": 0.1}, {"method": "tsit5", "step_size": 0.1}])
def test_fixed_steps_that_leave_the_domain(settings):
    both = [run(engine, GOOD, LEAVES, **settings)[0] for engine in ENGINES]
    for solution in both:
        assert solution.status.tolist() == [OK, NON_FINITE]
        assert solution.stats["n_rejected"].tolist() == [0, 1]
        assert solution.ys[1, 1].isfinite().all() and solution.ys[1, 2].isnan().all()
    for name in both[0].stats:
        assert torch.equal(both[0].stats[name], both[1].stats[name])


@pytest.mark.parametrize("last", [1.5, 2.0])
def test_fixed_steps_that_overflow(last):
    """The first infinite state ends a row, on the same step in both engines, also where it is the last one."""
    times = torch.linspace(0, last, 21, dtype=DOUBLE)
    both = [run(e, GOOD, EXPLODES, times=times, method="midpoint", step_size=0.1)[0] for e in ENGINES]
    for solution in both:
        assert solution.status.tolist() == [OK, NON_FINITE]
        assert not solution.ys.isinf().any()
    assert torch.equal(both[0].ys.isnan(), both[1].ys.isnan())
    for name in both[0].stats:
        assert torch.equal(both[0].stats[name], both[1].stats[name])


def test_a_gradient_that_is_not_finite_is_zero_and_told(caplog):
    """y = 0 solves y' = -sqrt(y), whose slope by y is infinite there."""
    solution, inputs = run("fused", GOOD, ROOT, GOOD)
    assert solution.status.tolist() == [OK] * 3
    torch.testing.assert_close(solution.ys[1], torch.zeros(3, 1, dtype=DOUBLE))
    with caplog.at_level(logging.WARNING, "pyro_latentde"):
        gradients = torch.autograd.grad(solution.ys.sum(), inputs)
    assert "1 of 3 rows have a non-finite gradient (first: row 1)" in caplog.text
    alone, own = run("fused", GOOD)
    for gradient, one in zip(gradients, torch.autograd.grad(alone.ys.sum(), own), strict=True):
        assert (gradient[1] == 0).all()
        assert torch.equal(gradient[0], one[0]) and torch.equal(gradient[2], one[0])
    assert solution.status.tolist() == [OK, NON_FINITE_GRADIENT, OK]
    assert solution.ok.all()


def test_a_gradient_that_is_not_finite_leaves_shared_parameters_to_the_other_rows(caplog):
    y0 = tensor([1.5], [0.0], [1.2])
    p = {k: torch.tensor(v, dtype=DOUBLE, requires_grad=True) for k, v in (("a", 0.1), ("b", 0.2), ("c", 0.0))}
    for engine_y0, reference in ((y0, y0[[0, 2]]),):
        bars = []
        for start in (engine_y0, reference):
            ys = lde.odesolve(fragile, start, TIMES, p, engine="fused", on_failure="nan").ys
            bars.append(torch.autograd.grad(ys.sum(), list(p.values())))
        torch.testing.assert_close(*bars, rtol=1e-12, atol=0)
    assert "non-finite gradient" in caplog.text


# ---- messages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_the_message_says_how_many_why_which_where_and_what_to_try(engine):
    y0, p = problem(GOOD, EXPLODES, LEAVES, EXPLODES)
    with pytest.raises(SolveError) as error:
        lde.odesolve(fragile, y0, TIMES, p, engine=engine)
    text = str(error.value)
    for part in (
        "3 of 4 trajectories failed",
        "step size underflow in 2",
        "non-finite state in 1",
        "row [1]",
        "t=0.3",
        "0..1",
        "y0 [2.5]",
        "a: 1, b: 0.1, c: 0",
        'on_failure="nan"',
        "Try:",
    ):
        assert part in text, (part, text)


def test_the_message_of_one_row_and_of_max_steps():
    with pytest.raises(SolveError) as error:
        solve(y0=STARTS[0], p=RATES[0], rtol=1e-8, max_steps=4)
    text = str(error.value)
    assert "1 of 1" in text and "max_steps reached in 1" in text and "raise max_steps" in text
    assert "p: [1.5, 1, 3, 1]" in text


# ---- processes and threads -------------------------------------------------------------------------------------


def _solve_and_report(queue):
    p = RATES.repeat(30, 1).requires_grad_()
    ys = solve(y0=STARTS.repeat(30, 1), p=p).ys
    ys.sum().backward()
    queue.put((ys.detach().sum().item(), p.grad.sum().item()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_solves_after_its_parent_did():
    p = RATES.repeat(30, 1).requires_grad_()
    ys = solve(y0=STARTS.repeat(30, 1), p=p).ys  # enough rows for the thread pool
    ys.sum().backward()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_solve_and_report, args=(queue,)) for _ in range(2)]
    for child in children:
        child.start()
    answers = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert answers == [(ys.detach().sum().item(), p.grad.sum().item())] * 2
    assert torch.equal(solve(y0=STARTS.repeat(30, 1), p=RATES.repeat(30, 1)).ys, ys)  # the parent goes on


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_between_solve_and_gradient():
    p = RATES.clone().requires_grad_()
    ys = solve(p=p).ys
    expected = torch.autograd.grad(ys.sum(), p, retain_graph=True)[0]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if torch.equal(torch.autograd.grad(ys.sum(), p)[0], expected) else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    os.close(reader), os.close(writer)
    assert os.waitstatus_to_exitcode(status) == 0


def test_concurrent_solves_from_threads():
    rates = [RATES.repeat(8, 1) * scale for scale in torch.linspace(0.7, 1.3, 24, dtype=DOUBLE)]

    def one(p):
        p = p.clone().requires_grad_()
        ys = solve(y0=STARTS.repeat(8, 1), p=p).ys
        return ys.detach(), torch.autograd.grad(ys.square().sum(), p)[0]

    expected = [one(p) for p in rates]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(one, rates))
    for a, b in zip(expected, together, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_concurrent_first_solves_of_a_new_field():
    """Threads that trace and compile the same field, and two methods of it, at the same time."""

    def field(t, y, p):
        return prey_predator(t, y, p) * torch.exp(-0.01 * t)

    def one(method):
        p = RATES.clone().requires_grad_()
        ys = solve(f=field, p=p, method=method, step_size=0.1).ys
        return torch.autograd.grad(ys.sum(), p)[0]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(one, ["euler", "midpoint", "euler", "midpoint"]))
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    for method, result in zip(("euler", "midpoint"), results, strict=False):
        p = RATES.clone().requires_grad_()
        plain = torch.autograd.grad(solve("torch", f=field, p=p, method=method, step_size=0.1).ys.sum(), p)[0]
        torch.testing.assert_close(result, plain, rtol=1e-10, atol=1e-11)
