# SPDX-License-Identifier: Apache-2.0
"""What to say when rows fail: how many, why, which first, where, with which parameters, and what to try."""

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.solve.lift import peek
from pyro_latentde.solve.problem import Problem
from pyro_latentde.solve.solution import Status

__all__ = ["failure_message", "steady_failure_message"]

_ADVICE = {
    Status.MAX_STEPS: 'raise max_steps, loosen rtol, or take method="auto" if these parameters make the system stiff',
    Status.UNDERFLOW: 'look whether the solution blows up at these parameters, or take method="auto" if it is stiff',
    Status.NO_CONVERGENCE: "take smaller steps, or leave step_size out so that the tolerances choose them",
    Status.NON_FINITE: "look for a logarithm, root or division that leaves its domain at these parameters",
    Status.TOO_MANY_EVENTS: "end the row where it comes to rest (a terminal event on the speed, for example), let the "
    "reset carry the state clear of zero, name the direction that counts, smooth a field that pushes back from both "
    "sides (torch.tanh(x / width) in the place of torch.sign(x)), or raise max_events if there are so many",
}

_STEADY_ADVICE = {
    Status.MAX_STEPS: "a y_guess nearer by, a larger max_steps, or look whether these parameters make the system "
    "oscillate, grow without end, or stiff",
    Status.UNDERFLOW: "a y_guess nearer by, or look whether the system blows up at these parameters",
    Status.NON_FINITE: "a y_guess at which the field is finite, or look for a logarithm, root or division that leaves "
    "its domain",
    Status.NO_STEADY_STATE: "a y_guess nearer by, or look whether there is a (stable) steady state at these parameters",
    Status.SINGULAR: "lde.ode to a late time: steady states lie side by side there, so that the state depends on the "
    "way to it and has no gradient of its own",
}


def failure_message(problem: Problem, status: np.ndarray, ys: Tensor, moments: Tensor | None = None) -> str:
    """The text of the :class:`SolveError` for failed rows.

    Args:
        problem: What was solved.
        status: Status codes, any shape.
        ys: States of the rows, ``(R, T, D)``, NaN where not reached.
        moments: Times of their events, ``(R, E)``, padded with NaN.
    """
    row, told, inputs = _first_failed(problem, status, "trajectories")
    times, start = _row(problem, 1, row), float(_row(problem, 2, row))
    reached = torch.isfinite(ys[row]).all(-1)
    last = float(times[reached].max() if times[-1] >= start else times[reached].min()) if reached.any() else start
    if Status(int(status.reshape(-1)[row])) == Status.TOO_MANY_EVENTS:
        told = told + _chattering(peek(moments[row]))
    advice = _given_badly(problem, row) or _ADVICE.get(Status(int(status.reshape(-1)[row])), "")
    return (
        f"{told} failed after t={last:g} (of {start:g}..{float(times[-1]):g}), y0 {inputs}. Try: {advice}. To go on "
        'with NaN in such rows: odesolve(..., on_failure="nan"); lde.ode does so under every Pyro handler.'
    )


def _chattering(moments: np.ndarray) -> str:
    """How many events there were, and when the last of them."""
    times = moments[np.isfinite(moments)]
    last = ", ".join(f"{t:.9g}" for t in times[-3:])
    return (
        f" had {len(times)} events between t={times[0]:.6g} and t={times[-1]:.6g} (the last at {last}), and one more "
        f"would be more than max_events: the condition crosses zero again and again. It"
    )


def steady_failure_message(problem: Problem, status: np.ndarray) -> str:
    """As :func:`failure_message`, for steady states.

    Args:
        problem: The field, with the guess as its initial state.
        status: Status codes, any shape.
    """
    row, told, inputs = _first_failed(problem, status, "steady states")
    advice = _given_badly(problem, row, "y_guess") or _STEADY_ADVICE.get(Status(int(status.reshape(-1)[row])), "")
    return (
        f"{told} failed, y_guess {inputs}. Try: {advice}. To go on with NaN in such rows: "
        'steady_state_solve(..., on_failure="nan"); lde.steady_state does so under every Pyro handler.'
    )


def _first_failed(problem: Problem, status: np.ndarray, what: str) -> tuple[int, str, str]:
    """The first row that failed, how many did and why, and the inputs of that row."""
    codes = status.reshape(-1)
    failed = np.flatnonzero(codes)
    kinds = ", ".join(f"{Status(int(c)).sentence} in {int((codes == c).sum())}" for c in np.unique(codes[failed]))
    row = int(failed[0])
    index = tuple(int(i) for i in np.unravel_index(row, problem.batch)) if problem.batch else ()
    where = f" First: row {list(index)}," if index else " It"
    values = ", ".join(
        f"{name}: {_short(_row(problem, 3 + k, row))}" for k, name in enumerate(problem.names[: problem.own])
    )
    logs, state = problem.info.state.logs, _row(problem, 0, row)
    state = _short(state if logs is None else logs.to_user(state))
    return row, f"{len(failed)} of {len(codes)} {what} failed: {kinds}.{where}", f"{state}, parameters {{{values}}}"


def _given_badly(problem: Problem, row: int, start: str = "y0") -> str:
    """Which input of the row is not finite, if one is."""
    y0 = peek(_row(problem, 0, row))
    for i in np.flatnonzero(~np.isfinite(y0))[:1] if y0 is not None else ():
        name = (problem.info.state.coordinates or {i: f"{start}[{i}]"})[i]
        return f"make the initial state finite, {name} is {y0[i]:g} in this row"
    for k, name in enumerate(problem.names[: problem.field_leaves]):
        values = peek(_row(problem, 3 + k, row))
        if values is not None and not np.isfinite(values).all():
            return f"make the parameters finite, {name} is not"
    return ""


def _row(problem: Problem, k: int, row: int) -> Tensor:
    x = problem.tensors[k].detach()
    return x if problem.shared[k] else x[row]


def _short(x: Tensor) -> str:
    values = peek(x)
    if values is None or values.size > 6:
        return f"tensor of shape {tuple(x.shape)}"
    return "[" + ", ".join(f"{v:.4g}" for v in values.reshape(-1)) + "]" if x.ndim else f"{float(values):.4g}"
