# SPDX-License-Identifier: Apache-2.0
"""Step sizes against their published formulas, and which steps become draws."""

import math

import numpy as np
import pytest

from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer import schedules
from pyro_latentde.infer.sgmcmc_schedules import Cyclical, Polynomial, plan_steps


def test_polynomial_is_the_formula_of_welling_and_teh():
    rule = Polynomial(0.3, 7.0, 0.55)
    assert [rule(t) for t in (0, 1, 100)] == pytest.approx([0.3 / (7.0 + t) ** 0.55 for t in (0, 1, 100)])


def test_cyclical_is_the_formula_of_zhang():
    rule, length = Cyclical(0.3, 100, cycles=3), math.ceil(100 / 3)
    # theirs counts steps from k = 1
    theirs = [0.15 * (math.cos(math.pi * ((k - 1) % length) / length) + 1) for k in range(1, 101)]
    assert [rule(t) for t in range(100)] == pytest.approx(theirs)
    assert min(theirs) > 0 and [rule.weight(t) for t in (0, 16, 17, 33, 34)] == [0, 0, 1, 1, 0]


@pytest.mark.parametrize("thinning", [1, 3])
def test_constant_steps_keep_every_so_many(thinning):
    plan = plan_steps(0.1, "constant", 10, 1000, thinning)
    assert (plan.step_sizes == 0.1).all() and len(plan.step_sizes) == 10 + 1000 * thinning
    assert (plan.kept == 10 + thinning * np.arange(1, 1001) - 1).all()


def test_named_polynomial_falls_to_a_tenth():
    sizes = plan_steps(0.2, "polynomial", 100, 900).step_sizes
    assert sizes[0] == pytest.approx(0.2) and sizes[-1] == pytest.approx(0.02, rel=1e-3)
    assert (np.diff(sizes) < 0).all()


def test_draws_of_falling_steps_are_the_weighted_average():
    plan = plan_steps(0.2, "polynomial", 50, 400, thinning=20)
    sizes = plan.step_sizes[50:]
    path = np.sin(np.arange(len(sizes)) / 1500.0)  # any slow function of the step
    assert path[plan.kept - 50].mean() == pytest.approx((sizes * path).sum() / sizes.sum(), abs=2e-3)
    assert abs(path.mean() - (sizes * path).sum() / sizes.sum()) > 0.05
    assert plan.kept[0] >= 50 and plan.kept[-1] == len(plan.step_sizes) - 1 and (np.diff(plan.kept) >= 0).all()


def test_draws_of_cycles_come_from_their_sampling_part_evenly():
    plan = plan_steps(0.2, "cyclical", 0, 200, thinning=4)
    position = plan.kept % 200 / 200
    assert len(plan.kept) == 200 and position.min() >= 0.5
    assert (np.bincount(plan.kept // 200) == 50).all() and set(np.diff(plan.kept)) == {2, 102}


def test_any_function_of_the_step():
    rule = schedules.exponential(0.1, 0.001, 100)
    plan = plan_steps(None, rule, 0, 100)
    assert plan.step_sizes == pytest.approx([rule(t) for t in range(100)])


@pytest.mark.parametrize(
    ("step_size", "schedule", "message"),
    [
        (None, "constant", "the schedule 'constant' needs one"),
        (0.0, "constant", "step_size must be a positive number, got 0.0"),
        (-0.1, "polynomial", "step_size must be a positive number, got -0.1"),
        (math.nan, "cyclical", "step_size must be a positive number, got nan"),
        (True, "constant", "step_size must be a positive number"),
        (0.1, "cosine", r"expected one of \('constant', 'polynomial', 'cyclical'\) or a function.* got 'cosine'"),
        (0.1, lambda t: 0.1, "leave step_size out"),
        (None, lambda t: 0.1 - 0.01 * t, "positive and finite, got .* at step 10 of 30"),
        (None, Cyclical(0.1, 10_000, 1), "all exploration"),
    ],
)
def test_bad_schedules_are_told(step_size, schedule, message):
    with pytest.raises(LatentDEError, match=message):
        plan_steps(step_size, schedule, 10, 20)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Polynomial(0.0),
        lambda: Polynomial(0.1, gamma=-1.0),
        lambda: Cyclical(0.1, 0),
        lambda: Cyclical(0.1, 9, 0),
    ],
)
def test_bad_rules_are_told(make):
    with pytest.raises(LatentDEError, match="must be a positive number"):
        make()
    with pytest.raises(LatentDEError, match=r"exploration is a part of each cycle in \[0, 1\), got 1.0"):
        Cyclical(0.1, 9, exploration=1.0)
