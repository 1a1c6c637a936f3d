# SPDX-License-Identifier: Apache-2.0
r"""A neuron that fires: the FitzHugh-Nagumo equations.

.. math::
    \frac{dV}{dt} = c \left(V - \frac{V^3}{3} + R\right), \qquad \frac{dR}{dt} = -\frac{V - a + b R}{c}

======  ==================================================  =====  =============================
symbol  meaning                                             unit   prior
======  ==================================================  =====  =============================
V, R    voltage across the membrane, and its recovery       1
a       level of the voltage at which recovery rests        1      Normal(0, 1), positive
b       leak of the recovery                                1      Normal(0, 1), positive
c       separation of the two time scales                   1      LogNormal(log 2, 0.5)
z0      (V, R) at the first time                            1      Normal(0, 1.5), each
sigma   standard error of the measured V and R              1      LogNormal(-1, 1), each
======  ==================================================  =====  =============================

Every row, the first too, is observed as Normal(z(t), sigma); time has no unit either, as everything is scaled.
"Positive" is the normal truncated at 0. The larger c, the steeper the edges of a spike: V jumps within 1 / c, and R
drifts within c.

References:
    FitzHugh, R. (1961). Impulses and physiological states in theoretical models of nerve membrane. Biophysical
    Journal 1.
    Nagumo, J., Arimoto, S. and Yoshizawa, S. (1962). An active pulse transmission line simulating nerve axon.
    Proceedings of the IRE 50.
    Ramsay, J. O. et al. (2007). Parameter estimation for differential equations: a generalized smoothing approach.
    Journal of the Royal Statistical Society B 69 (this form, and the values of `simulate`).
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

STATES = ("voltage", "recovery")
PARAMETERS = {"a": 0.2, "b": 0.2, "c": 3.0}  # spikes, one in about 8 units of time


def vector_field(t: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """dy/dt.

    Args:
        t: time (without unit), scalar; the equations do not depend on it.
        y: (2,), voltage and recovery (without unit).
        p: a, b, c, scalars.

    Returns:
        (2,), per unit of time.
    """
    v, r = y[0], y[1]
    return torch.stack([p["c"] * (v - v**3 / 3.0 + r), -(v - p["a"] + p["b"] * r) / p["c"]])


def model(series: Series | None = None, times: Tensor | None = None) -> Tensor:
    """Pyro model with the sites a, b, c, z0 (2,), sigma (2,), z (T, 2) and obs (T, 2).

    Several series are repeats of one experiment: they share parameters and start, and z and obs are (N, T, 2)
    in a plate "series".

    Args:
        series: N series of voltage and recovery (without unit), at times (N, T).
        times: (T,), to draw obs there instead of scoring the series; z0 stays at the first time of `series`, if one
            is given.

    Returns:
        The values of obs.

    Raises:
        ValueError: neither series nor times.

    Example:
        >>> import torch
        >>> from pyro_latentde.models.systems import fitzhugh_nagumo
        >>> fitzhugh_nagumo.model(times=torch.linspace(0, 20, 11)).shape
        torch.Size([11, 2])
    """
    times, t0, observed, plate = plan_experiment(series, times)
    p = {
        "a": pyro.sample("a", TruncatedNormal(times.new_tensor(0.0), 1.0)),
        "b": pyro.sample("b", TruncatedNormal(times.new_tensor(0.0), 1.0)),
        "c": pyro.sample("c", dist.LogNormal(times.new_tensor(math.log(2.0)), 0.5)),
    }
    z0 = pyro.sample("z0", dist.Normal(times.new_zeros(2), 1.5).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(times.new_full((2,), -1.0), 1.0).to_event(1))
    with plate:
        z = ode("z", vector_field, z0, times, p, t0=t0, states=STATES)
        error = sigma.unsqueeze(-2)  # (*batch, 1, 2), the same at all times
        return observe("obs", lambda z: dist.Normal(z, error), observed, z)


def simulate(
    times: Tensor | None = None,
    *,
    parameters: Mapping[str, float] | None = None,
    z0: tuple[float, float] = (-1.0, 1.0),
    sigma: tuple[float, float] = (0.5, 0.5),
    num_series: int = 1,
    missing: float = 0.0,
    seed: int = 0,
) -> Simulation:
    """Simulated measurements.

    Args:
        times: (T,) or (N, T); by default 101 from 0 to 20. The earliest is that of `z0`.
        parameters: some of a, b, c; the others as in `PARAMETERS`.
        z0: voltage and recovery at the start.
        sigma: standard errors.
        num_series: number N of repeats.
        missing: probability that a measurement is missing.
        seed: of the noise and the gaps.

    Returns:
        Simulation of N series, with the truth by site of `model`.

    Raises:
        ValueError: unknown parameter, or `missing` no probability below 1.

    Example:
        >>> from pyro_latentde.models.systems import fitzhugh_nagumo
        >>> fitzhugh_nagumo.simulate(seed=1).series
        Series(1 series, 101 times, 2 values (voltage, recovery), 202 observed, 0 missing)
    """
    p = fill_parameters(parameters, PARAMETERS)
    start, error = torch.tensor([z0, sigma], dtype=torch.float64)

    def solution(times: Tensor) -> Tensor:
        return odesolve(vector_field, start, times, p, t0=times.min(), method="dopri8", rtol=1e-10, atol=1e-10).ys

    return draw_simulation(
        torch.linspace(0.0, 20.0, 101, dtype=torch.float64) if times is None else times,
        solution,
        lambda z, noise: z + error * noise,
        names=STATES,
        truth={**p, "z0": start, "sigma": error},
        num_series=num_series,
        missing=missing,
        seed=seed,
    )
