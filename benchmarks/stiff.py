# SPDX-License-Identifier: Apache-2.0
"""Robertson's problem to t = 1e5, a batch of 64, rtol 1e-8, atol 1e-12: value and gradient, here and by diffrax.

``python benchmarks/stiff.py``. diffrax (Kvaerno5, float64, jitted, ``vmap`` over the rows, each with its own steps, the
gradient by its default adjoint) is run by the Python named in ``LATENTDE_NUMPYRO_PYTHON``, an environment of its own.
Rates differ from row to row by up to a tenth. Compiling is left out on both sides.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import pyro_latentde as lde  # noqa: E402
from benchmarks.measure import best  # noqa: E402

__all__ = ["main"]

ROWS, END = 64, 1e5
RATES = (0.04, 3e7, 1e4)
OURS = ("kvaerno5", "kvaerno3", "trbdf2", "auto")


def _rober(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
    a, b, c = k[0] * y[0], k[1] * y[1] * y[1], k[2] * y[1] * y[2]
    return torch.stack([c - a, a - b - c, b])


def _seconds(method: str, rows: int) -> tuple[float, int]:
    rates = torch.tensor(RATES, dtype=torch.float64) * torch.linspace(0.95, 1.05, rows, dtype=torch.float64)[:, None]
    y0, times = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), torch.tensor([0.0, END], dtype=torch.float64)
    steps = 0

    def run() -> None:
        nonlocal steps
        k = rates.clone().requires_grad_()
        found = lde.odesolve(_rober, y0, times, k, method=method, rtol=1e-8, atol=1e-12, max_steps=100_000)
        found.ys[:, -1].sum().backward()
        steps = int(found.stats["n_accepted"].max())

    run()
    return best(run), steps


def main() -> None:
    """Print milliseconds of each method and the ratio."""
    python, ours = os.environ.get("LATENTDE_NUMPYRO_PYTHON"), {}
    for rows in (1, ROWS):
        for method in OURS:
            seconds, steps = _seconds(method, rows)
            ours[method, rows] = seconds
            print(f"{method:10s} {rows:3d} rows: value and gradient {1e3 * seconds:8.2f} ms, at most {steps} steps")
    if python is None:
        print("diffrax: not installed (LATENTDE_NUMPYRO_PYTHON is not set)")
        return
    for rows in (1, ROWS):
        task = json.dumps({"rows": rows, "rates": RATES, "end": END})
        script = str(Path(__file__).with_name("peer_diffrax_stiff.py"))
        done = subprocess.run([python, script], input=task, capture_output=True, text=True, check=True)
        told = json.loads(done.stdout.strip().splitlines()[-1])
        ratio = told["seconds"] / ours["kvaerno5", rows]
        told_ms = 1e3 * told["seconds"]
        print(f"diffrax    {rows:3d} rows: value and gradient {told_ms:8.2f} ms, {ratio:.0f} times kvaerno5 here")


if __name__ == "__main__":
    main()
