# SPDX-License-Identifier: Apache-2.0
"""What every system's `simulate` returns, and how it is drawn."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.solve.integrate import odesolve

__all__ = [
    "Simulation",
    "draw_priors",
    "draw_simulation",
    "even_times",
    "fill_parameters",
    "random_stream",
    "solve_exactly",
]


class Simulation(NamedTuple):
    """Simulated observations, and the truth behind them.

    Args:
        series: N noisy series, as one would observe them.
        z: (N, T, S), the states without noise, at ``series.times``; float64.
        truth: what the simulation used, by name: of a system with a model the value of every latent site, of a
            system of many series, each with parameters of its own, those (N,).
    """

    series: Series
    z: Tensor
    truth: dict[str, Tensor]


def draw_simulation(
    times: Tensor,
    solution: Callable[[Tensor], Tensor],
    observe: Callable[[Tensor, Tensor], Tensor],
    *,
    names: Sequence[str],
    truth: Mapping[str, Tensor],
    num_series: int,
    missing: float,
    seed: int,
) -> Simulation:
    """Solve, add noise, take away what is missing.

    Args:
        times: (T,) or (N, T); sorted here.
        solution: times (T,) or (N, T) -> states (T, S) or (N, T, S).
        observe: (states, standard normal noise), both (N, T, S) -> observed values (N, T, D).
        names: names of the observed values.
        truth: values of the simulation by site.
        num_series: N, unless the times have it.
        missing: probability of a gap, at any but the first time, so that no series is empty.
        seed: of noise and gaps; the global generator is left alone.

    Returns:
        Simulation, float64.

    Raises:
        ValueError: `missing` is not a probability below 1, or `num_series` and the times disagree.
    """
    if not 0 <= missing < 1:
        raise ValueError(f"missing: expected a probability in [0, 1), got {missing}")
    times = torch.as_tensor(times, dtype=torch.float64).sort(dim=-1).values
    if times.dim() == 2 and num_series not in (1, times.shape[0]):
        raise ValueError(f"num_series = {num_series}, but times has {times.shape[0]} rows")
    n = times.shape[0] if times.dim() == 2 else num_series
    generator = torch.Generator().manual_seed(seed)
    z = solution(times).expand(n, -1, -1).clone()
    values = observe(z, torch.randn(z.shape, generator=generator, dtype=z.dtype))
    gone = torch.rand(values.shape, generator=generator, dtype=z.dtype) < missing
    gone[:, 0] = False
    series = Series.from_tensors(times, values.masked_fill(gone, float("nan")), names=names)
    return Simulation(series, z, dict(truth))


def fill_parameters(given: Mapping[str, float] | None, defaults: Mapping[str, float]) -> dict[str, Tensor]:
    """Defaults replaced by what is given, as float64 scalars.

    Raises:
        ValueError: a name that the system does not have.
    """
    unknown = sorted(set(given or {}) - set(defaults))
    if unknown:
        raise ValueError(f"parameters: the system has no {unknown}; it has {list(defaults)}")
    values = {**defaults, **(given or {})}
    return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in values.items()}


def random_stream(seed: int, stream: int) -> np.random.Generator:
    """A generator for one purpose of one simulation; none is global.

    Drawn series by series, numbers do not depend on how many series follow: n series are the first n of more.
    """
    return np.random.default_rng((seed, stream))


def even_times(n: int, num_times: int, step: float) -> Tensor:
    """(T,) times 0, step, ..., float64, after a look at the sizes.

    Raises:
        ValueError: no series, fewer than two times, or a step that is not positive.
    """
    for name, value, least in (("n", n, 1), ("num_times", num_times, 2)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if not step > 0:
        raise ValueError(f"step: expected a positive time between observations, got {step}")
    return step * torch.arange(num_times, dtype=torch.float64)


def draw_priors(priors: Mapping[str, Any], n: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Starts and parameters of n series.

    Args:
        priors: what a system's `priors` returns, of independent coordinates that have an `icdf`.
        n: number of series.
        seed: of stream 0.

    Returns:
        Starts (n, D) and parameters by name, each (n,); float64.
    """
    z0: dist.Independent = priors["z0"]
    size = z0.event_shape[0]
    uniform = torch.from_numpy(random_stream(seed, 0).random((n, size + len(priors["theta"]))))
    parameters = zip(priors["theta"].items(), uniform[:, size:].unbind(1), strict=True)
    return z0.base_dist.icdf(uniform[:, :size]), {name: prior.icdf(u).double() for (name, prior), u in parameters}


def solve_exactly(
    field: Callable, z0: Tensor, times: Tensor, p: Mapping[str, Tensor], t0: Tensor | None = None
) -> Tensor:
    """States (N, T, D) of all series, to about 1e-10 of their size.

    Args:
        field: of one row, ``f(t, y, p)``.
        z0: (N, D), states at `t0`.
        times: (T,).
        p: parameters (N,) by name.
        t0: the first time by default.
    """
    with torch.no_grad():
        settings = {"method": "dopri8", "rtol": 1e-10, "atol": 1e-12, "event_dims": dict.fromkeys(p, 0)}
        return odesolve(field, z0, times, dict(p), t0=t0, **settings).ys
