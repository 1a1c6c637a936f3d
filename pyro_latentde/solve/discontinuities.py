# SPDX-License-Identifier: Apache-2.0
"""Doses, known jumps and knots of inputs, checked against a problem and gathered to its stops."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.errors import DataError
from pyro_latentde.solve.lift import peek
from pyro_latentde.solve.stops import Change, Stops, lay_out
from pyro_latentde.solve.structure import StateShape

__all__ = ["Discontinuities", "stops_of"]


@dataclass(frozen=True)
class Discontinuities:
    """What the user says about times at which a solution is not smooth.

    Args:
        jumps: Times at which the field jumps, ``(M,)`` or ``(*batch, M)``, or None.
        after: Outputs at such times are the state after it.
    """

    jumps: Any = None
    after: bool = True

    @property
    def keywords(self) -> dict[str, Any]:
        """As keywords of :func:`~pyro_latentde.odesolve`."""
        return {"jumps": self.jumps}


def stops_of(
    given: Discontinuities | None, state: StateShape, y0: Tensor, times: Tensor, start: Tensor, backward: bool
) -> tuple[Stops | None, tuple[Tensor, ...]]:
    """The stops of one problem and their tensors."""
    if given is None:
        return None, ()
    changes = []
    if given.jumps is not None:
        changes.append(Change(_jump_times(given.jumps, y0)))
    return lay_out(changes, given.after) if changes else (None, ())


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
