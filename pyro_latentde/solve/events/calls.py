# SPDX-License-Identifier: Apache-2.0
"""The functions of events as the user wrote them, called on one row from flat pieces, and what they return checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_latentde.errors import LatentDEError, ShapeError
from pyro_latentde.solve.events.event import Event

if TYPE_CHECKING:
    from pyro_latentde.solve.vector_field import FieldInfo

__all__ = ["arguments_of", "call_condition", "call_reset", "event_values", "tried_events", "what_defines"]


def what_defines(events: Sequence[Event]) -> tuple:
    """What tells events apart: their functions, and not the objects, which are made anew at every call."""
    return tuple([(e.condition, e.reset, *e.traits) for e in events])


def call_condition(info: FieldInfo, event: Event, t: Tensor, y: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """c(t, y, p) of one row, ``()``."""
    value = _called(info, event.condition, t, y, leaves)
    if _shape(value) != ():
        raise ShapeError(
            f"Event: the condition returned {_told(value)}, expected a scalar tensor (), one number whose sign counts: "
            f"y[0] - 1.0, for example. Several conditions are several events, events=[...]."
        )
    if not value.dtype.is_floating_point:
        raise ShapeError(
            f"Event: the condition returned {value.dtype}, expected a floating number that goes through zero: write "
            f"y[0] - 1.0, not y[0] > 1.0."
        )
    return value.to(y.dtype)


def call_reset(info: FieldInfo, event: Event, t: Tensor, y: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """r(t, y, p) of one row as it is solved, ``(D,)``."""
    version = y._version
    value = _called(info, event.reset, t, y, leaves)
    if y._version != version:
        raise ShapeError(
            "Event: the reset changes y in place, but y is also the state before the event, which is written down: "
            "return a new state, for example torch.stack([y[0], -0.9 * y[1]]), or begin with y = y.clone()."
        )
    try:
        flat = info.state.flatten(value)
    except ShapeError as error:
        raise ShapeError(f"Event: {str(error).replace('the vector field', 'the reset').split('dy/dt')[0]}") from error
    if tuple(flat.shape) != (info.state.size,):
        raise ShapeError(
            f"Event: the reset returned {_told(flat)}, expected ({info.state.size},), the whole new state: "
            f"torch.stack([y[0], -0.9 * y[1]]), for example."
        )
    logs = info.state.logs
    return flat.to(y.dtype) if logs is None else logs.from_user(flat.to(y.dtype))


def event_values(
    info: FieldInfo, events: Sequence[Event], t: Tensor, y: Tensor, leaves: Sequence[Tensor]
) -> list[Tensor]:
    """All conditions, each ``(1,)``, then all resets, each ``(D,)``, of the events that have one."""
    found = [call_condition(info, e, t, y, leaves).reshape(1) for e in events]
    return found + [call_reset(info, e, t, y, leaves) for e in events if e.reset is not None]


def tried_events(
    info: FieldInfo, events: Sequence[Event], t: Tensor, y: Tensor, leaves: Sequence[Tensor]
) -> list[Tensor]:
    """As :func:`event_values`, for the first time; whatever goes wrong is a :class:`ShapeError` that names the call."""
    try:
        return event_values(info, events, t, y, leaves)
    except LatentDEError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{n}: {tuple(x.shape)}" for n, x in zip(info.params.names, leaves, strict=True))
        raise ShapeError(
            f"Event: its functions, called on one row as condition(t, y, p) and reset(t, y, p) with t of shape (), y "
            f"of shape {tuple(y.shape)}, parameters {{{shapes}}}, raised {type(error).__name__}: {error}."
        ) from error


def _called(info: FieldInfo, function: Callable, t: Tensor, y: Tensor, leaves: Sequence[Tensor]) -> Any:
    logs = info.state.logs
    state = info.state.unflatten(y if logs is None else logs.to_user(y))
    if arguments_of(function, info.params.given, "an event's function") == 2:
        return function(t, state)
    return function(t, state, info.params.rebuild(leaves))


def arguments_of(f: Callable, given: bool, what: str = "a vector field") -> int:
    """2 for ``f(t, y)``, 3 for ``f(t, y, p)``; a third argument with a default stays so without parameters."""
    target = f.forward if isinstance(f, torch.nn.Module) else f
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return 3
    if any(p.kind == p.VAR_POSITIONAL for p in parameters):
        return 3
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    if len(positional) < 2 or required > 3:
        raise ShapeError(
            f"{what} is called as f(t, y, p) (or f(t, y) without parameters); got a callable with the arguments "
            f"({', '.join(p.name for p in parameters)})."
        )
    return 2 if required <= 2 and not given else min(len(positional), 3)


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _told(value: Any) -> str:
    return f"shape {_shape(value)}" if isinstance(value, torch.Tensor) else type(value).__name__
