# SPDX-License-Identifier: Apache-2.0
"""Observed series as a Pyro site: masks, gaps, irregular times, several series."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.runtime import get_plates
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.errors import DataError, ShapeError
from pyro_latentde.sites.ode_record import named_errors
from pyro_latentde.sites.plate_sizes import check_plate_sizes

__all__ = ["observe", "pointwise_log_prob"]


def observe(
    name: str,
    distribution_of: Callable[[Tensor], dist.Distribution] | dist.Distribution,
    series: Series | None = None,
    ys: Tensor | None = None,
    *,
    positive: bool = False,
    floor: float | None = None,
) -> Tensor:
    r"""Score a series against a trajectory, or draw a new one where there are no values.

    .. math:: \log p = \sum_{n,t,d} m_{ntd} \log p(v_{ntd} \mid z_{nt})

    with mask m, values v and states z. The site has event shape (T, D), so that only the series are a batch:
    they belong to the enclosing plate at dim -1, or else, when there are several, to a plate
    ``f"{name}_series"`` that is made here. What is masked adds zero, to the gradient too. States that are NaN
    after a failed solve make the log-density NaN; with Pyro's value validation on, as in a plain `SVI.step`,
    Pyro raises instead.

    Args:
        name: name of the site.
        distribution_of: function from states (*batch, T, S) to a distribution of each observed value, of
            shape (*batch, T, D), D = number of observed values; or such a distribution itself. One with event
            dimension 1 (D values jointly, as in `MultivariateNormal`) is fine where whole rows are missing.
        series: N series of T times. None, or without values: new observations are drawn.
        ys: the states, from `lde.ode` at ``series.times`` (N, T), or at ``series.times[0]`` for one series.
        positive: the states cannot be negative: below `floor` they are set to it before `distribution_of`
            sees them, since the solver's error can make them zero or negative, where a logarithm is NaN.
        floor: unit of the states; by default ten times the default absolute tolerance, 1e-7 in float64 and
            1e-5 in float32.

    Returns:
        The observed values, gaps filled, or the drawn ones: (T, D), or (N, T, D) in a plate.

    Raises:
        ShapeError: the distribution does not fit the series, or the plate does not.
        DataError: a joint distribution of a row of which only a part is missing.
        TypeError: a function without states, or data that are not a `Series`.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_latentde.data import Series
        >>> from pyro_latentde.sites.observe_site import observe
        >>> series = Series.from_tensors([0.0, 1.0], [[1.0], [float("nan")]])
        >>> z = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> trace = pyro.poutine.trace(observe).get_trace("obs", lambda z: dist.Normal(z, 0.1), series, z)
        >>> round(trace.log_prob_sum().item(), 4)
        1.3836
    """
    if series is not None and not isinstance(series, Series):
        raise TypeError(
            f"observe({name!r}): series is a {type(series).__name__}, expected a Series: "
            "wrap it, lde.Series.from_tensors(times, values); NaN is missing."
        )
    fn = _split_event(_distribution(name, distribution_of, ys, positive, floor))
    if len(fn.event_shape) > 1:
        raise ShapeError(
            f"site {name!r}: one {type(fn).__name__} for several times, event shape {tuple(fn.event_shape)}, "
            "cannot be scored value by value: use a distribution per time, or pyro.sample."
        )
    if series is None:
        return _sample(name, fn, None, {"lde_observe": {}})
    shape = fn.batch_shape + fn.event_shape
    plate, drop = _series_plate(name, shape, len(series))
    _check_shape(name, shape, series)
    parts = (series.times, series.values, series.mask)
    times, values, mask = (part[0] if drop and part is not None else part for part in parts)
    if not series.complete:
        fn = fn.mask(mask if not fn.event_shape else _whole_rows(name, mask))
    infer = {"lde_observe": {"times": times, "mask": mask, "states": series.names}}
    with plate:
        return _sample(name, fn, values, infer)


def pointwise_log_prob(fn: dist.Distribution, value: Tensor) -> Tensor:
    """Log-density of each observed value of an `observe` site, not summed over times and values.

    Args:
        fn: the distribution of the site (``trace.nodes[name]["fn"]``).
        value: (*batch, T, D).

    Returns:
        (*batch, T, D), or (*batch, T) for a joint distribution of a row; zero where masked.
    """
    return _split_event(fn).log_prob(value)


def _sample(name: str, fn: dist.Distribution, values: Tensor | None, infer: dict[str, Any]) -> Tensor:
    fn = fn.to_event(2 - len(fn.event_shape))
    with named_errors(name):
        check_plate_sizes(fn.batch_shape)
    return pyro.sample(name, fn, obs=values, infer=infer)


def _split_event(fn: dist.Distribution) -> dist.Distribution:
    """Undo `to_event`."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn


def _distribution(
    name: str,
    distribution_of: Callable[[Tensor], dist.Distribution] | dist.Distribution,
    ys: Tensor | None,
    positive: bool,
    floor: float | None,
) -> dist.Distribution:
    # Pyro's distributions are callable too (calling one samples), so the class is asked first.
    if isinstance(distribution_of, torch.distributions.Distribution):
        if positive or floor is not None:
            raise TypeError(f"observe({name!r}): positive= and floor= need a function of the states, and ys=")
        return distribution_of
    if ys is None:
        raise TypeError(
            f"observe({name!r}): distribution_of is a function of the states, but none were given: pass the "
            "trajectory as the fourth argument (ys=), or a distribution instead of the function."
        )
    if positive or floor is not None:
        ys = ys.clamp(min=(1e-7 if ys.dtype == torch.float64 else 1e-5) if floor is None else floor)
    fn = distribution_of(ys)
    if not isinstance(fn, torch.distributions.Distribution):
        raise TypeError(f"observe({name!r}): distribution_of gave a {type(fn).__name__}, not a distribution")
    return fn


def _check_shape(name: str, shape: torch.Size, series: Series) -> None:
    length, columns = series.times.shape[1], series.num_values
    fits = len(shape) >= 2 and shape[-2] == length and columns in (None, shape[-1])
    batch = shape[-3] if len(shape) > 2 else 1
    if fits and (batch in (1, len(series)) or len(series) == 1):
        return
    hint = " Check that the states were solved at series.times."
    if fits:
        hint = f" The states are of {batch} series."
    elif len(shape) >= 2 and columns is not None and tuple(shape[-2:]) == (columns, length):
        hint = " It looks like (D, T): transpose it, states come last; or were y0 and times of the solve exchanged?"
    elif shape and shape[-1] == length:
        hint = f" The last dimension is missing: keep it, z[..., :{columns or 1}] instead of z[..., 0]."
    elif len(shape) >= 2 and shape[-2] == length:
        hint = _columns_hint(shape[-1], columns, series.names)
    raise ShapeError(
        f"site {name!r}: the distribution has shape {tuple(shape)}, the {len(series)} series T = {length}, "
        f"D = {'any' if columns is None else columns}; expected (..., {length}, {columns or 'D'}).{hint}"
    )


def _columns_hint(given: int, wanted: int, names: tuple[str, ...] | None) -> str:
    """Of a distribution of so many values at each time, where the series have another number of them."""
    told = f" ({', '.join(names)})" if names else ""
    if given > wanted:
        return f" Pick the {wanted} observed states{told}, for instance z[..., :{wanted}]."
    return f" The series have {wanted} values{told} at each time: give a distribution for each of them."


def _series_plate(name: str, shape: torch.Size, n: int) -> tuple[pyro.plate | nullcontext, bool]:
    """The plate of the series, and whether the batch dimension of one lone series is dropped."""
    enclosing = [frame for frame in get_plates() if frame.dim == -1]
    if enclosing and enclosing[0].size == n:
        return nullcontext(), False
    if n == 1:
        return nullcontext(), len(shape) < 3 or shape[-3] != 1
    if enclosing:
        raise ShapeError(
            f"site {name!r}: {n} series in plate {enclosing[0].name!r} of size {enclosing[0].size}. Index "
            "the series by the plate (`with pyro.plate(...) as i: ... series[i]`), or leave the plate, as "
            "observe makes its own."
        )
    return pyro.plate(f"{name}_series", n, dim=-1), False


def _whole_rows(name: str, mask: Tensor) -> Tensor:
    """Mask (..., T) of rows, where each row of (..., T, D) is observed wholly or not at all."""
    some, every = mask.any(-1), mask.all(-1)
    if bool((some != every).any()):
        raise DataError(
            f"site {name!r}: {int((some != every).sum())} rows are observed in part, and a joint "
            "distribution of the row cannot score them: use one distribution per value, or mask those rows."
        )
    return every
