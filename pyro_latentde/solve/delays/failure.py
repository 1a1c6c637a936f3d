# SPDX-License-Identifier: Apache-2.0
"""What to say when rows of a delay equation fail."""

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.errors import SolveError
from pyro_latentde.solve.delays.problem import DelayProblem
from pyro_latentde.solve.failure import failure_message
from pyro_latentde.solve.lift import peek
from pyro_latentde.solve.solution import Status

__all__ = ["raise_delay_failures"]


def raise_delay_failures(posed: DelayProblem, report: Tensor, ys: Tensor) -> None:
    """Raise if rows failed and the report can be seen.

    Raises:
        SolveError: How many rows, why, which first, its inputs, and what to try.
    """
    seen = peek(report)
    if seen is None or not np.count_nonzero(seen[:, 0]):
        return
    row = int(np.flatnonzero(seen[:, 0])[0])
    text = failure_message(posed.problem, seen[:, 0], ys)
    text = text.replace("lde.ode does so", "lde.dde does so").replace("odesolve(", "ddesolve(")
    raise SolveError(text + _about_lags(posed, row, Status(int(seen[row, 0])), ys))


def _about_lags(posed: DelayProblem, row: int, status: Status, ys: Tensor) -> str:
    problem = posed.problem
    lags, t0, times = (_of_row(posed, k, row) for k in (3 + posed.lag, 2, 1))
    told = f" Lags of this row: {[round(x, 6) for x in lags.tolist()]}."
    if status == Status.MAX_STEPS:
        needed = float((times[-1] - t0) / lags.min())
        return told + f" A step is no longer than the least lag: that makes {needed:.0f} steps at least."
    if status == Status.NON_FINITE and posed.past is not None:
        from pyro_latentde.solve.engines import batched_field

        past = batched_field(posed.of(posed.past))(problem.tensors[3:], problem.shared[3:])
        moments = torch.cat([t0[None], t0 - lags]).detach()
        rows = torch.full_like(moments, row, dtype=torch.int64)
        with torch.no_grad():
            states = past(moments, moments.new_zeros(len(moments), posed.state.size * (1 + posed.lags)), rows)
        bad = ~torch.isfinite(states[:, : posed.state.size]).all(1)
        if bool(bad.any()):
            return told + f" The history is not finite at t = {float(moments[bad][0]):g}."
    return told


def _of_row(posed: DelayProblem, k: int, row: int) -> Tensor:
    x = posed.problem.tensors[k].detach()
    return x if posed.problem.shared[k] else x[row]
