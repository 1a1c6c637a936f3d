# SPDX-License-Identifier: Apache-2.0
"""What is known of the pendulum, the neuron, convection and logistic growth without solving."""

import math

import pytest
import scipy.special
import scipy.stats
import torch
from pyro import poutine
from torch.testing import assert_close

from pyro_latentde.models.systems import fitzhugh_nagumo, lorenz, pendulum, template


def tensors(values):
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def test_energy_of_a_pendulum():
    times = torch.linspace(0.0, 20.0, 201)
    for friction in (0.0, 0.2):
        settings = {"parameters": {"length": 0.6, "friction": friction}, "z0": (2.0, 1.0)}
        theta, omega = pendulum.simulate(times, **settings).z[0].unbind(-1)
        energy = 0.5 * omega**2 - 9.81 / 0.6 * theta.cos()
        if friction == 0:
            assert (energy - energy[0]).abs().max() < 1e-6
        else:  # dE/dt = -friction omega^2
            lost = friction * torch.trapezoid(omega**2, dx=0.1)
            assert (energy[0] - energy[-1]).item() == pytest.approx(lost.item(), rel=0.01)


def test_period_of_a_pendulum():
    """4 sqrt(l / g) K(sin(A / 2)): after it a pendulum let go at the angle A is back."""
    period = 4 * math.sqrt(1.3 / 9.81) * scipy.special.ellipk(math.sin(0.9) ** 2)
    settings = {"parameters": {"length": 1.3, "friction": 0.0}, "z0": (1.8, 0.0)}
    z = pendulum.simulate([0.0, period / 2, period], **settings).z[0]
    assert_close(z[:, 0], torch.tensor([1.8, -1.8, 1.8]).double(), rtol=1e-7, atol=1e-7)


def test_angle_alone_is_scored():
    simulation = pendulum.simulate(missing=0.3, seed=4)
    trace = poutine.trace(poutine.condition(pendulum.model, simulation.truth)).get_trace(simulation.series)
    density = scipy.stats.norm(simulation.z[..., :1], 0.05).logpdf(simulation.series.values)
    expected = density[simulation.series.mask.numpy()].sum()
    assert trace.log_prob_sum(lambda name, _: name == "obs").item() == pytest.approx(expected, abs=1e-2)


def test_neuron_at_rest_and_firing():
    """a = .2, b = .2, c = 3 has a limit cycle, to which all paths come; a = 1.2 comes to rest where the field is 0."""
    times = torch.linspace(0.0, 200.0, 2001)
    late = [fitzhugh_nagumo.simulate(times, z0=z0).z[0, -400:, 0] for z0 in ((-1.0, 1.0), (0.3, -0.2))]
    for voltage in late:
        assert 1.9 < voltage.max() < 2.1 and -2.1 < voltage.min() < -1.9
    p = {**fitzhugh_nagumo.PARAMETERS, "a": 1.2}
    rest = fitzhugh_nagumo.simulate(times, parameters=p).z[0, -1]
    assert fitzhugh_nagumo.vector_field(torch.tensor(0.0), rest, tensors(p)).abs().max() < 1e-6


def test_fixed_points_of_convection():
    p, side = tensors(lorenz.PARAMETERS), math.sqrt(8 / 3 * 27)
    for sign in (-1, 1):
        point = torch.tensor([sign * side, sign * side, 27.0], dtype=torch.float64)
        assert lorenz.vector_field(torch.tensor(0.0), point, p).abs().max() < 1e-12
    # below the onset of convection everything comes to rest
    rest = lorenz.simulate([0.0, 100.0], parameters={"rho": 0.5}).z[0, -1]
    assert rest.abs().max() < 1e-8


def test_volume_shrinks_at_a_known_rate():
    """Divergence of the field: -(sigma + 1 + beta), everywhere."""
    p, y = tensors({"sigma": 9.0, "rho": 20.0, "beta": 2.0}), torch.tensor([1.0, -4.0, 7.0], dtype=torch.float64)
    slope = torch.func.jacfwd(lambda y: lorenz.vector_field(torch.tensor(0.0), y, p))(y)
    assert slope.trace().item() == pytest.approx(-12.0)


def test_model_is_as_exact_as_chaos_wants():
    """After 20 units of time errors have grown by 1e7: model and simulator, of other tolerances, agree to 1 % of the
    noise; float32 data are solved in float64."""
    simulation = lorenz.simulate()  # at times that float32 does not hold exactly: those of its data differ a little
    model = poutine.condition(lorenz.model, simulation.truth)
    z = poutine.trace(model).get_trace(simulation.series).nodes["z"]["value"]
    assert (z - simulation.z[0]).abs().max() < 0.005
    short = poutine.trace(model).get_trace(simulation.series.to(torch.float32)).nodes["z"]["value"]
    assert short.dtype == torch.float64 and (short[:5] - z[:5]).abs().max() < 1e-4
    # and it is chaos: a start that is off by 1e-6 ends somewhere else
    other = lorenz.simulate(z0=(-8.0 + 1e-6, 8.0, 27.0)).z
    assert (other - simulation.z)[0, -1].norm() > 1.0


def test_logistic_growth_is_the_closed_form():
    times = torch.linspace(3.0, 15.0, 30, dtype=torch.float64)
    z = template.simulate(times, parameters={"r": 0.6, "K": 40.0}, z0=(2.0,)).z[0, :, 0]
    assert_close(z, 40 / (1 + 19 * torch.exp(-0.6 * (times - 3))), rtol=1e-8, atol=1e-8)
