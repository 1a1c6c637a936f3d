# SPDX-License-Identifier: Apache-2.0
"""Networks as vector fields: value and gradient of all weights and y0, here, by diffrax and by torchdiffeq.

``python benchmarks/neural_fields.py``. ELU networks of two hidden layers, 100 output times on [0, 5], dopri5,
rtol = atol = 1e-5, the loss the mean square of all outputs, weights and starts the same everywhere; float32 and
float64. Here every row has its own steps. diffrax is jitted and run by the Python named in
``LATENTDE_NUMPYRO_PYTHON`` in both of its modes: one step size for the whole batch (``batch``), and own steps for every
row by ``vmap`` (``rows``). torchdiffeq's ``odeint`` has one step size for the batch; its gradient is by
backpropagation. Compiling is left out everywhere. This project is measured before and after its peers, the fastest
of many calls counts, and the load of the machine is told beside the numbers.

Results: ``benchmarks/results/neural_fields.json``.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torchdiffeq  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import pyro_latentde as lde  # noqa: E402
from benchmarks.measure import machine  # noqa: E402

__all__ = ["PROBLEMS", "main", "network"]

PROBLEMS = (
    ((4, 20, 20, 4), 100),
    ((4, 20, 20, 4), 1000),
    ((16, 200, 200, 16), 64),
    ((2, 20, 2), 100),
    ((4, 64, 64, 4), 100),
)
OUT = Path(__file__).resolve().parent / "results" / "neural_fields.json"


def network(sizes: tuple[int, ...], rows: int, dtype: torch.dtype) -> tuple[nn.Sequential, Tensor]:
    """A network with PyTorch's own initial weights, and the starts ``(rows, D)``."""
    torch.manual_seed(0)
    pairs = zip(sizes, sizes[1:], strict=False)
    layers = [layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ELU())]
    return nn.Sequential(*layers[:-1]).to(dtype), torch.randn(rows, sizes[0]).to(dtype)


def _least(task: Callable[[], None]) -> float:
    """Seconds of the fastest of up to a hundred calls in two seconds: neighbours on the machine only ever add."""
    task()
    calls, end = [], time.perf_counter() + 2.0
    while len(calls) < 100 and (len(calls) < 5 or time.perf_counter() < end):
        start = time.perf_counter()
        task()
        calls.append(time.perf_counter() - start)
    return min(calls)


def _here(net: nn.Sequential, y0: Tensor, times: Tensor, engine: str) -> tuple[float, Any]:
    told = {}

    def task() -> None:
        start = y0.clone().requires_grad_()
        net.zero_grad()
        tolerances = {"method": "dopri5", "rtol": 1e-5, "atol": 1e-5}
        solution = lde.odesolve(lambda t, y: net(y), start, times, engine=engine, **tolerances)
        solution.ys.square().mean().backward()
        told["engine"], told["steps"] = solution.engine, solution.stats["n_accepted"].float().mean().item()

    return _least(task), told


def _torchdiffeq(net: nn.Sequential, y0: Tensor, times: Tensor) -> float:
    def task() -> None:
        start = y0.clone().requires_grad_()
        net.zero_grad()
        ys = torchdiffeq.odeint(lambda t, y: net(y), start, times, method="dopri5", rtol=1e-5, atol=1e-5)
        ys.square().mean().backward()

    return _least(task)


def _diffrax(python: str, net: nn.Sequential, y0: Tensor) -> dict[str, float]:
    weights = [w.detach().double().tolist() for w in net.parameters()]
    task = json.dumps({"weights": weights, "y0": y0.tolist(), "double": y0.dtype == torch.float64})
    script = str(Path(__file__).with_name("peer_diffrax_neural.py"))
    done = subprocess.run([python, script], input=task, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def _side_by_side(python: str | None, sizes: tuple[int, ...], rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """Milliseconds of everybody."""
    net, y0 = network(sizes, rows, dtype)
    times = torch.linspace(0.0, 5.0, 100, dtype=dtype)
    before, told = _here(net, y0, times, "auto")
    seconds = {"torchdiffeq": _torchdiffeq(net, y0, times)}
    if python is not None:
        seconds.update({f"diffrax, {mode}": value for mode, value in _diffrax(python, net, y0).items()})
    seconds["here"] = min(before, _here(net, y0, times, "auto")[0])
    plain = {"engine": told["engine"], "steps per row": round(told["steps"], 2), "load": os.getloadavg()[0]}
    return plain | {f"{name}, ms": round(1e3 * value, 3) for name, value in seconds.items()}


def main() -> None:
    """Print milliseconds and write the results, problem by problem."""
    python = os.environ.get("LATENTDE_NUMPYRO_PYTHON")
    if python is None:
        print("diffrax: not installed (LATENTDE_NUMPYRO_PYTHON is not set)")
    results: dict[str, Any] = {}
    OUT.parent.mkdir(exist_ok=True)
    for dtype in (torch.float32, torch.float64):
        for sizes, rows in PROBLEMS:
            name = f"{'-'.join(map(str, sizes))}, {rows} rows, {str(dtype).removeprefix('torch.')}"
            results[name] = _side_by_side(python, sizes, rows, dtype)
            print(name, results[name], flush=True)
            OUT.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
