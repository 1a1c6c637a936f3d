# SPDX-License-Identifier: Apache-2.0
"""Delayed logistic growth against its closed form in the first two delays, and its cycle."""

import torch
from torch.testing import assert_close

from pyro_latentde.models.systems import delayed_logistic


def test_first_two_delays_in_closed_form():
    """Until tau crowding is that of the history: N0 exp(a t), a = r (1 - N0 / K); until 2 tau it is known, too."""
    r, capacity, tau, start = 0.9, 80.0, 1.3, 30.0
    times = torch.linspace(0.0, 2.6, 14, dtype=torch.float64)
    a = r * (1.0 - start / capacity)
    since = (times - tau).clamp(min=0.0)
    crowding = r * start / (capacity * a) * torch.expm1(a * since)
    expected = start * torch.exp(a * times.clamp(max=tau) + r * since - crowding)
    parameters = {"r": r, "K": capacity, "tau": tau}
    assert_close(
        delayed_logistic.simulate(times, parameters=parameters, z0=(start,)).z[0, :, 0], expected, rtol=1e-8, atol=0
    )


def test_it_cycles_beyond_the_bifurcation_and_settles_below_it():
    """r tau = 1.8 has a cycle of a little over four delays; r tau = 1.2 comes to rest at K."""
    times = torch.arange(0.0, 150.0, 0.05, dtype=torch.float64)
    z = delayed_logistic.simulate(times).z[0, 2000:, 0]
    peaks = ((z[1:-1] > z[:-2]) & (z[1:-1] > z[2:])).nonzero()[:, 0]
    period = 0.05 * float((peaks[-1] - peaks[0]) / (len(peaks) - 1))
    assert 4.0 < period / delayed_logistic.PARAMETERS["tau"] < 4.3
    rest = delayed_logistic.simulate(times, parameters={"r": 0.8}).z[0, -1, 0]
    assert abs(float(rest) - 100.0) < 0.1
