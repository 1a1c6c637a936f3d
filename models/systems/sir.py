# SPDX-License-Identifier: Apache-2.0
r"""An epidemic: the SIR model of Kermack and McKendrick, of which those who are ill are counted.

.. math::
    \frac{dS}{dt} = -\beta \frac{S I}{N}, \qquad \frac{dI}{dt} = \beta \frac{S I}{N} - \gamma I, \qquad
    \frac{dR}{dt} = \gamma I

=============  ================================================  =======  ==========================
symbol         meaning                                           unit     prior
=============  ================================================  =======  ==========================
S, I, R        susceptible, infected, removed                    persons
N              population, S + I + R, constant                   persons  known
beta           infections of one infected among susceptibles     1 / day  Normal(2, 1), positive
gamma          rate of removal                                   1 / day  Normal(0.4, 0.5), positive
phi_inv        overdispersion of the counts                      1        Exponential(5)
R0             beta / gamma, infections by the first case        1
recovery_time  1 / gamma, mean time of being infected            day
=============  ================================================  =======  ==========================

Counted is who is ill: NegativeBinomial of mean I(t) and variance I + phi_inv I^2. "Positive" is the normal truncated
at 0. The start (N - infected, infected, 0) at the time t0 is known. R0 and recovery_time are deterministic sites.

References:
    Kermack, W. O. and McKendrick, A. G. (1927). A contribution to the mathematical theory of epidemics. Proceedings
    of the Royal Society A 115.
    Grinsztajn, L. et al. (2021). Bayesian workflow for disease transmission modeling in Stan. Statistics in Medicine
    40 (the priors).
"""

from collections.abc import Mapping

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.distributions.truncated_normal import TruncatedNormal
from pyro_latentde.models.systems.experiment import plan_experiment
from pyro_latentde.models.systems.simulation import Simulation, draw_simulation, fill_parameters, random_stream
from pyro_latentde.sites.observe_site import observe
from pyro_latentde.sites.ode_site import ode
from pyro_latentde.solve.integrate import odesolve

__all__ = ["OBSERVED", "PARAMETERS", "STATES", "model", "simulate", "vector_field"]

STATES = ("susceptible", "infected", "removed")
OBSERVED = ("in_bed",)
PARAMETERS = {"beta": 1.7, "gamma": 0.5}  # influenza in a boarding school


def vector_field(t: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """dy/dt; the sum of the states is the population and stays as it is.

    Args:
        t: time (day), scalar; the equations do not depend on it.
        y: (3,), susceptible, infected and removed (persons).
        p: beta, gamma (1/day), scalars.

    Returns:
        (3,), persons per day.
    """
    susceptible, infected, removed = y[0], y[1], y[2]
    population = susceptible + infected + removed
    infections = p["beta"] * susceptible * infected / population
    removals = p["gamma"] * infected
    return torch.stack([-infections, infections - removals, removals])


def model(
    series: Series | None = None,
    times: Tensor | None = None,
    *,
    population: float = 763.0,
    infected: float = 1.0,
    t0: float = 0.0,
) -> Tensor:
    """Pyro model with the sites beta, gamma, phi_inv, R0, recovery_time, z (T, 3) and obs (T, 1).

    Several series are repeats of one outbreak: they share parameters and start, and z is (N, T, 3), obs (N, T, 1),
    in a plate "series".

    Args:
        series: N series of the number of those who are ill (persons), at times (N, T) (day).
        times: (T,) (day), to draw obs there instead of scoring the series.
        population: N (persons).
        infected: I at t0 (persons), among susceptibles.
        t0: time of the start (day); no observation is earlier.

    Returns:
        The values of obs.

    Raises:
        ValueError: neither series nor times; or not 0 < infected < population.

    Example:
        >>> import pyro
        >>> from pyro_latentde.data import load_boarding_school
        >>> from pyro_latentde.models.systems import sir
        >>> trace = pyro.poutine.trace(sir.model).get_trace(load_boarding_school())
        >>> trace.nodes["z"]["value"].shape, trace.nodes["obs"]["value"].shape
        (torch.Size([14, 3]), torch.Size([14, 1]))
    """
    times, _, observed, plate = plan_experiment(series, times)
    start = _start(population, infected)
    p = {
        "beta": pyro.sample("beta", TruncatedNormal(times.new_tensor(2.0), 1.0)),
        "gamma": pyro.sample("gamma", TruncatedNormal(times.new_tensor(0.4), 0.5)),
    }
    phi_inv = pyro.sample("phi_inv", dist.Exponential(times.new_tensor(5.0)))
    pyro.deterministic("R0", p["beta"] / p["gamma"])
    pyro.deterministic("recovery_time", 1.0 / p["gamma"])
    with plate:
        z = ode("z", vector_field, p["beta"].new_tensor(start), times, p, t0=times.new_tensor(t0), states=STATES)
        spread = phi_inv[..., None, None]  # the same at all times

        def counts(z: Tensor) -> dist.Distribution:
            return dist.NegativeBinomial(1.0 / spread, logits=(spread * z[..., 1:2]).log())

        return observe("obs", counts, observed, z, positive=True)


def simulate(
    times: Tensor | None = None,
    *,
    parameters: Mapping[str, float] | None = None,
    population: float = 763.0,
    infected: float = 1.0,
    t0: float = 0.0,
    phi_inv: float = 0.1,
    num_series: int = 1,
    missing: float = 0.0,
    seed: int = 0,
) -> Simulation:
    """Simulated counts of those who are ill.

    Args:
        times: (T,) or (N, T) (day); by default 1, 2, ..., 14.
        parameters: some of beta, gamma (1/day); the others as in `PARAMETERS`.
        population: N (persons).
        infected: I at t0 (persons).
        t0: time of the start (day).
        phi_inv: overdispersion, positive.
        num_series: number N of repeats.
        missing: probability that a count is missing.
        seed: of the counts and the gaps.

    Returns:
        Simulation of N series, with the truth by site of `model`.

    Raises:
        ValueError: unknown parameter, `missing` no probability below 1, or not 0 < infected < population.

    Example:
        >>> from pyro_latentde.models.systems import sir
        >>> sir.simulate(num_series=3, seed=1).series
        Series(3 series, up to 14 times, 1 values (in_bed), 42 observed, 0 missing)
    """
    p = fill_parameters(parameters, PARAMETERS)
    start = torch.tensor(_start(population, infected), dtype=torch.float64)
    spread = torch.tensor(phi_inv, dtype=torch.float64)
    first = torch.tensor(t0, dtype=torch.float64)

    def solution(times: Tensor) -> Tensor:
        return odesolve(vector_field, start, times, p, t0=first, rtol=1e-10, atol=1e-10).ys

    def counts(z: Tensor, noise: Tensor) -> Tensor:
        """A count is no function of one normal number, so it has a generator of its own."""
        success = 1.0 / (1.0 + phi_inv * z[..., 1:2].clamp(min=0.0).numpy())
        drawn = random_stream(seed, 1).negative_binomial(1.0 / phi_inv, success)
        return torch.from_numpy(drawn.astype(np.float64))

    return draw_simulation(
        torch.arange(1.0, 15.0) if times is None else times,
        solution,
        counts,
        names=OBSERVED,
        truth={**p, "phi_inv": spread},
        num_series=num_series,
        missing=missing,
        seed=seed,
    )


def _start(population: float, infected: float) -> list[float]:
    if not 0 < infected < population:
        raise ValueError(
            f"infected = {infected} of population = {population}: an epidemic starts with more than nobody infected "
            "and with somebody left to infect"
        )
    return [population - infected, infected, 0.0]
