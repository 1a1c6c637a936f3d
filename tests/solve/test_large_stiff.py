# SPDX-License-Identifier: Apache-2.0
"""Stiff systems of 20 and more states: values, gradients, Jacobians of three shapes, and when there is no kernel."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from pyro_latentde import odesolve
from pyro_latentde.solve.fused import emit
from pyro_latentde.solve.fused.kernel_choice import LARGEST, LARGEST_STIFF, too_large
from pyro_latentde.solve.methods.catalog import get_method


def tensor(x):
    return torch.as_tensor(x, dtype=torch.float64)


def brusselator(t, y, p):
    """With diffusion on a line, u and v at n inner points; Hairer, Wanner, Solving ODEs II, IV.10."""
    n = len(y) // 2
    one = torch.ones(1, dtype=y.dtype)
    u, v = torch.cat([one, y[:n], one]), torch.cat([3 * one, y[n:], 3 * one])
    spread = p[2] * (n + 1) ** 2
    twice = u[1:-1] ** 2 * v[1:-1]
    du = p[0] + twice - (p[1] + 1) * u[1:-1] + spread * (u[2:] - 2 * u[1:-1] + u[:-2])
    dv = p[1] * u[1:-1] - twice + spread * (v[2:] - 2 * v[1:-1] + v[:-2])
    return torch.cat([du, dv])


def start(n):
    x = torch.linspace(0, 1, n + 2, dtype=torch.float64)[1:-1]
    return torch.cat([1 + torch.sin(2 * torch.pi * x), 3 * torch.ones_like(x)])


RATES = tensor([1.0, 3.0, 0.02])


LINE_TIMES = np.linspace(0, 2, 5)


@pytest.fixture(scope="module")
def line_by_radau():
    field = lambda t, y: brusselator(t, torch.from_numpy(y), RATES).numpy()  # noqa: E731
    jacobian = torch.func.jacrev(lambda y: brusselator(0.0, y, RATES))
    matrix = lambda t, y: jacobian(torch.from_numpy(y)).numpy()  # noqa: E731
    return solve_ivp(field, (0, 2), start(20).numpy(), "Radau", LINE_TIMES, rtol=1e-10, atol=1e-12, jac=matrix).y.T


@pytest.mark.parametrize("method", ["kvaerno5", "auto"])
def test_a_line_of_forty_states_against_radau(method, line_by_radau):
    found = odesolve(
        brusselator, start(20), tensor(LINE_TIMES), RATES, method=method, rtol=1e-10, atol=1e-12, engine="fused"
    )
    np.testing.assert_allclose(found.ys.numpy(), line_by_radau, rtol=2e-8, atol=0)


def decay_to(t, y, a):
    return a @ (y - torch.cos(t))


def dense(d):
    """A symmetric matrix with decay rates from 1 to 1e4."""
    base, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(d, d)))
    return tensor(base @ np.diag(-np.logspace(0, 4, d)) @ base.T)


def exact(a, y0, times):
    """Of y' = a (y - cos t): each eigenvector by itself."""
    rates, base = np.linalg.eigh(a.numpy())
    t, weights = times.numpy()[:, None], base.T @ np.ones(len(a))
    forced = lambda t: weights * (rates**2 * np.cos(t) - rates * np.sin(t)) / (rates**2 + 1)  # noqa: E731
    return (forced(t) + np.exp(rates * t) * (base.T @ y0.numpy() - forced(0.0))) @ base.T


@pytest.mark.parametrize("longest", [0, 4000])  # of a Jacobian that is not a loop over its columns
def test_a_dense_linear_system_against_its_closed_form(longest, monkeypatch):
    monkeypatch.setattr(emit, "LONGEST", longest)
    a, y0, times = dense(20), torch.full((20,), 2.0).double(), tensor([0.0, 1e-3, 0.1, 2.0])
    field = (lambda t, y, a: decay_to(t, y, a)) if longest else (lambda t, y, a: a @ (y - t.cos()))
    found = odesolve(field, y0, times, a, method="kvaerno5", rtol=1e-10, atol=1e-12, engine="fused")
    np.testing.assert_allclose(found.ys.numpy(), exact(a, y0, times), rtol=0, atol=1e-9)


def line_gradients(field, steps, engine):
    p, y0 = RATES.clone().requires_grad_(), start(20).requires_grad_()
    found = odesolve(field, y0, tensor(SHORT), p, method="kvaerno5", replay=steps, engine=engine)
    return torch.autograd.grad((found.ys[1:] ** 2).sum(), (p, y0))


SHORT = [0.0, 0.1, 0.3]


@pytest.fixture(scope="module")
def line_steps():
    steps = odesolve(brusselator, start(20), tensor(SHORT), RATES, method="kvaerno5", rtol=1e-3, atol=1e-3)
    assert 2 <= int(steps.stats["n_accepted"]) < 8
    return steps, line_gradients(brusselator, steps, "torch")


@pytest.mark.parametrize("longest", [0, 4000])
def test_gradients_of_forty_states_agree_with_the_torch_engine(longest, monkeypatch, line_steps):
    monkeypatch.setattr(emit, "LONGEST", longest)
    steps, right = line_steps
    line = brusselator if longest else lambda t, y, p: brusselator(t, y, p) * 1.0
    for ours, theirs in zip(line_gradients(line, steps, "fused"), right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def network(t, y, p):
    return p["out"] @ torch.tanh(p["in"] @ y + t) - 50.0 * y


@pytest.mark.parametrize("longest", [0, 4000])
def test_jacobians_of_networks_by_rows_and_by_columns(longest, monkeypatch):
    """Newton's method converges with a wrong Jacobian too, if it is not very wrong; derivatives are wrong with it."""
    monkeypatch.setattr(emit, "LONGEST", longest)
    draws = np.random.default_rng(2)
    p = {"in": tensor(draws.normal(size=(9, 8))), "out": tensor(3 * draws.normal(size=(8, 9)))}
    field = (lambda t, y, p: network(t, y, p)) if longest else (lambda t, y, p: network(t, y, p) * 1.0)
    y0, times = tensor(draws.normal(size=8)), tensor([0.0, 0.3])
    more = {"method": "trbdf2", "engine": "fused", "event_dims": {"in": 2, "out": 2}}
    steps = odesolve(field, y0, times, p, rtol=1e-3, **more)

    def value(y0):
        return odesolve(field, y0, times, p, replay=steps, **more).ys[-1, :4].sum()

    found = torch.func.grad(value)(y0)
    along = torch.func.jvp(value, (y0,), (torch.ones_like(y0),))[1]
    for i in range(8):
        move = 1e-5 * torch.eye(8).double()[i]
        torch.testing.assert_close(found[i], (value(y0 + move) - value(y0 - move)) / 2e-5, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(along, found.sum(), rtol=1e-10, atol=0)


def test_methods_with_newton_keep_their_kernels_for_longer():
    assert LARGEST_STIFF > LARGEST
    asked = lambda size, method: too_large(  # noqa: E731
        SimpleNamespace(size=size, layered=False), get_method(method), torch.float64, False
    )
    assert asked(LARGEST, "tsit5") is None and asked(LARGEST_STIFF, "kvaerno5") is None
    assert f"{LARGEST + 1} scalar statements, more than {LARGEST}" in asked(LARGEST + 1, "tsit5")
    assert f"{LARGEST_STIFF + 1} scalar statements, more than {LARGEST_STIFF}" in asked(LARGEST_STIFF + 1, "auto")
