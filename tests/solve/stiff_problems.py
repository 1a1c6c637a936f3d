# SPDX-License-Identifier: Apache-2.0
"""The usual stiff test problems: fields in torch and NumPy alike, parameters, start, output times.

References:
    Hairer, Wanner, Solving Ordinary Differential Equations II, 2nd ed., Springer 1996, IV.10.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp


class Problem(NamedTuple):
    """dy/dt = f(t, y, p) from y0 at the first time; f returns the components as a list."""

    components: Any
    p: Any
    y0: list[float]
    times: np.ndarray

    def f(self, t, y, p):
        return torch.stack(self.components(t, y, p))

    def reference(self, rtol=1e-10, atol=1e-13):
        """SciPy's Radau at a tight tolerance, (T, D)."""
        span = (self.times[0], self.times[-1])
        field = lambda t, y: np.array(self.components(t, y, self.p))  # noqa: E731
        return solve_ivp(field, span, self.y0, "Radau", self.times, rtol=rtol, atol=atol).y.T


def _rober(t, y, k):
    a, b, c = k[0] * y[0], k[1] * y[1] * y[1], k[2] * y[1] * y[2]
    return [c - a, a - b - c, b]


def _van_der_pol(t, y, mu):
    """In the time in which the slow parts last for about mu."""
    return [y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]]


def _van_der_pol_slow(t, y, epsilon):
    """In units of mu; epsilon is 1 / mu^2."""
    return [y[1], ((1 - y[0] ** 2) * y[1] - y[0]) / epsilon]


def _hires(t, y, p):
    r = 280 * y[5] * y[7]
    return [
        -1.71 * y[0] + 0.43 * y[1] + 8.32 * y[2] + 0.0007,
        1.71 * y[0] - 8.75 * y[1],
        -10.03 * y[2] + 0.43 * y[3] + 0.035 * y[4],
        8.32 * y[1] + 1.71 * y[2] - 1.12 * y[3],
        -1.745 * y[4] + 0.43 * y[5] + 0.43 * y[6],
        -r + 0.69 * y[3] + 1.71 * y[4] - 0.43 * y[5] + 0.69 * y[6],
        r - 1.81 * y[6],
        1.81 * y[6] - r,
    ]


def _orego(t, y, p):
    first = p[0] * (y[1] + y[0] * (1 - p[1] * y[0] - y[1]))
    return [first, (y[2] - (1 + y[0]) * y[1]) / p[0], p[2] * (y[0] - y[2])]


ROBER = Problem(_rober, [0.04, 3e7, 1e4], [1.0, 0.0, 0.0], np.array([0, 0.4, 4, 40, 4e3, 4e5, 4e7, 4e9, 1e11]))
VAN_DER_POL = Problem(_van_der_pol, 1e3, [2.0, 0.0], np.linspace(0, 2000, 9))
PROBLEMS = {
    "rober": ROBER,
    "van der pol, 1e3": VAN_DER_POL,
    "van der pol, 1e6": Problem(_van_der_pol_slow, 1e-6, [2.0, 0.0], np.linspace(0, 2, 9)),
    "hires": Problem(_hires, 1.0, [1.0, 0, 0, 0, 0, 0, 0, 0.0057], np.linspace(0, 321.8122, 9)),
    "orego": Problem(_orego, [77.27, 8.375e-6, 0.161], [1.0, 2.0, 3.0], np.linspace(0, 360, 9)),
}
