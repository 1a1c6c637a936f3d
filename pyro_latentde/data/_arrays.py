# SPDX-License-Identifier: Apache-2.0
"""Arrays into the padded form of a `Series`: ragged rows, shapes, sorting in time, safe fillers for gaps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_latentde.errors import DataError

__all__ = [
    "as_batch",
    "as_tensor",
    "describe_rows",
    "fill_gaps",
    "pad_all",
    "pad_rows",
    "ragged_rows",
    "sort_in_time",
]


def as_tensor(data: Any, what: str, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of any kind as a floating tensor; tensors keep their device and floating dtype."""
    try:
        tensor = data if isinstance(data, Tensor) else torch.as_tensor(data)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{what}: expected numbers, got {type(data).__name__} ({error})") from error
    if tensor.is_complex():
        raise DataError(f"{what}: got {tensor.dtype}, expected real numbers; give both parts as states")
    if dtype is None:
        keep = isinstance(data, Tensor) and tensor.is_floating_point()
        dtype = tensor.dtype if keep else torch.float64
    return tensor.to(dtype)


def pad_rows(rows: Sequence[Tensor], filler: float | None = None) -> Tensor:
    """Stack ragged rows (T_i, ...) to (N, T, ...); short rows are continued by `filler`, or by their maximum.

    The maximum of a row of times is its last time even when the times are not sorted yet.
    """
    length = max(row.shape[0] for row in rows)
    out = []
    for row in rows:
        gap = length - row.shape[0]
        tail = row.amax(0, keepdim=True) if filler is None else torch.full_like(row[:1], filler)
        out.append(torch.cat([row, tail.expand(gap, *row.shape[1:])]) if gap else row)
    return torch.stack(out)


def ragged_rows(data: Any, what: str, dtype: torch.dtype | None) -> list[Tensor] | None:
    """The rows of a list of sequences of different lengths, or of tensors; None for what is one array."""
    if not isinstance(data, list | tuple) or not data:
        return None
    if all(isinstance(row, Tensor) and row.dim() == 0 for row in data):
        return None
    if not all(hasattr(row, "__len__") and not isinstance(row, str) for row in data):
        return None
    if len({len(row) for row in data}) == 1 and not isinstance(data[0], Tensor):
        return None  # an ordinary nested list
    rows = [as_tensor(row, f"{what}[{i}]", dtype) for i, row in enumerate(data)]
    empty = [i for i, row in enumerate(rows) if row.dim() == 0 or row.shape[0] == 0]
    if empty:
        raise DataError(f"{what}: series {empty} are empty; leave them out")
    return rows


def pad_all(
    times: Any, values: Any, mask: Any, inputs: Any, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Tensors of what may be ragged lists: times continued by their last one, values by NaN."""
    fillers = {"times": None, "values": float("nan"), "mask": 0.0, "inputs": 0.0}
    given = dict(zip(fillers, (times, values, mask, inputs), strict=True))
    rows = {what: ragged_rows(data, what, dtype) for what, data in given.items()}
    if rows["times"] is not None and rows["values"] is not None:
        lengths = [[row.shape[0] for row in rows[what]] for what in ("times", "values")]
        if lengths[0] != lengths[1]:
            raise DataError(f"ragged series: lengths of times {lengths[0]} and of values {lengths[1]} differ")
        if rows["values"][0].dim() == 1:
            rows["values"] = [row.unsqueeze(-1) for row in rows["values"]]
    out = []
    for what, data in given.items():
        if rows[what] is not None:
            if len({row.shape[1:] for row in rows[what]}) > 1:
                raise DataError(f"{what}: the series have different numbers of columns")
            out.append(pad_rows(rows[what], fillers[what]))
        else:
            out.append(None if data is None else as_tensor(data, what, dtype))
    return tuple(out)


def as_batch(times: Tensor, values: Tensor | None, what: str = "values") -> tuple[Tensor, Tensor | None]:
    """Times to (N, T) and values to (N, T, D), with the shapes that were given named in the error."""
    if times.dim() not in (1, 2) or times.numel() == 0:
        raise DataError(f"times: expected (T,) or (N, T), at least one time; got {tuple(times.shape)}")
    if values is None:
        return torch.atleast_2d(times), None
    given = f"times {tuple(times.shape)}, {what} {tuple(values.shape)}"
    length = times.shape[-1]
    if values.dim() == 1 or (values.dim() == 2 and times.dim() == 2):
        batch = torch.atleast_2d(values).unsqueeze(-1)  # (T,) or (N, T): one observed state
    elif values.dim() == 2:
        batch = values.unsqueeze(0)
    else:
        batch = values
    fits = batch.dim() == 3 and batch.shape[1] == length and batch.shape[2] > 0
    if not fits or (times.dim() == 2 and times.shape[0] not in (1, batch.shape[0])):
        raise DataError(
            f"{what} do not fit the times: {given}. Expected {what} (T,), (T, D) or (N, T, D) with "
            f"T = {length}.{_transpose_hint(times, values, what)}"
        )
    return times.expand(batch.shape[0], length), batch


def _transpose_hint(times: Tensor, values: Tensor, what: str) -> str:
    length, shape = times.shape[-1], tuple(values.shape)
    if len(shape) == 2 and shape[1] == length:
        return f" {what} look like (D, T): pass {what}.T, of shape {shape[::-1]}."
    if len(shape) == 3 and shape[1] != length and length in shape:
        order = (0, 2, 1) if shape[2] == length else (1, 0, 2)
        kind = "(N, D, T)" if shape[2] == length else "(T, N, D)"
        turned = tuple(shape[i] for i in order)
        return f" {what} look like {kind}: pass {what}.permute{order}, of shape {turned}."
    if length - 1 in shape:
        return f" There is one time more than {what}: does the list of times hold the initial time as well?"
    return ""


def sort_in_time(times: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Order each row of times (N, T), and what belongs to it (N, T, ...); replicates keep their order."""
    if bool((times[:, 1:] >= times[:, :-1]).all()):
        return (times, *others)
    order = times.argsort(dim=1, stable=True)
    out = [times.gather(1, order)]
    for other in others:
        index = None if other is None else order.reshape(*order.shape, 1).expand(other.shape)
        out.append(None if other is None else other.gather(1, index))
    return tuple(out)


def fill_gaps(values: Tensor, mask: Tensor) -> Tensor:
    """Replace masked entries of (N, T, D) by the observation of the same state that is nearest in the series.

    A gap is never scored, but its number still runs through the density, where NaN, or a value outside
    the support, would make the gradient NaN. An observed value of the same state is always safe.
    """
    if bool(mask.all()):
        return values
    length = values.shape[1]
    position = torch.arange(length, device=values.device)
    distance = (position[:, None] - position[None, :]).abs()  # (T, T)
    distance = distance[None, :, :, None].masked_fill(~mask[:, None], length + 1)  # (N, T, T', D)
    nearest = values.gather(1, distance.argmin(dim=2))
    # A state without any observation in one series borrows the first one of the other series; else 1.
    seen_here = mask.any(dim=1, keepdim=True)
    flat, seen = values.flatten(0, 1), mask.flatten(0, 1)
    borrowed = flat.gather(0, seen.to(torch.int8).argmax(dim=0, keepdim=True))
    borrowed = torch.where(seen.any(dim=0, keepdim=True), borrowed, torch.ones_like(borrowed))
    return torch.where(mask, values, torch.where(seen_here, nearest, borrowed))


def describe_rows(bad: Tensor, ids: Sequence[Any] | None) -> str:
    """Names (at most five) of the series marked in `bad` (N,)."""
    rows = bad.nonzero().flatten().tolist()
    names = [repr(ids[i]) if ids is not None else str(i) for i in rows[:5]]
    return ", ".join(names) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
