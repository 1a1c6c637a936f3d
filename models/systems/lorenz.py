# SPDX-License-Identifier: Apache-2.0
r"""Convection between two plates: the Lorenz equations, chaotic where rho is large.

.. math::
    \frac{dx}{dt} = \sigma (y - x), \qquad \frac{dy}{dt} = x (\rho - z) - y, \qquad \frac{dz}{dt} = x y - \beta z

=======  ==================================================  =====  =================================
symbol   meaning                                             unit   prior
=======  ==================================================  =====  =================================
x        speed of the convection                             1
y, z     temperature: across rolls, and its bend in height   1
sigma    Prandtl number of the fluid (water: 7)              1      LogNormal(log 7, 0.5)
rho      heating, in units of where convection begins        1      LogNormal(log 20, 0.5)
beta     shape of the rolls, 4 / (1 + a^2), wave number a    1      LogNormal(log 2, 0.5)
z0       (x, y, z) at the first time                         1      Normal((0, 0, 20), (10, 10, 15))
noise    standard error of all three                         1      LogNormal(-1, 1)
=======  ==================================================  =====  =================================

Every row, the first too, is observed as Normal(z(t), noise); time has no unit either. At the values of `simulate` two
paths that start close to each other part by a factor of e in 1.1 units of time on average, and by 1e7 in 20 units. So
sharp is the posterior of a start and of rho, in its narrowest direction, among countless other modes: the model
solves to 1e-11, and no sampler finds it from afar. `infer.lengthen` begins with the first few observations and adds one
after the other, which takes it 5 units of time far. In 20 units the posterior is a sheet that bends by very many times
its thickness, and no trajectory of Hamiltonian Monte Carlo gets along it; of segments, whose starts may be off by a
little, it does. From what the first six observations say, go on with four segments to each observation::

    sim = lorenz.simulate()
    series, times, shooting = sim.series, sim.series.times[0], Shooting(1, 0.1, parts=4)
    draws = lde.infer.lengthen(lorenz.model, series.window(0, 6)).draws()
    rates = {name: draws[name] for name in lorenz.PARAMETERS}
    draws["shots"] = shooting.starts(lorenz.vector_field, draws["z0"], times[:6], rates, rtol=1e-10, atol=1e-10)
    few = {"num_particles": 48, "num_moves": 3, "num_chains": 48, "num_warmup": 5, "num_samples": 2}
    found = lde.infer.lengthen(lorenz.model, series, shooting=shooting, start=draws, horizons=times[5:], **few)
    posterior = lde.infer.ensemble_hmc(lorenz.model, series, shooting=shooting, start=found, num_chains=48)

References:
    Lorenz, E. N. (1963). Deterministic nonperiodic flow. Journal of the Atmospheric Sciences 20.
"""

import math
from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.models.shooting import Shooting
from pyro_latentde.models.systems.experiment import plan_experiment
from pyro_latentde.models.systems.simulation import Simulation, draw_simulation, fill_parameters
from pyro_latentde.sites.observe_site import observe
from pyro_latentde.sites.ode_site import ode
from pyro_latentde.solve.integrate import odesolve

__all__ = ["PARAMETERS", "STATES", "model", "simulate", "vector_field"]

STATES = ("x", "y", "z")
PARAMETERS = {"sigma": 10.0, "rho": 28.0, "beta": 8.0 / 3.0}  # Lorenz's own
PRECISE = {"method": "dopri8", "rtol": 1e-11, "atol": 1e-11}  # of which chaos leaves 1e-3 after 20 units of time


def vector_field(t: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """dy/dt.

    Args:
        t: time (without unit), scalar; the equations do not depend on it.
        y: (3,), the states x, y, z (without unit).
        p: sigma, rho, beta, scalars.

    Returns:
        (3,), per unit of time.
    """
    x, y, z = y[0], y[1], y[2]
    return torch.stack([p["sigma"] * (y - x), x * (p["rho"] - z) - y, x * y - p["beta"] * z])


def model(series: Series | None = None, times: Tensor | None = None, *, shooting: Shooting | None = None) -> Tensor:
    """Pyro model with the sites sigma, rho, beta, z0 (3,), noise, z (T, 3) and obs (T, 3).

    Several series are repeats of one experiment: they share parameters and start, and z and obs are (N, T, 3)
    in a plate "series". All sites are float64, whatever the data are.

    Args:
        series: N series of x, y and z (without unit), at times (N, T).
        times: (T,), to draw obs there instead of scoring the series; z0 stays at the first time of `series`, if one
            is given.
        shooting: segments of the series, with sites shots and continuity; solved to 1e-6.

    Returns:
        The values of obs.

    Raises:
        ValueError: neither series nor times.

    Example:
        >>> import torch
        >>> from pyro_latentde.models.systems import lorenz
        >>> lorenz.model(times=torch.linspace(0, 5, 11)).shape
        torch.Size([11, 3])
    """
    times, t0, observed, plate = plan_experiment(series, times)
    times = times.double()  # chaos sees the rounding of anything shorter
    p = {
        "sigma": pyro.sample("sigma", dist.LogNormal(times.new_tensor(math.log(7.0)), 0.5)),
        "rho": pyro.sample("rho", dist.LogNormal(times.new_tensor(math.log(20.0)), 0.5)),
        "beta": pyro.sample("beta", dist.LogNormal(times.new_tensor(math.log(2.0)), 0.5)),
    }
    centre, width = times.new_tensor([[0.0, 0.0, 20.0], [10.0, 10.0, 15.0]])
    z0 = pyro.sample("z0", dist.Normal(centre, width).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(times.new_tensor(-1.0), 1.0))
    with plate:
        settings = PRECISE if shooting is None else {"rtol": 1e-6, "atol": 1e-6}
        z = ode("z", vector_field, z0, times, p, t0=t0, states=STATES, shooting=shooting, **settings)
        error = noise[..., None, None]  # the same of all states at all times
        return observe("obs", lambda z: dist.Normal(z, error), observed, z)


def simulate(
    times: Tensor | None = None,
    *,
    parameters: Mapping[str, float] | None = None,
    z0: tuple[float, float, float] = (-8.0, 8.0, 27.0),
    noise: float = 0.5,
    num_series: int = 1,
    missing: float = 0.0,
    seed: int = 0,
) -> Simulation:
    """Simulated measurements.

    Args:
        times: (T,) or (N, T); by default 20 from 0 to 20. The earliest is that of `z0`.
        parameters: some of sigma, rho, beta; the others as in `PARAMETERS`.
        z0: x, y and z at the start; by default on the attractor, where paths part from the first moment on.
        noise: standard error.
        num_series: number N of repeats.
        missing: probability that a measurement is missing.
        seed: of the noise and the gaps.

    Returns:
        Simulation of N series, with the truth by site of `model`.

    Raises:
        ValueError: unknown parameter, or `missing` no probability below 1.

    Example:
        >>> from pyro_latentde.models.systems import lorenz
        >>> lorenz.simulate(seed=1).series
        Series(1 series, 20 times, 3 values (x, y, z), 60 observed, 0 missing)
    """
    p = fill_parameters(parameters, PARAMETERS)
    start, error = torch.tensor(z0, dtype=torch.float64), torch.tensor(noise, dtype=torch.float64)

    def solution(times: Tensor) -> Tensor:
        return odesolve(vector_field, start, times, p, t0=times.min(), method="dopri8", rtol=1e-13, atol=1e-13).ys

    return draw_simulation(
        torch.linspace(0.0, 20.0, 20, dtype=torch.float64) if times is None else times,
        solution,
        lambda z, normal: z + error * normal,
        names=STATES,
        truth={**p, "z0": start, "noise": error},
        num_series=num_series,
        missing=missing,
        seed=seed,
    )
