# SPDX-License-Identifier: Apache-2.0
"""Doses: what is added to a state at given times, at once or at a constant rate for a while."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.errors import DataError, ShapeError
from pyro_latentde.solve.lift import peek
from pyro_latentde.solve.stops.schedule import Change

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Dose"]


@dataclass(frozen=True, eq=False)
class Dose:
    r"""Doses into one state: :math:`y_s(\tau^+) = y_s(\tau^-) + a`, or :math:`a / d` added to :math:`dy_s/dt` for d.

    Gradients flow to amounts, durations, rates and times. A dose at the start of a solve is given there; doses after
    its last time do not matter; a dose before its start is an error. Doses at the same time add up. An :class:`Event`
    at the time of a dose comes first; one whose condition the dose carries across zero does not happen.

    Args:
        times: When, in the user's unit of time, ``(M,)`` or ``(*batch, M)``; NaN where a row has fewer doses.
        amounts: How much, in units of the state, ``()`` or ``(*batch, M)``; not negative.
        state: Into which state, by its number, or by its name (of a structured state, or of ``states=`` of
            :func:`~pyro_latentde.ode`).
        duration: The dose is an infusion of this length, ``()`` or ``(*batch, M)``, in units of time.
        rate: The dose is an infusion at this rate, ``()`` or ``(*batch, M)``, in units of the state per time; it lasts
            amount / rate.

    Raises:
        DataError: For numbers that no dose has: a negative amount, a duration or rate that is not positive, an infinite
            time; for both a duration and a rate.
        ShapeError: For shapes that do not fit.

    References:
        Gabrielsson, Weiner, "Pharmacokinetic and Pharmacodynamic Data Analysis", 5th ed., 2016, ch. 2.

    Example:
        >>> import torch, pyro_latentde as lde
        >>> def field(t, y, p):
        ...     return {"gut": -p["ka"] * y["gut"], "blood": p["ka"] * y["gut"] - p["k"] * y["blood"]}
        >>> zero = {"gut": torch.zeros(()).double(), "blood": torch.zeros(()).double()}
        >>> pills = lde.Dose([0.0, 12.0, 24.0], 100.0, "gut")
        >>> solution = lde.odesolve(field, zero, [0.0, 11.0, 23.0], {"ka": 1.0, "k": 0.1}, doses=pills)
        >>> [round(x, 2) for x in solution.ys["blood"].tolist()]
        [0.0, 36.98, 48.12]
    """

    times: Tensor
    amounts: Tensor
    state: int | str
    duration: Tensor | None = None
    rate: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("times", "amounts", "duration", "rate"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _numbers(name, value))
        if self.duration is not None and self.rate is not None:
            raise DataError("a Dose has a duration or a rate, not both: one follows from the other and the amount.")
        if isinstance(self.state, bool) or not isinstance(self.state, int | str):
            raise DataError(f"Dose(state={self.state!r}): expected the number or the name of a state.")
        if self.times.ndim == 0:
            raise ShapeError("Dose: times has no dimension; expected (M,) or (*batch, M), one time for each dose.")
        for name in ("amounts", "duration", "rate"):
            self._check(name, getattr(self, name))
        seen = peek(self.times)
        if seen is not None and np.isinf(seen).any():
            raise DataError("Dose: a time is infinite; expected finite times, or NaN where a row has fewer doses.")

    def _check(self, name: str, value: Tensor | None) -> None:
        if value is None:
            return
        shape, count = tuple(value.shape), self.times.shape[-1]
        if shape and shape[-1] != count:
            raise ShapeError(
                f"Dose: {name} has shape {shape}, times {tuple(self.times.shape)}; expected one for each of the "
                f"{count} doses, or one number for all."
            )
        times, values = peek(self.times), peek(value)
        if times is None or values is None:
            return
        try:
            times, values = np.broadcast_arrays(times, values)
        except ValueError:
            raise ShapeError(
                f"Dose: the batch dimensions of {name} {shape} and times {tuple(self.times.shape)} do not broadcast."
            ) from None
        fine = values >= 0 if name == "amounts" else values > 0
        wrong = ~(fine & np.isfinite(values)) & ~np.isnan(times)
        if wrong.any():
            where = tuple(int(i) for i in np.argwhere(wrong)[0])
            wanted = "not negative" if name == "amounts" else "positive"
            raise DataError(
                f"Dose: {name}{list(where)} = {values[where]:g} at t = {times[where]:g}; expected a finite number that "
                f"is {wanted}. Rows with fewer doses have NaN as time."
            )

    def into(self, state: int | str) -> Dose:
        """The same doses into another state."""
        return Dose(self.times, self.amounts, state, self.duration, self.rate)

    def changes(self, state: int, like: Tensor) -> list[Change]:
        """What happens, to the state of this number, in the dtype and on the device of ``like``."""
        times, amounts = (x.to(dtype=like.dtype, device=like.device) for x in (self.times, self.amounts))
        padding = times.isnan()
        amounts = torch.where(padding, 0.0, amounts)
        if self.duration is None and self.rate is None:
            return [Change(times, state, amounts=amounts)]
        given = self.duration if self.rate is None else self.rate
        given = torch.where(padding, 1.0, given.to(like))  # NaN would pass through the division backwards
        rate, duration = (amounts / given, given) if self.rate is None else (given, amounts / given)
        rate = torch.where(padding, 0.0, rate)
        return [Change(times, state, rates=rate), Change(times + duration, state, rates=-rate)]

    @staticmethod
    def from_dataframe(
        frame: pd.DataFrame,
        *,
        time: str = "TIME",
        amount: str = "AMT",
        state: int | str = 0,
        states: Mapping[Any, int | str] | None = None,
        series: str | None = None,
        rate: str | None = None,
        duration: str | None = None,
        additional: str | None = None,
        interval: str | None = None,
        ids: Sequence[Any] | None = None,
    ) -> list[Dose]:
        """Doses from a long table as NONMEM's: a row for each dose; rows without an amount are observations.

        Args:
            frame: The table.
            time: Column of the times.
            amount: Column of the amounts; rows where it is empty or 0 are left out.
            state: State of all doses; or the column that tells it, with ``states``.
            states: From the entries of that column to states, ``{1: "gut", 2: "blood"}``.
            series: Column that tells series apart; None for one series.
            rate: Column of rates of infusion; empty or 0 is a dose given at once.
            duration: Column of durations, likewise.
            additional: Column with the number of further doses like this one (ADDL).
            interval: Column of the time between these (II).
            ids: Series in the order wanted, also those without doses (``Series.ids``); by default in the order in which
                they first appear.

        Returns:
            One :class:`Dose` for each state and kind (at once, infusion), times ``(N, M)``, or ``(M,)`` for one series.

        Raises:
            DataError: For columns that are absent or not numeric, or entries that no dose has.

        Example:
            >>> import pandas as pd, pyro_latentde as lde
            >>> rows = {"ID": [1, 1, 2], "TIME": [0.0, 1.0, 0.0], "AMT": [9.0, 0.0, 8.0], "ADDL": [2, 0, 0], "II": 12.0}
            >>> columns = {"series": "ID", "additional": "ADDL", "interval": "II", "state": "gut"}
            >>> (dose,) = lde.Dose.from_dataframe(pd.DataFrame(rows), **columns)
            >>> dose.times.tolist()
            [[0.0, 12.0, 24.0], [0.0, nan, nan]]
        """
        from pyro_latentde.solve.stops.dose_table import doses_of_table

        columns = {"rate": rate, "duration": duration, "additional": additional, "interval": interval}
        parts = doses_of_table(frame, time, amount, state, states, series, columns, ids)
        return [Dose(**part) for part in parts]


def _numbers(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"Dose: {name} of type {type(value).__name__} cannot be read as numbers: {error}.") from error
