# SPDX-License-Identifier: Apache-2.0
"""What every engine returns for a batch of rows."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["MAX_STEPS", "NON_FINITE", "OK", "UNDERFLOW", "RowSolution"]

# The values of the public Status.
OK, MAX_STEPS, UNDERFLOW, NON_FINITE = 0, 1, 2, 3


@dataclass
class RowSolution:
    """What an engine returns for R rows.

    Args:
        ys: States at the output times, NaN where not reached, ``(R, T, D)``.
        status: 0 ok, 1 too many steps, 2 step underflow, 3 non-finite, ``(R,)``.
        n_accepted: Accepted steps, ``(R,)``.
        n_rejected: Rejected trials, ``(R,)``.
        n_evals: Evaluations of the row's field, ``(R,)``.
        steps: Signed accepted step sizes, zeros at the right, ``(R, N)``.
    """

    ys: Tensor
    status: Tensor
    n_accepted: Tensor
    n_rejected: Tensor
    n_evals: Tensor
    steps: Tensor
