# SPDX-License-Identifier: Apache-2.0
r"""States that stay positive: solved as logarithms, :math:`du/dt = f(t, e^u) / e^u`, given back in the user's units.

The solver sees :math:`v = (\mathrm{atol} / \mathrm{rtol})\, u`, so that its test of an error of v against
:math:`\mathrm{atol} + \mathrm{rtol}\,|v|` is one of a relative error of y against
:math:`\mathrm{rtol}\,(1 + |\log y|)`, whatever the unit of y and whatever solver. Steps are the same for every factor.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.errors import DataError, ShapeError, SolveError
from pyro_latentde.solve.choices import not_among
from pyro_latentde.solve.lift import peek
from pyro_latentde.solve.settings import TOLERANCES
from pyro_latentde.solve.structure import StateShape

__all__ = ["LogStates", "read_positive"]


@dataclass(frozen=True)
class LogStates:
    """Which coordinates of a flat state ``(..., D)`` are solved as logarithms.

    Args:
        runs: Number and kind (True: positive) of coordinates side by side.
        factor: v / log y.
        lowest: Logarithms below it are followed, but y stays there: at the root of the dtype's smallest normal number,
            1.5e-154 or 1.1e-19, of which a gradient can still take the inverse and the square.
    """

    runs: tuple[tuple[int, bool], ...]
    factor: float
    lowest: float

    @property
    def mask(self) -> np.ndarray:
        """``(D,)``, True where positive."""
        return np.concatenate([np.full(size, kind) for size, kind in self.runs])

    def to_user(self, v: Tensor) -> Tensor:
        """The states in the user's units."""
        return self._map(lambda part: (part / self.factor).clamp(min=self.lowest).exp(), v)

    def to_user_padded(self, v: Tensor) -> Tensor:
        """The same where NaN fills up, without a gradient there."""
        there = ~v.isnan()
        return torch.where(there, self.to_user(torch.where(there, v, 0.0)), torch.nan)

    def from_user(self, y: Tensor) -> Tensor:
        """The states as they are solved; NaN, without a gradient, where y is not positive."""

        def log(part: Tensor) -> Tensor:
            fine = part > 0
            return torch.where(fine, self.factor * torch.where(fine, part, 1.0).log(), torch.nan)

        return self._map(log, y)

    def slope(self, v: Tensor, slope: Tensor) -> Tensor:
        """dv/dt from dy/dt."""
        if slope.shape != v.shape:
            return slope  # refused elsewhere, with a message
        return self._map(lambda part, y: self.factor * part / y, slope, self.to_user(v))

    def _map(self, change: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Apply ``change`` to the positive coordinates."""
        if len(self.runs) == 1:
            return change(*tensors)
        sizes = [size for size, _ in self.runs]
        parts = zip(*(x.split(sizes, -1) for x in tensors), strict=True)
        done = [change(*p) if kind else p[0] for p, (_, kind) in zip(parts, self.runs, strict=True)]
        return torch.cat(done, -1)


def read_positive(
    positive: Any,
    rtol: float | None,
    atol: float | None,
    strict: bool,
    doses: Any = None,
) -> Callable[[StateShape, Tensor], tuple[StateShape, Tensor]] | None:
    """Read ``positive=``: a change of a state ``(*batch, D)`` and its shape to the variables that are solved.

    Args:
        positive: True for all states, or names or indices of some; None, False or nothing for none.
        rtol: As given.
        atol: As given.
        strict: Refuse an initial state that is not positive; else such a row fails.
        doses: None, since a dose adds to a state, and logarithms multiply.

    Raises:
        SolveError: For tolerances of 0, and doses.
        ShapeError: For an unknown name or index.
        DataError: For an initial state that is not positive.
    """
    if positive is None or positive is False or (not isinstance(positive, (bool, Tensor)) and positive == ()):
        return None
    if doses is not None:
        raise SolveError(
            "positive= with doses=: a dose adds to a state whose logarithm is solved, which has no kernel. Leave out "
            "positive=, and give the states a tighter atol."
        )
    if 0 in (rtol, atol):
        raise SolveError(
            f"positive= holds states to relative errors of rtol: expected rtol and atol above 0, got {rtol}, {atol}."
        )

    def change(state: StateShape, y0: Tensor) -> tuple[StateShape, Tensor]:
        mask = _mask(positive, state)
        if not any(mask):
            return state, y0
        if strict:
            _check_positive(y0, mask, state)
        relative, absolute = (u if x is None else x for x, u in zip((rtol, atol), TOLERANCES[y0.dtype], strict=True))
        runs = tuple((len(list(group)), kind) for kind, group in groupby(mask))
        logs = LogStates(runs, absolute / relative, 0.5 * math.log(torch.finfo(y0.dtype).tiny))
        return replace(state, logs=logs), logs.from_user(y0)

    return change


def _mask(positive: Any, state: StateShape) -> list[bool]:
    if positive is True:
        return [True] * state.size
    chosen = [positive] if isinstance(positive, (str, int)) else list(positive)
    mask = [False] * state.size
    for one in chosen:
        for i in _places(one, state):
            mask[i] = True
    return mask


def _places(one: Any, state: StateShape) -> Sequence[int]:
    """Coordinates that a name or an index means; the name of a vector state means all its coordinates."""
    if isinstance(one, int) and not isinstance(one, bool):
        if not -state.size <= one < state.size:
            raise ShapeError(f"positive={one}: expected an index of one of {state.size} states.")
        return [one % state.size]
    if state.spec is None:
        raise ShapeError(
            f"positive names {one!r}, but y0 is a vector: expected indices 0 to {state.size - 1}, or True for all. "
            "Names need y0 as a dict, or states= of lde.ode."
        )
    coordinates = state.coordinates
    if one in coordinates:
        return [coordinates.index(one)]
    found = [i for i, name in enumerate(_owners(state)) if name == one]
    if not found:
        raise ShapeError(not_among("positive", one, dict.fromkeys((*state.names, *coordinates))))
    return found


def _owners(state: StateShape) -> list[str]:
    return [name for name, event in zip(state.names, state.events, strict=True) for _ in range(event.numel())]


def _check_positive(y0: Tensor, mask: list[bool], state: StateShape) -> None:
    seen = peek(y0)
    if seen is None:
        return
    bad = np.argwhere((seen <= 0) & np.array(mask))
    if len(bad):
        *row, i = (int(x) for x in bad[0])
        name = (state.coordinates or [f"y[{k}]" for k in range(state.size)])[i]
        where = f" in row {row}" if row else ""
        raise DataError(
            f"positive state {name} begins at {seen[(*row, i)]:g}{where}: expected a number above 0, whose logarithm "
            "is solved. A state that may be 0 cannot be positive: leave it out, or begin with a small number."
        )
