# SPDX-License-Identifier: Apache-2.0
r"""A drug taken by mouth, in one compartment: absorption and elimination of first order.

.. math::
    \frac{dA}{dt} = -k_a A, \qquad \frac{dC}{dt} = k_a A - \frac{CL}{V} C

======  ====================================================  ======  =======================
symbol  meaning                                               unit    prior
======  ====================================================  ======  =======================
A, C    amounts in the depot (the gut) and centrally (blood)  mg
ka      rate of absorption                                    1 / h   LogNormal(0, 1)
CL      clearance: volume freed of the drug in an hour        L / h   LogNormal(log 3, 1)
V       volume in which the drug is diluted                   L       LogNormal(log 30, 0.5)
sigma   relative error of the measured concentration          1       LogNormal(-1, 1)
dose    amount in the depot at the time t0                    mg      known
======  ====================================================  ======  =======================

Measured is the concentration, LogNormal(log(C / V), sigma), in mg / L. With k = CL / V

C / V = dose / V * ka / (ka - k) * (exp(-k s) - exp(-ka s)), s = t - t0.

Absorption and elimination can change places ("flip-flop"): ka and k exchanged, with the volume V k / ka, give the same
curve. Only the prior of V tells them apart; volumes below 5 L are hardly ever found.

References:
    Gibaldi, M. and Perrier, D. (1982). Pharmacokinetics, 2nd ed., chapter 1.
    Boeckmann, A. J., Sheiner, L. B. and Beal, S. L. (1994). NONMEM Users Guide, part V (theophylline, the values of
    `simulate`).
"""

import math
from collections.abc import Mapping, Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.models.systems.dosing import FLOOR, doses_of, full_depot, given_doses, with_doses
from pyro_latentde.models.systems.experiment import plan_experiment
from pyro_latentde.models.systems.simulation import Simulation, draw_simulation, fill_parameters
from pyro_latentde.sites.observe_site import observe
from pyro_latentde.sites.ode_site import ode
from pyro_latentde.solve.integrate import odesolve

__all__ = ["OBSERVED", "PARAMETERS", "STATES", "model", "simulate", "vector_field"]

STATES = ("depot", "central")
OBSERVED = ("concentration",)
PARAMETERS = {"ka": 1.5, "CL": 2.8, "V": 32.0}  # theophylline in an adult
SAMPLING_TIMES = (0.25, 0.5, 1.0, 2.0, 3.5, 5.0, 7.0, 9.0, 12.0, 24.0)  # h


def vector_field(t: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """dy/dt.

    Args:
        t: time (h), scalar; the equations do not depend on it.
        y: (2,), amounts in the depot and centrally (mg).
        p: ka (1/h), CL (L/h) and V (L), scalars.

    Returns:
        (2,), mg/h.
    """
    absorbed = p["ka"] * y[0]
    return torch.stack([-absorbed, absorbed - p["CL"] / p["V"] * y[1]])


def model(series: Series | None = None, times: Tensor | None = None, *, dose: float = 320.0, t0: float = 0.0) -> Tensor:
    """Pyro model with the sites ka, CL, V, sigma, z (T, 2) and obs (T, 1).

    Several series share the parameters, as repeats in one person; each may have a dose of its own. Then z is
    (N, T, 2), obs (N, T, 1), in a plate "series".

    Args:
        series: N series of concentrations (mg/L), at times (N, T) (h). Where they have covariates, the first is the
            dose (mg).
        times: (T,) (h), to draw obs there instead of scoring the series.
        dose: mg, for series without covariates.
        t0: time of the dose (h); no measurement is earlier.

    Returns:
        The values of obs.

    Raises:
        ValueError: neither series nor times; or a dose that is not positive.

    Example:
        >>> import torch
        >>> from pyro_latentde.models.systems import pk_one_compartment
        >>> pk_one_compartment.model(times=torch.linspace(1, 12, 12)).shape
        torch.Size([12, 1])
    """
    times, _, observed, plate = plan_experiment(series, times)
    p = {
        "ka": pyro.sample("ka", dist.LogNormal(times.new_tensor(0.0), 1.0)),
        "CL": pyro.sample("CL", dist.LogNormal(times.new_tensor(math.log(3.0)), 1.0)),
        "V": pyro.sample("V", dist.LogNormal(times.new_tensor(math.log(30.0)), 0.5)),
    }
    sigma = pyro.sample("sigma", dist.LogNormal(times.new_tensor(-1.0), 1.0))
    start = full_depot(doses_of(series, dose, p["ka"]), len(STATES))
    with plate:
        z = ode("z", vector_field, start, times, p, t0=times.new_tensor(t0), states=STATES)
        volume, error = p["V"][..., None, None], sigma[..., None, None]  # the same at all times

        def concentration(z: Tensor) -> dist.Distribution:
            return dist.LogNormal((z[..., 1:] / volume).log(), error)

        return observe("obs", concentration, observed, z, positive=True, floor=FLOOR)


def simulate(
    times: Tensor | None = None,
    *,
    parameters: Mapping[str, float] | None = None,
    dose: float | Sequence[float] = 320.0,
    t0: float = 0.0,
    sigma: float = 0.1,
    num_series: int = 1,
    missing: float = 0.0,
    seed: int = 0,
) -> Simulation:
    """Simulated concentrations.

    Args:
        times: (T,) or (N, T) (h); by default ten from a quarter of an hour to a day.
        parameters: some of ka (1/h), CL (L/h), V (L); the others as in `PARAMETERS`.
        dose: mg; or N of them, one for each series, which then is its covariate.
        t0: time of the dose (h).
        sigma: relative error.
        num_series: number N of repeats, unless the doses have it.
        missing: probability that a concentration is missing.
        seed: of the noise and the gaps.

    Returns:
        Simulation of N series, with the truth by site of `model`.

    Raises:
        ValueError: unknown parameter, `missing` no probability below 1, or a dose that is not positive.

    Example:
        >>> from pyro_latentde.models.systems import pk_one_compartment
        >>> pk_one_compartment.simulate(dose=[100.0, 200.0], seed=1).series.covariates.tolist()
        [[100.0], [200.0]]
    """
    p = fill_parameters(parameters, PARAMETERS)
    doses = given_doses(dose)
    start, error = full_depot(doses, len(STATES)), torch.tensor(sigma, dtype=torch.float64)
    first = torch.tensor(t0, dtype=torch.float64)

    def solution(times: Tensor) -> Tensor:
        return odesolve(vector_field, start, times, p, t0=first, rtol=1e-10, atol=1e-10).ys

    simulation = draw_simulation(
        torch.tensor(SAMPLING_TIMES) if times is None else times,
        solution,
        lambda z, noise: (z.clamp(min=FLOOR) / p["V"] * torch.exp(error * noise))[..., 1:],
        names=OBSERVED,
        truth={**p, "sigma": error},
        num_series=len(doses) if doses.dim() else num_series,
        missing=missing,
        seed=seed,
    )
    return simulation._replace(series=with_doses(simulation.series, dose))
