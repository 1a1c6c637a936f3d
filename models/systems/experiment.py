# SPDX-License-Identifier: Apache-2.0
"""What a system's model is asked for: to score series, or to draw observations at new times."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_latentde.data.series import Series

__all__ = ["Experiment", "plan_experiment"]


class Experiment(NamedTuple):
    """When to solve, what to score.

    Args:
        times: (T,), or (N, T) for several series.
        t0: time of the start z0, a scalar.
        observed: the series to score; None to draw.
        plate: the plate "series" around trajectory and observations, or nothing for one series.
    """

    times: Tensor
    t0: Tensor
    observed: Series | None
    plate: AbstractContextManager


def plan_experiment(series: Series | None, times: Tensor | None) -> Experiment:
    """Plan of a model ``model(series=None, times=None)``.

    Args:
        series: N series, repeats of one experiment that start together at the earliest of their times.
        times: (T,), when given: draw observations there, instead of scoring the series.

    Returns:
        Experiment. Its t0 is the earliest time of `series`, or without one that of `times`.

    Raises:
        ValueError: neither is given.
    """
    if series is None and times is None:
        raise ValueError("expected a series to score, or times= at which to draw observations; got neither")
    n = 1 if series is None else len(series)
    if times is None:
        grid, observed = series.times, series
    else:
        times = torch.as_tensor(times)
        dtype = times.dtype if times.is_floating_point() else torch.float64
        grid, observed = times.to(dtype).expand(n, -1), None
    t0 = (grid if series is None else series.times).min()
    plate = nullcontext() if n == 1 else pyro.plate("series", n, dim=-1)
    return Experiment(grid[0] if n == 1 else grid, t0, observed, plate)
