# SPDX-License-Identifier: Apache-2.0
"""Inputs through values at knots: closed forms, order, gradients by values and knots, rows, shapes, bad input."""

import pytest
import torch
from ode_fields import DOUBLE, ENGINES, tensor
from scipy.interpolate import CubicHermiteSpline

import pyro_latentde as lde
from pyro_latentde.errors import DataError, ShapeError

KNOTS = tensor(0.0, 1.0, 1.7, 2.5)
VALUES = tensor(0.0, 3.0, -1.0, 2.0)
TIMES = tensor(0.5, 1.0, 2.2, 4.0)
KINDS = ("previous", "linear", "cubic")
FINE = {"rtol": 1e-10, "atol": 1e-11, "t0": -0.5}


def integral(kind, engine="fused", knots=KNOTS, values=VALUES, **settings):
    """dy/dt = u(t)."""
    u = lde.Input(knots, values, kind)
    y0 = torch.zeros(1, dtype=DOUBLE)
    return lde.odesolve(lambda t, y: u(t) + 0 * y, y0, TIMES, engine=engine, **{**FINE, **settings}).ys[..., 0]


def law(kind, knots=KNOTS, values=VALUES):
    """The integral of u from -.5, knot by knot."""
    total = torch.zeros_like(TIMES)
    for i in range(len(knots) - 1):
        width = knots[i + 1] - knots[i]
        x = ((TIMES - knots[i]) / width).clamp(0, 1)
        rise = torch.zeros_like(x) if kind == "previous" else (values[i + 1] - values[i]) * x**2 / 2
        total = total + width * (values[i] * x + rise)
    return total + values[-1] * (TIMES - knots[-1]).clamp(min=0) + 0.5 * values[0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["previous", "linear"])
def test_values_and_gradients(kind, engine):
    torch.testing.assert_close(integral(kind, engine), law(kind), rtol=1e-9, atol=1e-10)
    inputs = [x.clone().requires_grad_() for x in (KNOTS, VALUES)]
    weights = tensor(1.0, 0.0, -0.7, 0.4)  # an output at a knot has a derivative from each side
    found = torch.autograd.grad((integral(kind, engine, *inputs) * weights).sum(), inputs)
    right = torch.autograd.grad((law(kind, *inputs) * weights).sum(), inputs)
    torch.testing.assert_close(found[1], right[1], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found[0][1:], right[0][1:], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_cubic_against_scipy(engine):
    u = lde.Input(KNOTS, VALUES, "cubic")
    spline = CubicHermiteSpline(KNOTS, VALUES, u.slopes)
    right = [spline.integrate(0.0, min(t, 2.5)) + VALUES[-1].item() * max(t - 2.5, 0.0) for t in TIMES.tolist()]
    torch.testing.assert_close(integral("cubic", engine), tensor(*right), rtol=1e-9, atol=1e-10)
    parabola = lde.Input(KNOTS, KNOTS**2, "cubic")  # Bessel's slopes are right for parabolas
    torch.testing.assert_close(parabola(tensor(1.3)[0]), tensor(1.69)[0], rtol=1e-12, atol=0)


def test_steps_end_at_knots():
    """With a fixed step the order of tsit5 is kept: rounding is all that is left of a polynomial."""
    for kind in KINDS:
        coarse, fine = (integral(kind, method="tsit5", step_size=step) for step in (0.6, 0.01))
        torch.testing.assert_close(coarse, fine, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_channels_and_parameters(engine):
    values = torch.stack([VALUES, 2 * VALUES])
    rows = integral("linear", engine, values=values)
    torch.testing.assert_close(rows, torch.stack([law("linear"), 2 * law("linear")]), rtol=1e-9, atol=1e-10)
    u = lde.Input(KNOTS, torch.stack([VALUES, -VALUES], -1), "linear")
    pair = lde.odesolve(lambda t, y, p: p["u"](t), torch.zeros(2).double(), TIMES, {"u": u}, engine=engine, **FINE)
    torch.testing.assert_close(pair.ys, torch.stack([law("linear"), -law("linear")], -1), rtol=1e-9, atol=1e-10)


def test_bad_input():
    with pytest.raises(DataError, match="do not increase"):
        lde.Input([0.0, 2.0, 1.0], [1.0, 2.0, 3.0])
    with pytest.raises(DataError, match="not finite"):
        lde.Input([0.0, float("nan")], [1.0, 2.0])
    with pytest.raises(ShapeError, match="one value for each knot"):
        lde.Input([0.0, 1.0], [1.0, 2.0, 3.0])
    with pytest.raises(DataError, match="Did you mean 'cubic'"):
        lde.Input([0.0, 1.0], [1.0, 2.0], "cubicc")
    with pytest.raises(DataError, match="cannot be read"):
        lde.Input("noon", [1.0])
