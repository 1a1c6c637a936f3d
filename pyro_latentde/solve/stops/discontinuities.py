# SPDX-License-Identifier: Apache-2.0
"""Doses and known jumps, checked against a problem and gathered to its stops."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.errors import DataError
from pyro_latentde.solve.choices import not_among
from pyro_latentde.solve.lift import peek
from pyro_latentde.solve.stops.dose import Dose
from pyro_latentde.solve.stops.inputs import Input
from pyro_latentde.solve.stops.schedule import Change, Stops, lay_out
from pyro_latentde.solve.structure import StateShape

__all__ = ["Discontinuities", "stops_of"]


@dataclass(frozen=True)
class Discontinuities:
    """What the user says about times at which a solution is not smooth.

    Args:
        doses: A :class:`Dose`, several, or None.
        jumps: Times at which the field jumps, ``(M,)`` or ``(*batch, M)``, or None.
        at_dose: Outputs at the time of a dose are the state ``"after"`` it or ``"before"``.
    """

    doses: Dose | Sequence[Dose] | None = None
    jumps: Any = None
    at_dose: str = "after"

    @property
    def keywords(self) -> dict[str, Any]:
        """As keywords of :func:`~pyro_latentde.odesolve`."""
        return {"doses": self.doses, "jumps": self.jumps, "at_dose": self.at_dose}


def stops_of(
    given: Discontinuities | None,
    state: StateShape,
    y0: Tensor,
    times: Tensor,
    start: Tensor,
    backward: bool,
    inputs: Sequence[Input],
) -> tuple[Stops | None, tuple[Tensor, ...]]:
    """The stops of one problem and their tensors; ``backward``: the part before t0 of a solve to both sides."""
    if given is None:
        return None, ()
    if given.at_dose not in ("after", "before"):
        raise DataError(not_among("at_dose", given.at_dose, ("after", "before")))
    changes = []
    for dose in _listed(given.doses):
        _check_start(dose, times, start, backward)
        into = dose.changes(_number(dose.state, state), y0)
        changes += [replace(c, times=torch.full_like(c.times, torch.inf)) if backward else c for c in into]
    if given.jumps is not None:
        changes.append(Change(_jump_times(given.jumps, y0)))
    changes += [Change(u.times.to(y0)) for u in inputs]
    return lay_out(changes, given.at_dose == "after") if changes else (None, ())


def _listed(doses: Dose | Sequence[Dose] | None) -> Sequence[Dose]:
    listed = [] if doses is None else [doses] if isinstance(doses, Dose) else doses
    for one in listed if isinstance(listed, Sequence) else [doses]:
        if not isinstance(one, Dose):
            raise DataError(f"doses: expected a Dose or a list of them, Dose(times, amounts, state); got {one!r:.80}.")
    return listed


def _number(name: int | str, state: StateShape) -> int:
    """Which coordinate a dose goes into."""
    if isinstance(name, int):
        if not -state.size <= name < state.size:
            there = "there is 1 state" if state.size == 1 else f"there are {state.size} states"
            raise DataError(
                f"a Dose into state {name}, but {there}, numbered 0 to {state.size - 1}: give one of these numbers, or "
                "the name of a state."
            )
        return name % state.size
    known = state.coordinates
    if known is None:
        raise DataError(
            f"a Dose into state {name!r}, but the states have no names: give the number of the state, or names by "
            "a dict as y0, or by states= of lde.ode."
        )
    if name not in known:
        raise DataError(not_among("the state of a Dose", name, known))
    return known.index(name)


def _check_start(dose: Dose, times: Tensor, start: Tensor, backward: bool) -> None:
    seen, begin, ends = peek(dose.times), peek(start), peek(times)
    if begin is not None and ends is not None and not backward and (ends[..., -1] < begin).any():
        raise DataError(
            "doses need times that increase: a solve backwards would have to take them back. Solve from before the "
            "first dose."
        )
    if seen is None or begin is None:
        return
    early = seen < begin[..., None]
    if early.any():
        shape = np.broadcast_shapes(seen.shape, begin[..., None].shape)
        where = tuple(int(i) for i in np.argwhere(early)[0])
        first = np.broadcast_to(seen, shape)[where]
        raise DataError(
            f"a dose at t = {first:g} (dose {list(where)}) comes before the start of the solve, t0 = "
            f"{np.broadcast_to(begin[..., None], shape)[where]:g}. Give t0= a time before the first dose, with y0 the "
            "state there, or NaN as the time of what is no dose."
        )


def _jump_times(jumps: Any, y0: Tensor) -> Tensor:
    try:
        jumps = torch.as_tensor(jumps, dtype=y0.dtype, device=y0.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"jumps of type {type(jumps).__name__} cannot be read as times: {error}.") from error
    if jumps.ndim == 0:
        jumps = jumps.reshape(1)
    seen = peek(jumps)
    if seen is not None and np.isinf(seen).any():
        raise DataError("jumps holds an infinite time; expected finite ones, or NaN where a row has fewer than others.")
    return jumps
