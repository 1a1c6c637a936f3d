# SPDX-License-Identifier: Apache-2.0
"""What a solve did, in words: steps, rejections, switches, the smallest step and where, and what to try."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_latentde.solve.memory import readable
from pyro_latentde.solve.methods.catalog import get_method
from pyro_latentde.solve.step_store import steps_kept

if TYPE_CHECKING:
    from pyro_latentde.solve.solution import Solution

__all__ = ["STABLE", "explain"]

# An explicit method is stable up to a step of about 3 / (fastest decay); mean steps near it are the stability's.
STABLE = 2.0
MUCH = 100_000_000  # bytes


def explain(solution: Solution) -> str:
    """A few lines about a solve; its steps are found by solving once more."""
    method, taken = get_method(solution.method), solution.counts.reshape(-1, 3)
    status = solution.status.reshape(-1)
    lines = [_head(solution, len(status))]
    accepted, rejected, evals = taken.unbind(1)
    if not len(status) or not int(accepted.max()):
        return lines[0]
    slowest = int((accepted + rejected).argmax())
    lines.append(
        f"Steps: {int(accepted.min())} to {int(accepted.max())} of a row{_where(slowest, len(status))}, "
        f"{int(rejected.sum())} rejected, {int(evals.sum())} evaluations of the field in all."
    )
    if solution.engine == "torchdiffeq":
        return "\n".join(lines)
    steps = solution.steps.reshape(len(status), -1).detach()
    lines.append(_smallest(solution, steps))
    lines += _events(solution) + _memory(solution)
    if method.stiff is not None:
        lines.append(_switches(solution.implicit.reshape(len(status), -1), steps != 0))
    logs = solution.shape_of_state.logs
    if logs is not None:
        lines.append(
            f"Positive: {int(logs.mask.sum())} of {len(logs.mask)} states, as logarithms; rtol is relative to y."
        )
    if method.kind == "symplectic":
        lines.append("Symplectic: the energy does not drift, but no error is checked; compare with half the step_size.")
    if method.kind == "explicit":
        lines += _advice(solution, steps, slowest, len(status))
    return "\n".join(lines)


def _head(solution: Solution, rows: int) -> str:
    control = (
        f"rtol {solution.rtol:g}, atol {solution.atol:g}"
        if solution.step_size is None
        else f"steps of at most {solution.step_size:g}"
    )
    failed = int((~solution.ok).sum())
    outcome = "all solved" if not failed else f"{failed} failed"
    return f"{solution.method}, {control}, engine {solution.engine} ({solution.reason}): {rows} row(s), {outcome}."


def _where(row: int, rows: int) -> str:
    return f" (most: row {row})" if rows > 1 else ""


def _smallest(solution: Solution, steps: Tensor) -> str:
    size = torch.where(steps == 0, torch.inf, steps.abs())
    row, n = divmod(int(size.argmin()), steps.shape[1])
    start = solution._start.expand(solution.status.shape).reshape(-1)[row]
    at = float(start + steps[row, :n].sum())
    return f"Smallest step: {float(size[row, n]):.3g} at t = {at:.6g}" + (f", row {row}." if len(steps) > 1 else ".")


def _events(solution: Solution) -> list[str]:
    """How many events there were, and how many rows saw none."""
    if solution.events is None:
        return []
    count = solution.events.count.reshape(-1)
    none = int((count == 0).sum())
    told = f", none in {none} row(s): their times are NaN" if none else ""
    return [f"Events: {int(count.min())} to {int(count.max())} of a row{told}."]


def _memory(solution: Solution) -> list[str]:
    """What is kept for the gradient, where it is much or was bounded."""
    kept, budget = steps_kept(solution._report.reshape(-1, 5)), solution.memory_budget
    if kept is None or (budget is None and kept.nbytes < MUCH):
        return []
    told = "" if budget is None else f", of a budget of {readable(budget)}"
    if kept.solved_again:
        told += f"; {kept.solved_again} of {kept.rows} row(s) kept nothing and are solved again in the backward pass"
    return [f"Memory: {readable(kept.nbytes)} of steps kept for the gradient{told}."]


def _switches(implicit: Tensor, taken: Tensor) -> str:
    changes = (implicit[:, 1:] != implicit[:, :-1]) & taken[:, 1:]
    share = 100.0 * float(implicit.sum()) / max(1, int(taken.sum()))
    return (
        f"Implicit: {share:.0f} % of the steps, in {int(implicit.any(1).sum())} row(s), {int(changes.sum())} switches."
    )


def _advice(solution: Solution, steps: Tensor, row: int, rows: int) -> list[str]:
    """Whether stability, not accuracy, bounds the steps of the slowest row."""
    decay = solution._decay(row)
    count = int((steps[row] != 0).sum())
    product = decay * float(steps[row].abs().sum()) / count
    if not product > STABLE:
        return []
    which = f"in row {row} " if rows > 1 else ""
    return [
        f"Stability bounds the steps: {which}the mean step times the fastest decay ({decay:.3g} per unit of time) is "
        f'{product:.2g}. The equations are stiff: try method="auto" or "kvaerno5".'
    ]
