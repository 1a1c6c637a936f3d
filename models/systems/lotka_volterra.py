# SPDX-License-Identifier: Apache-2.0
r"""Predator and prey: the Lotka-Volterra equations.

.. math::
    \frac{du}{dt} = (\alpha - \beta v)\, u, \qquad \frac{dv}{dt} = (-\gamma + \delta u)\, v

======  ============================================  ===================  ==============================
symbol  meaning                                       unit                 prior
======  ============================================  ===================  ==============================
u, v    prey and predator (hare and lynx)             thousands
alpha   growth rate of the prey                       1 / year             Normal(1, 0.5), positive
beta    loss rate of the prey, per predator           1 / year / thousand  Normal(0.05, 0.05), positive
gamma   death rate of the predator                    1 / year             Normal(1, 0.5), positive
delta   growth rate of the predator, per prey         1 / year / thousand  Normal(0.05, 0.05), positive
z0      (u, v) at the first time                      thousands            LogNormal(log 10, 1), each
sigma   relative error of the counts, of u and of v   1                    LogNormal(-1, 1), each
======  ============================================  ===================  ==============================

Every row, the first too, is observed as LogNormal(log z(t), sigma). "Positive" is the normal truncated at 0.
Away from the fixed point (gamma / delta, alpha / beta) the populations run in a closed orbit, on which
delta u - gamma log u + beta v - alpha log v is constant.

References:
    Lotka, A. J. (1925). Elements of Physical Biology.
    Volterra, V. (1926). Fluctuations in the abundance of a species considered mathematically. Nature 118.
    posteriordb, `hudson_lynx_hare-lotka_volterra` (the priors).
"""

import math
from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.distributions.truncated_normal import TruncatedNormal
from pyro_latentde.models.systems.experiment import plan_experiment
from pyro_latentde.models.systems.simulation import Simulation, draw_simulation, fill_parameters
from pyro_latentde.sites.observe_site import observe
from pyro_latentde.sites.ode_site import ode
from pyro_latentde.solve.integrate import odesolve

__all__ = ["PARAMETERS", "STATES", "model", "simulate", "vector_field"]

STATES = ("hare", "lynx")
PARAMETERS = {"alpha": 0.55, "beta": 0.028, "gamma": 0.8, "delta": 0.024}  # a cycle of ten years


def vector_field(t: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """dy/dt.

    Args:
        t: time (year), scalar; the equations do not depend on it.
        y: (2,), prey and predator (thousands).
        p: alpha, beta, gamma, delta, scalars.

    Returns:
        (2,), thousands per year.
    """
    u, v = y[0], y[1]
    return torch.stack([(p["alpha"] - p["beta"] * v) * u, (-p["gamma"] + p["delta"] * u) * v])


def model(series: Series | None = None, times: Tensor | None = None) -> Tensor:
    """Pyro model with the sites alpha, beta, gamma, delta, z0 (2,), sigma (2,), z (T, 2) and obs (T, 2).

    Several series are repeats of one experiment: they share parameters and start, and z and obs are (N, T, 2)
    in a plate "series".

    Args:
        series: N series of prey and predator (thousands), at times (N, T) (year).
        times: (T,) (year), to draw obs there instead of scoring the series; z0 stays at the first time of
            `series`, if one is given.

    Returns:
        The values of obs.

    Raises:
        ValueError: neither series nor times.

    Example:
        >>> import pyro
        >>> from pyro_latentde.data import load_lynx_hare
        >>> from pyro_latentde.models.systems import lotka_volterra
        >>> trace = pyro.poutine.trace(lotka_volterra.model).get_trace(load_lynx_hare())
        >>> trace.nodes["z"]["value"].shape
        torch.Size([21, 2])
    """
    times, t0, observed, plate = plan_experiment(series, times)
    p = {
        "alpha": pyro.sample("alpha", TruncatedNormal(times.new_tensor(1.0), 0.5)),
        "beta": pyro.sample("beta", TruncatedNormal(times.new_tensor(0.05), 0.05)),
        "gamma": pyro.sample("gamma", TruncatedNormal(times.new_tensor(1.0), 0.5)),
        "delta": pyro.sample("delta", TruncatedNormal(times.new_tensor(0.05), 0.05)),
    }
    z0 = pyro.sample("z0", dist.LogNormal(times.new_full((2,), math.log(10.0)), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(times.new_full((2,), -1.0), 1.0).to_event(1))
    with plate:
        z = ode("z", vector_field, z0, times, p, t0=t0, states=STATES)
        error = sigma.unsqueeze(-2)  # (*batch, 1, 2), the same at all times
        return observe("obs", lambda z: dist.LogNormal(z.log(), error), observed, z, positive=True)


def simulate(
    times: Tensor | None = None,
    *,
    parameters: Mapping[str, float] | None = None,
    z0: tuple[float, float] = (34.0, 5.9),
    sigma: tuple[float, float] = (0.25, 0.25),
    num_series: int = 1,
    missing: float = 0.0,
    seed: int = 0,
) -> Simulation:
    """Simulated counts.

    Args:
        times: (T,) or (N, T) (year); by default 0, 1, ..., 20. The earliest is that of `z0`.
        parameters: some of alpha, beta, gamma, delta; the others as in `PARAMETERS`.
        z0: prey and predator at the start (thousands).
        sigma: relative errors.
        num_series: number N of repeats.
        missing: probability that a count is missing.
        seed: of the noise and the gaps.

    Returns:
        Simulation of N series, with the truth by site of `model`.

    Raises:
        ValueError: unknown parameter, or `missing` no probability below 1.

    Example:
        >>> from pyro_latentde.models.systems import lotka_volterra
        >>> lotka_volterra.simulate(num_series=3, seed=1).series
        Series(3 series, up to 21 times, 2 values (hare, lynx), 126 observed, 0 missing)
    """
    p = fill_parameters(parameters, PARAMETERS)
    start, error = torch.tensor([z0, sigma], dtype=torch.float64)

    def solution(times: Tensor) -> Tensor:
        return odesolve(vector_field, start, times, p, t0=times.min(), rtol=1e-10, atol=1e-10).ys

    return draw_simulation(
        torch.arange(21.0) if times is None else times,
        solution,
        lambda z, noise: z * torch.exp(error * noise),
        names=STATES,
        truth={**p, "z0": start, "sigma": error},
        num_series=num_series,
        missing=missing,
        seed=seed,
    )
