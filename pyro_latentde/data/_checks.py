# SPDX-License-Identifier: Apache-2.0
"""What must be true of a `Series`, and what to tell who gave something else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_latentde.data._arrays import describe_rows
from pyro_latentde.errors import DataError, ShapeError

if TYPE_CHECKING:
    from pyro_latentde.data.series import Series

__all__ = ["check", "check_finite_times"]


def check_finite_times(times: Tensor, ids: Sequence[Any] | None) -> None:
    """Refuse NaN and infinite times (N, T), with the series named."""
    bad = ~times.isfinite()
    if bad.any():
        where = describe_rows(bad.any(dim=1), ids)
        raise DataError(
            f"times: {int(bad.sum())} of {times.numel()} are NaN or infinite (series {where}). A value may "
            "be missing, a time may not: drop those rows, or give ragged series as lists."
        )


def check(series: Series) -> None:
    """Refuse shapes that disagree, numbers that are not finite, series without any observation."""
    times, values, mask = series.times, series.values, series.mask
    n, length = times.shape if times.dim() == 2 else (-1, -1)
    columns = mask.shape[-1] if values is None else values.shape[-1]
    shapes_fit = mask.shape == (n, length, columns) and (values is None or values.shape == mask.shape)
    if n < 1 or not shapes_fit or mask.dtype != torch.bool:
        got = None if values is None else tuple(values.shape)
        raise DataError(
            f"Series: expected times (N, T), values and a bool mask (N, T, D); got {tuple(times.shape)}, "
            f"{got}, {tuple(mask.shape)} {mask.dtype}. Series.from_tensors takes other forms."
        )
    if series.names is not None and values is not None and len(series.names) != columns:
        raise DataError(f"names: {len(series.names)} names {series.names} for {columns} values")
    if series.ids is not None and len(series.ids) != n:
        raise DataError(f"ids: {len(series.ids)} labels for {n} series")
    if series.frame is not None and values is not None and math.prod(series.frame) != columns:
        size = " x ".join(str(edge) for edge in series.frame)
        raise ShapeError(
            f"frame: a picture of {series.frame} has {size} = {math.prod(series.frame)} values, but the series have "
            f"{columns} values at each time; values are (N, T, pixels), row by row."
        )
    for what, shape in (("inputs", (n, length)), ("covariates", (n,))):
        extra = getattr(series, what)
        if extra is not None and (extra.shape[:-1] != shape or not bool(extra.isfinite().all())):
            expected = (*shape, "K")
            raise DataError(f"{what}: expected finite numbers {expected}, got {tuple(extra.shape)}")
    if values is not None:
        if not bool(values.isfinite().all()):
            raise DataError("values: infinite entries; mark what was not measured by NaN")
        empty = ~mask.flatten(1).any(dim=1)
        if empty.any():
            raise DataError(
                f"series {describe_rows(empty, series.ids)} have no observation at all (of {n}): leave them "
                "out, or use Series.at_times for series that are only to be predicted."
            )
