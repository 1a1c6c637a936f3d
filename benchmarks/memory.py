# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of a gradient with and without ``memory_budget``, each in a process of its own."""

import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import pyro_latentde as lde  # noqa: E402

__all__ = ["run"]

BUDGETS = {
    "lorenz": (None, "50 MB", "2 MB"),
    "lorenz_long": (None, "1 MB"),
    "network": (None, "50 MB", "5 MB"),
}


def _lorenz(t: torch.Tensor, y: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    u, v, w = y
    return torch.stack([p[0] * (v - u), u * (p[1] - w) - v, u * v - p[2] * w])


def _problem(name: str) -> tuple:
    """Field, start, times, parameters and settings."""
    generator = torch.Generator().manual_seed(0)
    if name == "network":
        net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16)).double()
        y0 = torch.rand(64, 16, dtype=torch.float64, generator=generator)
        return lambda t, y: net(y), y0, 2.0, tuple(net.parameters()), {"engine": "torch", "step_size": 0.01}
    rows, end = (512, 40.0) if name == "lorenz" else (8, 400.0)
    y0 = 1.0 + torch.rand(rows, 3, dtype=torch.float64, generator=generator)
    p = torch.tensor([10.0, 28.0, 8.0 / 3.0], dtype=torch.float64).requires_grad_()
    return _lorenz, y0, end, (p,), {"rtol": 1e-9, "atol": 1e-9, "max_steps": 1_000_000}


def _peak() -> float:
    """Most megabytes this process has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def one(name: str, budget: str) -> dict[str, float]:
    """In this process: a short gradient to compile and load everything, then the one that is measured."""
    f, y0, end, parameters, settings = _problem(name)
    arguments = parameters if name != "network" else ()
    budget = None if budget == "None" else budget

    def gradient(until: float) -> tuple[float, float, int]:
        start = time.perf_counter()
        times = torch.tensor([0.0, until], dtype=torch.float64)
        solution = lde.odesolve(f, y0, times, *arguments, memory_budget=budget, **settings)
        middle = time.perf_counter()
        torch.autograd.grad(solution.ys[:, -1].sum(), parameters)
        return middle - start, time.perf_counter() - middle, int(solution.stats["n_accepted"].max())

    if budget is not None and name != "network":  # the kernels of long rows are compiled too
        lde.odesolve(f, y0[:1], torch.tensor([0.0, end / 10], dtype=torch.float64), *arguments,
                     memory_budget="60 KB", **settings)  # fmt: skip
    gradient(end / 200)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; getrusage would tell that of the parent too
    before = _peak()
    forward, backward, steps = gradient(end)
    return {"steps": steps, "rows": len(y0), "MB": _peak() - before, "forward_s": forward, "backward_s": backward}


def run() -> dict[str, dict[str, float]]:
    """Megabytes that the process grew by, and seconds of the forward and of the backward pass."""
    results = {}
    for name, budgets in BUDGETS.items():
        for budget in budgets:
            done = subprocess.run(
                [sys.executable, __file__, name, str(budget)], check=True, capture_output=True, text=True
            )
            results[f"{name}, {budget or 'plain'}"] = json.loads(done.stdout.splitlines()[-1])
    return results


if __name__ == "__main__":  # the process of its own
    print(json.dumps(one(*sys.argv[1:])))
