# SPDX-License-Identifier: Apache-2.0
"""What every engine returns for a batch of rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "BAD_LAG",
    "MAX_STEPS",
    "NON_FINITE",
    "NO_CONVERGENCE",
    "OK",
    "UNDERFLOW",
    "RowSolution",
    "empty_report",
    "report_of",
]

# The values of the public Status.
OK, MAX_STEPS, UNDERFLOW, NON_FINITE, NO_CONVERGENCE = 0, 1, 2, 3, 5
BAD_LAG = 20


@dataclass
class RowSolution:
    """What an engine returns for R rows.

    Args:
        ys: States at the output times, NaN where not reached, ``(R, T, D)``.
        status: 0 ok, 1 too many steps, 2 step underflow, 3 non-finite, 5 no convergence, 20 a bad lag, ``(R,)``.
        n_accepted: Accepted steps, ``(R,)``.
        n_rejected: Rejected trials, ``(R,)``.
        n_evals: Evaluations of the row's field, ``(R,)``.
        steps: Signed accepted step sizes, zeros at the right, ``(R, N)``; of a switching method ``(R, N, 2)`` with how
            each was taken: 0 explicit, 1 implicit, 2 implicit and beginning with f(t, y); with stops ``(R, N, 3)``, and
            last the number of the stop ahead, positive if the step ended there and negative if not; of a delay
            equation ``(R, N, 1 + L)`` with the lags.
    """

    ys: Tensor
    status: Tensor
    n_accepted: Tensor
    n_rejected: Tensor
    n_evals: Tensor
    steps: Tensor


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
