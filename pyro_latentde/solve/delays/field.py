# SPDX-License-Identifier: Apache-2.0
"""A field with lagged states, as a field of the state and its lagged copies side by side.

What examines, traces and maps fields knows ``g(t, Y, p)`` with Y and its result of one size. Here Y holds y and the L
lagged states, ``(D (1 + L),)``, and the result holds dy/dt, the history at t, and zeros: so that the field and the
history see the same parameters and captured tensors, once each.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_latentde.errors import ShapeError
from pyro_latentde.solve.structure import StateShape

__all__ = [
    "DelayedField",
    "MakeDelayed",
    "arguments_of_field",
    "arguments_of_history",
    "flat_history",
    "rowwise",
    "side_by_side",
]

RowField = Callable[..., Tensor]
MakeRowField = Callable[[Sequence[Tensor], Sequence[bool]], RowField]


@dataclass(frozen=True)
class DelayedField:
    """The field over rows, with what it needs of the past.

    Args:
        slope: ``slope(t (R,), Y (R, D (1 + L)), rows) -> (R, D)``.
        past: ``past(t (Q,), rows (Q,)) -> (Q, D)``, the history before t0; None: it is the initial state.
        lags: ``(R, L)``.
    """

    slope: RowField
    past: RowField | None
    lags: Tensor

    def start(self, y0: Tensor, t0: Tensor) -> Tensor:
        """The states at t0, ``(R, D)``; a row whose history is not finite there is kept out of every graph."""
        if self.past is None:
            return y0
        rows = torch.arange(len(t0), device=t0.device)
        with torch.no_grad():
            value = self.past(t0.detach(), rows)
            fine = torch.isfinite(value).all(1)
        if not torch.is_grad_enabled():
            return value
        rows = rows[fine]
        return value.index_copy(0, rows, self.past(t0[rows], rows))


MakeDelayed = Callable[[Sequence[Tensor], Sequence[bool]], DelayedField]


def rowwise(make_slope: MakeRowField, make_past: MakeRowField | None, lag: int, states: int) -> MakeDelayed:
    """``make(leaves, shared)`` of the delayed field, of which leaf ``lag`` holds the lags.

    Args:
        make_slope: Makes ``g(t, Y, rows)``, of whose result the first ``states`` are dy/dt.
        make_past: Makes ``h(t, Y, rows)``, of whose result the first ``states`` are the history at t.
        lag: Which leaf the lags are.
        states: D.
    """

    def make(leaves: Sequence[Tensor], shared: Sequence[bool]) -> DelayedField:
        slope, lags = make_slope(leaves, shared), leaves[lag]
        past = None if make_past is None else make_past(leaves, shared)
        width = states * (1 + lags.shape[-1])

        def history(t: Tensor, rows: Tensor) -> Tensor:
            return past(t, t.new_zeros(len(t), width), rows)[:, :states]

        return DelayedField(
            lambda t, y, rows=None: slope(t, y, rows)[:, :states],
            None if past is None else history,
            lags[None] if shared[lag] else lags,
        )

    return make


@lru_cache(maxsize=256)
def _kept(state: StateShape) -> StateShape:
    """One object for equal shapes: fields are known by what they hold."""
    return state


def side_by_side(
    f: Callable, history: Callable | None, asked: tuple[int, int], state: StateShape, lags: int, what: str = "both"
) -> Callable[..., Tensor]:
    """The field ``g(t, Y, p)`` of ``f(t, y, lagged, p)`` and ``history(t, p)``.

    Args:
        f: The user's field.
        history: The user's history; None if it is constant.
        asked: How many arguments each takes (:func:`arguments_of_field`, :func:`arguments_of_history`).
        state: Shape of one row's state.
        lags: L.
        what: ``"slope"`` or ``"past"`` leave out the other, ``"past"`` gives the history in the place of dy/dt.
    """
    state, size = _kept(state), state.size

    def field(t: Tensor, states: Tensor, p: Any = None) -> Tensor:
        parts = []
        if what != "past":
            y, *lagged = [state.unflatten(x) for x in states.split(size)]
            arguments = (t, y, tuple(lagged), p)[: asked[0]]
            parts.append(_like(state.flatten(f(*arguments)), state, "the vector field"))
        if history is not None and what != "slope":
            value = history(*(t, p)[: asked[1]])
            parts.append(_like(flat_history(value, state), state, "history"))
        rest = (1 + lags - len(parts)) * size
        return torch.cat([*parts, states.new_zeros(rest)])

    return field


def flat_history(value: Any, state: StateShape) -> Tensor:
    """The state that a history function gives for one row, as ``(D,)``."""
    if state.spec is None:
        if isinstance(value, Tensor):
            return value
        raise ShapeError(
            f"history(t, p) returned {type(value).__name__}; expected the state at t, a tensor ({state.size},)."
        )
    leaves, spec = tree_flatten(value)
    if spec != state.spec or not all(isinstance(x, Tensor) for x in leaves):
        raise ShapeError(f"history(t, p) returned another structure than the state's: got {spec}, not {state.spec}.")
    return torch.cat([x.reshape(-1) for x in leaves])


def _like(value: Tensor, state: StateShape, what: str) -> Tensor:
    if tuple(value.shape) != (state.size,):
        told = "dy/dt of one row" if what != "history" else "the state of one row"
        raise ShapeError(
            f"{what} returned shape {tuple(value.shape)}, expected ({state.size},): {told}. The history has "
            f"{state.size} state(s): as many are expected of the field."
        )
    return value


def arguments_of_field(f: Callable) -> int:
    """3 for ``f(t, y, lagged)``, 4 for ``f(t, y, lagged, p)``."""
    return _arguments(f, 3, "the vector field of a delay equation is called as f(t, y, lagged, p)")


def arguments_of_history(history: Callable | None) -> int:
    """1 for ``history(t)``, 2 for ``history(t, p)``."""
    return 0 if history is None else _arguments(history, 1, "a history is called as history(t, p) (or history(t))")


def _arguments(f: Callable, needed: int, told: str) -> int:
    """How many positional arguments a function takes: those needed, or one more, the parameters."""
    target = f.forward if isinstance(f, torch.nn.Module) else f
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return needed + 1
    if any(p.kind == p.VAR_POSITIONAL for p in parameters):
        return needed + 1
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    if len(positional) < needed or required > needed + 1:
        raise ShapeError(f"{told}; got a callable with the arguments ({', '.join(p.name for p in parameters)}).")
    return min(len(positional), needed + 1)
