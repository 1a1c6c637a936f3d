# SPDX-License-Identifier: Apache-2.0
"""One gradient of the lynx-hare solve: the fused engine against torchdiffeq's ``odeint``, same method and tolerance."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.lynx_hare import peer_solve, rows, solve
from benchmarks.measure import best

__all__ = ["run"]


def _gradient(solver: Callable[[Tensor, Tensor], Tensor], count: int) -> Callable[[], None]:
    theta, y0 = (x.requires_grad_() for x in rows(count))

    def task() -> None:
        torch.autograd.grad(solver(theta, y0).sum(), (theta, y0))

    return task


def run() -> dict[str, dict[str, float]]:
    """Microseconds per call, and how many times faster the fused engine is."""
    results = {}
    for count, bar in ((1, 400), (256, 50)):
        ours = best(_gradient(solve, count))
        theirs = best(_gradient(peer_solve, count))
        results[f"gradient, {count} rows"] = {
            "fused_us": 1e6 * ours,
            "torchdiffeq_us": 1e6 * theirs,
            "ratio": theirs / ours,
            "bar": bar,
        }
    return results
