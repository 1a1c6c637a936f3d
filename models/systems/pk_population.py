# SPDX-License-Identifier: Apache-2.0
r"""Population pharmacokinetics: a dose by mouth, one compartment, first-order absorption, many people.

.. math::
    \frac{dA}{dt} = -k_a A, \qquad \frac{dC}{dt} = k_a A - \frac{CL}{V} C, \qquad A(0) = \text{dose},\ C(0) = 0

======  =================================================  =====  ==================  ============
symbol  meaning                                            unit   prior, typical      prior, spread
======  =================================================  =====  ==================  ============
A, C    amounts of the drug in the gut and in the blood    mg
dose    what was swallowed at t = 0, a covariate           mg
ka      absorption rate                                    1 / h  LogNormal(0, 0.5)   HalfNormal(0.5)
CL      clearance, over the bioavailability                L / h  LogNormal(log 3, 0.5)  HalfNormal(0.5)
V       volume of distribution, over the bioavailability   L      LogNormal(log 30, 0.5)  HalfNormal(0.5)
sigma   relative error of a person's measurements          1      LogNormal(log 0.15, 0.5)  HalfNormal(0.5)
======  =================================================  =====  ==================  ============

Every person n has a ka, CL, V and sigma of their own, LogNormal(log typical, spread). The concentration C / V (mg / L)
is observed as LogNormal(log C / V, sigma). In closed form, with k = CL / V and unless ka = k,

.. math:: C(t) = \text{dose} \frac{k_a}{k_a - k} (e^{-k t} - e^{-k_a t})

References:
    Davidian, M. and Giltinan, D. M. (1995). Nonlinear Models for Repeated Measurement Data, chapter 5.
    Lavielle, M. (2014). Mixed Effects Models for the Population Approach.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.models.population import Population, Varying
from pyro_latentde.models.systems.simulation import Simulation, draw_simulation, fill_parameters, random_stream

__all__ = [
    "COVARIATES",
    "DOSES",
    "OBSERVED",
    "PARAMETERS",
    "STATES",
    "exact_solution",
    "model",
    "population",
    "priors",
    "simulate",
    "vector_field",
]

STATES = ("gut", "blood")
OBSERVED = ("concentration",)
COVARIATES = ("dose",)
DOSES = (50.0, 100.0, 200.0)  # mg, in turns
PARAMETERS = {
    **{"ka_typical": 1.2, "CL_typical": 3.5, "V_typical": 32.0, "sigma_typical": 0.12},
    **{"ka_spread": 0.35, "CL_spread": 0.3, "V_spread": 0.25, "sigma_spread": 0.3},
}
LOCAL = ("ka", "CL", "V", "sigma")
TIMES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 21.0, 24.0)
# What the error of the solver may make of an amount (mg) that is gone; a concentration must be positive.
FLOOR = 1e-6


def vector_field(t: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """dy/dt.

    Args:
        t: time (h), scalar; the equations do not depend on it.
        y: (2,), amounts in gut and blood (mg).
        p: ka (1/h), CL (L/h) and V (L), scalars.

    Returns:
        (2,), mg/h.
    """
    absorbed = p["ka"] * y[0]
    return torch.stack([-absorbed, absorbed - p["CL"] / p["V"] * y[1]])


def exact_solution(times: Tensor, dose: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """The solution in closed form, for ka != CL / V.

    Args:
        times: (N, T) (h), since the dose.
        dose: (N,) (mg).
        p: ka, CL and V, each (N,).

    Returns:
        (N, T, 2), amounts in gut and blood (mg).

    Example:
        >>> import torch
        >>> from pyro_latentde.models.systems import pk_population
        >>> p = {"ka": torch.tensor([1.0]), "CL": torch.tensor([4.0]), "V": torch.tensor([32.0])}
        >>> pk_population.exact_solution(torch.tensor([[0.0, 8.0]]), torch.tensor([100.0]), p)[0, :, 1]
        tensor([ 0.0000, 42.0050])
    """
    ka, k, dose = (x.unsqueeze(-1) for x in (p["ka"], p["CL"] / p["V"], dose))
    gut = torch.exp(-ka * times)
    return dose.unsqueeze(-1) * torch.stack([gut, ka / (ka - k) * (torch.exp(-k * times) - gut)], dim=-1)


def priors() -> dict[str, Varying]:
    """Priors of the typical values and the spreads of ka, CL, V and sigma, by name."""
    medians = torch.tensor([1.0, 3.0, 30.0, 0.15], dtype=torch.float64)
    half = torch.tensor(0.5, dtype=torch.float64)
    typical = (dist.LogNormal(median.log(), half) for median in medians)
    return {name: Varying(prior, dist.HalfNormal(half)) for name, prior in zip(LOCAL, typical, strict=True)}


def population(*, centered: bool | float | Mapping[str, bool | float] = True, **options: Any) -> Population:
    """Pyro model of N people: ``model(series, times=None)`` for series of the concentration with covariate dose.

    Centred, since twenty concentrations tell more of a person than the population does.

    Args:
        centered: for all local parameters, or by name; see :class:`.Population`.
        options: ``correlation``, or settings of the solve; its error is then below 3e-4 of a concentration.

    Returns:
        The model, with the sites ka_typical, ka_spread, ..., in the plate "series" ka, CL, V, sigma (N,), z (N, T, 2)
        and obs (N, T, 1).

    Example:
        >>> import pyro
        >>> from pyro_latentde.models.systems import pk_population
        >>> series = pk_population.simulate(num_series=5).series
        >>> pyro.poutine.trace(pk_population.population()).get_trace(series).nodes["z"]["value"].shape
        torch.Size([5, 20, 2])
    """
    return Population(
        vector_field,
        z0=lambda p: (p["dose"], 0.0),
        local=priors(),
        likelihood=lambda z, p: dist.LogNormal((z[..., 1:].clamp(min=FLOOR) / p["V"]).log(), p["sigma"]),
        covariates=COVARIATES,
        centered=centered,
        t0=0.0,
        states=STATES,
        **{"rtol": 1e-6, "atol": 1e-4, **options},  # mg
    )


def model(series: Series, times: Tensor | None = None) -> Tensor:
    """The model of `population` with its default settings.

    It is centred: the twenty concentrations of a person tell each ka, CL and V to some per cent, much better than the
    population does. Non-centred, these would be tied to the typical values and the spreads, and a sampler would crawl.
    Of people with few concentrations take ``population(centered=False)``.

    Args:
        series: N people (mg/L), at times (N, T) (h), with the dose (mg) as the only covariate.
        times: (T,) or (N, T) (h), to draw obs there instead of scoring the series.

    Returns:
        The values of obs, (N, T, 1).

    Raises:
        DataError: series without dose.

    Example:
        >>> from pyro_latentde.data import Series
        >>> from pyro_latentde.models.systems import pk_population
        >>> pk_population.model(Series.at_times([1.0, 4.0, 12.0], covariates=[[100.0], [200.0]])).shape
        torch.Size([2, 3, 1])
    """
    return population()(series, times)


def simulate(
    times: Tensor | None = None,
    *,
    parameters: Mapping[str, float] | None = None,
    num_series: int = 50,
    missing: float = 0.0,
    seed: int = 0,
) -> Simulation:
    """Simulated concentrations of a population.

    Args:
        times: (T,) or (N, T) (h), positive; by default 20 times in a day.
        parameters: some of ka_typical, ka_spread, CL_typical, ...; the others as in `PARAMETERS`.
        num_series: number N of people; the doses are `DOSES` in turns.
        missing: probability that a concentration is missing.
        seed: of the people, the noise and the gaps.

    Returns:
        Simulation of N series, with the truth of typical values and spreads, and of ka, CL, V and sigma (N,).

    Raises:
        ValueError: unknown parameter, or `missing` no probability below 1.

    Example:
        >>> from pyro_latentde.models.systems import pk_population
        >>> pk_population.simulate(num_series=3, seed=1).series
        Series(3 series, up to 20 times, 1 values (concentration), 60 observed, 0 missing)
    """
    p = fill_parameters(parameters, PARAMETERS)
    noise = torch.from_numpy(random_stream(seed, 0).standard_normal((num_series, len(LOCAL))))
    local = {name: p[f"{name}_typical"] * torch.exp(p[f"{name}_spread"] * noise[:, i]) for i, name in enumerate(LOCAL)}
    dose = torch.tensor(DOSES, dtype=torch.float64)[torch.arange(num_series) % len(DOSES)]

    def concentration(times: Tensor) -> Tensor:
        return exact_solution(times.expand(num_series, -1), dose, local)[..., 1:] / local["V"][:, None, None]

    drawn = draw_simulation(
        torch.tensor(TIMES) if times is None else times,
        concentration,
        lambda c, noise: c * torch.exp(local["sigma"][:, None, None] * noise),
        names=OBSERVED,
        truth={**p, **local},
        num_series=num_series,
        missing=missing,
        seed=seed,
    )
    series = replace(drawn.series, covariates=dose.unsqueeze(-1))
    return Simulation(series, exact_solution(series.times, dose, local), drawn.truth)
