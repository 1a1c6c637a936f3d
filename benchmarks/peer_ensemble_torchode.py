# SPDX-License-Identifier: Apache-2.0
"""Lorenz ensembles by torchode, by the Python of an environment with it; see `lorenz_ensemble`. The last line is JSON.

torchode takes no equal steps: that case is left out.
"""

import json
import sys
import time
from collections.abc import Callable

import torch
import torchode
from torch import Tensor

__all__: list[str] = []


def _run(task: dict, rows: int) -> Callable[[], None]:
    kind = {"dtype": getattr(torch, task["dtype"]), "device": task["device"]}
    rho = torch.linspace(0.0, 21.0, rows, **kind).requires_grad_(task["kind"] == "gradient")

    def field(t: Tensor, y: Tensor) -> Tensor:
        a, b, c = y.unbind(-1)
        return torch.stack([10.0 * (b - a), a * (rho - c) - b, a * b - (8.0 / 3.0) * c], -1)

    term = torchode.ODETerm(field)
    step = torchode.Tsit5(term=term)
    control = torchode.IntegralController(atol=task["tol"], rtol=task["tol"], term=term)
    solver = torchode.AutoDiffAdjoint(step, control).to(task["device"])
    y0 = torch.tensor([1.0, 0.0, 0.0], **kind).expand(rows, 3)
    times = torch.tensor([0.0, 1.0], **kind).expand(rows, 2)

    def run() -> None:
        found = solver.solve(torchode.InitialValueProblem(y0=y0, t_eval=times))
        if task["kind"] == "gradient":
            found.ys[:, -1].sum().backward()
        if task["device"] == "cuda":
            torch.cuda.synchronize()

    return run


def main() -> None:
    task = json.load(sys.stdin)
    found: dict[int, float] = {}
    for rows in task["sizes"] if task["kind"] != "fixed" else []:
        run, times = _run(task, rows), []
        run()
        for _ in range(5):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
            if times[-1] > task["limit"]:
                break
        found[rows] = min(times)
        if found[rows] > task["limit"]:
            break
    print(json.dumps(found))


if __name__ == "__main__":
    main()
