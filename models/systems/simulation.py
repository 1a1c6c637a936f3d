# SPDX-License-Identifier: Apache-2.0
"""What every system's `simulate` returns, and how it is drawn."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_latentde.data.series import Series

__all__ = ["Simulation", "draw_simulation", "fill_parameters"]


class Simulation(NamedTuple):
    """Simulated observations, and the truth behind them.

    Args:
        series: N noisy series, as one would observe them.
        z: (N, T, D), the states without noise, at ``series.times``.
        truth: value of every latent site of the system's model, by name.
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
        solution: times (T,) or (N, T) -> states (T, D) or (N, T, D).
        observe: (states, standard normal noise) -> observed values, all (N, T, D).
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
    gone = torch.rand(z.shape, generator=generator, dtype=z.dtype) < missing
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
