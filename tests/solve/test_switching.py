# SPDX-License-Identifier: Apache-2.0
"""``method="auto"``: never much dearer than the better of its two methods, and the same decisions in both engines."""

import numpy as np
import pytest
import torch
from stiff_problems import PROBLEMS, VAN_DER_POL, Problem

from pyro_latentde import odesolve


def tensor(x):
    return torch.as_tensor(x, dtype=torch.float64)


def lorenz(t, y, p):
    return [p[0] * (y[1] - y[0]), y[0] * (p[1] - y[2]) - y[1], y[0] * y[1] - p[2] * y[2]]


def prey_and_predator(t, y, p):
    return [y[0] * (p[0] - p[1] * y[1]), y[1] * (p[1] * y[0] - p[2])]


def drawn_to_cosine(t, y, p):
    """Prothero and Robinson: y = cos t whatever the decay rate."""
    return [-p * (y[0] - torch.cos(t)) - torch.sin(t)]


STIFF = {
    "rober": PROBLEMS["rober"],
    "hires": PROBLEMS["hires"],
    "orego": PROBLEMS["orego"],
    "van der pol, 10": VAN_DER_POL._replace(p=10.0, times=np.linspace(0, 40, 3)),
    "prothero": Problem(drawn_to_cosine, 1e4, [1.0], np.linspace(0, 20, 3)),
}
SMOOTH = {
    "lorenz": Problem(lorenz, [10.0, 28.0, 8 / 3], [1.0, 1.0, 1.0], np.linspace(0, 15, 3)),
    "prey and predator": Problem(prey_and_predator, [1.5, 1.0, 3.0], [1.0, 1.0], np.linspace(0, 30, 3)),
    "van der pol, 1": VAN_DER_POL._replace(p=1.0, times=np.linspace(0, 20, 3)),
}


def solve(problem, method, rtol, engine="fused"):
    return odesolve(
        problem.f, tensor(problem.y0), tensor(problem.times), tensor(problem.p), method=method, rtol=rtol,
        atol=1e-4 * rtol, max_steps=50_000, engine=engine, on_failure="nan",
    )  # fmt: skip


def evaluations(*arguments):
    solution = solve(*arguments)
    return int(solution.stats["n_evals"]) if int(solution.status) == 0 else np.inf


@pytest.mark.parametrize("rtol", [1e-5, 1e-9, 1e-11])
@pytest.mark.parametrize("name", STIFF)
def test_auto_costs_little_more_than_the_better_method(name, rtol):
    best = min(evaluations(STIFF[name], method, rtol) for method in ("tsit5", "kvaerno5"))
    assert evaluations(STIFF[name], "auto", rtol) < 1.35 * best


@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("name", SMOOTH)
def test_auto_stays_explicit_where_nothing_is_stiff(name, rtol):
    found = solve(SMOOTH[name], "auto", rtol)
    assert not found.implicit.any()
    assert int(found.stats["n_evals"]) <= 1.03 * evaluations(SMOOTH[name], "tsit5", rtol)


def test_a_leap_that_fails_leaves_the_solution_as_it_was():
    """Lorenz at 1e-3: steps times rates are large enough to try, and the states are those of tsit5 bit for bit."""
    found, plain = (solve(SMOOTH["lorenz"], method, 1e-3) for method in ("auto", "tsit5"))
    assert int(found.stats["n_rejected"]) > int(plain.stats["n_rejected"])
    assert int(found.stats["n_accepted"]) == int(plain.stats["n_accepted"])
    torch.testing.assert_close(found.ys, plain.ys, rtol=1e-9, atol=0)


def test_both_engines_decide_alike():
    problem = STIFF["van der pol, 10"]
    fused, torch_ = (solve(problem, "auto", 1e-5, engine) for engine in ("fused", "torch"))
    changes = fused.implicit[1:] != fused.implicit[:-1]
    assert int(changes.sum()) >= 4
    assert torch.equal(fused.implicit, torch_.implicit)
    torch.testing.assert_close(fused.ys, torch_.ys, rtol=1e-8, atol=0)
