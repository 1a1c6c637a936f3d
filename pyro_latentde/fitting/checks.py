# SPDX-License-Identifier: Apache-2.0
"""Model and data together, before the work: does the model run on them, and can it have made these values?"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import Independent, constraints

from pyro_latentde.data import Series
from pyro_latentde.errors import DataError, LatentDEError, SolveError
from pyro_latentde.fitting.system import System
from pyro_latentde.fitting.table import Columns, row_of
from pyro_latentde.posterior import ModelSites, inspect_model
from pyro_latentde.posterior.model_sites import kind_of, observed_mask, seeded

__all__ = ["check_model"]

_MAX_TRIES = 20


def check_model(system: System, series: Series, path: str | Path, columns: Columns) -> ModelSites:
    """Run the model once on the data.

    Args:
        system: its model is asked.
        series: the data.
        path: of the table from which they were read, for the number of a row.
        columns: of the table.

    Returns:
        The model's sites.

    Raises:
        DataError: a value that the likelihood cannot give, with its site, row and column.
        LatentDEError: the model stops on these data, observes nothing, or has nothing to infer.
    """
    nodes = _run(system, lambda: _trace(system.model, series))
    for node in nodes.values():
        if kind_of(node) == "observed":
            _check_support(node, series, path, columns)
    sites = _run(system, lambda: inspect_model(system.model, series))
    if not sites.latent:
        raise LatentDEError(f"the model of {system.name} has no latent site: there is nothing to infer. Sample some")
    if not sites.observed and "factor" not in {site.kind for site in sites.values()}:
        raise LatentDEError(
            f"the model of {system.name} observes nothing, so the data would not count. Give them to it: "
            '`lde.observe("obs", ..., series, z)` or `pyro.sample(..., obs=series.values)`'
        )
    return sites


def _trace(model: Callable, series: Series) -> dict[str, Any]:
    """One run on the data; a draw from the prior whose solve fails is followed by another."""
    for seed in range(_MAX_TRIES):
        try:
            with seeded(seed), torch.no_grad(), pyro.validation_enabled(False):
                return poutine.trace(model).get_trace(series).nodes
        except SolveError as error:
            last = error
    raise last


def _run(system: System, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except LatentDEError as error:
        raise LatentDEError(f"{system.name}: {error}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if system.path and Path(frame.filename).resolve() == system.path.resolve()]
        last = (own or frames)[-1]
        raise LatentDEError(
            f"the model of {system.name} stops on these data: {type(error).__name__}: {error} "
            f"({Path(last.filename).name}, line {last.lineno})"
        ) from error


def _check_support(node: Mapping[str, Any], series: Series, path: str | Path, columns: Columns) -> None:
    """Values outside of a support that does not depend on the unknowns, such as zeros where all is positive."""
    fn, value = node["fn"], node["value"]
    while isinstance(fn, Independent | dist.MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    support = getattr(type(fn), "support", None)
    if not isinstance(support, constraints.Constraint) or constraints.is_dependent(support):
        return
    outside = ~support.check(value)
    mask = observed_mask(node)
    if isinstance(mask, Tensor):
        outside = outside & (mask if mask.ndim == outside.ndim else mask.any(-1))
    if not outside.any():
        return
    first = tuple(outside.nonzero()[0].tolist())
    where = _place(value, first, series, path, columns)
    raise DataError(
        f"site {node['name']!r} has a {type(fn).__name__} likelihood, whose values are {_in_words(support)}, but "
        f"{int(outside.sum())} of the data are not: {where}. Leave the cell empty if nothing was measured, or take a "
        "likelihood that allows such values"
    )


def _in_words(support: constraints.Constraint) -> str:
    known = {
        constraints.positive: "above 0",
        constraints.nonnegative: "0 or above",
        constraints.nonnegative_integer: "whole numbers from 0 on",
        constraints.positive_integer: "whole numbers from 1 on",
        constraints.unit_interval: "between 0 and 1",
        constraints.boolean: "0 or 1",
    }
    return next((text for each, text in known.items() if each is support), f"in {support}")


def _place(value: Tensor, at: tuple[int, ...], series: Series, path: str | Path, columns: Columns) -> str:
    number = float(value[at]) if len(at) == value.ndim else float("nan")
    same = series.values is not None and value.numel() == series.values.numel()
    if not same or len(at) != value.ndim:
        return f"{number:g} at position {at} of the site"
    flat = int(torch.arange(value.numel()).reshape(value.shape)[at])
    n, t, d = (int(i) for i in torch.unravel_index(torch.tensor(flat), series.values.shape))
    label = None if series.ids is None else series.ids[n]
    name, time = columns.values[d], float(series.times[n, t])
    row = row_of(path, columns, label, time, name, number)
    text = f"{name} = {number:g} at time {time:g}"
    text += "" if label is None else f" of series {label!r}"
    return text if row is None else f"{text}, row {row}"
