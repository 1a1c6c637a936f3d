# SPDX-License-Identifier: Apache-2.0
"""Every elementary function that a field may use: graph and kernel against torch, values, slopes and domain edges."""

import math

import pytest
import torch
from ode_fields import DOUBLE, tensor

import pyro_latentde as lde
from pyro_latentde.solve.fused.graph_torch import graph_field
from pyro_latentde.solve.fused.trace import trace_row

# the smallest kernels, which still evaluate and differentiate the field at several times
QUICK = {"method": "euler", "step_size": 0.25}


ELEMENTARY = {
    "exp": torch.exp,
    "expm1": torch.expm1,
    "exp2": torch.exp2,
    "log": torch.log,
    "log1p": torch.log1p,
    "log2": torch.log2,
    "log10": torch.log10,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "asin": torch.asin,
    "acos": torch.acos,
    "atan": torch.atan,
    "atan2": lambda x: torch.atan2(x, 1 + x * x),
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "tanh": torch.tanh,
    "asinh": torch.asinh,
    "acosh": lambda x: torch.acosh(1.5 + x),
    "atanh": torch.atanh,
    "erf": torch.erf,
    "erfc": torch.erfc,
    "abs": lambda x: torch.abs(x - 0.5),
    "sign": lambda x: torch.sign(x - 0.5) * x,
    "floor": lambda x: torch.floor(5 * x) * x,
    "ceil": lambda x: torch.ceil(5 * x) * x,
    "round": lambda x: torch.round(5 * x) * x,
    "trunc": lambda x: torch.trunc(-5 * x) * x,
    "frac": lambda x: torch.frac(5 * x),
    "neg": torch.neg,
    "pow": lambda x: x**2.5 + x**3 + x**-2 + 2.0**x + x**x + x**0.5,
    "remainder": lambda x: torch.remainder(x, 0.3) + torch.remainder(-x, 0.3),
    "fmod": lambda x: torch.fmod(-x, 0.3),
    "floor_divide": lambda x: x * torch.div(x, 0.15, rounding_mode="floor") + x.detach() // 0.2,
    "sigmoid": torch.sigmoid,
    "logsigmoid": torch.nn.functional.logsigmoid,
    "softplus": lambda x: torch.nn.functional.softplus(x - 0.3, beta=2.0),
    "silu": torch.nn.functional.silu,
    "elu": lambda x: torch.nn.functional.elu(x - 0.5, alpha=1.3),
    "selu": lambda x: torch.selu(x - 0.5),
    "celu": lambda x: torch.celu(x - 0.5, alpha=0.7),
    "gelu": lambda x: torch.nn.functional.gelu(x) + torch.nn.functional.gelu(x, approximate="tanh"),
    "mish": torch.nn.functional.mish,
    "relu6": lambda x: torch.nn.functional.relu6(8 * x),
    "hardtanh": lambda x: torch.nn.functional.hardtanh(2 * x) * x,
    "hardswish": torch.nn.functional.hardswish,
    "hardsigmoid": torch.nn.functional.hardsigmoid,
    "leaky_relu": lambda x: torch.nn.functional.leaky_relu(x - 0.5, 0.2),
    "threshold": lambda x: torch.nn.functional.threshold(x, 0.5, 0.1),
    "softsign": torch.nn.functional.softsign,
    "tanhshrink": torch.nn.functional.tanhshrink,
    "lerp": lambda x: torch.lerp(x, x * x, 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
    "addcdiv": lambda x: torch.addcdiv(x, x, x + 1, value=0.5),
    "hypot": lambda x: torch.hypot(x, 1 - x),
    "xlogy": lambda x: torch.xlogy(x, x + 1) + torch.xlogy(0.0, x),
    "logaddexp": lambda x: torch.logaddexp(x, 2 * x),
    "logit": lambda x: torch.logit(x),
    "sinc": torch.sinc,
    "square": torch.square,
    "logsumexp": lambda x: torch.logsumexp(x, 0) * x,
    "log_softmax": lambda x: torch.log_softmax(x, 0),
    "heaviside": lambda x: torch.heaviside(x.detach() - 0.5, torch.full_like(x, 0.5)) * x,
    "nan_to_num": lambda x: torch.nan_to_num(x / 2),
    "deg2rad": torch.deg2rad,
    "true_divide": lambda x: 1 / (1 + x) + x / 3 - 2 / x,
    "logical": lambda x: torch.where((x > 0.2) & ~(x > 0.6) | (x == 0.1), x * x, -x),
    "bool_arithmetic": lambda x: (x > 0.5) * x + (x <= 0.5).to(x) * 2 * x,
}
ROUGH = {"celu": 1e-7, "hardsigmoid": 1e-7}  # torch's own slopes have constants in single precision
POINTS = tensor(0.17, 0.37, 0.83)


@pytest.mark.parametrize("name", ELEMENTARY)
def test_graph_of_an_elementary_function(name):
    function = ELEMENTARY[name]
    trace = trace_row(lambda t, y, leaves: function(y), tensor(0.0)[0], POINTS.clone(), [])
    field = graph_field(trace.graph, trace.outputs)
    y = POINTS.clone().requires_grad_()
    expected = function(y)
    value = field(tensor(0.0), y[None], [])[0]
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-14)
    seed = tensor(1.0, -0.7, 0.4)
    slopes = [torch.autograd.grad((seed * x).sum(), y, retain_graph=True)[0] for x in (value, expected)]
    torch.testing.assert_close(*slopes, rtol=ROUGH.get(name, 1e-12), atol=1e-13)


def test_kernels_of_all_elementary_functions():
    def f(t, y, p):
        x = p[:1]
        return torch.cat([function(x) for function in ELEMENTARY.values()]) + 0 * y

    x = POINTS[:1].clone().requires_grad_()
    y0 = torch.zeros(len(ELEMENTARY), dtype=DOUBLE)
    ys = lde.odesolve(f, y0, tensor(0.0, 1.0), x, engine="fused", method="euler", step_size=1.0).ys[-1]
    expected = f(0.0, y0, x)
    for name, got, wanted in zip(ELEMENTARY, ys, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14, msg=lambda m, name=name: f"{name}: {m}")
        slopes = [torch.autograd.grad(v, x, retain_graph=True)[0] for v in (got, wanted)]
        rtol = ROUGH.get(name, 1e-11)
        torch.testing.assert_close(*slopes, rtol=rtol, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")
    direction = tensor(0.3)
    dots = [
        torch.func.jvp(function, (x.detach(),), (direction,))[1]
        for function in (
            lambda p: lde.odesolve(f, y0, tensor(0.0, 1.0), p, engine="fused", method="euler", step_size=1.0).ys[-1],
            lambda p: f(0.0, y0, p),
        )
    ]
    torch.testing.assert_close(*dots, rtol=1e-7, atol=1e-13)


def test_kinks_and_domain_edges_have_torchs_slopes():
    def f(t, y, p):
        x, z = p
        return torch.stack(
            [x.abs(), torch.relu(x), torch.maximum(x, z), x.clamp(0.0, 1.0), (x * z).sign() + x, x**2, z**x]
        )

    x = tensor(0.0, 0.0, requires_grad=True)
    y0 = torch.zeros(7, dtype=DOUBLE)
    ys = lde.odesolve(f, y0, tensor(0.0, 1.0), x, engine="fused", method="euler", step_size=1.0).ys[-1]
    expected = f(0.0, y0, x)
    for i in range(7):
        slopes = [torch.autograd.grad(v[i], x, retain_graph=True)[0] for v in (ys, expected)]
        torch.testing.assert_close(*slopes, rtol=0, atol=0, msg=lambda m, i=i: f"output {i}: {m}")


def test_infinities_and_nans_reach_the_status():
    def f(t, y, p):
        return torch.stack([torch.exp(p), torch.log(p), torch.sqrt(p), torch.floor(p), torch.remainder(p, 0.3)])

    y0 = torch.zeros(5, dtype=DOUBLE)
    for value in (1e4, -1.0, math.nan, math.inf):
        p = torch.tensor(value, dtype=DOUBLE)
        for engine in ("fused", "torch"):
            solution = lde.odesolve(f, y0, tensor(0.0, 1.0), p, engine=engine, on_failure="nan", **QUICK)
            assert solution.status == lde.Status.NON_FINITE
