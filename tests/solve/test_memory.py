# SPDX-License-Identifier: Apache-2.0
"""``memory_budget=``: less memory, the same gradient; and what is told when a plain backward pass would not fit."""

import tracemalloc
import warnings
from math import comb
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from ode_fields import DOUBLE, RATES, STARTS, prey_predator, tensor

import pyro_latentde as lde
from pyro_latentde.errors import SolveError
from pyro_latentde.solve import memory
from pyro_latentde.solve.fused import segments
from pyro_latentde.solve.memory import Allowance, budget_bytes, free_memory, readable
from pyro_latentde.solve.step_store import find_steps

TIMES = torch.linspace(0, 20, 7, dtype=DOUBLE)
SHARED = RATES[0]
WEIGHTS = torch.linspace(-1, 1, 40 * 7 * 2, dtype=DOUBLE).reshape(40, 7, 2)


def starts(rows):
    noise = torch.rand(rows, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    return 0.5 + noise


def gradient(rows, budget, y0=None, p=SHARED, times=TIMES, **settings):
    """ys, its gradient with respect to y0, p and times, and the steps that the solve kept."""
    y0 = starts(rows) if y0 is None else y0
    inputs = [x.clone().requires_grad_() for x in (y0, p, times)]
    solution = lde.odesolve(prey_predator, *inputs[::2], inputs[1], memory_budget=budget, **settings)
    steps = find_steps(solution._report)
    weights = WEIGHTS[:rows, : times.shape[-1]]
    return [solution.ys.detach(), *torch.autograd.grad((solution.ys * weights).sum(), inputs)], steps


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


# ---- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("2 GB", 2 * 10**9), ("1.5GiB", 3 * 2**29), ("500 mb", 5 * 10**8), (4096, 4096), (None, None)]
)
def test_budgets_as_they_are_written(text, size):
    assert budget_bytes(text) == size


@pytest.mark.parametrize("bad", ["2 gigs", "GB", "1.2.3 MB", 0, -1, 1.5, True, "0 B"])
def test_budgets_that_cannot_be(bad):
    with pytest.raises(SolveError, match="memory_budget = .*expected a number of bytes"):
        lde.odesolve(prey_predator, STARTS, TIMES, RATES, memory_budget=bad)


def test_sizes_are_readable():
    assert [readable(x) for x in (999, 1000, 1.44e9, 13_700_000_000)] == ["999 B", "1.0 KB", "1.4 GB", "14 GB"]


def test_free_memory_is_that_of_this_machine():
    total = 1024 * int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0])
    assert 0 < free_memory() <= total
    assert free_memory("meta") is None


# ---- the same gradient ------------------------------------------------------------------------------------------

METHODS = {
    "tsit5": {"rtol": 1e-11, "atol": 1e-12},
    "kvaerno3": {"rtol": 1e-5},
    "auto": {"rtol": 1e-8},
    "rk4": {"step_size": 0.01},
}
FINE = METHODS["tsit5"]


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_are_solved_again_have_the_same_gradient_bit_for_bit(method):
    settings = {"method": method, **METHODS[method]}
    plain, steps = gradient(40, None, **settings)
    assert steps.complete
    longest = int(max(steps.spans[1::2] - steps.spans[::2])) * 8 * steps.width
    for budget in (steps.nbytes // 2, 5 * longest):
        again, kept = gradient(40, budget, **settings)
        assert not kept.complete and kept.nbytes <= budget // 2
        assert_equal(plain, again)
        assert np.array_equal(kept.plan(), steps.plan())


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_are_cut_have_the_same_gradient(method):
    settings = {"method": method, **METHODS[method]}
    plain, steps = gradient(3, None, **settings)
    for budget in (100_000, 45_000):
        cut, kept = gradient(3, budget, **settings)
        assert all(kept.again.is_long(r) for r in range(3)) and kept.nbytes <= budget // 2
        for a, b in zip(plain, cut, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13 * float(a.abs().max()))


def test_a_long_solve_stays_within_its_budget():
    """tracemalloc sees every array of NumPy: 30,000 steps of 40 bytes in 200 KB."""
    times = tensor(0.0, 400.0)
    settings = {"rtol": 1e-12, "atol": 1e-12, "max_steps": 100_000, "times": times}
    plain, steps = gradient(2, None, **settings)
    assert steps.nbytes > 2_000_000
    gradient(2, 200_000, **settings)
    tracemalloc.start()
    cut, _ = gradient(2, 200_000, **settings)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 250_000
    for a, b in zip(plain, cut, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13 * float(a.abs().max()))


def test_failed_rows_and_neighbours():
    y0 = torch.cat([starts(3), tensor([torch.nan, 1.0]), starts(1)])
    plain, _ = gradient(5, None, y0=y0, on_failure="nan", rtol=1e-8)
    for budget in (100_000, 50_000):
        again, steps = gradient(5, budget, y0=y0, on_failure="nan", rtol=1e-8)
        assert steps.status.tolist() == [0, 0, 0, 3, 0]
        for a, b in zip(plain, again, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13, equal_nan=True)
        assert (again[1][3] == 0).all()


def test_symplectic_steps():
    def gradient(budget):
        inputs = [tensor(1.0, 0.2).expand(4, 2).clone().requires_grad_(), tensor(1.0, 2.0, 3.0, 4.0).requires_grad_()]
        settings = {"method": "leapfrog", "step_size": 0.01, "memory_budget": budget}
        ys = lde.odesolve(lambda t, y, p: torch.stack([y[1], -p * torch.sin(y[0])]), inputs[0], TIMES, inputs[1],
                          **settings).ys  # fmt: skip
        return torch.autograd.grad(ys.square().sum(), inputs)

    for budget in ("300 KB", "30 KB"):
        for a, b in zip(gradient(None), gradient(budget), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-11)


def test_networks_whose_rows_are_solved_side_by_side():
    net = torch.nn.Sequential(torch.nn.Linear(4, 20), torch.nn.ELU(), torch.nn.Linear(20, 4)).double()
    y0 = torch.rand(150, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))

    def gradient(budget):
        solution = lde.odesolve(lambda t, y: net(y), y0, TIMES[:2], rtol=1e-9, memory_budget=budget, engine="fused")
        return torch.autograd.grad(solution.ys.square().sum(), tuple(net.parameters())), solution

    plain, solution = gradient(None)
    steps = find_steps(solution._report)
    longest = int((steps.spans[1::2] - steps.spans[::2]).max()) * 8 * steps.width
    for budget in (steps.nbytes // 2, 40 * longest):
        again, solution = gradient(budget)
        assert not find_steps(solution._report).complete
        for a, b in zip(plain, again, strict=True):  # lanes add up what their rows give, and have other rows now
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * float(a.abs().max()))
    with pytest.raises(SolveError, match=r"rows of networks cannot be cut.*Expected at least \S+ KB"):
        gradient(longest)


def test_times_on_both_sides_and_backwards():
    def both(budget):
        p = RATES.clone().requires_grad_()
        times = torch.linspace(-3, 3, 7, dtype=DOUBLE)
        ys = lde.odesolve(prey_predator, STARTS, times, p, t0=0.0, memory_budget=budget, **FINE).ys
        return ys.detach(), torch.autograd.grad(ys.square().sum(), p)[0]

    assert_equal(both(None), both(20_000))


def test_given_steps():
    first = lde.odesolve(prey_predator, STARTS, TIMES, RATES, **FINE)
    plain, _ = gradient(3, None, y0=STARTS, p=RATES, replay=first)
    for budget in (150_000, 40_000):
        again, steps = gradient(3, budget, y0=STARTS, p=RATES, replay=first)
        assert not steps.complete
        for a, b in zip(plain, again, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-12)


# ---- transforms -------------------------------------------------------------------------------------------------


def last_state(p, y0, budget):
    return lde.odesolve(prey_predator, y0, TIMES[:3], p, rtol=1e-9, memory_budget=budget).ys[-1].square().sum()


def mapped(transform):
    """The transform with too small a budget for the steps, and without any."""
    return [transform(lambda p, y0: last_state(p, y0, None)), transform(lambda p, y0: last_state(p, y0, 20_000))]


def test_under_transforms():
    moves = torch.ones_like(RATES[0])
    for transform in (
        lambda f: torch.func.vmap(torch.func.grad(f))(RATES, STARTS),
        lambda f: torch.func.jacrev(f)(RATES[1], STARTS[1]),
        lambda f: torch.func.jvp(lambda p: f(p, STARTS[1]), (RATES[1],), (moves,))[1],
        lambda f: torch.func.hessian(f)(RATES[1], STARTS[1]),
    ):
        plain, again = mapped(transform)
        torch.testing.assert_close(plain, again, rtol=1e-13, atol=1e-13)


def test_a_recorded_gradient():
    from torch.fx.experimental.proxy_tensor import make_fx

    graphs = [make_fx(f)(RATES, STARTS) for f in mapped(lambda f: torch.func.vmap(torch.func.grad(f)))]
    plain, again = (graph(1.01 * RATES, STARTS) for graph in graphs)
    assert torch.equal(plain, again)


def test_forward_derivatives_of_rows_that_are_too_long_are_refused():
    with pytest.raises(lde.errors.GradientPathError, match="whole rows.*memory_budget"):
        torch.func.jvp(whole_rows, (RATES[0],), (torch.ones_like(RATES[0]),))


def whole_rows(p):
    return lde.odesolve(prey_predator, STARTS[0], TIMES, p, memory_budget=45_000, **FINE).ys


# ---- checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pieces", "states"), [(1, 3), (4, 3), (5, 3), (10, 3), (35, 4), (100, 3), (500, 5)])
def test_no_order_needs_fewer_forward_solves(monkeypatch, pieces, states):
    """Griewank and Walther: with c states, l segments need r l - binomial(c + r, c + 1) solves without recording."""
    advanced, done = [], []

    def part(start, first, end, free):
        assert free >= 0
        while end - first > 1:
            assert free > 0
            middle = first + segments._first_part(end - first, free)
            advanced.append(middle - first)
            part(middle, middle, end, free - 1)
            end = middle
        done.append(first)

    part(0, 0, pieces, states)
    r = segments.repetitions(pieces, states)
    assert done == list(range(pieces))[::-1]
    assert sum(advanced) == (r * pieces - comb(states + r, states + 1) if r else 0)


def test_a_budget_that_is_too_small_says_what_is_needed():
    with pytest.raises(SolveError, match=r"memory_budget = 2.0 KB is too small.*expected at least (\S+ KB)") as error:
        gradient(2, 2000, rtol=1e-8)
    needed = str(error.value).split("at least ")[1].split(",")[0]
    plain, _ = gradient(2, None, rtol=1e-8)
    cut, _ = gradient(2, needed, rtol=1e-8)
    for a, b in zip(plain, cut, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-12)


# ---- what is told, and where budgets come from -------------------------------------------------------------------


def test_a_solve_that_would_not_fit_warns_once(monkeypatch):
    monkeypatch.setattr(memory, "SMALL", 1000)
    monkeypatch.setattr(memory, "free_memory", lambda device: 120_000)
    monkeypatch.setattr(memory, "_told", set())
    plain, _ = gradient(40, 10**9, rtol=1e-8)
    with pytest.warns(UserWarning, match=r"backprop through \d+ steps x 40 rows needs ~\d+ KB; keeping \d+ rows"):
        again, steps = gradient(40, None, rtol=1e-8)
    assert not steps.complete
    assert_equal(plain, again)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient(40, None, rtol=1e-8)


def test_what_is_free_is_asked_for_only_by_large_solves(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "free_memory", lambda device: asked.append(device) or 10 * memory.SMALL)
    allowance = Allowance(None)
    assert allowance.take(memory.SMALL) and not asked
    assert allowance.take(memory.SMALL) and len(asked) == 1
    assert not allowance.take(4 * memory.SMALL) and len(asked) == 1
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    assert Allowance(None).take(10**15)


def test_budgets_from_outside(monkeypatch):
    kept = []
    monkeypatch.setattr(segments.LongRows, "check", lambda self, again, r: kept.append(again.budget))

    def model():
        return lde.ode("z", prey_predator, STARTS.clone().requires_grad_(), TIMES, RATES, **FINE)

    model()
    assert not kept
    with lde.solver(memory_budget="50 KB"):
        model()
    assert set(kept) == {50_000}
    with pyro.settings.context(latentde_memory_budget="60 KB"):
        model()
    assert set(kept) == {50_000, 60_000}
    with pytest.raises(SolveError, match="memory_budget"), lde.solver(memory_budget="much"):
        pass


def test_a_delay_equation_has_no_budget():
    with pytest.raises(SolveError, match="memory_budget = '1 GB': a delay equation looks back"):
        lde.ddesolve(lambda t, y, lagged: -lagged[0], torch.ones(1), 1.0, torch.linspace(0, 2, 3), memory_budget="1 GB")


@pytest.mark.parametrize("budget", ["1.5 MB", "80 KB"])
def test_jumps_of_the_field(budget):
    """Rows solved again, and rows cut: steps that end at jumps are frozen and thawed like all others."""

    def switched(t, y, p):
        return torch.where(t > p[2], p[1], p[0]) * y + torch.where(t > p[3], 1.0, 0.0)

    def gradient(budget):
        p = tensor(-1.0, -0.3, 1.0, 2.2).expand(20, 4).clone().requires_grad_()
        settings = {"jumps": p[:, 2:], "t0": 0.0, "step_size": 0.002, "memory_budget": budget}
        ys = lde.odesolve(switched, torch.ones(20, 1, dtype=DOUBLE), tensor(0.5, 1.0, 3.0), p, **settings).ys
        return torch.autograd.grad(ys.square().sum(), p)[0]

    torch.testing.assert_close(gradient(budget), gradient(None), rtol=1e-12, atol=1e-12)
