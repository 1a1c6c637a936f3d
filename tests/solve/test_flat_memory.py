# SPDX-License-Identifier: Apache-2.0
"""Ten thousand solves leave no memory behind: no reference cycles, no steps without a gradient, bounded caches."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from ode_fields import DOUBLE, RATES, STARTS, prey_predator, solve

import pyro_latentde as lde
from pyro_latentde.errors import SolveError
from pyro_latentde.solve import engines, step_store
from pyro_latentde.solve.solution import Solution
from pyro_latentde.solve.vector_field import _FIELDS, clear_fields

TIMES = torch.linspace(0, 2, 3, dtype=DOUBLE)
P = RATES.clone().requires_grad_()
BAD = STARTS.clone()
BAD[1] = torch.nan


def again(y0=STARTS, p=P, **settings):
    """A solve with a lambda of its own, as models make one at every call."""
    return lde.odesolve(lambda t, y, p: prey_predator(t, y, p), y0, TIMES, p, rtol=1e-3, **settings)


def with_gradient():
    torch.autograd.grad(again().ys.sum(), P)


def without_gradient():
    again(p=RATES)


def never_asked():
    again()


def failing():
    torch.autograd.grad(again(BAD, on_failure="nan").ys[0].sum(), P)


def raising():
    with pytest.raises(SolveError):
        again(BAD)


def within_a_budget():
    solution = again(STARTS.repeat(4, 1), P.repeat(4, 1), memory_budget=1500)
    assert not step_store.find_steps(solution._report).complete
    torch.autograd.grad(solution.ys.sum(), P)


def interpolated():
    again(p=RATES).at(1.5)


def replayed():
    again(p=RATES, replay=again(p=RATES))


_mapped = torch.func.vmap(torch.func.grad(lambda p, y0: again(y0, p).ys.sum()))


def mapped():
    _mapped(RATES, STARTS)


def on_torch():
    torch.autograd.grad(again(engine="torch", step_size=1.0).ys.sum(), P)


KINDS = (with_gradient, without_gradient, never_asked, failing, raising, within_a_budget, interpolated, replayed)


def resident():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


def test_ten_thousand_solves():
    def solves(count):
        for i in range(count):
            KINDS[i % len(KINDS)]()
            if i % 100 == 0:
                mapped()
        gc.collect()
        return resident(), len(gc.get_objects()), len(step_store._store), step_store._used

    memory, objects, stored, used = solves(1000)
    after, objects_after, stored_after, used_after = solves(9000)
    assert (stored_after, used_after) == (stored, used)
    assert objects_after - objects < 200
    assert after - memory < 8_000_000


@pytest.mark.parametrize("kind", [*KINDS, mapped, on_torch], ids=lambda kind: kind.__name__)
def test_nothing_of_ours_waits_for_the_garbage_collector(kind):
    """PyTorch's own functions leave cycles; none of ours may, since tensors would hang on them."""
    for _ in range(3):
        kind()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        kind()
        gc.collect()
        kept = [x for x in gc.garbage if isinstance(x, torch.Tensor) or "pyro_latentde" in _where(x)]
        assert [_where(x) for x in kept] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def _where(x):
    return f"{getattr(x, '__module__', None) or type(x).__module__}.{type(x).__qualname__}"


@pytest.mark.parametrize("engine", ["fused", "torch"])
def test_solutions_die_at_once(engine):
    gc.disable()
    try:
        solution = solve(engine, p=P, rtol=1e-3)
        found = [weakref.ref(solution), weakref.ref(solution.ys)]
        assert isinstance(solution, Solution)
        del solution
        assert [one() for one in found] == [None, None]
    finally:
        gc.enable()


def test_steps_of_mapped_solves_are_bounded():
    before, stored = len(step_store._store), []  # what tests before this one left, whose gradient nobody took
    for _ in range(30):
        mapped()
        stored.append(len(step_store._store))
    assert max(stored) <= before + step_store._ALWAYS + 2
    for _ in range(300):
        torch.func.vmap(lambda p, y0: again(y0, p).ys)(RATES, STARTS)  # whose gradient nobody takes
    assert len(step_store._store) <= step_store._FREE + 1
    plain = again()
    expected = torch.autograd.grad(plain.ys.square().sum(), P)[0]
    found = torch.func.grad(lambda p: again(p=p).ys.square().sum())(RATES)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_a_gradient_whose_steps_were_forgotten_under_a_transform():
    def f(p):
        first = again(p=p).ys
        for _ in range(step_store._FREE + 5):
            again(p=p)
        return first.square().sum()

    expected = torch.func.grad(lambda p: again(p=p).ys.square().sum())(RATES)
    assert torch.equal(torch.func.grad(f)(RATES), expected)


def test_settings_of_a_field_are_bounded():
    clear_fields()
    for i in range(engines.MANY + 50):
        lde.odesolve(prey_predator, STARTS, TIMES, RATES, rtol=1e-3 + 1e-6 * i)
    (info,) = _FIELDS.values()
    assert len(info.kernels) < engines.MANY + 5
