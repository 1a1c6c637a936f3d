# SPDX-License-Identifier: Apache-2.0
"""The table of a run: which columns are what, and what is wrong in which row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyro_latentde.data import Series
from pyro_latentde.data._tables import nearest, read_table
from pyro_latentde.errors import DataError

__all__ = ["Columns", "choose_columns", "describe_series", "read_series", "row_of"]

_SHOWN = 3  # rows that a message names


@dataclass(frozen=True)
class Columns:
    """Which column of a long table is what.

    Args:
        time: the times.
        values: the observed values.
        series: labels that tell the series apart; None for one series.
        replicates: equal times in a series are repeated measurements, not a mistake.
        covariates: what is known of each series, the same in all of its rows.
    """

    time: str
    values: tuple[str, ...]
    series: str | None = None
    replicates: bool = False
    covariates: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """For a JSON file."""
        return {**asdict(self), "values": list(self.values), "covariates": list(self.covariates)}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Columns:
        """From what `plain` gave."""
        lists = {name: tuple(plain.get(name, ())) for name in ("values", "covariates")}
        return cls(**{**plain, **lists})


def choose_columns(
    path: str | Path,
    states: Sequence[str] | None,
    *,
    time: str = "time",
    values: Sequence[str] | None = None,
    series: str | None = None,
    replicates: bool = False,
    covariates: Sequence[str] = (),
) -> Columns:
    """The columns asked for; values are those of the system and series is ``series``, where nothing was said.

    Args:
        path: of the CSV file.
        states: names of the values that the system observes; None to take all columns left.
        time: column of the times.
        values: columns of the values, in the order of the system's.
        series: column of the labels.
        replicates: allow equal times in a series.
        covariates: columns of what is known of each series.

    Returns:
        Columns, all of which are in the table.

    Raises:
        DataError: a column is not there, with those that are and the nearest name; or the file is no table.
    """
    table = read_table(path)
    there = [str(name) for name in table.columns]
    if series is None and "series" in there:
        series = "series"
    chosen = tuple(values or states or [name for name in there if name not in (time, series, *covariates)])
    known = {"--time": [time], "--series": [series] if series else [], "--covariates": covariates}
    wanted = {**known, "--values": chosen}
    for option, names in wanted.items():
        for name in names:
            if name not in there:
                hint = " A state that was never measured is an empty column" if option == "--values" else ""
                raise DataError(
                    f"{Path(path).name} has no column {name!r}{nearest(name, there)}. Its columns are {there}; say "
                    f"which one it is by {option}.{hint}"
                )
    names = [time, series, *chosen, *covariates]
    if not chosen or any(names.count(name) > 1 for name in names):
        raise DataError(f"expected one time, one series and different values and covariates; got {names}")
    return Columns(time, chosen, series, replicates, tuple(covariates))


def read_series(path: str | Path, columns: Columns) -> Series:
    """The series of a table, after a look for what a sampler would take without a word.

    Raises:
        DataError: negative times, one series under two spellings, a time that occurs twice, or what
            :meth:`.Series.from_csv` finds.
    """
    series = Series.from_csv(path, **_names(columns))
    table = read_table(path)
    _check_times(table[columns.time], columns.time)
    if columns.series is not None:
        _check_labels(table[columns.series], columns.series)
    _check_repeats(table, columns)
    return series


def row_of(path: str | Path, columns: Columns, label: Any, time: float, name: str, value: float) -> int | None:
    """Number of the row, counted from 1 below the column names, that holds this value; None if it is not found."""
    table = read_table(path)
    found = np.isclose(table[columns.time], time) & np.isclose(table[name], value)
    if columns.series is not None:
        found &= (table[columns.series] == label).to_numpy()
    return int(found.argmax()) + 1 if found.any() else None


def describe_series(series: Series) -> pd.DataFrame:
    """A row for each series: its first and last time, and how many values it has and misses."""
    rows = []
    for i in range(len(series)):
        seen = series.times[i][series.mask[i].any(-1)]
        rows.append(
            {
                "series": str(i if series.ids is None else series.ids[i]),
                "first time": float(seen.min()),
                "last time": float(seen.max()),
                "times with data": len(seen),
                "values": int(series.mask[i].sum()),
                "missing": len(seen) * series.mask.shape[-1] - int(series.mask[i].sum()),
            }
        )
    return pd.DataFrame(rows)


def _names(columns: Columns) -> dict[str, Any]:
    names = {"time": columns.time, "values": list(columns.values), "series": columns.series}
    return {**names, "covariates": columns.covariates}


def _check_times(times: pd.Series, name: str) -> None:
    negative = np.flatnonzero(times.to_numpy() < 0)
    if len(negative):
        shown = ", ".join(f"row {row + 1}: {times.iloc[row]:g}" for row in negative[:_SHOWN])
        raise DataError(
            f"column {name!r} has {len(negative)} negative times ({shown}; counted from the first row below the "
            "names). If they are meant, add a constant to all times, so that the first is 0"
        )


def _check_labels(labels: pd.Series, name: str) -> None:
    if pd.api.types.is_numeric_dtype(labels):
        return
    spellings: dict[str, str] = {}
    for label in labels.unique():
        key = " ".join(str(label).split()).casefold()
        if key in spellings:
            raise DataError(
                f"column {name!r}: {spellings[key]!r} and {label!r} differ in spaces or capitals only, and would be "
                "two series; write both alike if they are one, else give them different names"
            )
        spellings[key] = label


def _check_repeats(table: pd.DataFrame, columns: Columns) -> None:
    keys = [columns.time] if columns.series is None else [columns.series, columns.time]
    again = table.duplicated(keys)
    if columns.replicates or not again.any():
        return
    second = int(again.to_numpy().argmax())
    here = table.iloc[second]
    first = int((table[keys] == here[keys]).all(axis=1).to_numpy().argmax())
    same = table.iloc[first][list(columns.values)].equals(here[list(columns.values)])
    where = f"time {here[columns.time]:g}"
    if columns.series is not None:
        where += f" of series {here[columns.series]!r}"
    which = "the same row again" if same else "with other values"
    hint = "Two experiments of one name? Give each its own." if columns.series is not None else "Several series? Name "
    hint += "" if columns.series is not None else "the column that tells them apart by --series."
    raise DataError(
        f"{where} is in row {first + 1} and, {which}, in row {second + 1} (of {int(again.sum())} repeated rows, "
        f"counted from the first below the names). {hint} Repeated measurements are allowed by --replicates"
    )
