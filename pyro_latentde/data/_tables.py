# SPDX-License-Identifier: Apache-2.0
"""Columns of a long table into ragged rows, one per series."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from pyro_latentde.errors import DataError

__all__ = ["columns_by_series"]


def columns_by_series(
    frame: pd.DataFrame,
    series: str | None,
    time: str,
    values: Sequence[str] | str,
    inputs: Sequence[str],
    covariates: Sequence[str],
) -> dict[str, Any]:
    """Keyword arguments for `Series.from_tensors`: rows in the order in which the series first appear."""
    values = [values] if isinstance(values, str) else list(values)
    inputs, covariates = list(inputs), list(covariates)
    wanted = [*([series] if series else []), time, *values, *inputs, *covariates]
    absent = [name for name in wanted if name not in frame.columns]
    if absent:
        raise DataError(f"table has no column {absent}; its columns are {[str(c) for c in frame.columns]}")
    if not values or frame.empty:
        raise DataError("table: expected at least one row and one column of values")
    for name in [time, *values, *inputs, *covariates]:
        if not pd.api.types.is_numeric_dtype(frame[name]):
            raise DataError(
                f"column {name!r} holds {frame[name].dtype}, expected numbers; convert it first, for "
                "instance by pandas.to_numeric, or dates by (date - start) / pandas.Timedelta(days=1)"
            )
    if series is not None and frame[series].isna().any():
        raise DataError(f"column {series!r}: {int(frame[series].isna().sum())} rows belong to no series")
    groups = [(None, frame)] if series is None else list(frame.groupby(series, sort=False))

    def rows(names: list[str]) -> list[torch.Tensor]:
        tables = [group[names].to_numpy(dtype="float64", na_value=float("nan")) for _, group in groups]
        return [torch.tensor(table) for table in tables]

    for name in covariates:
        changing = [key for key, group in groups if group[name].nunique(dropna=False) != 1]
        if changing:
            raise DataError(f"covariate {name!r} changes within series {changing[:5]}; is it an input?")
    return {
        "times": [row[:, 0] for row in rows([time])],
        "values": rows(values),
        "names": values,
        "ids": None if series is None else [key for key, _ in groups],
        "inputs": rows(inputs) if inputs else None,
        "covariates": torch.stack([row[0] for row in rows(covariates)]) if covariates else None,
    }
