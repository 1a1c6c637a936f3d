# SPDX-License-Identifier: Apache-2.0
"""Two compartments, repeated boluses and infusions, rows of their own: against superposed bi-exponentials."""

import pytest
import torch
from ode_fields import DOUBLE, ENGINES, tensor

import pyro_latentde as lde

NAN = float("nan")
HOURS = tensor([1.0, 5.0, 9.5, 14.0, 22.0, 30.0], [0.5, 3.0, 8.0, 12.5, 20.0, 40.0], [2.0, 2.5, 6.0, 7.0, 18.0, 26.0])
GIVEN = {
    "CL": tensor(4.5, 2.0, 7.0),
    "V1": tensor(25.0, 20.0, 30.0),
    "Q": tensor(4.0, 6.0, 2.5),
    "V2": tensor(35.0, 50.0, 20.0),
    "bolus times": tensor([0.0, 8.0, 13.0], [4.0, NAN, NAN], [1.0, 6.5, NAN]),
    "bolus amounts": tensor([100.0, 80.0, 60.0], [150.0, 0.0, 0.0], [90.0, 110.0, 0.0]),
    "drip times": tensor([2.0, 12.0, 20.0], [0.0, 6.0, 9.0], [3.0, NAN, NAN]),
    "drip amounts": tensor([300.0, 200.0, 250.0], [120.0, 400.0, 90.0], [500.0, 0.0, 0.0]),
    "durations": tensor([1.5, 3.0, 0.5], [2.0, 4.0, 1.0], [6.0, 1.0, 1.0]),  # in two rows they overlap
}


def body(t, y, p):
    exchange = p["Q"] * (y[0] / p["V1"] - y[1] / p["V2"])
    return torch.stack([-p["CL"] / p["V1"] * y[0] - exchange, exchange])


def solved(given, engine, hours=HOURS, **settings):
    doses = [
        lde.Dose(given["bolus times"], given["bolus amounts"], 0),
        lde.Dose(given["drip times"], given["drip amounts"], 0, duration=given["durations"]),
    ]
    p = {name: given[name] for name in ("CL", "V1", "Q", "V2")}
    settings = {"method": "dopri8", "rtol": 1e-11, "atol": 1e-11, "t0": -1.0, **settings}
    y0 = torch.zeros(2, dtype=DOUBLE)
    return lde.odesolve(body, y0, hours, p, doses=doses, engine=engine, **settings)


def closed_form(given):
    """Both compartments, (row, time, 2): each dose is a sum of two exponentials, each drip an integral of it."""
    k10, k12, k21 = (given[a] / given[b] for a, b in (("CL", "V1"), ("Q", "V1"), ("Q", "V2")))
    total = k10 + k12 + k21
    root = (total**2 - 4 * k10 * k21).sqrt()
    fast, slow = (total + root) / 2, (total - root) / 2
    central, tissue = ((fast - k21) / root, (k21 - slow) / root), (-k12 / root, k12 / root)

    def since(times):  # (row, time, dose)
        return HOURS[..., None] - times[:, None]

    def summed(shares, response):
        parts = [
            share[:, None, None] * response(rate[:, None, None])
            for share, rate in zip(shares, (fast, slow), strict=True)
        ]
        return sum(parts)

    there = ~given["bolus times"].isnan()[:, None], ~given["drip times"].isnan()[:, None]
    given = given | {name: given[name].nan_to_num() for name in ("bolus times", "drip times")}
    after = since(given["bolus times"])
    on = since(given["drip times"]).clamp(min=0.0)
    off = since(given["drip times"] + given["durations"]).clamp(min=0.0)
    speed = (given["drip amounts"] / given["durations"])[:, None]
    states = []
    for shares in (central, tissue):
        bolus = summed(shares, lambda rate: torch.exp(-rate * after.clamp(min=0.0))) * given["bolus amounts"][:, None]
        drip = summed(shares, lambda rate: (torch.exp(-rate * off) - torch.exp(-rate * on)) / rate) * speed
        states.append((bolus * ((after >= 0) & there[0])).sum(-1) + (drip * there[1]).sum(-1))
    return torch.stack(states, -1)


@pytest.mark.parametrize("engine", ENGINES)
def test_values_are_those_of_the_closed_form(engine):
    right = closed_form(GIVEN)
    torch.testing.assert_close(solved(GIVEN, engine).ys, right, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_those_of_the_closed_form(engine):
    """To clearance, volumes, flow, amounts, times and durations, of both compartments at all times."""
    inputs = {name: value.clone().requires_grad_() for name, value in GIVEN.items()}
    weights = torch.cos(torch.arange(HOURS.numel() * 2, dtype=DOUBLE)).reshape(3, 6, 2)
    found, right = (
        torch.autograd.grad((ys * weights).sum(), list(inputs.values()))
        for ys in (solved(inputs, engine).ys, closed_form(inputs))
    )
    for name, one, other in zip(inputs, found, right, strict=True):
        padding = GIVEN[name].isnan()
        assert not one.isnan().any() and (one[padding] == 0.0).all(), name
        assert (other[~padding] != 0.0).any(), name
        torch.testing.assert_close(
            one, other.where(~padding, 0.0), rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_rows_alone_give_the_same_bits():
    together = solved(GIVEN, "fused", rtol=1e-6).ys
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in GIVEN.items()}
        assert torch.equal(solved(alone, "fused", HOURS[row], rtol=1e-6).ys[0], together[row])
