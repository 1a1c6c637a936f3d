# SPDX-License-Identifier: Apache-2.0
"""Networks as vector fields: value and gradient of all weights and y0, here, by diffrax and by torchdiffeq.

ELU networks of two hidden layers, 100 output times on [0, 5], dopri5, rtol = atol = 1e-5, the loss the mean square of
all outputs, weights and starts the same everywhere; float32 and float64. Here every row has its own steps. diffrax is
jitted, in both of its modes: one step size for the whole batch (``batch``), and own steps for every row by ``vmap``
(``rows``). torchdiffeq's ``odeint`` has one step size for the batch; its gradient is by backpropagation. Compiling is
left out everywhere. This project is measured before and after its peers, and the fastest of many calls counts.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

import pyro_latentde as lde
from benchmarks.peers import ask, python_of

__all__ = ["PROBLEMS", "network", "run"]

SMALL, WIDE = (4, 20, 20, 4), (16, 200, 200, 16)
PROBLEMS = ((SMALL, 100), (SMALL, 1000), (WIDE, 64), ((2, 20, 2), 100), ((4, 64, 64, 4), 100))
# At least so many times as fast as each peer.
BARS = {
    (SMALL, 100): {"diffrax batch": 1.0, "torchdiffeq": 9.0},
    (SMALL, 1000): {"diffrax batch": 1.0, "torchdiffeq": 2.5},
    (WIDE, 64): {"diffrax batch": 1 / 1.5, "diffrax rows": 1.0, "torchdiffeq": 1.0},
}


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
    task = {"weights": weights, "y0": y0.tolist(), "double": y0.dtype == torch.float64}
    return {f"diffrax {mode}": s for mode, s in ask(python, "peer_diffrax_neural.py", task).items()}


def _side_by_side(python: str | None, sizes: tuple[int, ...], rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """Milliseconds of everybody, and ratios."""
    net, y0 = network(sizes, rows, dtype)
    times = torch.linspace(0.0, 5.0, 100, dtype=dtype)
    before, told = _here(net, y0, times, "auto")
    peers = {"torchdiffeq": _torchdiffeq(net, y0, times)}
    if python is not None:
        peers |= _diffrax(python, net, y0)
    here = min(before, _here(net, y0, times, "auto")[0])
    row = {"engine": told["engine"], "steps per row": round(told["steps"], 2), "ms": 1e3 * here}
    for name, seconds in peers.items():
        row |= {f"{name} ms": 1e3 * seconds, f"{name} ratio": seconds / here}
    return row | {f"{name} bar": round(bar, 2) for name, bar in BARS.get((sizes, rows), {}).items()}


def run() -> dict[str, dict[str, Any]]:
    """Milliseconds and ratios, problem by problem."""
    python, results = python_of("diffrax"), {}
    for dtype in (torch.float32, torch.float64):
        for sizes, rows in PROBLEMS:
            name = f"{'-'.join(map(str, sizes))}, {rows} rows, {str(dtype).removeprefix('torch.')}"
            results[name] = _side_by_side(python, sizes, rows, dtype)
    return results
