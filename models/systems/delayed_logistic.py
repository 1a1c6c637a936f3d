# SPDX-License-Identifier: Apache-2.0
r"""Delayed logistic growth: Hutchinson's equation.

.. math::
    \frac{dN}{dt} = r N(t) \left(1 - \frac{N(t - \tau)}{K}\right), \qquad N(t) = N_0 \text{ for } t \le t_0

======  ==============================================  ===========  ====================
symbol  meaning                                         unit         prior
======  ==============================================  ===========  ====================
N       size of the population                          individuals
r       growth rate of a small population               1 / month    LogNormal(0, 0.3)
K       size at which it neither grows nor shrinks      individuals  LogNormal(log 100, 1)
tau     delay: how old the crowding is that counts      month        LogNormal(0, 0.5)
z0      N up to the first time                          individuals  LogNormal(log 50, 1)
sigma   relative error of the counts                    1            LogNormal(-2, 1)
======  ==============================================  ===========  ====================

Every row, the first too, is observed as LogNormal(log N(t), sigma). K is stable where r tau < pi / 2; beyond it the
population runs in cycles, of a period of about 4 tau.

References:
    Hutchinson, G. E. (1948). Circular causal systems in ecology. Annals of the New York Academy of Sciences 50.
    May, R. M. (1974). Stability and Complexity in Model Ecosystems, 2nd ed., Princeton.
"""

import math
from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.models.systems.experiment import plan_experiment
from pyro_latentde.models.systems.simulation import Simulation, draw_simulation, fill_parameters
from pyro_latentde.sites.dde_site import dde
from pyro_latentde.sites.observe_site import observe
from pyro_latentde.solve.delays.integrate import ddesolve

__all__ = ["PARAMETERS", "STATES", "model", "simulate", "vector_field"]

STATES = ("population",)
PARAMETERS = {"r": 1.2, "K": 100.0, "tau": 1.5}  # r tau = 1.8: a cycle of six months


def vector_field(t: Tensor, y: Tensor, lagged: tuple[Tensor, ...], p: Mapping[str, Tensor]) -> Tensor:
    """dN/dt.

    Args:
        t: time (month), scalar; the equation does not depend on it.
        y: (1,), the population now.
        lagged: (1,), the population a delay ago, alone in a tuple.
        p: r, K, scalars.

    Returns:
        (1,), individuals per month.
    """
    (now,), (before,) = y, lagged[0]
    return torch.stack([p["r"] * now * (1.0 - before / p["K"])])


def model(series: Series | None = None, times: Tensor | None = None) -> Tensor:
    """Pyro model with the sites r, K, tau, z0 (1,), sigma (1,), z (T, 1) and obs (T, 1).

    Several series are repeats of one experiment: they share parameters and start, and z and obs are (N, T, 1)
    in a plate "series".

    Args:
        series: N series of counts (individuals), at times (N, T) (month).
        times: (T,) (month), to draw obs there instead of scoring the series; z0 stays at the first time of
            `series`, if one is given.

    Returns:
        The values of obs.

    Raises:
        ValueError: neither series nor times.

    Example:
        >>> import torch
        >>> from pyro_latentde.models.systems import delayed_logistic
        >>> delayed_logistic.model(times=torch.linspace(0, 5, 11)).shape
        torch.Size([11, 1])
    """
    times, t0, observed, plate = plan_experiment(series, times)
    p = {
        "r": pyro.sample("r", dist.LogNormal(times.new_tensor(0.0), 0.3)),
        "K": pyro.sample("K", dist.LogNormal(times.new_tensor(math.log(100.0)), 1.0)),
    }
    tau = pyro.sample("tau", dist.LogNormal(times.new_tensor(0.0), 0.5))
    z0 = pyro.sample("z0", dist.LogNormal(times.new_full((1,), math.log(50.0)), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(times.new_full((1,), -2.0), 1.0).to_event(1))
    with plate:
        z = dde("z", vector_field, z0, [tau], times, p, t0=t0, states=STATES)
        error = sigma.unsqueeze(-2)  # (*batch, 1, 1), the same at all times
        return observe("obs", lambda z: dist.LogNormal(z.log(), error), observed, z, positive=True)


def simulate(
    times: Tensor | None = None,
    *,
    parameters: Mapping[str, float] | None = None,
    z0: tuple[float] = (50.0,),
    sigma: tuple[float] = (0.1,),
    num_series: int = 1,
    missing: float = 0.0,
    seed: int = 0,
) -> Simulation:
    """Simulated counts.

    Args:
        times: (T,) or (N, T) (month); by default 0, 0.5, ..., 20. The earliest is where the history ends.
        parameters: some of r, K, tau; the others as in `PARAMETERS`.
        z0: population up to the first time (individuals).
        sigma: relative error.
        num_series: number N of repeats.
        missing: probability that a count is missing.
        seed: of the noise and the gaps.

    Returns:
        Simulation of N series, with the truth by site of `model`.

    Raises:
        ValueError: unknown parameter, or `missing` no probability below 1.

    Example:
        >>> from pyro_latentde.models.systems import delayed_logistic
        >>> delayed_logistic.simulate(num_series=3, seed=1).series
        Series(3 series, up to 41 times, 1 values (population), 123 observed, 0 missing)
    """
    p = fill_parameters(parameters, PARAMETERS)
    start, error = torch.tensor(z0, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)

    def solution(times: Tensor) -> Tensor:
        return ddesolve(vector_field, start, p["tau"], times, p, t0=times.min(), rtol=1e-10, atol=1e-10).ys

    return draw_simulation(
        torch.arange(41.0) / 2 if times is None else times,
        solution,
        lambda z, noise: z * torch.exp(error * noise),
        names=STATES,
        truth={**p, "z0": start, "sigma": error},
        num_series=num_series,
        missing=missing,
        seed=seed,
    )
