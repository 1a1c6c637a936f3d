# SPDX-License-Identifier: Apache-2.0
"""What the user gave of a delay equation, checked and laid out as rows: history, lags, times, parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.errors import DataError, ShapeError, SolveError
from pyro_latentde.solve.delays.field import (
    arguments_of_field,
    arguments_of_history,
    side_by_side,
)
from pyro_latentde.solve.delays.history import state_of_history
from pyro_latentde.solve.lift import peek
from pyro_latentde.solve.problem import Problem, flatten_state, pose
from pyro_latentde.solve.structure import StateShape
from pyro_latentde.solve.vector_field import BoundField

__all__ = ["DelayProblem", "pose_delays"]


class DelayProblem(NamedTuple):
    """Rows of a delay equation.

    Args:
        problem: The field of ``delay_field.side_by_side`` with its tensors; of these y0 is the state alone.
        wide: The same, where y0 has lagged copies behind it, as the field sees them.
        state: Shape of one row's state.
        lags: L.
        lag: Which leaf holds the lags ``(L,)``.
        slope: The field without the history.
        past: The history alone, in the place of dy/dt; None if it is constant.
    """

    problem: Problem
    wide: Problem
    state: StateShape
    lags: int
    lag: int
    slope: Callable
    past: Callable | None

    def of(self, f: Callable) -> Problem:
        """The same rows with another field of the same tensors."""
        return self.problem._replace(f=f)


def pose_delays(
    f: Callable | BoundField,
    history: Any,
    lags: Any,
    times: Any,
    params: Any,
    t0: Any,
    event_dims: dict[str, int] | None,
    strict: bool,
) -> DelayProblem:
    """Check a delay problem and lay it out.

    Args:
        strict: Refuse lags that are not positive, where they can be seen; else such rows fail.

    Raises:
        ShapeError: For shapes, dtypes or devices that do not fit.
        DataError: For times that are not finite, or not after t0, and for lags that are not positive.
        SolveError: For lags that depend on the state.
    """
    _check_callable(f)
    bound = f if isinstance(f, BoundField) else None
    plain = f if bound is None else bound.f
    past = history if _is_function(history) else None
    held = getattr(past, "held", past)  # a history that reads sampled weights
    past = past.f if isinstance(past, BoundField) else past
    asked = (arguments_of_field(plain), arguments_of_history(past))
    _check_parameters(asked, params, past)
    if past is None:
        state, y0 = _constant(history, event_dims or {})
    else:
        state, y0 = state_of_history(past, held, bound, asked[1], times, params, t0, event_dims or {})
    delays = _as_lags(lags, y0)
    _check_lags(delays, strict)
    count = delays.shape[-1]

    def field(f: Callable, past: Callable | None, what: str = "both") -> Callable:
        return side_by_side(f, past, asked, state, count, what)

    own = {k: v for k, v in (event_dims or {}).items() if k not in state.names}
    given = bound or BoundField(plain, (), (), (), plain)
    whole = BoundField(
        field(given.f, past),
        (*given.tensors, delays),
        (*given.event_dims, 1),
        (*given.names, "lags"),
        field(given.held, held),
    )
    wide = torch.cat([y0.detach()] * (1 + count), -1)
    problems = _posed(whole, wide, times, params, t0, own, state.size, count)
    problem = problems[0]
    _check_forward(problem, len(problems))
    if problem.shared[0]:
        start = y0
    else:
        start = y0.expand(*problem.batch, state.size).reshape(problem.rows, state.size)
    return DelayProblem(
        problem._replace(tensors=(start, *problem.tensors[1:])),
        problem,
        state,
        count,
        problem.own + len(given.tensors),
        field(given.held, held, "slope"),
        None if past is None else field(given.held, held, "past"),
    )


def _constant(history: Any, event_dims: dict[str, int]) -> tuple[StateShape, Tensor]:
    """A history that does not change: a state, called by its name in messages."""
    try:
        return flatten_state(history, event_dims)
    except ShapeError as error:
        error.args = (str(error).replace("y0", "history") + " It may also be a function, history(t, p).",)
        raise


def _is_function(history: Any) -> bool:
    return callable(history) or isinstance(history, BoundField)


def _check_callable(f: Any) -> None:
    if not callable(f) and not isinstance(f, BoundField):
        raise ShapeError(f"the vector field must be callable as f(t, y, lagged, p); got {type(f).__name__}.")


def _check_parameters(asked: tuple[int, int], params: Any, past: Callable | None) -> None:
    if params is not None and asked[0] == 3 and asked[1] < 2:
        told = "the vector field takes only (t, y, lagged)" + (", the history only t" if past is not None else "")
        raise ShapeError(f"parameters were given, but {told}; write it as f(t, y, lagged, p).")


def _posed(
    whole: BoundField, wide: Tensor, times: Any, params: Any, t0: Any, own: dict[str, int], size: int, count: int
) -> list[Problem]:
    try:
        return pose(whole, wide, times, params, t0, own or None)
    except ShapeError as error:
        called = f"f(t, y, p) with t of shape (), y of shape ({wide.shape[-1]},)"
        means = f"f(t, y, lagged, p) with t of shape (), y and {count} lagged state(s) of shape ({size},)"
        error.args = (str(error).replace(called, means),)
        raise


def _as_lags(lags: Any, y0: Tensor) -> Tensor:
    """As a tensor ``(L,)`` or ``(*batch, L)`` like y0."""
    if callable(lags):
        raise SolveError(
            "lags: expected numbers, got a function: lags that depend on time or on the state are not solved for, "
            "since the method of steps needs to know them before it starts. Give a float, (L,), or (*batch, L)."
        )
    if isinstance(lags, dict):
        raise ShapeError(f"lags: expected a float, a tensor (L,) or (*batch, L), or a list of L; got {lags!r}.")
    if isinstance(lags, (list, tuple)) and any(isinstance(x, Tensor) for x in lags):
        lags = torch.stack(torch.broadcast_tensors(*[torch.as_tensor(x, dtype=y0.dtype) for x in lags]), -1)
    try:
        lags = torch.as_tensor(lags, dtype=y0.dtype, device=y0.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(f"lags of type {type(lags).__name__} cannot be read as numbers: {error}.") from error
    lags = lags.reshape(1) if lags.ndim == 0 else lags
    if lags.shape[-1] == 0:
        raise ShapeError("lags: there are none; an equation without lags is an ODE: use lde.ode or lde.odesolve.")
    return lags


def _check_lags(lags: Tensor, strict: bool) -> None:
    seen = peek(lags)
    if not strict or seen is None or (np.isfinite(seen) & (seen > 0)).all():
        return
    where = tuple(int(i) for i in np.argwhere(~(np.isfinite(seen) & (seen > 0)))[0])
    row = f" of row {list(where[:-1])}" if where[:-1] else ""
    hint = {True: "a lag of 0 makes an ODE: use lde.ode or lde.odesolve", False: "lags are positive and finite"}
    raise DataError(
        f"lag {where[-1]}{row} is {seen[where]:g}, in units of time; {hint[bool(seen[where] == 0)]}. "
        'To go on with NaN in such rows: on_failure="nan".'
    )


def _check_forward(problem: Problem, sides: int) -> None:
    times, t0 = peek(problem.times), peek(problem.tensors[2])
    if sides == 1 and times is not None and t0 is not None:
        t0 = t0 if problem.shared[2] else t0.reshape(problem.batch)
        if (times >= t0[..., None]).all():
            return
    elif sides == 1:
        return
    raise DataError(
        "times lie before t0: a delay equation is solved forward, from its history (which is given before t0) on. "
        "Give times that do not decrease, and t0= if it is not the first of them."
    )
