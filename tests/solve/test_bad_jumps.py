# SPDX-License-Identifier: Apache-2.0
"""Doses, delays, events and steady states as users get them wrong: each message says what, where, and what to try."""

import pytest
import torch
from ode_fields import tensor

import pyro_latentde as lde
from pyro_latentde.errors import DataError, GradientPathError, ShapeError, SolveError

TIMES, ONE, K = tensor(0.5, 2.0, 6.0), tensor(1.0), torch.tensor(0.5, dtype=torch.float64)


def decay(t, y, k):
    return -k * y


def lagging(t, y, lagged, k):
    return -k * lagged[0]


def driven(t, y, p):
    return p["u"](t) - y


def two(t, y, lagged, k):
    return torch.stack([-k * lagged[0][0], y[0]])


def ode(doses=None, **settings):
    return lde.odesolve(decay, ONE, TIMES, K, t0=0.0, doses=doses, **settings)


def dde(history=ONE, lags=1.0, f=lagging, **settings):
    return lde.ddesolve(f, history, lags, TIMES, K, t0=0.0, **settings)


def event(**settings):
    return ode(events=lde.Event(lambda t, y, p: y[0] - 0.5, terminal=True), **settings)


INPUT = {"u": lde.Input([0.0, 1.0], [1.0, 2.0], "linear")}
WRONG = {
    "negative amount": (
        lambda: lde.Dose([[0.0, 1.0], [0.0, 2.0]], [[1.0, 2.0], [1.0, -2.0]], 0),
        DataError,
        ["amounts[1, 1] = -2 at t = 2", "expected a finite number that is not negative", "NaN as time"],
    ),
    "dose before t0": (
        lambda: ode(lde.Dose([-1.0, 1.0], 1.0, 0)),
        DataError,
        ["a dose at t = -1 (dose [0])", "before the start of the solve, t0 = 0", "Give t0= a time before the first"],
    ),
    "state that is not there": (
        lambda: ode(lde.Dose([1.0], 1.0, 3)),
        DataError,
        ["a Dose into state 3", "numbered 0 to 0", "give one of these numbers, or the name"],
    ),
    "state without a name": (
        lambda: ode(lde.Dose([1.0], 1.0, "blood")),
        DataError,
        ["a Dose into state 'blood'", "no names", "give the number of the state, or names"],
    ),
    "state misspelt at a site": (
        lambda: lde.ode("z", decay, ONE, TIMES, K, states=("blood",), doses=lde.Dose([1.0], 1.0, "blod")),
        DataError,
        ["site 'z'", "the state of a Dose: expected one of blood; got 'blod'", "Did you mean 'blood'?"],
    ),
    "lag of 0": (lambda: dde(lags=0.0), DataError, ["lag 0 is 0, in units of time", "use lde.ode or lde.odesolve"]),
    "negative lag": (
        lambda: dde(torch.ones(2, 1).double(), tensor([1.0], [-2.0])),
        DataError,
        ["lag 0 of row [1] is -2", "lags are positive and finite", 'on_failure="nan"'],
    ),
    "negative lag at a site": (
        lambda: lde.dde("z", lagging, ONE, -1.0, TIMES, K, t0=0.0),
        DataError,
        ["site 'z': lag 0 is -1", "lags are positive and finite"],
    ),
    "history without a dimension": (
        lambda: dde(K),
        ShapeError,
        ["history has no dimension", "expected (*batch, D)", "history.reshape(1)", "history(t, p)"],
    ),
    "history as a list": (
        lambda: dde([1.0]),
        ShapeError,
        ["history is of type list", "expected a tensor (*batch, D)", "history(t, p)"],
    ),
    "history of another size": (
        lambda: dde(torch.ones(3).double(), f=two),
        ShapeError,
        ["returned shape (2,), expected (3,)", "The history has 3 state(s)"],
    ),
    "history of several rows": (
        lambda: dde(lambda t, k: torch.ones(2, 1).double()),
        ShapeError,
        ["history(t, p) returned shape (2, 1) for one row", "expected the state at t, (D,)", "parameters p"],
    ),
    "adjoint with events": (
        lambda: event(gradient="adjoint"),
        GradientPathError,
        ['gradient="adjoint"', "does not know events", 'Use gradient="discrete"'],
    ),
    "adjoint with doses": (
        lambda: ode(lde.Dose([1.0], 1.0, 0), gradient="adjoint"),
        GradientPathError,
        ["no doses", 'expected gradient="discrete" or "forward"', "got 'adjoint'"],
    ),
    "adjoint with jumps": (
        lambda: ode(jumps=[1.0], gradient="adjoint"),
        GradientPathError,
        ["no doses, jumps", 'expected gradient="discrete" or "forward"', "got 'adjoint'"],
    ),
    "adjoint with an input": (
        lambda: lde.odesolve(driven, ONE, TIMES, INPUT, t0=0.0, gradient="adjoint"),
        GradientPathError,
        ["inputs with knots", 'expected gradient="discrete" or "forward"', "got 'adjoint'"],
    ),
    "adjoint with delays": (
        lambda: dde(gradient="adjoint"),
        GradientPathError,
        ['gradient="adjoint"', "only the discrete gradient", "leave gradient out"],
    ),
    "Newton's matrix is singular": (
        lambda: lde.odesolve(lambda t, y, k: k * y, ONE, tensor(0.0, 10.0), K / 0.13, method="kvaerno5", step_size=1.0),
        SolveError,
        ["Newton's method did not converge in 1", "after t=0 (of 0..10), y0 [1]", "take smaller steps"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_message_says_what_where_and_what_to_try(name):
    call, kind, parts = WRONG[name]
    with pytest.raises(kind) as told:
        call()
    text = str(told.value)
    assert [part for part in parts if part not in text] == [], text
