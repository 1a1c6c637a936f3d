# SPDX-License-Identifier: Apache-2.0
"""A batch of observed series: irregular, with gaps, of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_latentde.data._arrays import (
    as_batch,
    as_tensor,
    describe_rows,
    fill_gaps,
    pad_all,
    pad_rows,
    ragged_rows,
    sort_in_time,
)
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

    Raises:
        DataError: shapes disagree, times are not finite, or a series has no observation at all.

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
    complete: bool = field(init=False)  # nothing missing

    def __post_init__(self) -> None:
        _check(self)
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
            dtype: of everything; by default the widest given, lists and integers counting as float64.

        Returns:
            Series with times (N, T), values and mask (N, T, D).

        Raises:
            DataError: shapes disagree (a likely transpose is named), times not finite, an empty series.
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
        _check_finite_times(times, ids)
        times, values, observed, inputs = sort_in_time(times, values, observed, inputs)
        return cls(
            times=times.contiguous(),
            values=fill_gaps(values, observed).contiguous(),
            mask=observed,
            names=None if names is None else tuple(names),
            ids=None if ids is None else tuple(ids),
            inputs=inputs,
            covariates=covariates,
        )

    @classmethod
    def at_times(cls, times: Any, *, names: Sequence[str] | None = None, dtype: torch.dtype | None = None) -> Series:
        """Series without values: when to look, for models that then draw new observations.

        Args:
            times: (T,), (N, T), or a list of N ragged (T_i,).
            names: names of the values that would be observed.
            dtype: by default that of a floating tensor given, else float64.

        Returns:
            Series with values None and mask (N, T, 1), False where a short series was padded.
        """
        rows = ragged_rows(times, "times", dtype)
        if rows is None:
            times, _ = as_batch(as_tensor(times, "times", dtype), None)
            mask = torch.ones_like(times, dtype=torch.bool)
        else:
            times, mask = pad_rows(rows), pad_rows([torch.ones_like(r) for r in rows], 0.0).bool()
        _check_finite_times(times, None)
        times, mask = sort_in_time(times, mask[..., None])
        return cls(times=times, values=None, mask=mask, names=None if names is None else tuple(names))

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
        import pandas as pd

        frame = pd.read_csv(path, comment="#")
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
        rows = rows.to(self.times.device)
        picked = {name: t[rows] for name, t in self._tensors().items()}
        ids = None if self.ids is None else tuple(self.ids[i] for i in rows.tolist())
        return replace(self, **picked, ids=ids)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Series:
        """The same series in another floating dtype, or on another device."""
        moved = {
            name: t.to(device=device, dtype=t.dtype if name == "mask" else dtype or t.dtype)
            for name, t in self._tensors().items()
        }
        return replace(self, **moved)

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


def _check_finite_times(times: Tensor, ids: Sequence[Any] | None) -> None:
    bad = ~times.isfinite()
    if bad.any():
        where = describe_rows(bad.any(dim=1), ids)
        raise DataError(
            f"times: {int(bad.sum())} of {times.numel()} are NaN or infinite (series {where}). A value may "
            "be missing, a time may not: drop those rows, or give ragged series as lists."
        )


def _check(series: Series) -> None:
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
