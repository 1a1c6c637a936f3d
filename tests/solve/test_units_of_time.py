# SPDX-License-Identifier: Apache-2.0
"""The unit of time makes no difference: the same steps, scaled; and clocks that began long ago."""

import pytest
import torch
from ode_fields import DOUBLE, ENGINES, scipy_solution, tensor

import pyro_latentde as lde

UNITS = (1e6, 1e-9)
PROBLEMS = {
    "tsit5": ("driven", 1e-6),
    "dopri8": ("driven", 1e-8),
    "kvaerno5": ("stiff", 1e-4),
    "auto": ("stiff", 1e-4),
}


def driven(t, y, p):
    """A pendulum that is pushed: q'' = -sin q + .3 sin t, t in units of p."""
    return torch.stack([y[1], -torch.sin(y[0]) + 0.3 * torch.sin(t / p)]) / p


def stiff(t, y, p):
    """A fast state follows the cosine of a slow clock: rates 500 and 1, in units of p."""
    return torch.stack([-500.0 * (y[0] - torch.cos(t / p)), y[0] - y[1]]) / p


FIELDS = {"driven": (driven, tensor(0.4, 0.1)), "stiff": (stiff, tensor(0.0, 1.0))}


def solve(name, unit, engine, start=None, times=None, **settings):
    field, y0 = FIELDS[name]
    times = tensor(0.0, 0.3, 1.0, 1.5) if times is None else times
    return lde.odesolve(field, y0 if start is None else start, times * unit, tensor(unit)[0], engine=engine, **settings)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", PROBLEMS)
def test_steps_are_the_same_in_every_unit(method, engine):
    name, tolerance = PROBLEMS[method]
    settings = {"method": method, "rtol": tolerance, "atol": tolerance / 10}
    one = solve(name, 1.0, engine, **settings)
    if method == "auto":
        assert one.implicit.any() and not one.implicit.all()
    for unit in UNITS:
        other = solve(name, unit, engine, **settings)
        newton = method in ("kvaerno5", "auto")  # solved to a thousandth of the tolerance, not to rounding
        for key, count in one.stats.items():
            spare = 0.02 if newton and key == "n_evals" else 0.0  # an iteration more or less
            assert (other.stats[key] - count).abs() <= spare * count, (key, unit)
        torch.testing.assert_close(other.ys, one.ys, rtol=1e-7 if newton else 1e-9, atol=1e-11)
        torch.testing.assert_close(other.steps / unit, one.steps, rtol=1e-4, atol=0)  # errors are rounded


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", ["at rest", "from zero", "backward", "nothing happens"])
def test_where_the_state_does_not_tell_its_time(case, engine):
    """The first step then goes by the span."""

    def f(t, y, p):
        return {"at rest": torch.sin(t / p) * (1 + 0 * y), "from zero": torch.cos(t / p) - y}.get(case, -y) / p

    y0 = tensor(0.0) if case in ("from zero", "nothing happens") else tensor(1.0)
    times = tensor(0.0, 2.0, 5.0) * (-1 if case == "backward" else 1)
    found = []
    for unit in (1.0, *UNITS):
        found.append(lde.odesolve(f, y0, times * unit, tensor(unit)[0], engine=engine, method="bosh3"))
    for other in found[1:]:
        assert torch.equal(other.counts, found[0].counts)
        torch.testing.assert_close(other.ys, found[0].ys, rtol=1e-9, atol=1e-12)
    steps = found[0].steps.abs()
    assert 9.9e-7 <= steps[0] / 5.0 <= 0.1
    if case == "nothing happens":
        assert abs(steps[0] - 5e-6) < 1e-13 and found[0].ys.abs().max() == 0


@pytest.mark.parametrize("method", ["leapfrog", "rk4"])
def test_fixed_steps_are_the_same_in_every_unit(method):
    def f(t, y, p):
        return torch.stack([y[1], -y[0] + 0.1 * torch.cos(t / p)]) / p

    times, settings = tensor(0.0, 1.0, 2.2), {"method": method, "engine": "fused"}
    one = lde.odesolve(f, tensor(1.0, 0.5), times, tensor(1.0)[0], step_size=0.06, **settings)
    for unit in UNITS:
        other = lde.odesolve(f, tensor(1.0, 0.5), times * unit, tensor(unit)[0], step_size=0.06 * unit, **settings)
        assert torch.equal(other.counts, one.counts)
        torch.testing.assert_close(other.ys, one.ys, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method, engine", [*((method, "fused") for method in PROBLEMS), ("tsit5", "torch")])
def test_seconds_since_1970(method, engine):
    """t0 = 1.7e9 s, a span of hours: times are resolved to .24 us, steps follow what t really moves by."""
    name, tolerance = PROBLEMS[method]
    field, start = FIELDS[name]
    epoch, hour = 1.7e9, 3600.0

    def late(t, y, p):
        return field(t - epoch, y, p)

    times = tensor(0.0, 0.25, 1.0, 1.5) * hour
    settings = {"method": method, "rtol": tolerance, "atol": tolerance / 10, "engine": engine}
    early = lde.odesolve(field, start, times, tensor(hour)[0], **settings)
    found = lde.odesolve(late, start, epoch + times, tensor(hour)[0], **settings)
    assert (found.counts - early.counts).abs().max() <= 2
    torch.testing.assert_close(found.ys, early.ys, rtol=1e-8, atol=1e-9)
    t = epoch + torch.nn.functional.pad(found.steps, (1, 0)).cumsum(0)
    assert torch.equal(t[:-1] + found.steps, t[1:])  # each step is a difference of two clock times
    assert t[-1] == epoch + 1.5 * hour


def test_against_scipy_on_a_late_clock():
    epoch = 1.7e9

    def f(t, y):
        return torch.stack([y[1], -y[0] + torch.cos(2 * (t - epoch))])

    times = torch.linspace(0, 8, 5, dtype=DOUBLE)
    exact = scipy_solution(lambda t, y: torch.stack([y[1], -y[0] + torch.cos(2 * t)]), tensor(1.0, 0.0), times)
    for engine in ENGINES:
        found = lde.odesolve(f, tensor(1.0, 0.0), epoch + times, rtol=1e-6, atol=1e-7, engine=engine)
        assert (found.ys - exact).abs().max() < 1e-5  # .24 us of the clock are less


def test_steps_shorter_than_the_clock_resolves_are_told():
    def f(t, y):
        return -1e9 * y

    for engine in ENGINES:
        out = lde.odesolve(f, tensor(1.0), 1.7e9 + tensor(0.0, 1.0), engine=engine, method="tsit5", on_failure="nan")
        assert int(out.status) == lde.Status.UNDERFLOW
        assert int(lde.odesolve(f, tensor(1.0), tensor(0.0, 1e-8), engine=engine, method="tsit5").status) == 0
