# SPDX-License-Identifier: Apache-2.0
"""Ensembles of Lorenz's equations, 8 to 131,072 rows: seconds on the CPU and, where there is one, on a CUDA device.

dy/dt = (10 (y2 - y1), y1 (rho - y3) - y2, y1 y2 - 8/3 y3) from (1, 0, 0) to t = 1, rho = linspace(0, 21, N), as in
Utkarsh et al., Automated translation and accelerated solving of differential equations on multiple GPU platforms,
Comput. Methods Appl. Mech. Eng. 419 (2024) 116591: 1,000 equal steps of tsit5 (rk4 by torchdiffeq), or steps by
rtol = atol = 1e-5 (dopri5 by torchdiffeq, which takes one step size for all rows); and for the latter also the gradient
of the sum of last states by rho. The peers: torchdiffeq, batched; on a device diffrax (``vmap``, jitted) and torchode
too, which take minutes for each case on a CPU. Compiling is left out. Times are the best of five calls; a case ends
with the first size that takes longer than ``SECONDS``. Writes a log-log plot beside the results.
"""

import time
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torchdiffeq  # noqa: E402
from torch import Tensor  # noqa: E402

import pyro_latentde as lde  # noqa: E402
from benchmarks.peers import ask, python_of  # noqa: E402

__all__ = ["run", "slope"]

SIZES = [8 * 4**k for k in range(8)]
SIZES = [*(n for n in SIZES if n < 131_072), 131_072]
KINDS = ("fixed", "adaptive", "gradient")
TOLERANCE = 1e-5
PEERS = {"cpu": (), "cuda": ("diffrax", "torchode")}
SECONDS = 8.0
LINEAR_FROM, SLOPE = 256, 1.05
PLOT = Path(__file__).with_name("results") / "lorenz_ensemble.png"
Task = Callable[[int], Callable[[], object]]


def _lorenz(t: Tensor, y: Tensor, rho: Tensor) -> Tensor:
    return torch.stack([10.0 * (y[1] - y[0]), y[0] * (rho - y[2]) - y[1], y[0] * y[1] - (8.0 / 3.0) * y[2]])


def _inputs(rows: int, device: str, dtype: torch.dtype, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    rho = torch.linspace(0.0, 21.0, rows, dtype=dtype, device=device).requires_grad_(kind == "gradient")
    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=dtype, device=device)
    return y0, torch.tensor([0.0, 1.0], dtype=dtype, device=device), rho


def ours(device: str, dtype: torch.dtype, kind: str) -> Task:
    """The fused engine."""
    control = {"step_size": 1e-3} if kind == "fixed" else {"rtol": TOLERANCE, "atol": TOLERANCE}

    def task(rows: int) -> Callable[[], object]:
        y0, times, rho = _inputs(rows, device, dtype, kind)

        def run() -> None:
            ys = lde.odesolve(_lorenz, y0, times, rho, engine="fused", method="tsit5", **control).ys
            if kind == "gradient":
                ys[:, -1].sum().backward()
            _wait(device)

        return run

    return task


def by_torchdiffeq(device: str, dtype: torch.dtype, kind: str) -> Task:
    """All rows as one system."""
    control = {"method": "rk4", "options": {"step_size": 1e-3}}
    if kind != "fixed":
        control = {"method": "dopri5", "rtol": TOLERANCE, "atol": TOLERANCE}

    def task(rows: int) -> Callable[[], object]:
        y0, times, rho = _inputs(rows, device, dtype, kind)

        def field(t: Tensor, y: Tensor) -> Tensor:
            a, b, c = y.unbind(-1)
            return torch.stack([10.0 * (b - a), a * (rho - c) - b, a * b - (8.0 / 3.0) * c], -1)

        def run() -> None:
            ys = torchdiffeq.odeint(field, y0.expand(rows, 3), times, **control)
            if kind == "gradient":
                ys[-1].sum().backward()
            _wait(device)

        return run

    return task


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(task: Task, sizes: list[int], limit: float) -> dict[int, float]:
    """Best of five calls for each size, until a call takes longer than ``limit``."""
    found: dict[int, float] = {}
    for rows in sizes:
        run = task(rows)
        times = []
        run()
        for _ in range(5):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
            if times[-1] > limit:
                break
        found[rows] = min(times)
        if found[rows] > limit:
            break
    return found


def _peer(name: str, device: str, dtype: torch.dtype, kind: str) -> dict[int, float]:
    python = python_of(name)
    if python is None:
        return {}
    task = {"device": device, "dtype": str(dtype)[6:], "kind": kind, "sizes": SIZES, "limit": SECONDS, "tol": TOLERANCE}
    return {int(rows): s for rows, s in ask(python, f"peer_ensemble_{name}.py", task).items()}


def slope(seconds: dict[int, float]) -> float:
    """Of log seconds by log rows, from 256 rows up."""
    points = [(n, s) for n, s in seconds.items() if n >= LINEAR_FROM]
    if len(points) < 2:
        return float("nan")
    return float(np.polyfit(*np.log(np.array(points).T), 1)[0])


def _cases(device: str) -> dict[tuple[str, ...], dict[int, float]]:
    """Seconds by number of rows, for everybody, number type and kind of steps."""
    cases = {}
    for dtype in (torch.float64, torch.float32):
        for kind in KINDS:
            found = {"here": seconds_of(ours(device, dtype, kind), SIZES, SECONDS)}
            found["torchdiffeq"] = seconds_of(by_torchdiffeq(device, dtype, kind), SIZES, SECONDS)
            found |= {name: _peer(name, device, dtype, kind) for name in PEERS[device]}
            cases |= {(name, device, str(dtype)[6:], kind): s for name, s in found.items() if s}
    return cases


def _plot(cases: dict[tuple[str, ...], dict[int, float]]) -> None:
    figure, axes = plt.subplots(1, len(KINDS), figsize=(13, 4.5), sharey=True, layout="constrained")
    names = sorted({name for name, *_ in cases})
    titles = {"fixed": "1,000 equal steps", "adaptive": "rtol = atol = 1e-5", "gradient": "the same, with gradient"}
    for ax, kind in zip(axes, KINDS, strict=True):
        for (name, device, dtype, own), seconds in cases.items():
            if own == kind:
                line, marker = {"float64": "-", "float32": "--"}[dtype], {"cpu": "o", "cuda": "s"}[device]
                colour = f"C{2 * names.index(name) + (device == 'cuda')}"
                label = f"{name}, {device.upper()}, {dtype}"
                ax.loglog(*zip(*seconds.items(), strict=True), line + marker, color=colour, ms=4, label=label)
        ax.set(title=titles[kind], xlabel="rows")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("seconds per solve")
    axes[0].legend(fontsize=7)
    figure.savefig(PLOT, dpi=130)
    plt.close(figure)


def run() -> dict[str, dict[str, float]]:
    """Microseconds per row by number of rows, and the slope of the log-log line from 256 rows up."""
    cases = {}
    for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
        cases |= _cases(device)
    _plot(cases)
    results = {}
    for (name, device, dtype, kind), seconds in cases.items():
        row = {f"{n} rows": 1e6 * s / n for n, s in seconds.items()} | {"slope": slope(seconds)}
        row |= {"most_slope": SLOPE} if name == "here" else {}
        results[f"us per row, {device}, {dtype}, {kind}, {name}"] = row
    return results
