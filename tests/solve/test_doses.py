# SPDX-License-Identifier: Apache-2.0
"""Doses and infusions: pharmacokinetics against closed forms (superposition of exponentials), gradients included."""

import pandas as pd
import pytest
import torch
from ode_fields import DOUBLE, ENGINES, tensor
from torch.func import jvp, vmap

import pyro_latentde as lde
from pyro_latentde.errors import DataError, ShapeError

TIMES = tensor(0.5, 2.0, 6.0, 9.0, 13.0, 20.0, 30.0)
THETA = tensor(1.2, 5.0, 20.0)  # ka, CL, V
GIVEN = tensor(0.0, 8.0, 12.0), tensor(100.0, 50.0, 80.0)  # times and amounts
ZERO = torch.zeros(2, dtype=DOUBLE)


def oral(t, y, p):
    """One compartment with absorption: gut, central."""
    ka, cl, v = p
    return torch.stack([-ka * y[0], ka * y[0] - cl / v * y[1]])


def bolus_law(theta, times, amounts, t=TIMES):
    ka, cl, v = theta
    s = (t[:, None] - times).clamp(min=0)
    ke = cl / v
    gut = amounts * torch.exp(-ka * s)
    central = amounts * ka / (ka - ke) * (torch.exp(-ke * s) - torch.exp(-ka * s))
    here = t[:, None] >= times
    return torch.stack([(x * here).sum(1) for x in (gut, central)], -1)


def infusion_law(theta, times, amounts, durations, t=TIMES):
    """Into the central compartment."""
    ke = theta[1] / theta[2]
    on = (t[:, None] - times).clamp(min=0)
    off = (t[:, None] - times - durations).clamp(min=0)
    return (amounts / durations / ke * (torch.exp(-ke * off) - torch.exp(-ke * on))).sum(1)


def solve(theta=THETA, doses=None, engine="fused", **settings):
    doses = lde.Dose(*GIVEN, 0) if doses is None else doses
    settings = {"rtol": 1e-10, "atol": 1e-11, "t0": 0.0, **settings}
    return lde.odesolve(oral, ZERO, settings.pop("times", TIMES), theta, doses=doses, engine=engine, **settings)


@pytest.mark.parametrize(("engine", "method"), [("fused", "tsit5"), ("fused", "kvaerno5"), ("torch", "tsit5")])
def test_repeated_doses_and_infusions(engine, method):
    durations = tensor(2.0, 1.0, 5.0)
    doses = [lde.Dose(*GIVEN, 0), lde.Dose(*GIVEN, 1, duration=durations)]
    ys = solve(doses=doses, engine=engine, method=method).ys
    right = bolus_law(THETA, *GIVEN)
    right[:, 1] += infusion_law(THETA, *GIVEN, durations)
    torch.testing.assert_close(ys, right, rtol=1e-8, atol=1e-8)
    rated = [lde.Dose(*GIVEN, 0), lde.Dose(*GIVEN, 1, rate=GIVEN[1] / durations)]
    torch.testing.assert_close(solve(doses=rated, engine=engine, method=method).ys, ys, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("engine", "method"), [("fused", "tsit5"), ("fused", "kvaerno5"), ("torch", "dopri8")])
def test_gradients_against_the_closed_form(engine, method):
    durations, weights = tensor(2.0, 1.0, 5.0), torch.cos(torch.arange(7, dtype=DOUBLE))
    inputs = [x.clone().requires_grad_() for x in (THETA, *GIVEN, durations)]

    def loss(theta, times, amounts, durations):
        doses = [lde.Dose(times, amounts, 0), lde.Dose(times, amounts, 1, duration=durations)]
        return (solve(theta, doses, engine, method=method, t0=-1.0).ys[:, 1] * weights).sum()

    def law(theta, times, amounts, durations):
        central = bolus_law(theta, times, amounts)[:, 1] + infusion_law(theta, times, amounts, durations)
        return (central * weights).sum()

    found, right = (torch.autograd.grad(f(*inputs), inputs) for f in (loss, law))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    moves = tuple(torch.sin(x.detach()) for x in inputs)
    _, turn = jvp(loss, tuple(x.detach() for x in inputs), moves)
    torch.testing.assert_close(
        turn, sum((g * m).sum() for g, m in zip(found, moves, strict=True)), rtol=1e-9, atol=1e-9
    )


def test_engines_agree_and_rows_are_their_own():
    """Ragged doses by NaN times; a row alone gives the same bits."""
    times = tensor([0.0, 8.0, 12.0], [3.0, torch.nan, torch.nan], [torch.nan, torch.nan, torch.nan])
    dose = lde.Dose(times, tensor(100.0, 50.0, 80.0), 0)
    fused, plain = (solve(doses=dose, engine=engine) for engine in ENGINES)
    assert fused.ys.shape == (3, 7, 2)
    torch.testing.assert_close(fused.ys, plain.ys, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fused.ys[1], bolus_law(THETA, tensor(3.0), tensor(100.0)), rtol=1e-8, atol=1e-8)
    assert (fused.ys[2] == 0).all()
    assert torch.equal(fused.ys[0], solve().ys)


def test_outputs_at_a_dose():
    times = tensor(0.0, 8.0, 12.0)
    before, after = (solve(times=times, at_dose=side).ys[:, 0] for side in ("before", "after"))
    torch.testing.assert_close(after - before, GIVEN[1], rtol=1e-12, atol=1e-12)
    solution = solve(at_dose="before")
    torch.testing.assert_close(solution.at(tensor(8.0))[:, 0], before[1:2], rtol=1e-8, atol=0)
    torch.testing.assert_close(solve().at(tensor(8.0))[:, 0], after[1:2], rtol=1e-8, atol=0)
    plain = solve(times=times, engine="torch").ys[:, 0]
    torch.testing.assert_close(plain, after, rtol=1e-9, atol=1e-9)


def test_doses_after_the_end_do_not_matter():
    late = lde.Dose(tensor(0.0, 8.0, 12.0, 99.0), tensor(100.0, 50.0, 80.0, 7.0), 0)
    assert torch.equal(solve(doses=late).ys, solve().ys)


def test_amounts_under_vmap():
    def central(scale):
        return solve(doses=lde.Dose(GIVEN[0], scale * GIVEN[1], 0)).ys[:, 1].sum()

    scales = tensor(0.5, 1.0, 2.0)
    mapped = vmap(torch.func.grad(central))(scales)
    torch.testing.assert_close(mapped, bolus_law(THETA, *GIVEN)[:, 1].sum().expand(3), rtol=1e-8, atol=0)


def test_a_state_by_name():
    def field(t, y, p):
        return {"gut": -p[0] * y["gut"], "blood": p[0] * y["gut"] - p[1] / p[2] * y["blood"]}

    y0 = {"gut": ZERO[0], "blood": ZERO[0]}
    ys = lde.odesolve(field, y0, TIMES, THETA, t0=0.0, doses=lde.Dose(*GIVEN, "gut"), rtol=1e-9, atol=1e-9).ys
    torch.testing.assert_close(ys["blood"], bolus_law(THETA, *GIVEN)[:, 1], rtol=1e-7, atol=1e-7)
    with pytest.raises(DataError, match="Did you mean 'blood'"):
        lde.odesolve(field, y0, TIMES, THETA, t0=0.0, doses=lde.Dose(*GIVEN, "bloud"))


def test_doses_from_a_table():
    rows = {
        "ID": [7, 7, 7, 3, 3],
        "TIME": [0.0, 1.0, 24.0, 2.0, 3.0],
        "AMT": [100.0, 0.0, 60.0, 80.0, float("nan")],
        "RATE": [0.0, 0.0, 30.0, 0.0, 0.0],
        "ADDL": [1, 0, 0, 2, 0],
        "II": [12.0, 0.0, 0.0, 6.0, 0.0],
        "CMT": [1, 2, 2, 1, 2],
    }
    columns = {"series": "ID", "rate": "RATE", "additional": "ADDL", "interval": "II"}
    doses = lde.Dose.from_dataframe(pd.DataFrame(rows), state="CMT", states={1: 0, 2: 1}, **columns)
    assert [(d.state, d.rate is None) for d in doses] == [(0, True), (1, False)]
    torch.testing.assert_close(doses[0].times, tensor([0.0, 12.0, torch.nan], [2.0, 8.0, 14.0]), equal_nan=True)
    torch.testing.assert_close(doses[1].times, tensor([24.0], [torch.nan]), equal_nan=True)
    torch.testing.assert_close(doses[1].rate[0], tensor(30.0))
    turned = lde.Dose.from_dataframe(pd.DataFrame(rows), ids=[3, 7, 9], **columns)
    assert turned[0].times.shape == (3, 3) and turned[0].times[2].isnan().all()
    with pytest.raises(DataError, match="Did you mean 'AMT'"):
        lde.Dose.from_dataframe(pd.DataFrame(rows), amount="AMTT")


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (([0.0], [-1.0], 0), {}, r"amounts\[0\] = -1"),
        (([0.0], [float("inf")], 0), {}, "finite number"),
        (([0.0, float("inf")], 1.0, 0), {}, "infinite"),
        (([0.0], 1.0, 0), {"duration": 0.0}, "positive"),
        (([0.0], 1.0, 0), {"rate": -2.0}, "positive"),
        (([0.0], 1.0, 0), {"rate": 1.0, "duration": 1.0}, "not both"),
        (([0.0], 1.0, 1.5), {}, "number or the name"),
        (([0.0], "much", 0), {}, "cannot be read"),
    ],
)
def test_numbers_that_no_dose_has(arguments, keywords, message):
    with pytest.raises(DataError, match=message):
        lde.Dose(*arguments, **keywords)


def test_other_bad_input():
    with pytest.raises(ShapeError, match="one for each of the 2 doses"):
        lde.Dose([0.0, 1.0], [1.0, 2.0, 3.0], 0)
    with pytest.raises(ShapeError, match="no dimension"):
        lde.Dose(0.0, 1.0, 0)
    with pytest.raises(DataError, match="a dose at t = -3 .* before the start"):
        solve(doses=lde.Dose([-3.0, 1.0], 1.0, 0))
    with pytest.raises(DataError, match="no names"):
        solve(doses=lde.Dose([1.0], 1.0, "gut"))
    with pytest.raises(DataError, match="there are 2 states"):
        solve(doses=lde.Dose([1.0], 1.0, 2))
    with pytest.raises(DataError, match="expected a Dose"):
        solve(doses=[1.0])
    with pytest.raises(DataError, match="at_dose"):
        solve(at_dose="during")
    with pytest.raises(DataError, match="times that increase"):
        solve(doses=lde.Dose([31.0], 1.0, 0), times=TIMES.flip(0), t0=31.0)
