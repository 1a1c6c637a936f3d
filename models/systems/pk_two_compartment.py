# SPDX-License-Identifier: Apache-2.0
r"""A drug taken by mouth, in two compartments: the blood and a tissue that fills and empties more slowly.

.. math::
    \frac{dA}{dt} = -k_a A, \qquad
    \frac{dC}{dt} = k_a A - \frac{CL + Q}{V_1} C + \frac{Q}{V_2} P, \qquad
    \frac{dP}{dt} = \frac{Q}{V_1} C - \frac{Q}{V_2} P

=======  =====================================================  ======  =======================
symbol   meaning                                                unit    prior
=======  =====================================================  ======  =======================
A, C, P  amounts in the depot (the gut), the central (blood)    mg
         and the peripheral compartment (tissue)
ka       rate of absorption                                     1 / h   LogNormal(0, 1)
CL       clearance: volume freed of the drug in an hour         L / h   LogNormal(log 5, 1)
V1       central volume                                         L       LogNormal(log 30, 0.5)
Q        flow between the compartments                          L / h   LogNormal(log 5, 1)
V2       peripheral volume                                      L       LogNormal(log 60, 1)
sigma    relative error of the measured concentration           1       LogNormal(-1, 1)
dose     amount in the depot at the time t0                     mg      known
=======  =====================================================  ======  =======================

Measured is the central concentration, LogNormal(log(C / V1), sigma), in mg / L. It is the sum of three exponentials of
t - t0, with the rates ka and the two roots r of r^2 - (CL / V1 + Q / V1 + Q / V2) r + CL Q / (V1 V2) = 0. As in one
compartment, absorption and a decay can change places, and only the prior of the volumes tells them apart.

References:
    Gibaldi, M. and Perrier, D. (1982). Pharmacokinetics, 2nd ed., chapter 2.
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

STATES = ("depot", "central", "peripheral")
OBSERVED = ("concentration",)
PARAMETERS = {"ka": 2.0, "CL": 10.0, "V1": 35.0, "Q": 15.0, "V2": 105.0}  # half gone in 12 h, in the end
SAMPLING_TIMES = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 18.0, 24.0, 36.0)  # h


def vector_field(t: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """dy/dt.

    Args:
        t: time (h), scalar; the equations do not depend on it.
        y: (3,), amounts in the depot, the central and the peripheral compartment (mg).
        p: ka (1/h), CL, Q (L/h), V1 and V2 (L), scalars.

    Returns:
        (3,), mg/h.
    """
    absorbed = p["ka"] * y[0]
    eliminated = p["CL"] / p["V1"] * y[1]
    into_tissue = p["Q"] * (y[1] / p["V1"] - y[2] / p["V2"])
    return torch.stack([-absorbed, absorbed - eliminated - into_tissue, into_tissue])


def model(
    series: Series | None = None, times: Tensor | None = None, *, dose: float = 1000.0, t0: float = 0.0
) -> Tensor:
    """Pyro model with the sites ka, CL, V1, Q, V2, sigma, z (T, 3) and obs (T, 1).

    Several series share the parameters, as repeats in one person; each may have a dose of its own. Then z is
    (N, T, 3), obs (N, T, 1), in a plate "series".

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
        >>> from pyro_latentde.models.systems import pk_two_compartment
        >>> pk_two_compartment.model(times=torch.linspace(1, 12, 12)).shape
        torch.Size([12, 1])
    """
    times, _, observed, plate = plan_experiment(series, times)
    p = {
        "ka": pyro.sample("ka", dist.LogNormal(times.new_tensor(0.0), 1.0)),
        "CL": pyro.sample("CL", dist.LogNormal(times.new_tensor(math.log(5.0)), 1.0)),
        "V1": pyro.sample("V1", dist.LogNormal(times.new_tensor(math.log(30.0)), 0.5)),
        "Q": pyro.sample("Q", dist.LogNormal(times.new_tensor(math.log(5.0)), 1.0)),
        "V2": pyro.sample("V2", dist.LogNormal(times.new_tensor(math.log(60.0)), 1.0)),
    }
    sigma = pyro.sample("sigma", dist.LogNormal(times.new_tensor(-1.0), 1.0))
    start = full_depot(doses_of(series, dose, p["ka"]), len(STATES))
    with plate:
        z = ode("z", vector_field, start, times, p, t0=times.new_tensor(t0), states=STATES)
        volume, error = p["V1"][..., None, None], sigma[..., None, None]  # the same at all times

        def concentration(z: Tensor) -> dist.Distribution:
            return dist.LogNormal((z[..., 1:2] / volume).log(), error)

        return observe("obs", concentration, observed, z, positive=True, floor=FLOOR)


def simulate(
    times: Tensor | None = None,
    *,
    parameters: Mapping[str, float] | None = None,
    dose: float | Sequence[float] = 1000.0,
    t0: float = 0.0,
    sigma: float = 0.1,
    num_series: int = 1,
    missing: float = 0.0,
    seed: int = 0,
) -> Simulation:
    """Simulated concentrations.

    Args:
        times: (T,) or (N, T) (h); by default 15 from six minutes to a day and a half.
        parameters: some of ka (1/h), CL, Q (L/h), V1, V2 (L); the others as in `PARAMETERS`.
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
        >>> from pyro_latentde.models.systems import pk_two_compartment
        >>> pk_two_compartment.simulate(seed=1).series
        Series(1 series, 15 times, 1 values (concentration), 15 observed, 0 missing)
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
        lambda z, noise: (z.clamp(min=FLOOR) / p["V1"] * torch.exp(error * noise))[..., 1:2],
        names=OBSERVED,
        truth={**p, "sigma": error},
        num_series=len(doses) if doses.dim() else num_series,
        missing=missing,
        seed=seed,
    )
    return simulation._replace(series=with_doses(simulation.series, dose))
