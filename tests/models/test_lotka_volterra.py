# SPDX-License-Identifier: Apache-2.0
"""Lotka-Volterra: equations, log-density of the lynx-hare model against SciPy, simulator."""

import numpy as np
import pyro
import pytest
import scipy.integrate
import scipy.stats
import torch
from pyro import poutine
from torch.testing import assert_close

from pyro_latentde.data import load_lynx_hare
from pyro_latentde.models.systems import lotka_volterra

POINT = {
    "alpha": 0.54686,
    "beta": 0.027747,
    "gamma": 0.80010,
    "delta": 0.024086,
    "z0": [34.035, 5.936],
    "sigma": [0.24806, 0.25102],
}


def tensors(point):
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in point.items()}


def solve(point, times):
    """(T, 2) by DOP853 at 1e-12, with the equations written again."""
    a, b, c, d = (point[name] for name in ("alpha", "beta", "gamma", "delta"))

    def f(t, y):
        return [a * y[0] - b * y[0] * y[1], -c * y[1] + d * y[0] * y[1]]

    span = (times[0], times[-1])
    return scipy.integrate.solve_ivp(f, span, point["z0"], "DOP853", times, rtol=1e-12, atol=1e-12).y.T


def log_density(point, times, values):
    """Log-density of the posteriordb model, normalised priors, by SciPy."""
    total = 0.0
    for names, loc, scale in ((("alpha", "gamma"), 1, 0.5), (("beta", "delta"), 0.05, 0.05)):
        prior = scipy.stats.truncnorm(-loc / scale, np.inf, loc, scale)
        total += sum(prior.logpdf(point[name]) for name in names)
    total += scipy.stats.lognorm(1, scale=10).logpdf(point["z0"]).sum()
    total += scipy.stats.lognorm(1, scale=np.exp(-1)).logpdf(point["sigma"]).sum()
    z = solve(point, times)
    return total + scipy.stats.lognorm(np.array(point["sigma"]), scale=z).logpdf(values).sum()


def log_joint(point, series):
    return poutine.trace(poutine.condition(lotka_volterra.model, point)).get_trace(series).log_prob_sum()


def test_log_density_of_lynx_and_hare():
    series = load_lynx_hare()
    years, pelts = np.arange(1900.0, 1921.0), series.values[0].numpy()
    for change in ({}, {"alpha": 0.7, "sigma": [0.5, 0.4]}, {"z0": [20.0, 8.0]}):
        point = {**POINT, **change}
        ours = log_joint(tensors(point), series)
        assert ours.dtype == torch.float64
        assert ours.item() == pytest.approx(log_density(point, years, pelts), abs=1e-3)


def test_gradient_of_the_log_density():
    """Against central differences of SciPy's solution, so neither the solver nor autograd is shared."""
    series, point = load_lynx_hare(), tensors(POINT)
    leaves = {name: value.clone().requires_grad_() for name, value in point.items()}
    grads = torch.autograd.grad(log_joint(leaves, series), list(leaves.values()))
    years, pelts = np.arange(1900.0, 1921.0), series.values[0].numpy()
    for name, grad in zip(leaves, grads, strict=True):
        if grad.dim():
            continue
        step = 1e-5 * POINT[name]
        up, down = (log_density({**POINT, name: POINT[name] + s * step}, years, pelts) for s in (1, -1))
        assert grad.item() == pytest.approx((up - down) / (2 * step), rel=1e-3, abs=1e-2)


def test_sites_and_shapes():
    trace = poutine.trace(lotka_volterra.model).get_trace(load_lynx_hare())
    shapes = {name: tuple(trace.nodes[name]["value"].shape) for name in trace.stochastic_nodes}
    scalars = {name: () for name in ("alpha", "beta", "gamma", "delta")}
    assert shapes == {**scalars, "z0": (2,), "sigma": (2,)}
    assert trace.nodes["z"]["value"].shape == trace.nodes["obs"]["value"].shape == (21, 2)
    assert trace.nodes["obs"]["infer"]["lde_observe"]["states"] == ("hare", "lynx")


def test_prediction_goes_on_from_the_start_of_the_series():
    """Forecast at 1921 to 1925 from the state in 1900, not from the state at the first new time."""
    times = torch.arange(1921.0, 1926.0, dtype=torch.float64)
    model = poutine.condition(lotka_volterra.model, tensors(POINT))
    trace = poutine.trace(model).get_trace(load_lynx_hare(), times=times)
    years = np.concatenate([[1900.0], times.numpy()])
    assert_close(trace.nodes["z"]["value"], torch.as_tensor(solve(POINT, years)[1:]), rtol=1e-4, atol=1e-4)
    assert not trace.nodes["obs"]["is_observed"] and trace.nodes["obs"]["value"].shape == (5, 2)


def test_simulation_has_the_law_of_the_model():
    """Log residuals of 60 series: mean and deviation within 5 standard errors (false alarm 2e-6)."""
    simulation = lotka_volterra.simulate(num_series=60, sigma=(0.3, 0.1), missing=0.2, seed=3)
    truth = {**lotka_volterra.PARAMETERS, "z0": [34.0, 5.9]}
    assert_close(simulation.z[7], torch.as_tensor(solve(truth, np.arange(21.0))), rtol=1e-7, atol=1e-7)
    residual = (simulation.series.values / simulation.z).log()
    for state, sigma in enumerate((0.3, 0.1)):
        seen = residual[..., state][simulation.series.mask[..., state]]
        assert abs(seen.mean().item()) < 5 * sigma / len(seen) ** 0.5
        assert seen.std().item() == pytest.approx(sigma, abs=5 * sigma / (2 * len(seen)) ** 0.5)


def test_first_integral():
    z = lotka_volterra.simulate(torch.linspace(0, 60, 200)).z[0]
    p = lotka_volterra.PARAMETERS
    u, v = z[:, 0], z[:, 1]
    energy = p["delta"] * u - p["gamma"] * u.log() + p["beta"] * v - p["alpha"] * v.log()
    assert (energy - energy[0]).abs().max() < 1e-6


def test_field_and_priors_stay_positive():
    fixed = torch.tensor([0.8 / 0.024, 0.55 / 0.028], dtype=torch.float64)
    rate = lotka_volterra.vector_field(torch.tensor(0.0), fixed, tensors(lotka_volterra.PARAMETERS))
    assert rate.abs().max() < 1e-12
    pyro.set_rng_seed(1)
    traces = [poutine.trace(lotka_volterra.model).get_trace(times=torch.arange(2.0)) for _ in range(20)]
    for trace in traces:
        assert all((trace.nodes[name]["value"] > 0).all() for name in trace.stochastic_nodes)
