# SPDX-License-Identifier: Apache-2.0
"""Schedules against numbers worked out by hand; they can be compared, pickled and printed."""

import pickle

import pytest

from pyro_latentde.infer import schedules


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (schedules.linear(2.0, 0.0, 4), {0: 2.0, 1: 1.5, 4: 0.0, 9: 0.0}),
        (schedules.cosine(1.0, 0.0, 4), {0: 1.0, 1: 0.8535533905932737, 2: 0.5, 4: 0.0, 9: 0.0}),
        (schedules.exponential(1.0, 0.01, 4), {0: 1.0, 1: 0.31622776601683794, 2: 0.1, 4: 0.01, 9: 0.01}),
        (schedules.warmup(4, 2.0), {0: 0.5, 1: 1.0, 3: 2.0, 9: 2.0}),
        (schedules.warmup(2, schedules.linear(4.0, 0.0, 4)), {0: 2.0, 1: 3.0, 2: 2.0}),
        # four cycles of 25 steps; each climbs in its first half
        (schedules.cyclic(4, 0.5, 100), {0: 0.0, 5: 0.4, 12.5: 1.0, 20: 1.0, 25: 0.0, 30: 0.4, 100: 1.0, 999: 1.0}),
        (schedules.progressive(10, 50, 100), {0: 10, 25: 20, 100: 50, 999: 50}),
    ],
    ids=repr,
)
def test_values(schedule, values):
    assert {step: schedule(step) for step in values} == pytest.approx(values, abs=1e-12)
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule and again(3) == schedule(3)
    assert eval(repr(schedule), vars(schedules)) == schedule


def test_windows_are_whole_numbers():
    lengths = [schedules.progressive(7, 23, 50)(step) for step in range(60)]
    assert all(isinstance(length, int) for length in lengths) and lengths == sorted(lengths)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.linear(0, 1, 0), "linear: expected a positive number of steps"),
        (lambda: schedules.cyclic(2, 0.0, 10), r"ratio.*\(0, 1\]"),
        (lambda: schedules.exponential(1.0, 0.0, 10), "positive start and stop"),
        (lambda: schedules.progressive(0, 10, 10), "at least one time"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
