# SPDX-License-Identifier: Apache-2.0
"""A batch of observed series: irregular, with gaps, of different lengths."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_latentde.data._arrays import (
    as_batch,
    as_tensor,
    fill_gaps,
    pad_all,
    pad_rows,
    ragged_rows,
    sort_in_time,
)
from pyro_latentde.data._checks import check, check_finite_times
from pyro_latentde.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Series"]


@dataclass(frozen=True, eq=False, repr=False)
class Series:
    """N series of D observed values at up to T times each.

    Make one by `from_tensors`, `from_dataframe`, `from_csv` or, without values, `at_times`. Times are sorted
    in each series; equal times are replicates and stay. Shorter series repeat their last time, with nothing
    observed there. What is missing has ``mask == False`` and an observed value of the same state as filler,
    so that no NaN is ever in `values`, nor in a gradient.

    Args:
        times: (N, T), floating, finite, not decreasing along T; unit: the user's.
        values: (N, T, D), floating, finite; None for a series that only says when to look.
        mask: (N, T, D), bool, True where observed; (N, T, 1) when `values` is None.
        names: names of the D observed values.
        ids: one label per series.
        inputs: (N, T, K), known inputs at the times; finite.
        covariates: (N, C), known constants of each series; finite.
        frame: shape of the picture that the D values are, row by row, such as (28, 28).
        index: (N,), int64, which series these are of the data set that they were taken from by `batch`.
        population: number of series in that data set.
        time_weight: how many windows like this one a whole series holds; 1 where these are all the data.

    Raises:
        DataError: shapes disagree, times are not finite, or a series has no observation at all.
        ShapeError: `frame` does not have D values.

    Example:
        >>> import torch
        >>> from pyro_latentde.data import Series
        >>> nan = float("nan")
        >>> values = [[2.0, 5.0], [nan, 4.0], [1.0, 3.0]]
        >>> Series.from_tensors([0.0, 1.0, 3.0], values, names=("prey", "predator"))
        Series(1 series, 3 times, 2 values (prey, predator), 5 observed, 1 missing)
    """

    times: Tensor
    values: Tensor | None
    mask: Tensor
    names: tuple[str, ...] | None = None
    ids: tuple[Any, ...] | None = None
    inputs: Tensor | None = None
    covariates: Tensor | None = None
    frame: tuple[int, ...] | None = None
    index: Tensor | None = None
    population: int | None = None
    time_weight: float = 1.0
    complete: bool = field(init=False)  # nothing missing

    def __post_init__(self) -> None:
        check(self)
        # Asked at every evaluation of a log-joint, where a look into the mask would cost a synchronisation.
        object.__setattr__(self, "complete", bool(self.mask.all()))

    @classmethod
    def from_tensors(
        cls,
        times: Any,
        values: Any,
        *,
        mask: Any = None,
        names: Sequence[str] | None = None,
        ids: Sequence[Any] | None = None,
        inputs: Any = None,
        covariates: Any = None,
        frame: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Series:
        """Series from tensors, arrays or nested lists.

        Args:
            times: (T,) shared by all series, (N, T), or a list of N ragged (T_i,).
            values: (T,), (T, D), (N, T, D), or a list of N ragged (T_i,) or (T_i, D). With times (N, T),
                values (N, T) are N series of one state. NaN is missing.
            mask: like `values`, bool; False is missing too.
            names: names of the D values.
            ids: one label per series.
            inputs: like `values`, of K columns, complete.
            covariates: (N, C), or (C,) for one series.
            frame: shape of the picture that the D values are.
            dtype: of everything; by default the widest given, lists and integers counting as float64.

        Returns:
            Series with times (N, T), values and mask (N, T, D).

        Raises:
            DataError: shapes disagree (a likely transpose is named), times not finite, an empty series.
            ShapeError: `frame` does not have D values.
        """
        times, values, mask, inputs = pad_all(times, values, mask, inputs, dtype)
        mask, inputs = (None if extra is None else as_batch(times, extra)[1] for extra in (mask, inputs))
        times, values = as_batch(times, values)
        dtype = torch.promote_types(times.dtype, values.dtype) if dtype is None else dtype
        times, values = times.to(dtype), values.to(dtype)
        observed = ~values.isnan()
        if mask is not None:
            observed = observed & mask.expand_as(values).bool()
        if inputs is not None:
            inputs = inputs.to(dtype).expand(times.shape[0], -1, -1)
        if covariates is not None:
            covariates = torch.atleast_2d(as_tensor(covariates, "covariates", dtype))
        check_finite_times(times, ids)
        times, values, observed, inputs = sort_in_time(times, values, observed, inputs)
        return cls(
            times=times.contiguous(),
            values=fill_gaps(values, observed).contiguous(),
            mask=observed,
            names=None if names is None else tuple(names),
            ids=None if ids is None else tuple(ids),
            inputs=inputs,
            covariates=covariates,
            frame=None if frame is None else tuple(frame),
        )

    @classmethod
    def at_times(
        cls,
        times: Any,
        *,
        names: Sequence[str] | None = None,
        ids: Sequence[Any] | None = None,
        inputs: Any = None,
        covariates: Any = None,
        dtype: torch.dtype | None = None,
    ) -> Series:
        """Series without values: when to look, for models that then draw new observations.

        Args:
            times: (T,) shared by all series, (N, T), or a list of N ragged (T_i,).
            names: names of the values that would be observed.
            ids: one label per series.
            inputs: (T, K), (N, T, K), or a list of N ragged (T_i, K), complete.
            covariates: (N, C), or (C,) for one series.
            dtype: by default that of a floating tensor given, else float64.

        Returns:
            Series with values None and mask (N, T, 1), False where a short series was padded.

        Raises:
            DataError: shapes disagree, or times are not finite.

        Example:
            >>> Series.at_times([1.0, 2.0, 4.0], covariates=[[100.0], [200.0]], ids=["Ann", "Bo"])
            Series(2 series, up to 3 times, no values)
        """
        rows = ragged_rows(times, "times", dtype)
        mask = None if rows is None else pad_rows([torch.ones_like(row) for row in rows], 0.0).bool()
        times, _, _, inputs = pad_all(times, None, None, inputs, dtype)
        times, inputs = as_batch(times, inputs, "inputs")
        mask = torch.ones_like(times, dtype=torch.bool) if mask is None else mask.expand_as(times)
        if covariates is not None:
            covariates = torch.atleast_2d(as_tensor(covariates, "covariates", dtype)).to(times)
        check_finite_times(times, ids)
        times, mask, inputs = sort_in_time(times, mask[..., None], None if inputs is None else inputs.to(times))
        n = max(len(part) for part in (times, covariates, ids) if part is not None)
        if len(times) == 1:
            parts = (times, mask, inputs)
            times, mask, inputs = (None if part is None else part.repeat_interleave(n, 0) for part in parts)
        return cls(
            times=times,
            values=None,
            mask=mask,
            names=None if names is None else tuple(names),
            ids=None if ids is None else tuple(ids),
            inputs=inputs,
            covariates=covariates,
        )

    @classmethod
    def from_dataframe(
        cls,
        frame: pd.DataFrame,
        *,
        time: str,
        values: Sequence[str] | str,
        series: str | None = None,
        inputs: Sequence[str] = (),
        covariates: Sequence[str] = (),
        dtype: torch.dtype = torch.float64,
    ) -> Series:
        """Series from a long table, one row per series and time.

        Args:
            frame: the table; NaN is missing. Rows may be in any order.
            time: column of the times.
            values: columns of the D values.
            series: column that tells the series apart; None for one series.
            inputs: columns of known inputs.
            covariates: columns that are constant within a series.
            dtype: of the tensors.

        Returns:
            Series, in the order in which they first appear in the table, with column names as `names`.

        Raises:
            DataError: a column is absent or not numeric, a covariate changes within a series.
        """
        from pyro_latentde.data._tables import columns_by_series

        columns = columns_by_series(frame, series, time, values, inputs, covariates)
        return cls.from_tensors(**columns, dtype=dtype)

    @classmethod
    def from_csv(
        cls,
        path: str | PathLike[str],
        *,
        time: str,
        values: Sequence[str] | str,
        series: str | None = None,
        inputs: Sequence[str] = (),
        covariates: Sequence[str] = (),
        dtype: torch.dtype = torch.float64,
    ) -> Series:
        """`from_dataframe` of a CSV file; lines that start with ``#`` are comments."""
        from pyro_latentde.data._tables import read_table

        frame = read_table(path)
        return cls.from_dataframe(
            frame, time=time, values=values, series=series, inputs=inputs, covariates=covariates, dtype=dtype
        )

    def __len__(self) -> int:
        return self.times.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Series:
        """Some of the series: a batch of one by an integer, else by a slice, list, index or bool tensor."""
        n = len(self)
        if isinstance(index, int):
            if not -n <= index < n:  # IndexError also ends Python's iteration
                raise IndexError(f"series {index} of {n}")
            rows = torch.tensor([index % n])
        elif isinstance(index, slice):
            rows = torch.arange(n)[index]
        else:
            rows = torch.as_tensor(index)
            rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows.reshape(-1)
        if not len(rows):
            raise DataError(f"no series left of {n}: the index is empty")
        return self._pick(rows)

    def batch(self, index: Tensor | Sequence[int]) -> Series:
        """Some of the series, as a sample of all: like indexing, and `index` and `population` are set.

        Args:
            index: (B,), positions in these series, each once.

        Returns:
            Series of B, from which `series_plate` knows how much each of them counts.

        Example:
            >>> series = Series.from_tensors(torch.arange(4.0), torch.randn(10, 4, 2))
            >>> batch = series.batch([7, 2])
            >>> batch.index.tolist(), batch.population
            ([7, 2], 10)
        """
        rows = torch.as_tensor(index, dtype=torch.int64)  # looked at where it is: no wait for another device
        if rows.dim() != 1 or not len(rows):
            raise DataError(f"batch: expected positions (B,) of {len(self)} series, got {tuple(rows.shape)}")
        if int(rows.min()) < 0 or int(rows.max()) >= len(self):
            raise DataError(
                f"batch: positions {int(rows.min())} to {int(rows.max())} are not all in {len(self)} series"
            )
        picked = self._pick(rows)
        if self.index is None:
            return picked._with(index=rows.to(self.times.device), population=len(self))
        return picked

    def window(self, start: int | Tensor | Sequence[int], length: int, *, sample: bool = False) -> Series:
        """Consecutive times of each series. A window may hold no observation; times stay as they are.

        Args:
            start: position of the first time, the same or (N,), one for each series.
            length: number of times.
            sample: False: a plain cut, whose values are the data from now on. True: a random window that stands for
                its whole series, as `batch` stands for all series: ``time_weight`` is multiplied by T / length.

        Returns:
            Series of `length` times.

        Raises:
            DataError: the window is longer than the series, or does not lie inside of it.

        Example:
            >>> series = Series.from_tensors(torch.arange(4.0), torch.randn(2, 4, 1))
            >>> window = series.window([0, 1], length=2)
            >>> window.times.tolist(), window.time_weight, series.window(0, 2, sample=True).time_weight
            ([[0.0, 1.0], [1.0, 2.0]], 1.0, 2.0)
        """
        n, total = self.times.shape
        if not 1 <= length <= total:
            raise DataError(f"window: {length} times from series of {total}; give a length from 1 to {total}")
        starts = torch.as_tensor(start, dtype=torch.int64)
        if starts.shape not in ((), (n,)) or int(starts.min()) < 0 or int(starts.max()) > total - length:
            raise DataError(
                f"window: expected one start or {n}, from 0 to {total - length} (series of {total} times, windows of "
                f"{length}); got shape {tuple(starts.shape)}, {int(starts.min())} to {int(starts.max())}"
            )
        if starts.dim() == 0:
            where: Any = (slice(None), slice(int(starts), int(starts) + length))
        else:
            columns = (starts[:, None] + torch.arange(length, device=starts.device)).to(self.times.device)
            where = (torch.arange(n, device=columns.device)[:, None], columns)
        in_time = {name: t for name, t in self._tensors().items() if name not in ("covariates", "index")}
        cut = {name: t[where] for name, t in in_time.items()}
        return self._with(**cut, time_weight=self.time_weight * (total / length if sample else 1.0))

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Series:
        """The same series in another floating dtype, or on another device."""
        moved = {
            name: t.to(device=device, dtype=(dtype or t.dtype) if t.is_floating_point() else t.dtype)
            for name, t in self._tensors().items()
        }
        return self._with(**moved)

    @property
    def n_observed(self) -> int:
        """Number of observed values, over all series, times and states."""
        return 0 if self.values is None else int(self.mask.sum())

    @property
    def num_values(self) -> int | None:
        """D; None when there are neither values nor names."""
        if self.values is not None:
            return self.values.shape[-1]
        return None if self.names is None else len(self.names)

    def mean_values(self) -> Tensor:
        """Mean of each value over all series and times at which it was observed, (D,); 0 where it never was.

        Raises:
            DataError: there are no values at all.
        """
        if self.values is None or not bool(self.mask.any()):
            raise DataError("mean_values: these series have no observations")
        return torch.where(self.mask, self.values, 0).sum((0, 1)) / self.mask.sum((0, 1)).clamp(min=1)

    def _pick(self, rows: Tensor) -> Series:
        rows = rows.to(self.times.device)
        ids = None if self.ids is None else tuple(self.ids[i] for i in rows.tolist())
        return self._with(**{name: t[rows] for name, t in self._tensors().items()}, ids=ids)

    def _with(self, **changes: Any) -> Series:
        """Parts of checked series need no second check, which would cost a training step milliseconds."""
        other = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(other, name, value)
        object.__setattr__(other, "complete", self.complete or bool(other.mask.all()))
        return other

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: t for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor)}

    def __repr__(self) -> str:
        n, length = self.times.shape
        padded = "" if n == 1 else "up to "
        text = f"Series({n} series, {padded}{length} times"
        if self.values is None:
            return f"{text}, no values)"
        names = f" ({', '.join(self.names)})" if self.names else ""
        gaps = self.mask.numel() - self.n_observed
        return f"{text}, {self.num_values} values{names}, {self.n_observed} observed, {gaps} missing)"
