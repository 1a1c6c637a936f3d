# SPDX-License-Identifier: Apache-2.0
"""Delay equations with known solutions, and a method of steps on SciPy's solver to compare others with."""

import math

import numpy as np
import torch
from scipy.integrate import solve_ivp

DOUBLE = torch.float64


def tensor(*values, **kwargs):
    return torch.tensor(values, dtype=DOUBLE, **kwargs)


ENGINES = ("fused", "torch")
TIMES = tensor(0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.7)
WEIGHTS = torch.cos(torch.arange(8, dtype=DOUBLE))
TIGHT = {"rtol": 1e-11, "atol": 1e-12}
ONE = torch.ones(1, dtype=DOUBLE)


def leaves(*values):
    return [v.detach().clone().requires_grad_() for v in values]


def decay(t, y, lagged, p):
    """dy/dt = -p y(t - lag)."""
    return -p * lagged[0]


def decay_solution(times, lag, start, rate=1.0, t0=0.0):
    """With a constant history: start * sum_k (-rate)^k (t - t0 - (k - 1) lag)_+^k / k!, ``(..., T)``."""
    total = start * torch.ones_like(times)
    for k in range(1, 12):
        x = (times - t0 - (k - 1) * lag).clamp(min=0.0)
        total = total + start * (-rate) ** k * x**k / math.factorial(k)
    return total


def logistic(t, y, lagged, p):
    """Hutchinson's equation, dy/dt = r y (1 - y(t - lag) / K)."""
    return p["r"] * y * (1.0 - lagged[0] / p["K"])


def mackey_glass(t, y, lagged, p):
    """dy/dt = beta y(t - lag) / (1 + y(t - lag)^n) - gamma y."""
    return p["beta"] * lagged[0] / (1.0 + lagged[0] ** p["n"]) - p["gamma"] * y


MACKEY_GLASS = {"beta": tensor(0.2)[0], "gamma": tensor(0.1)[0], "n": tensor(10.0)[0]}


def two_lags(t, y, lagged, p):
    """Two states, two lags, pushed in time."""
    first, second = lagged
    a, b, c = p
    return torch.stack([-a * first[1] + 0.2 * torch.sin(t), b * second[0] * torch.cos(y[1]) - c * first[1] * y[0]])


def wave(t, p):
    """A history with parameters."""
    return torch.stack([torch.cos(p[0] * t), 1.0 + p[1] * torch.sin(t)])


def by_scipy(f, history, lags, times, p=None, t0=0.0):
    """Method of steps with DOP853 at rtol 1e-12, between all sums of lags; of one row, ``(T, D)``.

    Args:
        f: ``f(t, y, lagged, p)`` in torch.
        history: ``history(t) -> numpy (D,)``.
        lags: List of floats.
        times: ``(T,)``.
    """
    sums = {t0}
    for _ in range(10):
        sums |= {round(s + lag, 12) for s in sums for lag in lags}
    end, least = float(times[-1]), min(lags)
    grid = sorted(s for s in sums if s < end) + [end]
    pieces = []

    def at(t):
        if t <= t0:
            return history(t)
        return next(dense for last, dense in pieces if t <= last + 1e-12)(t)

    def field(t, y):
        lagged = tuple(torch.from_numpy(np.asarray(at(t - lag))) for lag in lags)
        state, moment = torch.from_numpy(y.copy()), torch.tensor(t, dtype=DOUBLE)
        return f(moment, state, lagged, p).numpy()

    y = history(t0)
    for a, b in zip(grid[:-1], grid[1:], strict=True):
        for u, v in _pieces(a, b, least):
            out = solve_ivp(field, (u, v), y, "DOP853", rtol=1e-12, atol=1e-13, dense_output=True)
            pieces.append((v, out.sol))
            y = out.y[:, -1]
    return torch.from_numpy(np.stack([at(float(t)) for t in times]))


def _pieces(a, b, longest):
    edges = np.linspace(a, b, 1 + math.ceil((b - a) / longest - 1e-12))
    return list(zip(edges[:-1], edges[1:], strict=True))
