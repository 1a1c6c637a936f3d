# SPDX-License-Identifier: Apache-2.0
"""Lorenz's equations: the way back is not the way there, so only the discrete gradient is one.

The flow contracts volumes by exp(-13.7 t): solved backwards, an error of 1e-12 grows by up to exp(14.6 t). A continuous
adjoint finds the trajectory again by solving it backwards; the discrete gradient goes back over the states that were
stored. The reference are the variational equations, solved forward by SciPy's DOP853 at 1e-13.
"""

import numpy as np
import torch
from ode_fields import tensor
from scipy.integrate import solve_ivp

import pyro_latentde as lde

START = tensor(1.0, 0.0, 0.0)
RATES = tensor(10.0, 28.0, 8 / 3)


def lorenz(t, y, p):
    return torch.stack([p[0] * (y[1] - y[0]), y[0] * (p[1] - y[2]) - y[1], y[0] * y[1] - p[2] * y[2]])


def sensitivities(end):
    """d y(end) / d (sigma, rho, beta), ``(3, 3)``, by dS/dt = J S + df/dp."""
    sigma, rho, beta = RATES.tolist()

    def field(t, z):
        x, y, w = z[:3]
        jacobian = np.array([[-sigma, sigma, 0], [rho - w, -1, -x], [y, x, -beta]])
        explicit = np.diag([y - x, x, -w])
        slope = [sigma * (y - x), x * (rho - w) - y, x * y - beta * w]
        return np.concatenate([slope, (jacobian @ z[3:].reshape(3, 3) + explicit).ravel()])

    start = np.concatenate([START.numpy(), np.zeros(9)])
    found = solve_ivp(field, (0, end), start, method="DOP853", rtol=1e-13, atol=1e-13)
    return torch.from_numpy(found.y[3:, -1].reshape(3, 3).copy())


def gradient_of_x(end, **settings):
    rates = RATES.clone().requires_grad_()
    ys = lde.odesolve(lorenz, START, tensor(0.0, end), rates, **settings).ys
    return torch.autograd.grad(ys[-1, 0], rates)[0]


def test_solved_backwards_misses_the_start():
    end = lde.odesolve(lorenz, START, tensor(0.0, 20.0), RATES, rtol=1e-12, atol=1e-12, max_steps=50_000).ys[-1]
    back = lde.odesolve(
        lorenz, end, tensor(20.0, 0.0), RATES, rtol=1e-12, atol=1e-12, max_steps=20_000, on_failure="nan"
    )
    assert not back.ok or (back.ys[-1] - START).norm() > 1.0


def test_the_discrete_gradient_is_right_where_the_continuous_adjoint_is_not():
    expected = sensitivities(2.0)[0]
    for engine in ("fused", "torch"):
        discrete = gradient_of_x(2.0, rtol=1e-8, atol=1e-8, engine=engine)
        torch.testing.assert_close(discrete, expected, rtol=1e-6, atol=0)
    continuous = gradient_of_x(2.0, rtol=1e-8, atol=1e-8, gradient="adjoint")
    assert (continuous - expected).norm() > expected.norm()  # off by more than its own size


def test_the_discrete_gradient_stays_right_as_far_as_the_trajectory_does():
    for end, error in ((5.0, 1e-7), (10.0, 1e-6), (15.0, 1e-6)):
        torch.testing.assert_close(
            gradient_of_x(end, rtol=1e-10, atol=1e-10), sensitivities(end)[0], rtol=error, atol=0
        )
