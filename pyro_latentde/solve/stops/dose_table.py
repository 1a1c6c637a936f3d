# SPDX-License-Identifier: Apache-2.0
"""From a long table with a row for each dose to padded rows of doses, one row for each series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_latentde.errors import DataError
from pyro_latentde.solve.choices import not_among

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["doses_of_table"]


def doses_of_table(
    frame: pd.DataFrame,
    time: str,
    amount: str,
    state: int | str,
    states: Mapping[Any, int | str] | None,
    series: str | None,
    columns: Mapping[str, str | None],
    ids: Sequence[Any] | None,
) -> list[dict[str, Any]]:
    """Keywords of one Dose for each state and kind; arguments as those of ``Dose.from_dataframe``."""
    target = _Target(state, states)
    _check_columns(frame, [time, amount], [series, *target.column, *columns.values()])
    keys = [None] * len(frame) if series is None else frame[series].tolist()
    order = list(dict.fromkeys(keys)) if ids is None else list(ids)
    unknown = [key for key in dict.fromkeys(keys) if key not in order]
    if unknown:
        raise DataError(f"column {series!r}: {unknown[:3]} are not among the ids of the series.")
    numbers = {name: _column(frame, name) for name in [time, amount, *filter(None, columns.values())]}
    rows: dict[tuple, list[list[tuple]]] = {}
    for i in np.flatnonzero(numbers[amount] != 0):
        one = {what: 0.0 if name is None else numbers[name][i] for what, name in columns.items()}
        kind = "rate" if one["rate"] else "duration" if one["duration"] else None
        into = rows.setdefault((target.of(frame, i), kind), [[] for _ in order])
        place = into[order.index(keys[i])]
        if one["additional"] and not one["interval"] > 0:
            raise DataError(f"row {i + 1} has {one['additional']:g} additional doses; expected a positive interval.")
        for k in range(int(one["additional"]) + 1):
            entry = (numbers[time][i] + k * one["interval"], numbers[amount][i], one[kind] if kind else 0.0)
            place.append(entry)
    if not rows:
        raise DataError(f"column {amount!r} holds no amounts: the table has no doses.")
    return [_padded(into, kind, series, lists) for (into, kind), lists in rows.items()]


def _padded(state: int | str, kind: str | None, series: str | None, lists: list[list[tuple]]) -> dict[str, Any]:
    most = max(len(entries) for entries in lists)
    table = torch.full((len(lists), most, 3), torch.nan, dtype=torch.float64)
    table[..., 1] = 0.0
    for row, entries in zip(table, lists, strict=True):
        if entries:
            row[: len(entries)] = torch.tensor(sorted(entries), dtype=torch.float64)
    table = table[0] if series is None else table
    found = {"times": table[..., 0], "amounts": table[..., 1], "state": state}
    return {**found, kind: table[..., 2]} if kind else found


class _Target:
    """Which state a row is a dose into."""

    def __init__(self, state: int | str, states: Mapping[Any, int | str] | None) -> None:
        self.state, self.states = state, states
        self.column = [] if states is None else [state]

    def of(self, frame: pd.DataFrame, i: int) -> int | str:
        if self.states is None:
            return self.state
        entry = frame[self.state].iloc[i]
        if entry not in self.states:
            raise DataError(f"row {i + 1}: {not_among(f'column {self.state!r}', entry, map(str, self.states))}")
        return self.states[entry]


def _check_columns(frame: pd.DataFrame, needed: list[str], further: list[str | None]) -> None:
    for name in [*needed, *filter(None, further)]:
        if name not in frame.columns:
            raise DataError(f"the table: {not_among('column', name, [str(c) for c in frame.columns])}")


def _column(frame: pd.DataFrame, name: str) -> np.ndarray:
    """Numbers; 0 where a cell is empty."""
    try:
        return np.nan_to_num(frame[name].to_numpy(dtype=np.float64, na_value=np.nan), nan=0.0)
    except (TypeError, ValueError) as error:
        raise DataError(f"column {name!r} is not numeric: {error}.") from error
