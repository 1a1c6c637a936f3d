# SPDX-License-Identifier: Apache-2.0
"""The vector-field contract: ``f(t, y, p)`` for one row, as the user wrote it, called from flat pieces.

Everything found out about a field (which dimensions of its parameters are batch, which tensors it captures) is kept
under its key, so that a field made anew at every call is examined once.
"""

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyro_latentde.errors import ShapeError
from pyro_latentde.solve.events.calls import arguments_of, tried_events
from pyro_latentde.solve.events.event import Event
from pyro_latentde.solve.field_key import Walk
from pyro_latentde.solve.lift import Lift, in_fresh_thread, is_wrapped, stand_in
from pyro_latentde.solve.misfit import ambiguity, check_result, misfit
from pyro_latentde.solve.stops.inputs import Input
from pyro_latentde.solve.structure import Parameters, StateShape

__all__ = [
    "BoundField",
    "FieldInfo",
    "StateShape",
    "clear_fields",
    "Parameters",
    "examine",
    "readings",
    "reading",
    "row_of",
]


@dataclass(frozen=True)
class BoundField:
    """A field together with tensors that it reads from elsewhere and that may carry batch dimensions (sampled weights).

    Args:
        f: The field, ``f(t, y, p)``.
        tensors: Tensors it reads, by identity.
        event_dims: Number of trailing dimensions of each that belong to one row; the rest is batch.
        names: What each is called in messages.
        held: Evaluates ``f`` with these tensors, also long after: a gradient may call it.
    """

    f: Callable
    tensors: tuple[Tensor, ...]
    event_dims: tuple[int, ...]
    names: tuple[str, ...]
    held: Callable


@dataclass
class FieldInfo:
    """What is known about a field: how it is called, event shapes of its leaves, where its captured tensors are."""

    arguments: int
    state: StateShape
    params: Parameters
    ranks: tuple[int, ...]
    captured: tuple[int, ...] | None  # positions in the walk; None: they must be looked for at every call
    captured_count: int = 0
    batchable: bool = True
    kernels: dict[Any, Any] = field(default_factory=dict)
    layouts: dict[Any, Any] = field(default_factory=dict)  # of its tensors as rows, by the shapes of times and t0
    keep: tuple = ()

    def call(self, f: Callable, t: Tensor, y: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """dy/dt of one row as a flat tensor."""
        logs = self.state.logs
        state = self.state.unflatten(y if logs is None else logs.to_user(y))
        further = () if self.arguments == 2 else (self.params.rebuild(leaves),)
        slope = self.state.flatten(f(t, state, *further))
        return slope if logs is None else logs.slope(y, slope)


def reading(f: Callable, bound: BoundField | None, inputs: Sequence[Input]) -> BoundField | None:
    """The field with the inputs it reads, whose tensors may carry batch dimensions."""
    if not inputs:
        return bound
    bound = bound or BoundField(f, (), (), (), f)
    tensors = tuple(x for u in inputs for x in u.tensors)
    ranks = tuple(rank for u in inputs for rank in u.ranks)
    names = tuple(f"{name} of input {i}" for i, u in enumerate(inputs) for name in u.names)
    return BoundField(
        bound.f,
        (*bound.tensors, *tensors),
        (*bound.event_dims, *ranks),
        (*bound.names, *names),
        bound.held,
    )


_FIELDS: "OrderedDict[tuple, FieldInfo]" = OrderedDict()
_LIMIT = 512
_LOCK = threading.Lock()


def clear_fields() -> None:
    """Forget every field and its kernels."""
    with _LOCK:
        _FIELDS.clear()


def examine(
    f: Callable,
    bound: BoundField | None,
    state: StateShape,
    y0: Tensor,
    t: Tensor,
    params: Parameters,
    event_dims: dict[str, int],
    walk: Walk,
    events: tuple[Event, ...] = (),
) -> tuple[FieldInfo, list[Tensor]]:
    """Find out how a field is called, or recall it.

    Args:
        f: The user's field.
        bound: Further tensors it reads, if known.
        state: Shape of one row's state.
        y0: ``(*batch, D)``.
        t: Start time, any shape.
        params: The parameters.
        event_dims: Event ranks given by the user, by path.
        walk: The field, walked.
        events: What happens on the way; their functions are examined with the field.

    Returns:
        What is known, and the captured tensors of this very call.

    Raises:
        ShapeError: When the field cannot be called on one row, or its parameters can be read in several ways.
    """
    if params.fixed:
        walk.visit([value for _, value in params.fixed])
    leaves = params.leaves
    shapes = tuple([(x.shape, x.dtype) for x in leaves])
    structure = None if state.spec is None else (state.events, state.names, state.spec)
    bound_shapes = None if bound is None else (tuple([x.shape for x in bound.tensors]), bound.event_dims)
    told = tuple(sorted(event_dims.items())) if event_dims else None
    key = (walk.key, y0.shape, y0.dtype, y0.device, structure, state.logs, params.shape, shapes, bound_shapes, told)
    info = _FIELDS.get(key)
    if info is not None:
        if info.captured is not None:
            return info, [walk.tensors[i] for i in info.captured]
        captured = in_fresh_thread(
            lambda: _Row(f, info, state, y0, t, bound, events).call(_rows_of(leaves, info.ranks))[1]
        )
        if len(captured) == info.captured_count:
            return info, captured
    info, captured = _examine(f, bound, state, y0, t, params, event_dims, walk, events)
    info.keep = tuple(walk.keep)
    with _LOCK:
        _FIELDS[key] = info
        while len(_FIELDS) > _LIMIT:
            _FIELDS.popitem(last=False)
    return info, captured


def row_of(x: Tensor, rank: int) -> Tensor:
    """The first row of ``x`` as a plain tensor. Call it in a fresh thread: a functorch level would wrap it."""
    if 0 in x.shape[: x.ndim - rank]:  # a batch of no rows
        return torch.full(tuple(x.shape[x.ndim - rank :]), 0.5, dtype=x.dtype, device=x.device)
    if is_wrapped(x):
        return stand_in(x)[(0,) * (x.ndim - rank)]
    return stand_in(x[(0,) * (x.ndim - rank)] if x.ndim > rank else x)


def _rows_of(leaves: Sequence[Tensor], ranks: Sequence[int]) -> list[Tensor]:
    return [row_of(x, r) for x, r in zip(leaves, ranks, strict=True)]


class _Row:
    """One row of a problem on plain tensors, to call the field on; made and used in a fresh thread."""

    def __init__(
        self,
        f: Callable,
        info: FieldInfo,
        state: StateShape,
        y0: Tensor,
        t: Tensor,
        bound: BoundField | None,
        events: tuple[Event, ...] = (),
    ) -> None:
        self.f, self.info, self.events = f if bound is None else bound.held, info, events
        self.y, self.t = row_of(y0, 1), row_of(t, 0)
        pairs = [] if bound is None else zip(bound.tensors, bound.event_dims, strict=True)
        self.bound = {id(x): row_of(x, rank) for x, rank in pairs}

    def call(self, leaves: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The result and the captured tensors."""
        lift = Lift([self.t, self.y, *leaves], self.bound)
        with lift:
            out = lift.adopt(self.info.call(self.f, self.t, self.y, leaves))
            if self.events and tuple(out.shape) == (self.info.state.size,):
                lift.adopt(tried_events(self.info, self.events, self.t, self.y, leaves))
        return out, [x for x in lift.captured if x.dtype.is_floating_point]


def _examine(
    f: Callable,
    bound: BoundField | None,
    state: StateShape,
    y0: Tensor,
    t: Tensor,
    params: Parameters,
    event_dims: dict[str, int],
    walk: Walk,
    events: tuple[Event, ...],
) -> tuple[FieldInfo, list[Tensor]]:
    names, leaves = params.names, params.leaves
    info = FieldInfo(arguments_of(f, params.given), state, params.blank(), (), None)
    if info.arguments == 2 and leaves and not events:
        raise ShapeError("parameters were given, but the vector field takes only (t, y); write it as f(t, y, p).")
    row = in_fresh_thread(lambda: _Row(f, info, state, y0, t, bound, events))
    unknown = set(event_dims) - set(names)
    if unknown:
        known = sorted({*names, *state.names})
        raise ShapeError(f"event_dims names {sorted(unknown)}; expected names of parameters or states: {known}.")
    choices = readings(names, leaves, event_dims, y0.shape[:-1])

    def attempt() -> tuple[list, list]:
        fits, misses = [], []
        for ranks in choices:
            try:
                out, captured = row.call(_rows_of(leaves, ranks))
                if tuple(out.shape) == (state.size,):
                    fits.append((ranks, out, captured))
                else:
                    misses.append((ranks, out))
            except Exception as error:
                misses.append((ranks, error))
        return fits, misses

    def works(exchanged: bool, y0: Tensor, leaves: Sequence[Tensor]) -> bool:
        return in_fresh_thread(lambda: _works(row.f, info, exchanged, y0, t, leaves, event_dims))

    fits, misses = in_fresh_thread(attempt)
    if not fits:
        for _, miss in misses:
            if isinstance(miss, ShapeError) and str(miss).startswith("Event:"):
                raise miss
        raise misfit(names, leaves, y0, misses, works)
    if len(fits) > 1:
        raise ambiguity(names, leaves, [ranks for ranks, *_ in fits])
    ranks, out, captured = fits[0]
    check_result(out, y0)
    info.ranks, info.captured_count = ranks, len(captured)
    positions = {id(x): i for i, x in enumerate(walk.tensors)}
    if all(id(x) in positions for x in captured):
        info.captured = tuple(positions[id(x)] for x in captured)
    return info, captured


def _works(
    f: Callable,
    info: FieldInfo,
    exchanged: bool,
    y0: Tensor,
    t: Tensor,
    leaves: Sequence[Tensor],
    event_dims: dict[str, int],
) -> bool:
    """Whether the field would do if it were called otherwise."""
    if info.state.spec is not None:
        return False
    state = StateShape(None, (y0.shape[-1:],), ())
    other = replace(info, state=state)
    turned = (lambda t, y, *p: f(y, t, *p)) if exchanged else f
    for ranks in readings(info.params.names, leaves, event_dims, y0.shape[:-1]):
        try:
            out, _ = _Row(turned, other, state, y0, t, None).call(_rows_of(leaves, ranks))
        except Exception:
            continue
        if tuple(out.shape) == (state.size,) and out.device == y0.device:
            return True
    return False


def readings(
    names: Sequence[str], leaves: Sequence[Tensor], event_dims: dict[str, int], batch: torch.Size
) -> list[tuple[int, ...]]:
    """Event ranks to try for the leaves, whole tensors first."""
    options = []
    for name, leaf in zip(names, leaves, strict=True):
        if name in event_dims:
            if not 0 <= event_dims[name] <= leaf.ndim:
                raise ShapeError(f"event_dims[{name!r}] = {event_dims[name]}, but {name} has {leaf.ndim} dimensions.")
            options.append([event_dims[name]])
        else:
            options.append([r for r in range(leaf.ndim, -1, -1) if _broadcasts(leaf.shape[: leaf.ndim - r], batch)])
    count = 1
    for o in options:
        count *= len(o)
    if count > 4096:
        raise ShapeError(
            f"the batch dimensions of {len(names)} parameters can be read in {count} ways; say how many trailing "
            f"dimensions "
            "of each belong to one row, event_dims={...}."
        )
    return list(itertools.product(*options))


def _broadcasts(a: torch.Size, b: torch.Size) -> bool:
    return all(x == y or x == 1 or y == 1 for x, y in zip(a[::-1], b[::-1], strict=False))
