# SPDX-License-Identifier: Apache-2.0
"""Problems that several tests solve: shared, because every field and method is compiled once."""

import numpy as np
import torch
from scipy.integrate import solve_ivp

import pyro_latentde as lde

DOUBLE = torch.float64
ENGINES = ("fused", "torch")


def tensor(*values, **kwargs):
    return torch.tensor(values, dtype=DOUBLE, **kwargs)


def prey_predator(t, y, p):
    """Lotka-Volterra, pushed in time: dx/dt = a x - b x z + .1 sin t, dz/dt = d x z - c z."""
    x, z = y
    a, b, c, d = p
    return torch.stack([a * x - b * x * z + 0.1 * torch.sin(t), d * x * z - c * z])


RATES = tensor([1.5, 1.0, 3.0, 1.0], [1.2, 0.8, 2.0, 0.9], [0.9, 1.1, 1.0, 0.4])
STARTS = tensor([1.0, 1.0], [2.0, 0.5], [0.3, 0.9])


def solve(engine="fused", f=prey_predator, y0=STARTS, times=None, p=RATES, **settings):
    """``odesolve`` of three prey-predator rows, unless told otherwise; the engine must be the one asked for."""
    times = torch.linspace(0, 4, 9, dtype=DOUBLE) if times is None else times
    solution = lde.odesolve(f, y0, times, p, engine=engine, **settings)
    assert solution.engine == engine
    return solution


def scipy_solution(f, y0, times, p=None, t0=None):
    """DOP853 at rtol 1e-12 of one row; ``times`` in the direction of integration."""

    def field(t, y):
        arguments = (torch.tensor(t, dtype=DOUBLE), torch.from_numpy(y.copy()))
        return (f(*arguments) if p is None else f(*arguments, p)).numpy()

    times = times.numpy()
    span = (times[0] if t0 is None else t0, times[-1])
    out = solve_ivp(field, span, y0.numpy(), "DOP853", times, rtol=1e-12, atol=1e-13)
    return torch.from_numpy(np.ascontiguousarray(out.y.T))


def central_difference(function, x, size=1e-5):
    """Derivative of a scalar function of one tensor, fourth order: error about size**4 + 1e-16 / size."""
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        move = torch.zeros_like(x)
        move.view(-1)[i] = size * max(1.0, float(x.reshape(-1)[i].abs()))
        step = float(move.abs().sum())
        near = function(x + move) - function(x - move)
        far = function(x + 2 * move) - function(x - 2 * move)
        gradient.view(-1)[i] = (8 * near - far) / (12 * step)
    return gradient
