# SPDX-License-Identifier: Apache-2.0
"""Robertson's problem to t = 1e5, rtol 1e-8, atol 1e-12: value and gradient of 1 and of 64 rows, here and by diffrax.

diffrax: Kvaerno5, float64, jitted, ``vmap`` over the rows, each with its own steps, the gradient by its default
adjoint. Rates differ from row to row by up to a tenth. Compiling is left out on both sides.
"""

import torch
from torch import Tensor

import pyro_latentde as lde
from benchmarks.measure import best
from benchmarks.peers import ask, python_of

__all__ = ["run"]

ROWS, END = (1, 64), 1e5
RATES = (0.04, 3e7, 1e4)
METHODS = ("kvaerno5", "kvaerno3", "trbdf2", "auto")
BAR = {64: 10}


def _rober(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
    a, b, c = k[0] * y[0], k[1] * y[1] * y[1], k[2] * y[1] * y[2]
    return torch.stack([c - a, a - b - c, b])


def _here(method: str, rows: int) -> dict[str, float]:
    rates = torch.tensor(RATES, dtype=torch.float64) * torch.linspace(0.95, 1.05, rows, dtype=torch.float64)[:, None]
    y0, times = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), torch.tensor([0.0, END], dtype=torch.float64)
    steps = 0

    def task() -> None:
        nonlocal steps
        k = rates.clone().requires_grad_()
        found = lde.odesolve(_rober, y0, times, k, method=method, rtol=1e-8, atol=1e-12, max_steps=100_000)
        found.ys[:, -1].sum().backward()
        steps = int(found.stats["n_accepted"].max())

    return {"ms": 1e3 * best(task), "most_steps": steps}


def run() -> dict[str, dict[str, float]]:
    """Milliseconds of every method here, and how many times as long diffrax takes with the same method."""
    python, results = python_of("diffrax"), {}
    for rows in ROWS:
        found = {method: _here(method, rows) for method in METHODS}
        if python is not None:
            theirs = 1e3 * ask(python, "peer_diffrax_stiff.py", {"rows": rows, "rates": RATES, "end": END})["seconds"]
            found["kvaerno5"] |= {"diffrax_ms": theirs, "ratio": theirs / found["kvaerno5"]["ms"]}
            found["kvaerno5"] |= {"bar": BAR[rows]} if rows in BAR else {}
        results |= {f"Robertson, {rows} rows, {method}": row for method, row in found.items()}
    return results
