# SPDX-License-Identifier: Apache-2.0
r"""Logistic growth, and a template: copy this file to make a system of your own.

.. math::
    \frac{dy}{dt} = r\, y \left(1 - \frac{y}{K}\right), \qquad
    y(t) = \frac{K}{1 + (K / y_0 - 1)\, e^{-r (t - t_0)}}

======  ============================================  =========  ======================
symbol  meaning                                       unit       prior
======  ============================================  =========  ======================
y       population                                    thousands
r       growth rate while there are few               1 / day    LogNormal(-1, 1)
K       capacity, at which growth ends                thousands  LogNormal(log 100, 1)
z0      (y,) at the first time                        thousands  LogNormal(log 10, 1)
sigma   relative error of the counts                  1          LogNormal(-1, 1)
======  ============================================  =========  ======================

Every row, the first too, is observed as LogNormal(log y(t), sigma).

What to change, from top to bottom: this text (the first line is what `pyro-latentde systems` prints), STATES and
PARAMETERS, the vector field, the priors and the law of the observations in `model`, and the same law in `simulate`.
A start, parameters and errors of other names are fine: sites are called as you like.

References:
    Verhulst, P.-F. (1838). Notice sur la loi que la population suit dans son accroissement. Correspondance
    mathematique et physique 10.
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
from pyro_latentde.sites.observe_site import observe
from pyro_latentde.sites.ode_site import ode
from pyro_latentde.solve.integrate import odesolve

__all__ = ["PARAMETERS", "STATES", "model", "simulate", "vector_field"]

# The coordinates of the state, in the order of the vector field. They name plots, tables and the columns of a CSV file.
# Where not the states themselves are observed, name the columns: OBSERVED = ("concentration",), as in
# pk_one_compartment.py.
STATES = ("population",)

# What `simulate` takes for the parameters that are not given to it. Inference never looks at these.
PARAMETERS = {"r": 0.5, "K": 100.0}


def vector_field(t: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """dy/dt.

    Args:
        t: time (day), scalar; the equation does not depend on it.
        y: (1,), population (thousands).
        p: r (1/day) and K (thousands), scalars.

    Returns:
        (1,), thousands per day.
    """
    # Written for one point in time of one series: `t` is a scalar, `y` a vector of as many numbers as STATES, each
    # parameter a scalar. Chains, particles and series are added by the solver, so no dimension in front need be
    # thought of. Use torch operations, and put the rates together with torch.stack: the field is compiled, and an
    # assignment such as dy[0] = ... would not be differentiable everywhere.
    population = y[0]
    return torch.stack([p["r"] * population * (1.0 - population / p["K"])])


def model(series: Series | None = None, times: Tensor | None = None) -> Tensor:
    """Pyro model with the sites r, K, z0 (1,), sigma (1,), z (T, 1) and obs (T, 1).

    Several series are repeats of one experiment: they share parameters and start, and z and obs are (N, T, 1)
    in a plate "series".

    Args:
        series: N series of the population (thousands), at times (N, T) (day).
        times: (T,) (day), to draw obs there instead of scoring the series; z0 stays at the first time of `series`,
            if one is given.

    Returns:
        The values of obs.

    Raises:
        ValueError: neither series nor times.

    Example:
        >>> import torch
        >>> from pyro_latentde.models.systems import template
        >>> template.model(times=torch.linspace(0, 5, 11)).shape
        torch.Size([11, 1])
    """
    # With a series the model scores it; with times it draws there, which is how predictions are made. The plan says
    # when to solve, at which time the start is, what to score, and which plate several series are in.
    times, t0, observed, plate = plan_experiment(series, times)

    # Priors, in the units of the table above. `times.new_tensor` gives them the data's dtype, float64 unless you ask
    # for less: differential equations want its digits.
    p = {
        "r": pyro.sample("r", dist.LogNormal(times.new_tensor(-1.0), 1.0)),
        "K": pyro.sample("K", dist.LogNormal(times.new_tensor(math.log(100.0)), 1.0)),
    }
    # Vectors are events: `.to_event(1)`. A start that is known is a plain tensor instead of a site, as in sir.py.
    z0 = pyro.sample("z0", dist.LogNormal(times.new_full((1,), math.log(10.0)), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(times.new_full((1,), -1.0), 1.0).to_event(1))

    # What differs between the series goes inside the plate; parameters and start are drawn outside, and shared.
    with plate:
        z = ode("z", vector_field, z0, times, p, t0=t0, states=STATES)  # (*batch, T, 1)
        error = sigma.unsqueeze(-2)  # (*batch, 1, 1), the same at all times
        # The law of the observations, given the states. Missing values are left out by `observe`. positive=True keeps
        # the logarithm from a state that the solver's error has made zero or less; drop it for states of any sign.
        return observe("obs", lambda z: dist.LogNormal(z.log(), error), observed, z, positive=True)


def simulate(
    times: Tensor | None = None,
    *,
    parameters: Mapping[str, float] | None = None,
    z0: tuple[float] = (5.0,),
    sigma: tuple[float] = (0.1,),
    num_series: int = 1,
    missing: float = 0.0,
    seed: int = 0,
) -> Simulation:
    """Simulated counts.

    Args:
        times: (T,) or (N, T) (day); by default 0, 1, ..., 20. The earliest is that of `z0`.
        parameters: some of r (1/day), K (thousands); the others as in `PARAMETERS`.
        z0: population at the start (thousands).
        sigma: relative error.
        num_series: number N of repeats.
        missing: probability that a count is missing.
        seed: of the noise and the gaps.

    Returns:
        Simulation of N series, with the truth by site of `model`.

    Raises:
        ValueError: unknown parameter, or `missing` no probability below 1.

    Example:
        >>> from pyro_latentde.models.systems import template
        >>> template.simulate(num_series=3, seed=1).series
        Series(3 series, up to 21 times, 1 values (population), 63 observed, 0 missing)
    """
    p = fill_parameters(parameters, PARAMETERS)
    start, error = torch.tensor([z0, sigma], dtype=torch.float64)

    # Data should be more exact than what is fitted to them, hence the tolerances.
    def solution(times: Tensor) -> Tensor:
        return odesolve(vector_field, start, times, p, t0=times.min(), rtol=1e-10, atol=1e-10).ys

    return draw_simulation(
        torch.arange(21.0) if times is None else times,
        solution,
        lambda z, noise: z * torch.exp(error * noise),  # `noise` is standard normal, of the shape of the states
        names=STATES,
        truth={**p, "z0": start, "sigma": error},  # a value for every site that `model` draws
        num_series=num_series,
        missing=missing,
        seed=seed,
    )
