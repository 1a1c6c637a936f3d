# SPDX-License-Identifier: Apache-2.0
"""Inputs that are known, or sampled, at some times, and read by a vector field at any: ``u(t)``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import GetAttrKey, register_pytree_node, tree_flatten_with_path

from pyro_latentde.errors import DataError, ShapeError
from pyro_latentde.solve.choices import not_among
from pyro_latentde.solve.lift import peek

__all__ = ["Input", "inputs_of"]

KINDS = ("previous", "linear", "cubic")


class Input:
    r"""A function of time through values at knots, for use inside a vector field: captured, or among its parameters.

    Between knots :math:`t_i \le t < t_{i+1}`, with :math:`\theta = (t - t_i) / (t_{i+1} - t_i)`:
    ``"previous"`` :math:`u = u_i`; ``"linear"`` :math:`u = u_i + \theta (u_{i+1} - u_i)`; ``"cubic"`` the cubic Hermite
    polynomial with the slopes of the parabolas through each three neighbouring values (Bessel's interpolation: smooth
    once, and only neighbours matter). Before the first and after the last knot the value is held. The steps of a solve
    end at every knot in its span, so that methods keep their order; gradients flow to values and times.

    Args:
        times: Knots, increasing, ``(M,)`` or ``(*batch, M)``, in units of time.
        values: ``(*batch, M)``, or with ``channels`` ``(*batch, M, C)``.
        kind: ``"previous"``, ``"linear"`` or ``"cubic"``.
        channels: Values are vectors; ``u(t)`` is ``(C,)`` instead of ``()``. By default where the last dimension of
            ``values`` is not the number of knots.

    Raises:
        DataError: For knots that do not increase, or are not finite.
        ShapeError: For shapes that do not fit.

    References:
        de Boor, "A Practical Guide to Splines", revised ed., Springer 2001, ch. IV.

    Example:
        >>> import torch, pyro_latentde as lde
        >>> heating = lde.Input([0.0, 1.0, 2.0], [0.0, 10.0, 0.0], "previous")
        >>> def room(t, y, p):
        ...     return p["k"] * (heating(t) - y)
        >>> times = torch.linspace(0, 3, 4)
        >>> solution = lde.odesolve(room, torch.zeros(1).double(), times, {"k": 1.0})
        >>> [round(x, 3) for x in solution.ys[:, 0].tolist()]
        [0.0, 0.0, 6.321, 2.325]
    """

    def __init__(self, times: Any, values: Any, kind: str = "linear", *, channels: bool | None = None) -> None:
        if kind not in KINDS:
            raise DataError(not_among("kind of an Input", kind, KINDS))
        times, values = _numbers("times", times), _numbers("values", values)
        if values.dtype != times.dtype:
            times = times.to(values.dtype)
        self.kind = kind
        self.channels = values.shape[-1:] != times.shape[-1:] if channels is None else channels
        own = values.shape[-2:-1] if self.channels else values.shape[-1:]
        if times.ndim == 0 or times.shape[-1:] != own or times.shape[-1] == 0:
            raise ShapeError(
                f"Input: times {tuple(times.shape)}, values {tuple(values.shape)}; expected one value for each knot, "
                "(*batch, M) and (*batch, M), or with channels (*batch, M) and (*batch, M, C)."
            )
        _check_knots(times)
        self.times, self.values = times, values
        self.slopes = self._bessel() if kind == "cubic" else None

    @property
    def ranks(self) -> tuple[int, ...]:
        """Dimensions of times, values and slopes that belong to one row."""
        rank = 2 if self.channels else 1
        return (1, rank) if self.slopes is None else (1, rank, rank)

    @property
    def names(self) -> tuple[str, ...]:
        return ("times", "values", "slopes")[: len(self.ranks)]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Times, values and, of a cubic, slopes."""
        return (self.times, self.values) if self.slopes is None else (self.times, self.values, self.slopes)

    def __call__(self, t: Tensor) -> Tensor:
        """u(t) at a scalar time: ``()``, or ``(C,)`` with channels."""
        times, values = self.times, self.values
        last = self.times.shape[-1] - 1
        if self.kind == "previous" or last == 0:
            return values[(torch.searchsorted(times, t.detach(), right=True) - 1).clamp(min=0)]
        i = (torch.searchsorted(times, t.detach(), right=True) - 1).clamp(0, last - 1)
        left, right = times[i], times[i + 1]
        width = right - left
        x = ((t - left) / width).clamp(0.0, 1.0)
        low, high = values[i], values[i + 1]
        if self.slopes is None:
            return low + x * (high - low)
        rise = x * x * (3.0 - 2.0 * x)
        bend = width * x * (1.0 - x) * ((1.0 - x) * self.slopes[i] - x * self.slopes[i + 1])
        return low + rise * (high - low) + bend

    def _bessel(self) -> Tensor:
        """Slopes at the knots of the parabola through each three values, at the ends of that beside."""
        values = self.values if self.channels else self.values[..., None]
        if values.shape[-2] == 1:
            return torch.zeros_like(self.values)
        width = self.times.diff(dim=-1)[..., None]
        secant = values.diff(dim=-2) / width
        if values.shape[-2] == 2:
            slopes = torch.cat([secant, secant], -2)
        else:
            before, after = width[..., :-1, :], width[..., 1:, :]
            inner = (after * secant[..., :-1, :] + before * secant[..., 1:, :]) / (before + after)
            first, final = (2.0 * secant[..., k, :] - inner[..., k, :] for k in (0, -1))
            slopes = torch.cat([first[..., None, :], inner, final[..., None, :]], -2)
        return slopes if self.channels else slopes[..., 0]


def inputs_of(params: Any, event_dims: dict[str, int]) -> tuple[list[Input], dict[str, int]]:
    """The inputs among parameters, and the dimensions of one row with those of their tensors."""
    if (
        params is None
        or isinstance(params, Tensor)
        or (type(params) is dict and not any(isinstance(x, Input) for x in params.values()))
    ):
        return [], event_dims
    found, dims = [], {}
    for path, leaf in tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, Input))[0]:
        if isinstance(leaf, Input):
            found.append(leaf)
            name = ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)
            dims.update({f"{name}.{n}".lstrip("."): r for n, r in zip(leaf.names, leaf.ranks, strict=True)})
    return found, {**dims, **event_dims}


def _numbers(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"Input: {name} of type {type(value).__name__} cannot be read as numbers: {error}.") from error


def _check_knots(times: Tensor) -> None:
    seen = peek(times)
    if seen is None:
        return
    if not np.isfinite(seen).all():
        raise DataError(
            "Input: a knot is not finite; expected finite times. Rows with fewer knots go on with later ones."
        )
    steps = np.diff(seen, axis=-1)
    if not (steps > 0).all():
        where = tuple(int(i) for i in np.argwhere(~(steps > 0))[0])
        after = (*where[:-1], where[-1] + 1)
        raise DataError(
            f"Input: the knots do not increase, times{list(where)} = {seen[where]:g} and times{list(after)} = "
            f"{seen[after]:g}; expected each later than the one before. Sort them, with their values."
        )


def _flatten(u: Input) -> tuple[list[Tensor], tuple[str, bool]]:
    return list(u.tensors), (u.kind, u.channels)


def _unflatten(tensors: list[Any], context: tuple[str, bool]) -> Input:
    u = object.__new__(Input)  # one row, or placeholders, of an input that was checked
    u.kind, u.channels = context
    u.times, u.values, u.slopes = (*tensors, None)[:3]
    return u


def _flatten_with_keys(u: Input) -> tuple[list[tuple[GetAttrKey, Tensor]], tuple[str, bool]]:
    names = ("times", "values", "slopes")
    return [(GetAttrKey(n), x) for n, x in zip(names, u.tensors, strict=False)], (u.kind, u.channels)


register_pytree_node(
    Input,
    _flatten,
    _unflatten,
    serialized_type_name="pyro_latentde.Input",
    flatten_with_keys_fn=_flatten_with_keys,
)
