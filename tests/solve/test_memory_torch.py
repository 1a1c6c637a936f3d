# SPDX-License-Identifier: Apache-2.0
"""``memory_budget=`` on the torch engine: steps differentiated part by part."""

import warnings

import pytest
import torch
from ode_fields import DOUBLE, RATES, STARTS, prey_predator

import pyro_latentde as lde
from pyro_latentde.errors import SolveError
from pyro_latentde.solve import memory
from pyro_latentde.solve.torch_engine import replay, replay_parts
from pyro_latentde.solve.torch_engine.replay_parts import Parts

TIMES = torch.linspace(0, 3, 7, dtype=DOUBLE)
WEIGHTS = torch.linspace(-1, 1, 3 * 7 * 2, dtype=DOUBLE).reshape(3, 7, 2)


def gradient(budget, p=RATES, rows=3, **settings):
    inputs = [x.clone().requires_grad_() for x in (STARTS[:rows], p, TIMES)]
    y0, p, times = inputs
    ys = lde.odesolve(prey_predator, y0, times, p, engine="torch", memory_budget=budget, **settings).ys
    return torch.autograd.grad((ys * WEIGHTS[:rows]).sum(), inputs)


def cut_into(monkeypatch, parts):
    """From now on every derivative goes through these parts; what was cut is noted."""
    seen = []

    def given(run, steps, *rest):
        seen.append(steps)
        return parts

    monkeypatch.setattr(replay, "parts_needed", given)
    return seen


@pytest.mark.parametrize(
    "settings",
    [{"rtol": 1e-5}, {"step_size": 0.2, "method": "rk4"}, {"rtol": 1e-2, "method": "kvaerno3"}, {"method": "dopri8"}],
    ids=lambda s: s.get("method", "tsit5"),
)
@pytest.mark.parametrize("parts", [Parts(4, 100), Parts(1, 3)], ids=["one level", "many levels"])
def test_parts_have_the_gradient_of_the_whole(monkeypatch, settings, parts):
    plain = gradient(None, **settings)
    seen = cut_into(monkeypatch, parts)
    again = gradient(None, **settings)
    assert seen and seen[0] > 8
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_parts_of_a_range():
    assert Parts(3, 10).of(0, 8) == [(0, 3), (3, 6), (6, 8)]
    assert Parts(1, 3).of(0, 10) == [(0, 9), (9, 10)]
    assert Parts(1, 3).of(2, 9) == [(2, 5), (5, 8), (8, 9)]


def test_what_autograd_keeps_is_bounded(monkeypatch):
    """Tensors that are kept at the same time, counted by hooks: those of one part, and the states between parts."""
    counts = {}
    for parts in (None, Parts(5, 100)):
        cut_into(monkeypatch, parts)
        alive, most = [0], [0]

        class Held:
            def __init__(self, x, alive=alive, most=most):
                self.x, self.alive = x, alive
                alive[0] += 1
                most[0] = max(most[0], alive[0])

            def __del__(self):
                self.alive[0] -= 1

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.x):
            gradient(None, step_size=0.03)
        counts[parts] = most[0]
    assert counts[Parts(5, 100)] < 0.15 * counts[None]


@pytest.mark.parametrize("transform", [torch.func.hessian, torch.func.jacfwd], ids=["hessian", "jacfwd"])
def test_other_derivatives(monkeypatch, transform):
    def f(p):
        ys = lde.odesolve(prey_predator, STARTS[0], TIMES[:2], p, engine="torch", step_size=0.1).ys
        return ys[-1].square().sum()

    plain = transform(f)(RATES[0])
    seen = cut_into(monkeypatch, Parts(2, 2))
    torch.testing.assert_close(transform(f)(RATES[0]), plain, rtol=1e-12, atol=1e-12)
    assert seen


def test_mapped_gradients(monkeypatch):
    def f(p, y0):
        return lde.odesolve(prey_predator, y0, TIMES, p, engine="torch", step_size=0.1).ys.square().sum()

    plain = torch.func.vmap(torch.func.grad(f))(RATES, STARTS)
    cut_into(monkeypatch, Parts(5, 10))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(f))(RATES, STARTS), plain, rtol=1e-13, atol=1e-13)


def test_a_budget_cuts_and_says_when_it_is_too_small(monkeypatch):
    found = []
    needed = replay.parts_needed
    monkeypatch.setattr(replay, "parts_needed", lambda *args: found.append(needed(*args)) or found[-1])
    plain = gradient(None, step_size=0.05)
    for budget in ("100 MB", "2 MB"):
        for a, b in zip(plain, gradient(budget, step_size=0.05), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    assert found[:2] == [None, None] and found[2].steps < 20
    with pytest.raises(
        SolveError, match=r"too small for 3 rows on the torch engine.*expected at least (\S+ KB)"
    ) as error:
        gradient(1000, step_size=0.05)
    enough = str(error.value).split("at least ")[1].split(". Give")[0]
    torch.testing.assert_close(gradient(enough, step_size=0.05)[1], plain[1], rtol=1e-13, atol=1e-13)


def test_a_derivative_that_would_not_fit_warns_once(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 2_000_000)
    monkeypatch.setattr(memory, "_told", set())
    monkeypatch.setattr(memory, "SMALL", 1000)
    monkeypatch.setattr(replay_parts, "SMALL", 1000)
    text = r"backprop through 60 steps x 3 rows needs ~\S+ MB; using \d+ checkpoints \(\S+ [KM]B, \+1 forward\)"
    with pytest.warns(UserWarning, match=text):
        gradient(None, step_size=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient(None, step_size=0.05)
