# SPDX-License-Identifier: Apache-2.0
"""What to say when rows fail: how many, why, which first, where, with which parameters, and what to try."""

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.solve.lift import peek
from pyro_latentde.solve.problem import Problem
from pyro_latentde.solve.solution import Status

__all__ = ["failure_message"]

_ADVICE = {
    Status.MAX_STEPS: 'raise max_steps, loosen rtol, or take method="auto" if these parameters make the system stiff',
    Status.UNDERFLOW: 'look whether the solution blows up at these parameters, or take method="auto" if it is stiff',
    Status.NO_CONVERGENCE: "take smaller steps, or leave step_size out so that the tolerances choose them",
    Status.NON_FINITE: "look for a logarithm, root or division that leaves its domain at these parameters",
}


def failure_message(problem: Problem, status: np.ndarray, ys: Tensor) -> str:
    """The text of the :class:`SolveError` for failed rows.

    Args:
        problem: What was solved.
        status: Status codes, any shape.
        ys: States of the rows, ``(R, T, D)``, NaN where not reached.
    """
    codes = status.reshape(-1)
    failed = np.flatnonzero(codes)
    kinds = ", ".join(f"{Status(int(c)).sentence} in {int((codes == c).sum())}" for c in np.unique(codes[failed]))
    row = int(failed[0])
    index = tuple(int(i) for i in np.unravel_index(row, problem.batch)) if problem.batch else ()
    where = f" First: row {list(index)}," if index else " It"
    times, start = _row(problem, 1, row), float(_row(problem, 2, row))
    reached = torch.isfinite(ys[row]).all(-1)
    last = float(times[reached].max() if times[-1] >= start else times[reached].min()) if reached.any() else start
    values = ", ".join(
        f"{name}: {_short(_row(problem, 3 + k, row))}" for k, name in enumerate(problem.names[: problem.own])
    )
    state = _short(_row(problem, 0, row))
    advice = _given_badly(problem, row) or _ADVICE.get(Status(int(codes[row])), "")
    return (
        f"{len(failed)} of {len(codes)} trajectories failed: {kinds}.{where} failed after t={last:g} (of {start:g}.."
        f"{float(times[-1]):g}), y0 {state}, parameters {{{values}}}. Try: {advice}. To go on with NaN in such rows: "
        'odesolve(..., on_failure="nan"); lde.ode does so under every Pyro handler.'
    )


def _given_badly(problem: Problem, row: int) -> str:
    """Which input of the row is not finite, if one is."""
    y0 = peek(_row(problem, 0, row))
    for i in np.flatnonzero(~np.isfinite(y0))[:1] if y0 is not None else ():
        name = (problem.info.state.coordinates or {i: f"y0[{i}]"})[i]
        return f"make the initial state finite, {name} is {y0[i]:g} in this row"
    for k, name in enumerate(problem.names):
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
