# SPDX-License-Identifier: Apache-2.0
"""What a solution says of itself: events, and memory kept for the gradient."""

import pytest
import torch
from ode_fields import DOUBLE, ENGINES, RATES, STARTS, prey_predator, solve, tensor

import pyro_latentde as lde
from pyro_latentde.solve import explain
from pyro_latentde.solve.memory import readable
from pyro_latentde.solve.step_store import steps_kept

ENDS = tensor(0.0, 4.0)
STEP = 8 * (2 + 2)  # bytes of the record of a step: time, size and two states


def kept(**settings):
    p = RATES.clone().requires_grad_()
    return lde.odesolve(prey_predator, STARTS, ENDS, p, method="midpoint", step_size=0.01, engine="fused", **settings)


def line(solution, word):
    return [x for x in str(solution).splitlines() if x.startswith(word)]


def test_memory_is_told_where_a_budget_was_given():
    solution = kept(memory_budget="1 MB")
    needed, size = STEP * int(solution.stats["n_accepted"].sum()), steps_kept(solution._report).nbytes
    assert needed <= size < 2 * needed
    assert line(solution, "Memory") == [
        f"Memory: {readable(size)} of steps kept for the gradient, of a budget of 1.0 MB."
    ]
    assert solution.memory_budget == 1_000_000


def test_rows_that_are_solved_again_are_told():
    solution = kept(memory_budget=20_000)
    (told,) = line(solution, "Memory")
    assert "of a budget of 20 KB; 3 of 3 row(s) kept nothing and are solved again in the backward pass." in told


def test_memory_is_told_where_it_is_much(monkeypatch):
    assert line(kept(), "Memory") == []
    monkeypatch.setattr(explain, "MUCH", 10_000)
    (told,) = line(kept(), "Memory")
    assert told.endswith("KB of steps kept for the gradient.")
    assert line(solve(method="midpoint", step_size=0.01), "Memory") == []  # nobody asks for a gradient


def test_telling_changes_nothing():
    """The gradient after it is the one without it, and the steps were not lost on the way."""
    gradients = []
    for told in (False, True):
        p = RATES.clone().requires_grad_()
        solution = solve(times=ENDS, p=p, memory_budget="1 MB")
        assert not told or len(line(solution, "Memory")) == 1
        gradients.append(torch.autograd.grad(solution.ys.sum(), p)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("engine", ENGINES)
def test_events_are_counted_and_those_that_never_fire_are_told(engine):
    """y = y0 exp(-t) passes 1 once, if it begins above."""
    event = lde.Event(lambda t, y: y[0] - 1.0, terminal=False, direction=-1, max_events=3)
    y0 = tensor([2.0], [0.5], [3.0])
    solution = lde.odesolve(lambda t, y: -y, y0, tensor(0.0, 5.0), events=event, engine=engine)
    assert line(solution, "Events") == ["Events: 0 to 1 of a row, none in 1 row(s): their times are NaN."]
    assert solution.events.times[1].isnan().all() and solution.events.count.tolist() == [1, 0, 1]
    assert solution.events.times[0, 0] == pytest.approx(float(torch.tensor(2.0, dtype=DOUBLE).log()), abs=1e-6)
