# SPDX-License-Identifier: Apache-2.0
r"""A pendulum with friction, whose angle is measured.

.. math::
    \frac{d\theta}{dt} = \omega, \qquad \frac{d\omega}{dt} = -\frac{g}{l} \sin\theta - \kappa\, \omega

========  ===========================================  ==========  ========================
symbol    meaning                                      unit        prior
========  ===========================================  ==========  ========================
theta     angle from below                             rad
omega     its rate                                     rad / s
length    l                                            m           LogNormal(0, 0.5)
friction  kappa, rate at which a swing loses momentum  1 / s       LogNormal(-2, 1)
g         gravity                                      m / s^2     9.81
z0        (theta, omega) at the first time             rad, rad/s  Normal(0, (1, 3))
sigma     standard error of the angle                  rad         LogNormal(-2, 1)
========  ===========================================  ==========  ========================

Every angle, the first too, is observed as Normal(theta(t), sigma). Without friction omega^2 / 2 - (g / l) cos theta is
constant. Videos of such pendulums are in `pendulum_pixels`.

References:
    Landau, L. D. and Lifshitz, E. M. (1976). Mechanics, 3rd ed., sections 11 and 25.
"""

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.models.systems.experiment import plan_experiment
from pyro_latentde.models.systems.simulation import Simulation, draw_simulation, fill_parameters
from pyro_latentde.sites.observe_site import observe
from pyro_latentde.sites.ode_site import ode
from pyro_latentde.solve.integrate import odesolve

__all__ = ["OBSERVED", "PARAMETERS", "STATES", "model", "simulate", "vector_field"]

STATES = ("theta", "omega")
OBSERVED = ("theta",)
PARAMETERS = {"length": 1.0, "friction": 0.1}
GRAVITY = 9.81  # m / s^2


def vector_field(t: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """dy/dt.

    Args:
        t: time (s), scalar; the equations do not depend on it.
        y: (2,), angle (rad) and its rate (rad/s).
        p: length (m) and friction (1/s), scalars.

    Returns:
        (2,), rad/s and rad/s^2.
    """
    theta, omega = y[0], y[1]
    return torch.stack([omega, -GRAVITY / p["length"] * torch.sin(theta) - p["friction"] * omega])


def model(series: Series | None = None, times: Tensor | None = None) -> Tensor:
    """Pyro model with the sites length, friction, z0 (2,), sigma, z (T, 2) and obs (T, 1).

    Several series are repeats of one experiment: they share parameters and start, and z is (N, T, 2), obs (N, T, 1),
    in a plate "series".

    Args:
        series: N series of the angle (rad), at times (N, T) (s).
        times: (T,) (s), to draw obs there instead of scoring the series; z0 stays at the first time of `series`, if
            one is given.

    Returns:
        The values of obs.

    Raises:
        ValueError: neither series nor times.

    Example:
        >>> import torch
        >>> from pyro_latentde.models.systems import pendulum
        >>> pendulum.model(times=torch.linspace(0, 5, 11)).shape
        torch.Size([11, 1])
    """
    times, t0, observed, plate = plan_experiment(series, times)
    p = {
        "length": pyro.sample("length", dist.LogNormal(times.new_tensor(0.0), 0.5)),
        "friction": pyro.sample("friction", dist.LogNormal(times.new_tensor(-2.0), 1.0)),
    }
    z0 = pyro.sample("z0", dist.Normal(times.new_zeros(2), times.new_tensor([1.0, 3.0])).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(times.new_tensor(-2.0), 1.0))
    with plate:
        z = ode("z", vector_field, z0, times, p, t0=t0, states=STATES)
        error = sigma[..., None, None]  # the same at all times
        return observe("obs", lambda z: dist.Normal(z[..., :1], error), observed, z)


def simulate(
    times: Tensor | None = None,
    *,
    parameters: Mapping[str, float] | None = None,
    z0: tuple[float, float] = (1.0, 0.0),
    sigma: float = 0.05,
    num_series: int = 1,
    missing: float = 0.0,
    seed: int = 0,
) -> Simulation:
    """Simulated measurements of the angle.

    Args:
        times: (T,) or (N, T) (s); by default 51 from 0 to 10. The earliest is that of `z0`.
        parameters: some of length (m), friction (1/s); the others as in `PARAMETERS`.
        z0: angle and its rate at the start (rad, rad/s).
        sigma: standard error (rad).
        num_series: number N of repeats.
        missing: probability that a measurement is missing.
        seed: of the noise and the gaps.

    Returns:
        Simulation of N series, with the truth by site of `model`.

    Raises:
        ValueError: unknown parameter, or `missing` no probability below 1.

    Example:
        >>> from pyro_latentde.models.systems import pendulum
        >>> pendulum.simulate(seed=1).series
        Series(1 series, 51 times, 1 values (theta), 51 observed, 0 missing)
    """
    p = fill_parameters(parameters, PARAMETERS)
    start, error = torch.tensor(z0, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)

    def solution(times: Tensor) -> Tensor:
        return odesolve(vector_field, start, times, p, t0=times.min(), rtol=1e-10, atol=1e-10).ys

    return draw_simulation(
        torch.linspace(0.0, 10.0, 51, dtype=torch.float64) if times is None else times,
        solution,
        lambda z, noise: (z + error * noise)[..., :1],
        names=OBSERVED,
        truth={**p, "z0": start, "sigma": error},
        num_series=num_series,
        missing=missing,
        seed=seed,
    )
