# SPDX-License-Identifier: Apache-2.0
"""What every engine returns for a batch of rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "BAD_LAG",
    "MAX_STEPS",
    "NON_FINITE",
    "NO_CONVERGENCE",
    "OK",
    "TOO_MANY_EVENTS",
    "UNDERFLOW",
    "RowSolution",
    "empty_report",
    "report_of",
]

# The values of the public Status.
OK, MAX_STEPS, UNDERFLOW, NON_FINITE, NO_CONVERGENCE, TOO_MANY_EVENTS = 0, 1, 2, 3, 5, 6
BAD_LAG = 20


@dataclass
class RowSolution:
    """What an engine returns for R rows.

    Args:
        ys: States at the output times, NaN where not reached, ``(R, T, D)``.
        status: 0 ok, 1 too many steps, 2 step underflow, 3 non-finite, 5 no convergence, 6 too many events, 20 a bad
            lag, ``(R,)``.
        n_accepted: Accepted steps, ``(R,)``.
        n_rejected: Rejected trials, ``(R,)``.
        n_evals: Evaluations of the row's field, ``(R,)``.
        steps: Signed accepted step sizes, zeros at the right, ``(R, N)``; of a switching method, and with stops or
            events, ``(R, N, C)`` with columns that ``step_record.py`` tells; of a delay equation ``(R, N,
            1 + L)`` with the lags.
        found: The events, where there can be any.
    """

    ys: Tensor
    status: Tensor
    n_accepted: Tensor
    n_rejected: Tensor
    n_evals: Tensor
    steps: Tensor
    found: Any = None


def empty_report(rows: int, device: torch.device) -> Tensor:
    """A report ``(R, 5)`` int64: status, accepted steps, rejected steps, evaluations and step token of every row.

    One tensor instead of five, since each costs a small solve some microseconds; column by column in memory, since
    kernels read and write the status alone.
    """
    return torch.empty(5, rows, dtype=torch.int64, device=device).t()


def report_of(solution: RowSolution, tokens: Tensor) -> Tensor:
    """The report of a solution with its step tokens ``(R,)``."""
    columns = [solution.status, solution.n_accepted, solution.n_rejected, solution.n_evals, tokens]
    return torch.stack(columns).t()
