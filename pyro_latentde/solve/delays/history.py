# SPDX-License-Identifier: Apache-2.0
"""What one row's state looks like, where only a function of time tells it: ``history(t, p)``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_latentde.errors import LatentDEError, ShapeError
from pyro_latentde.solve.lift import Lift, in_fresh_thread
from pyro_latentde.solve.problem import flatten_state
from pyro_latentde.solve.structure import Parameters, StateShape
from pyro_latentde.solve.vector_field import BoundField, readings, row_of

__all__ = ["state_of_history"]


def state_of_history(
    past: Callable,
    held: Callable,
    bound: BoundField | None,
    asked: int,
    times: Any,
    params: Any,
    t0: Any,
    event_dims: dict[str, int],
) -> tuple[StateShape, Tensor]:
    """The state that a history gives for one row, and a zero state ``(D,)`` of its dtype and device.

    Args:
        past: ``history(t, p)`` as written.
        held: The same with sampled weights, if it reads any.
        bound: Sampled weights.
        asked: How many arguments it takes.
        times: As given.
        params: As given.
        t0: As given.
        event_dims: As given.

    Raises:
        ShapeError: If it does not give one state.
    """
    moment = torch.as_tensor(times if t0 is None else t0)
    moment = moment if moment.dtype.is_floating_point else moment.to(torch.get_default_dtype())
    moment = moment[..., 0] if t0 is None else moment
    parameters = Parameters.of(params, moment)
    dims = {k: v for k, v in event_dims.items() if k in parameters.names}
    choices = readings(parameters.names, parameters.leaves, dims, torch.Size())

    def attempt() -> tuple[dict[Any, Tensor], list[Any]]:
        found, misses = {}, []
        t = row_of(moment, 0)
        pairs = [] if bound is None else zip(bound.tensors, bound.event_dims, strict=True)
        known = {id(x): row_of(x, rank) for x, rank in pairs}
        for ranks in choices:
            rows = [row_of(x, r) for x, r in zip(parameters.leaves, ranks, strict=True)]
            try:
                with Lift([t, *rows], known) as lift:
                    value = lift.adopt(held(*(t, parameters.rebuild(rows))[:asked]))
                state, flat = flatten_state(value, event_dims)
            except Exception as error:
                misses.append(error)
                continue
            if flat.ndim == 1:
                found[state] = torch.zeros_like(flat)
            else:
                misses.append(tuple(flat.shape))
        return found, misses

    found, misses = in_fresh_thread(attempt)
    if len(found) == 1:
        return next(iter(found.items()))
    if found:
        sizes = sorted({state.size for state in found})
        raise ShapeError(
            f"history(t, p) gives states of sizes {sizes}, depending on which dimensions of its parameters are batch: "
            f"say how many trailing dimensions of each belong to one row, event_dims={{...}}, for "
            f"{', '.join(parameters.names)}."
        )
    shape = next((m for m in misses if isinstance(m, tuple)), None)
    if shape is not None:
        raise ShapeError(
            f"history(t, p) returned shape {shape} for one row; expected the state at t, (D,), of one row: rows of a "
            "batch differ by their parameters p."
        )
    if isinstance(misses[0], LatentDEError):
        raise ShapeError(f"history(t, p): {misses[0]}") from misses[0]
    raise ShapeError(
        f"history(t, p), called on one row with t of shape (), raised {type(misses[0]).__name__}: {misses[0]}."
    ) from misses[0]
