# SPDX-License-Identifier: Apache-2.0
r"""A linear system: the damped oscillator, whose solution is known.

.. math::
    \frac{d}{dt} \begin{pmatrix} x \\ v \end{pmatrix} = A \begin{pmatrix} x \\ v \end{pmatrix}, \qquad
    A = \begin{pmatrix} 0 & 1 \\ -\omega^2 & -2 \kappa \end{pmatrix}, \qquad
    z(t) = e^{A (t - t_0)} z_0

======  ============================================  =====  ==============================
symbol  meaning                                       unit   prior
======  ============================================  =====  ==============================
x, v    position and velocity                         m, m/s
omega   angular frequency without damping             1 / s  LogNormal(0, 0.5)
kappa   damping rate; critical at kappa = omega       1 / s  LogNormal(-2, 1)
z0      (x, v) at the first time                      m, m/s Normal(0, 2), each
sigma   standard error of the measured x and v        m, m/s LogNormal(-2, 1), each
======  ============================================  =====  ==============================

Every row, the first too, is observed as Normal(z(t), sigma). Below critical damping
x = e^{-kappa s} (x0 cos w s + (v0 + kappa x0) / w sin w s), s = t - t0, w^2 = omega^2 - kappa^2.

References:
    Landau, L. D. and Lifshitz, E. M. (1976). Mechanics, 3rd ed., section 25.
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

__all__ = ["PARAMETERS", "STATES", "exact_solution", "matrix", "model", "simulate", "vector_field"]

STATES = ("x", "v")
PARAMETERS = {"omega": 1.5, "kappa": 0.15}


def vector_field(t: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """dy/dt = A y.

    Args:
        t: time (s), scalar; the equations do not depend on it.
        y: (2,), position (m) and velocity (m/s).
        p: omega and kappa (1/s), scalars.

    Returns:
        (2,), velocity (m/s) and acceleration (m/s^2).
    """
    x, v = y[0], y[1]
    return torch.stack([v, -(p["omega"] ** 2) * x - 2.0 * p["kappa"] * v])


def matrix(p: Mapping[str, Tensor]) -> Tensor:
    """A of the equation.

    Args:
        p: omega and kappa (1/s), of shape (*batch,).

    Returns:
        (*batch, 2, 2).
    """
    omega, kappa = torch.broadcast_tensors(p["omega"], p["kappa"])
    rows = [torch.zeros_like(omega), torch.ones_like(omega), -omega.square(), -2.0 * kappa]
    return torch.stack(rows, dim=-1).unflatten(-1, (2, 2))


def exact_solution(times: Tensor, z0: Tensor, p: Mapping[str, Tensor], t0: Tensor | None = None) -> Tensor:
    """The solution, by the matrix exponential; differentiable in everything.

    Args:
        times: (*batch, T) (s).
        z0: (*batch, 2), position and velocity at t0 (m, m/s).
        p: omega and kappa (1/s), of shape (*batch,).
        t0: (*batch,) (s); by default the first of the times.

    Returns:
        (*batch, T, 2).

    Example:
        >>> import math, torch
        >>> from pyro_latentde.models.systems import linear
        >>> free = {"omega": torch.tensor(1.0), "kappa": torch.tensor(0.0)}
        >>> z = linear.exact_solution(torch.tensor([0.0, math.pi]), torch.tensor([1.0, 0.0]), free)
        >>> [round(x, 5) for x in z[:, 0].tolist()]
        [1.0, -1.0]
    """
    t0 = times[..., 0] if t0 is None else t0
    since = (times - t0.unsqueeze(-1))[..., None, None]
    flow = torch.linalg.matrix_exp(since * matrix(p).unsqueeze(-3))
    return (flow @ z0[..., None, :, None]).squeeze(-1)


def model(series: Series | None = None, times: Tensor | None = None) -> Tensor:
    """Pyro model with the sites omega, kappa, z0 (2,), sigma (2,), z (T, 2) and obs (T, 2).

    Several series are repeats of one experiment: they share parameters and start, and z and obs are (N, T, 2)
    in a plate "series".

    Args:
        series: N series of position and velocity (m, m/s), at times (N, T) (s).
        times: (T,) (s), to draw obs there instead of scoring the series; z0 stays at the first time of
            `series`, if one is given.

    Returns:
        The values of obs.

    Raises:
        ValueError: neither series nor times.

    Example:
        >>> import torch
        >>> from pyro_latentde.models.systems import linear
        >>> linear.model(times=torch.linspace(0, 5, 11)).shape
        torch.Size([11, 2])
    """
    times, t0, observed, plate = plan_experiment(series, times)
    p = {
        "omega": pyro.sample("omega", dist.LogNormal(times.new_tensor(0.0), 0.5)),
        "kappa": pyro.sample("kappa", dist.LogNormal(times.new_tensor(-2.0), 1.0)),
    }
    z0 = pyro.sample("z0", dist.Normal(times.new_zeros(2), 2.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(times.new_full((2,), -2.0), 1.0).to_event(1))
    with plate:
        z = ode("z", vector_field, z0, times, p, t0=t0, states=STATES)
        error = sigma.unsqueeze(-2)  # (*batch, 1, 2), the same at all times
        return observe("obs", lambda z: dist.Normal(z, error), observed, z)


def simulate(
    times: Tensor | None = None,
    *,
    parameters: Mapping[str, float] | None = None,
    z0: tuple[float, float] = (1.0, 0.0),
    sigma: tuple[float, float] = (0.1, 0.1),
    num_series: int = 1,
    missing: float = 0.0,
    seed: int = 0,
) -> Simulation:
    """Simulated measurements, from the exact solution.

    Args:
        times: (T,) or (N, T) (s); by default 40 from 0 to 12. The earliest is that of `z0`.
        parameters: some of omega, kappa (1/s); the others as in `PARAMETERS`.
        z0: position and velocity at the start (m, m/s).
        sigma: standard errors (m, m/s).
        num_series: number N of repeats.
        missing: probability that a measurement is missing.
        seed: of the noise and the gaps.

    Returns:
        Simulation of N series, with the truth by site of `model`.

    Raises:
        ValueError: unknown parameter, or `missing` no probability below 1.

    Example:
        >>> from pyro_latentde.models.systems import linear
        >>> linear.simulate(seed=1).series
        Series(1 series, 40 times, 2 values (x, v), 80 observed, 0 missing)
    """
    p = fill_parameters(parameters, PARAMETERS)
    start, error = torch.tensor([z0, sigma], dtype=torch.float64)
    return draw_simulation(
        torch.linspace(0.0, 12.0, 40, dtype=torch.float64) if times is None else times,
        lambda times: exact_solution(times, start, p, t0=times.min()),
        lambda z, noise: z + error * noise,
        names=STATES,
        truth={**p, "z0": start, "sigma": error},
        num_series=num_series,
        missing=missing,
        seed=seed,
    )
