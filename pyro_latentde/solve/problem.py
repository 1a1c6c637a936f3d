# SPDX-License-Identifier: Apache-2.0
"""What the user gave, checked and laid out as rows: states, times, parameters."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from pyro_latentde.errors import DataError, ShapeError
from pyro_latentde.solve.events.calls import what_defines
from pyro_latentde.solve.events.event import Event
from pyro_latentde.solve.exchanged import exchange_hint
from pyro_latentde.solve.field_key import walk_field
from pyro_latentde.solve.lift import is_wrapped, no_transform, peek
from pyro_latentde.solve.stops.discontinuities import Discontinuities, stops_of
from pyro_latentde.solve.stops.inputs import inputs_of
from pyro_latentde.solve.stops.schedule import Stops
from pyro_latentde.solve.structure import Parameters, StateShape
from pyro_latentde.solve.vector_field import BoundField, FieldInfo, examine, reading

__all__ = ["Problem", "pose"]


Move = tuple[tuple[int, ...], tuple[int, ...]]
Change = Callable[[StateShape, Tensor], tuple[StateShape, Tensor]]


class RowLayout(NamedTuple):
    """How tensors are laid out as rows.

    Args:
        batch: Batch shape.
        rows: Its product.
        shared: Which tensors have no row dimension.
        moves: What to expand and reshape each of the others to (None: as it is); empty where all are as they are.
    """

    batch: torch.Size
    rows: int
    shared: tuple[bool, ...]
    moves: tuple[Move | None, ...]


class Problem(NamedTuple):
    """Rows to solve.

    Args:
        f: The user's field.
        info: What is known about it.
        layout: How many rows there are, and which tensors they share.
        tensors: y0, times, t0, then parameters, bound and captured tensors; each ``(...)`` if shared, else ``(rows,
            ...)``.
        originals: The bound and captured tensors as the field sees them.
        bound_names: What the bound tensors are called in messages.
        times: As given, ``(T,)`` or ``(*batch, T)``.
        order: Positions that sort the times in the direction of integration, if they were not.
        checked: False where the times cannot be looked at before the solve (a transform holds them).
        stops: What happens at the times at which steps must end, if there are any; its tensors are the last ones.
        events: What happens on the way.
    """

    f: Callable
    info: FieldInfo
    layout: RowLayout
    tensors: tuple[Tensor, ...]
    originals: tuple[Tensor, ...]
    bound_names: tuple[str, ...]
    times: Tensor
    order: Tensor | None
    checked: bool
    stops: Stops | None = None
    events: tuple[Event, ...] = ()

    @property
    def batch(self) -> torch.Size:
        return self.layout.batch

    @property
    def rows(self) -> int:
        return self.layout.rows

    @property
    def shared(self) -> tuple[bool, ...]:
        return self.layout.shared

    @property
    def names(self) -> tuple[str, ...]:
        """What each tensor after y0, times and t0 is called in messages."""
        return _names(self.info, self.bound_names, self.stops)

    @property
    def own(self) -> int:
        """Number of parameter leaves, before the bound and captured tensors."""
        return self.field_leaves - len(self.originals)

    @property
    def field_leaves(self) -> int:
        """Number of tensors that the field sees."""
        return self.leaves - (0 if self.stops is None else len(self.stops.names))

    @property
    def leaves(self) -> int:
        return len(self.tensors) - 3


def flatten_state(y0: Any, event_dims: dict[str, int]) -> tuple[StateShape, Tensor]:
    """The state as ``(*batch, D)``, and how to give it back."""
    if isinstance(y0, Tensor):
        _check_floating("y0", y0)
        if y0.ndim == 0:
            raise ShapeError(
                "y0 has no dimension; expected (*batch, D): one state is a vector of length 1, y0.reshape(1)."
            )
        if y0.shape[-1] == 0:
            raise ShapeError(f"y0 has shape {tuple(y0.shape)}; expected (*batch, D) with at least one state.")
        return _vector(y0.shape[-1]), y0
    if isinstance(y0, (int, float, list, np.ndarray)):
        raise ShapeError(
            f"y0 is of type {type(y0).__name__}; expected a tensor (*batch, D), for example torch.tensor([1.0, "
            f"2.0]), or a dict "
            "or named tuple of tensors."
        )
    pairs, spec = tree_flatten_with_path(y0)
    names, leaves = Parameters.paths(pairs), [leaf for _, leaf in pairs]
    if not leaves or not all(isinstance(x, Tensor) for x in leaves):
        kinds = ", ".join(f"{n}: {type(x).__name__}" for n, x in zip(names, leaves, strict=True))
        raise ShapeError(f"a structured y0 holds one tensor per state, torch.tensor(1.0); got {{{kinds}}}.")
    for name, leaf in zip(names, leaves, strict=True):
        _check_floating(f"y0[{name!r}]", leaf)
        if leaf.dtype != leaves[0].dtype or leaf.device != leaves[0].device:
            raise ShapeError(
                f"the states of y0 differ: {names[0]} is {leaves[0].dtype} on {leaves[0].device}, {name} is "
                f"{leaf.dtype} on "
                f"{leaf.device}; make them the same, for example y0[{name!r}].to(y0[{names[0]!r}])."
            )
    ranks = [event_dims.get(name, 0) for name in names]
    events = tuple(x.shape[x.ndim - r :] for x, r in zip(leaves, ranks, strict=True))
    batches = [x.shape[: x.ndim - r] for x, r in zip(leaves, ranks, strict=True)]
    batch = _broadcast(batches, [f"y0[{n!r}]" for n in names])
    flat = [x.expand((*batch, *e)).reshape((*batch, e.numel())) for x, e in zip(leaves, events, strict=True)]
    return StateShape(spec, events, tuple(names)), torch.cat(flat, dim=-1)


@lru_cache(maxsize=1024)
def _vector(size: int) -> StateShape:
    return StateShape(None, (torch.Size((size,)),), ())


def _check_floating(name: str, x: Tensor) -> None:
    if x.dtype in (torch.float64, torch.float32):
        return
    what = "its real and imaginary parts as states" if x.dtype.is_complex else f"{name}.double() or {name}.float()"
    raise ShapeError(f"{name} has dtype {x.dtype}; expected torch.float64 or torch.float32: {what}.")


def pose(
    f: Callable | BoundField,
    y0: Any,
    times: Any,
    params: Any,
    t0: Any,
    event_dims: dict[str, int] | None,
    given: Discontinuities | None = None,
    change: Change | None = None,
    events: tuple[Event, ...] = (),
) -> list[Problem]:
    """Check a problem and lay it out; two problems (forward, backward) when the times lie on both sides of t0.

    ``change`` gives the variables that are solved instead of y.

    Raises:
        ShapeError: For shapes, dtypes or devices that do not fit.
        DataError: For times that are not finite, or unsorted without ``t0``.
    """
    try:
        return _laid_out(f, y0, times, params, t0, event_dims, given, change, events)
    except (ShapeError, DataError) as error:
        error.args = (f"{error}{exchange_hint(y0, times)}",)
        raise


def _laid_out(
    f: Callable | BoundField,
    y0: Any,
    times: Any,
    params: Any,
    t0: Any,
    event_dims: dict[str, int] | None,
    given: Discontinuities | None,
    change: Change | None,
    events: tuple[Event, ...],
) -> list[Problem]:
    bound = f if isinstance(f, BoundField) else None
    f = bound.f if bound is not None else f
    if not callable(f):
        raise ShapeError(f"the vector field must be callable as f(t, y, p); got {type(f).__name__}.")
    if event_dims is not None and not isinstance(event_dims, dict):
        raise ShapeError(
            f'event_dims = {event_dims!r}; expected a dict by name, {{"k": 1}}; a single tensor is called "p".'
        )
    dims = event_dims or {}
    state, y0 = flatten_state(y0, dims)
    state, y0 = (state, y0) if change is None else change(state, y0)
    parameters = Parameters.of(params, y0)
    _check_devices(parameters, y0)
    own_dims = {k: v for k, v in dims.items() if k not in state.names or k in parameters.names}
    times = _as_times("times", times, y0)
    if times.ndim == 0 or times.shape[-1] == 0:
        raise ShapeError(f"times has shape {tuple(times.shape)}; expected (T,) or (*batch, T) with T at least 1.")
    start = _start_of_grid(times) if t0 is None else None
    if start is not None:
        sides = [(times, None, True)]
    else:
        start = times[..., 0] if t0 is None else _as_times("t0", t0, y0)
        sides = _sides(times, start, t0 is not None)
    walk = walk_field(f)
    if events:
        walk.visit(what_defines(events))
    inputs, own_dims = inputs_of(params, own_dims)
    bound = reading(f, bound, walk.inputs)
    info, captured = examine(f, bound, state, y0, start, parameters, own_dims, walk, events)
    originals = tuple(captured) if bound is None else (*bound.tensors, *captured)
    bound_names = () if bound is None else bound.names
    f = f if bound is None else bound.held
    leaves = (*parameters.leaves, *originals)
    problems = []
    for side, order, checked in sides:
        stops, moments = stops_of(given, state, y0, side, start, len(problems) > 0, (*inputs, *walk.inputs))
        tensors = (y0, side, start, *leaves, *moments)
        layout = _layout_of(info, bound, tensors, stops)
        if layout.moves:
            pairs = zip(tensors, layout.moves, strict=True)
            tensors = tuple(x if m is None else x.expand(m[0]).reshape(m[1]) for x, m in pairs)
        problem = Problem(f, info, layout, tensors, originals, bound_names, times, order, checked, stops, events)
        problems.append(problem)
    return problems


def _check_devices(parameters: Parameters, y0: Tensor) -> None:
    device = y0.device
    for i, leaf in enumerate(parameters.leaves):
        if leaf.device != device:
            name = parameters.names[i]
            raise ShapeError(f"parameter {name} is on {leaf.device}, y0 on {y0.device}: {name}.to({str(y0.device)!r}).")


def _as_times(name: str, value: Any, y0: Tensor) -> Tensor:
    """Times as a tensor like y0."""
    if not isinstance(value, Tensor) or value.dtype != y0.dtype or value.device != y0.device:
        try:
            value = torch.as_tensor(value, dtype=y0.dtype, device=y0.device)
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(value).__name__
            raise DataError(
                f"{name} of type {kind} cannot be read as numbers; expected a tensor or a list: {error}."
            ) from error
    return value


def _check_finite(name: str, seen: np.ndarray | None) -> None:
    if seen is not None and not np.isfinite(seen).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(seen))[0])
        raise DataError(
            f"{name}{list(where) if where else ''} is {seen[where]}; times must be finite. "
            "Mask missing observations in the data, not in the times; ragged rows repeat their last time."
        )


def _names(info: FieldInfo, bound_names: Sequence[str], stops: Stops | None) -> tuple[str, ...]:
    captured = (f"captured tensor {i}" for i in range(info.captured_count))
    return (*info.params.names, *bound_names, *captured, *(() if stops is None else stops.names))


def _layout_of(info: FieldInfo, bound: BoundField | None, tensors: Sequence[Tensor], stops: Stops | None) -> RowLayout:
    """The layout of these tensors, recalled: all other shapes are part of what ``info`` is of."""
    ends = () if stops is None else stops.ranks
    last = len(tensors) - len(ends)
    shapes = (tensors[1].shape, tensors[2].shape, *(x.shape for x in tensors[last:]))
    layout = info.layouts.get(shapes)
    if layout is None:
        if len(info.layouts) >= _LAYOUTS:
            info.layouts.clear()
        extra = () if bound is None else bound.event_dims
        captured = tensors[last - info.captured_count : last]
        ranks = (1, 1, 0, *info.ranks, *extra, *(x.ndim for x in captured), *ends)
        names = ("y0", "times", "t0", *_names(info, () if bound is None else bound.names, stops))
        layout = info.layouts[shapes] = _layout([tuple(x.shape) for x in tensors], ranks, names)
    return layout


_LAYOUTS = 256


def _layout(shapes: Sequence[tuple[int, ...]], ranks: Sequence[int], names: Sequence[str]) -> RowLayout:
    lead = [torch.Size(shape[: len(shape) - r]) for shape, r in zip(shapes, ranks, strict=True)]
    batch = _broadcast(lead, names, [tuple(shape) for shape in shapes])
    moves: list[Move | None] = []
    for shape, r, own in zip(shapes, ranks, lead, strict=True):
        event = tuple(shape[len(shape) - r :])
        as_is = not own or (own == batch and len(batch) == 1)
        moves.append(None if as_is else ((*batch, *event), (batch.numel(), *event)))
    shared = tuple(not own for own in lead)
    return RowLayout(batch, batch.numel(), shared, tuple(moves) if any(moves) else ())


def _broadcast(shapes: Sequence[torch.Size], names: Sequence[str], full: Sequence[tuple] | None = None) -> torch.Size:
    distinct = {s for s in shapes if s}
    if len(distinct) < 2:  # torch.broadcast_shapes costs more than a small solve
        return distinct.pop() if distinct else torch.Size()
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        pass
    told = ", ".join(f"{n}: batch {tuple(s)}" for n, s in zip(names, shapes, strict=True) if s)
    hint = ""
    for n, s, whole in zip(names, shapes, full or [()] * len(names), strict=True):
        others = [o for m, o in zip(names, shapes, strict=True) if m != n and {m, n} != {"t0", "times"}]
        if len(whole) == 2 and s and _fits([torch.Size(whole[1:]), *others]):
            hint = f" Did you mean {n}.transpose(0, 1), of shape {whole[::-1]}?"
    raise ShapeError(f"the batch dimensions do not broadcast: {told}.{hint}")


def _fits(shapes: Sequence[torch.Size]) -> bool:
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return False
    return True


Side = tuple[Tensor, Tensor | None, bool]


def _sides(times: Tensor, start: Tensor, given: bool) -> list[Side]:
    """Times sorted away from t0: one set, or two (later and earlier, clamped at t0) when t0 lies between."""
    seen, t0 = peek(times), peek(start)
    _check_finite("times", seen)
    if given:
        _check_finite("t0", t0)
    if seen is None or t0 is None:
        return [(times, None, False)]
    after = seen - np.asarray(t0)[..., None]
    steps = np.diff(seen, axis=-1)
    rising, falling = (steps >= 0).all(-1), (steps <= 0).all(-1)
    if not given:
        if (rising | falling).all():
            return [(times, None, True)]
        raise DataError(
            "times are not sorted, so the start is not clear: give t0= (the time of y0). The solution comes back in "
            "the "
            "order of the times given."
        )
    later, earlier = (after >= 0).all(-1), (after <= 0).all(-1)
    if not (later | earlier).all():
        moment = start[..., None]
        return [_sorted(torch.maximum(times, moment), 1.0), _sorted(torch.minimum(times, moment), -1.0)]
    if ((later & rising) | (earlier & falling)).all():
        return [(times, None, True)]
    sign = np.where(later, 1.0, -1.0)
    return [_sorted(times, torch.as_tensor(sign, dtype=times.dtype, device=times.device)[..., None])]


def _start_of_grid(times: Tensor) -> Tensor | None:
    """The first of the times, where they are what they mostly are: plain numbers for all rows, finite and rising.

    None where they are anything else. The number comes as a constant tensor, since a view of the times would be one
    more input of the solve that is made and followed at every call.
    """
    if times.ndim != 1 or type(times) is not Tensor or times.requires_grad or not times.is_cpu:
        return None
    if is_wrapped(times) or not no_transform():
        return None
    if times.shape[0] <= 64:
        values = times.tolist()  # few numbers are compared sooner one by one than as arrays
        rise = math.isfinite(sum(values)) and values == sorted(values)
    else:
        values = times.numpy()
        rise = math.isfinite(values[-1] - values[0]) and bool((values[:-1] <= values[1:]).all())
    return _constant(float(values[0]), times.dtype) if rise else None


@lru_cache(maxsize=1024)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # else no gradient could keep it
        return torch.tensor(value, dtype=dtype, device="cpu")


def _sorted(times: Tensor, sign: Tensor | float) -> Side:
    order = (times * sign).argsort(dim=-1, stable=True)
    times = times.expand(order.shape)
    return times.gather(-1, order), order, True
