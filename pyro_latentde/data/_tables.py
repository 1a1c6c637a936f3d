# SPDX-License-Identifier: Apache-2.0
"""Columns of a long table into ragged rows, one per series."""

import csv
import difflib
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pyro_latentde.errors import DataError

__all__ = ["columns_by_series", "nearest", "read_table"]

_SHOWN = 3  # cells or rows that a message names


def read_table(path: str | PathLike[str]) -> pd.DataFrame:
    """A CSV file as a table; lines that start with ``#`` are comments.

    Raises:
        DataError: no such file, no table in it, or a column name that occurs twice.
    """
    try:
        frame = pd.read_csv(path, comment="#")
        _refuse_repeated_names(path)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; expected a CSV file") from None
    except pd.errors.EmptyDataError:
        raise DataError(f"{path} is empty; expected a line of column names and a line for each time") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read as CSV text ({error}). Save it as CSV (UTF-8), with as many cells in each line "
            "as there are column names"
        ) from None
    if frame.empty:
        raise DataError(f"{path} has no rows, only the columns {[str(c) for c in frame.columns]}")
    return frame


def _refuse_repeated_names(path: str | PathLike[str]) -> None:
    """Pandas would call the second column ``name.1``."""
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(line for line in file if line.strip() and not line.startswith("#")), [])
    repeated = sorted({name for name in names if name and names.count(name) > 1})
    if repeated:
        raise DataError(f"{path}: the column names {repeated} occur more than once; give each column its own")


def nearest(name: str, known: Iterable[Any]) -> str:
    """``"; did you mean 'hare'?"``, or nothing where no known name is near."""
    by_key = {str(each).strip().casefold(): str(each) for each in known}
    found = difflib.get_close_matches(name.strip().casefold(), by_key, n=1)
    return f"; did you mean {by_key[found[0]]!r}?" if found else ""


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
        raise DataError(
            f"table has no column {absent}; its columns are {[str(c) for c in frame.columns]}"
            f"{_why_absent(absent[0], frame)}"
        )
    if not values or frame.empty:
        raise DataError("table: expected at least one row and one column of values")
    for name in [time, *values, *inputs, *covariates]:
        if not pd.api.types.is_numeric_dtype(frame[name]):
            raise DataError(
                f"column {name!r} holds {frame[name].dtype}, expected numbers{_which_cells(frame[name])}; convert it "
                "first, for instance by pandas.to_numeric, or dates by (date - start) / pandas.Timedelta(days=1). An "
                "empty cell is a missing value"
            )
    if series is not None and frame[series].isna().any():
        rows = _rows(frame[series].isna())
        raise DataError(f"column {series!r}: {int(frame[series].isna().sum())} rows belong to no series ({rows})")
    if frame[time].isna().any():
        lost = frame[time].isna()
        raise DataError(
            f"column {time!r}: {int(lost.sum())} rows have no time ({_rows(lost)}). A value may be missing, a time may "
            "not: fill it in, or leave the row out"
        )
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


def _why_absent(name: str, frame: pd.DataFrame) -> str:
    only = str(frame.columns[0])
    separator = next((mark for mark in (";", "\t", "|") if mark in only), None)
    if len(frame.columns) == 1 and separator:
        return f". Its cells are separated by {separator!r}; expected commas"
    return nearest(name, frame.columns)


def _which_cells(column: pd.Series) -> str:
    """Texts that are no numbers, with their rows: ``": row 2 'n/d'"``."""
    wrong = column.notna() & pd.to_numeric(column, errors="coerce").isna()
    if not wrong.any():
        return ""
    cells = [f"row {row + 1} {str(column.iloc[row])!r}" for row in wrong.to_numpy().nonzero()[0][:_SHOWN]]
    more = f" and {int(wrong.sum()) - len(cells)} more" if wrong.sum() > len(cells) else ""
    return f"; {', '.join(cells)}{more}, counted from the first row below the names"


def _rows(flags: pd.Series) -> str:
    """``"rows 3, 7"``, counted from 1 below the column names."""
    rows = (flags.to_numpy().nonzero()[0] + 1).tolist()
    text = ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")
    return f"{'row' if len(rows) == 1 else 'rows'} {text}"
