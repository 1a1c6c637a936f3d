# SPDX-License-Identifier: Apache-2.0
r"""Several outbreaks of one disease: SIR models whose rates come from a population.

.. math::
    \frac{d \log s}{dt} = -\beta i, \qquad \frac{d \log i}{dt} = \beta s - \gamma, \qquad
    s(0) = 1 - i_0,\ i(0) = i_0

======  ============================================  =======  ======================  ===============
symbol  meaning                                       unit     prior, typical          prior, spread
======  ============================================  =======  ======================  ===============
s, i    shares of the susceptible and the infected    1
i0      share of the infected at t = 0, known         1
beta    infections by one infected, all susceptible   1 / day  LogNormal(log 0.6, 0.3)  HalfNormal(0.3)
gamma   rate of recovery                              1 / day  LogNormal(log 0.2, 0.3)  HalfNormal(0.3)
sigma   relative error of the observed share i        1        LogNormal(log 0.2, 0.5)
======  ============================================  =======  ======================  ===============

Every outbreak n has a beta and a gamma of its own, LogNormal(log typical, spread); sigma is shared. Observed is
LogNormal(log i, sigma). In logarithms no share can become negative, however small it is, so that the model can be
simulated for nearly every draw of the prior: it is made for calibration studies. The sum s + i - gamma / beta log s is
constant.

References:
    Kermack, W. O. and McKendrick, A. G. (1927). A contribution to the mathematical theory of epidemics. Proceedings
    of the Royal Society A 115.
    Talts, S. et al. (2018). Validating Bayesian inference algorithms with simulation-based calibration.
    arXiv:1804.06788.
"""

import math
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.models.population import Population, Varying
from pyro_latentde.models.systems.simulation import (
    Simulation,
    draw_simulation,
    fill_parameters,
    random_stream,
    solve_exactly,
)

__all__ = [
    "OBSERVED",
    "PARAMETERS",
    "START",
    "STATES",
    "model",
    "population",
    "priors",
    "simulate",
    "vector_field",
]

STATES = ("log_s", "log_i")
OBSERVED = ("infected",)
PARAMETERS = {
    **{"beta_typical": 0.6, "gamma_typical": 0.2, "sigma": 0.2},
    **{"beta_spread": 0.2, "gamma_spread": 0.2},
}
LOCAL = ("beta", "gamma")
START = 1e-3  # i0


def vector_field(t: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """dy/dt.

    Args:
        t: time (day), scalar; the equations do not depend on it.
        y: (2,), logarithms of the shares of susceptible and infected.
        p: beta and gamma (1/day), scalars.

    Returns:
        (2,), 1/day.
    """
    return torch.stack([-p["beta"] * y[1].exp(), p["beta"] * y[0].exp() - p["gamma"]])


def priors() -> dict[str, Varying]:
    """Priors of the typical values and the spreads of beta and gamma, by name."""
    medians = torch.tensor([0.6, 0.2], dtype=torch.float64)
    width = torch.tensor(0.3, dtype=torch.float64)
    return {
        name: Varying(dist.LogNormal(median.log(), width), dist.HalfNormal(width))
        for name, median in zip(LOCAL, medians, strict=True)
    }


def population(*, centered: bool | float | Mapping[str, bool | float] = True, **options: Any) -> Population:
    """Pyro model of N outbreaks: ``model(series, times=None)`` for series of the share of the infected.

    Centred, since twelve shares tell more of an outbreak than the population does.

    Args:
        centered: for both local parameters, or by name; see :class:`.Population`.
        options: ``correlation``, or settings of the solve.

    Returns:
        The model, with the sites sigma, beta_typical, beta_spread, gamma_typical, gamma_spread, in the plate "series"
        beta and gamma (N,), z (N, T, 2) and obs (N, T, 1).

    Example:
        >>> import pyro
        >>> from pyro_latentde.models.systems import sir_population
        >>> series = sir_population.simulate(num_series=5).series
        >>> pyro.poutine.trace(sir_population.population()).get_trace(series).nodes["beta"]["value"].shape
        torch.Size([5])
    """
    median, width = torch.tensor([0.2, 0.5], dtype=torch.float64)
    return Population(
        vector_field,
        z0=_start(),
        local=priors(),
        likelihood=lambda z, p: dist.LogNormal(z[..., 1:], p["sigma"]),
        shared={"sigma": dist.LogNormal(median.log(), width)},
        centered=centered,
        t0=0.0,
        states=STATES,
        **{"rtol": 1e-6, "atol": 1e-6, **options},
    )


def model(series: Series, times: Tensor | None = None) -> Tensor:
    """The model of `population` with its default settings: centred, since an outbreak tells its own rates well.

    Args:
        series: N outbreaks, shares of the infected at times (N, T) (day), not negative.
        times: (T,) or (N, T) (day), to draw obs there instead of scoring the series.

    Returns:
        The values of obs, (N, T, 1).

    Example:
        >>> from pyro_latentde.data import Series
        >>> from pyro_latentde.models.systems import sir_population
        >>> sir_population.model(Series.at_times([10.0, 20.0, 30.0], ids=["Ulm", "Ravensburg"])).shape
        torch.Size([2, 3, 1])
    """
    return population()(series, times)


def simulate(
    times: Tensor | None = None,
    *,
    parameters: Mapping[str, float] | None = None,
    num_series: int = 6,
    missing: float = 0.0,
    seed: int = 0,
) -> Simulation:
    """Simulated outbreaks.

    Args:
        times: (T,) or (N, T) (day), not negative; by default 3, 6, ..., 36.
        parameters: some of beta_typical, beta_spread, ..., sigma; the others as in `PARAMETERS`.
        num_series: number N of outbreaks.
        missing: probability that a share is missing.
        seed: of the outbreaks, the noise and the gaps.

    Returns:
        Simulation of N series, with the truth of the typical values, spreads and sigma, and of beta and gamma (N,).

    Raises:
        ValueError: unknown parameter, or `missing` no probability below 1.

    Example:
        >>> from pyro_latentde.models.systems import sir_population
        >>> sir_population.simulate(num_series=3, seed=1).series
        Series(3 series, up to 12 times, 1 values (infected), 36 observed, 0 missing)
    """
    p = fill_parameters(parameters, PARAMETERS)
    noise = torch.from_numpy(random_stream(seed, 0).standard_normal((num_series, len(LOCAL))))
    local = {name: p[f"{name}_typical"] * torch.exp(p[f"{name}_spread"] * noise[:, i]) for i, name in enumerate(LOCAL)}
    start = torch.tensor(_start(), dtype=torch.float64).expand(num_series, -1)

    def states(times: Tensor) -> Tensor:
        return solve_exactly(vector_field, start, times.expand(num_series, -1), local, t0=times.new_zeros(num_series))

    drawn = draw_simulation(
        torch.arange(3.0, 37.0, 3.0) if times is None else times,
        lambda times: states(times)[..., 1:].exp(),
        lambda i, noise: i * torch.exp(p["sigma"] * noise),
        names=OBSERVED,
        truth={**p, **local},
        num_series=num_series,
        missing=missing,
        seed=seed,
    )
    return Simulation(drawn.series, states(drawn.series.times), drawn.truth)


def _start() -> tuple[float, float]:
    return math.log1p(-START), math.log(START)
