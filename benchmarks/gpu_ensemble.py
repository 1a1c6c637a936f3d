# SPDX-License-Identifier: Apache-2.0
"""Ensembles of Lorenz's equations, 8 to 131,072 rows: seconds on the CPU and, where there is one, on a CUDA device.

``python benchmarks/gpu_ensemble.py [--most-rows N] [--seconds S] [--name NAME]``. dy/dt = (10 (y2 - y1), y1 (rho - y3)
- y2, y1 y2 - 8/3 y3) from (1, 0, 0) to t = 1, rho = linspace(0, 21, N), as in Utkarsh et al., Automated translation and
accelerated solving of differential equations on multiple GPU platforms, Comput. Methods Appl. Mech. Eng. 419 (2024)
116591: 1,000 equal steps of tsit5 (rk4 by torchdiffeq), or steps by rtol = atol = 1e-5 (dopri5 by torchdiffeq, which
takes one step size for all rows); and for the latter also the gradient of the sum of last states by rho. The peers on
the device: torchdiffeq, batched; diffrax (``vmap``, jitted) and torchode by the Pythons named in
``LATENTDE_NUMPYRO_PYTHON`` and ``LATENTDE_TORCHODE_PYTHON``, environments of their own. Compiling is left out.

Writes ``benchmarks/results/NAME.json``, ``.md`` (microseconds per row, slopes of the log-log lines from 256 rows up)
and ``.png``. Times are the best of five calls; a case ends with the first size that takes longer than ``--seconds``.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torchdiffeq  # noqa: E402
from torch import Tensor  # noqa: E402

import pyro_latentde as lde  # noqa: E402
from benchmarks.measure import machine  # noqa: E402

__all__ = ["main"]

SIZES = [8 * 4**k for k in range(8)]
SIZES = [*(n for n in SIZES if n < 131_072), 131_072]
KINDS = ("fixed", "adaptive", "gradient")
TOLERANCE = 1e-5
PEERS = {"diffrax": "LATENTDE_NUMPYRO_PYTHON", "torchode": "LATENTDE_TORCHODE_PYTHON"}
LINEAR_FROM = 256
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


def _peer(name: str, device: str, dtype: torch.dtype, kind: str, sizes: list[int], limit: float) -> dict[int, float]:
    python = os.environ.get(PEERS[name])
    if python is None:
        return {}
    task = {"device": device, "dtype": str(dtype)[6:], "kind": kind, "sizes": sizes, "limit": limit, "tol": TOLERANCE}
    script = str(Path(__file__).with_name(f"peer_ensemble_{name}.py"))
    done = subprocess.run([python, script], input=json.dumps(task), capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        return {}
    return {int(rows): s for rows, s in json.loads(done.stdout.strip().splitlines()[-1]).items()}


def slope(seconds: dict[int, float]) -> float:
    """Of log seconds by log rows, from 256 rows up."""
    points = [(n, s) for n, s in seconds.items() if n >= LINEAR_FROM]
    if len(points) < 2:
        return float("nan")
    return float(np.polyfit(*np.log(np.array(points).T), 1)[0])


def _cases(device: str, sizes: list[int], limit: float) -> list[dict]:
    rows = []
    for dtype in (torch.float64, torch.float32):
        for kind in KINDS:
            found = {"pyro_latentde": seconds_of(ours(device, dtype, kind), sizes, limit)}
            if device == "cuda":
                found["torchdiffeq"] = seconds_of(by_torchdiffeq(device, dtype, kind), sizes, limit)
                found |= {name: _peer(name, device, dtype, kind, sizes, limit) for name in PEERS}
            for name, seconds in found.items():
                if seconds:
                    case = {"by": name, "device": device, "dtype": str(dtype)[6:], "kind": kind, "seconds": seconds}
                    rows.append({**case, "slope": slope(seconds)})
                    print(f"{name:14s} {device:5s} {case['dtype']:8s} {kind:9s}", _row(seconds), flush=True)
    return rows


def _row(seconds: dict[int, float]) -> str:
    return "  ".join(f"{n}: {1e6 * s / n:.3g}" for n, s in seconds.items()) + " us per row"


def _table(report: dict) -> str:
    sizes = sorted({n for case in report["cases"] for n in case["seconds"]})
    lines = [
        ", ".join(f"{k} {v}" for k, v in report["machine"].items()),
        "",
        "Lorenz ensembles, microseconds per row; slope of the log-log line from 256 rows up.",
        "",
        "| by | device | dtype | steps | " + " | ".join(f"{n:,}" for n in sizes) + " | slope |",
        "|---" * (len(sizes) + 5) + "|",
    ]
    for case in report["cases"]:
        cells = [f"{1e6 * case['seconds'][n] / n:.3g}" if n in case["seconds"] else "" for n in sizes]
        lines.append(
            "| " + " | ".join([case["by"], case["device"], case["dtype"], case["kind"], *cells, f"{case['slope']:.2f}"])
            + " |"
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def _plot(report: dict, target: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(KINDS), figsize=(13, 4.5), sharey=True, layout="constrained")
    names = sorted({case["by"] for case in report["cases"]})
    titles = {"fixed": "1,000 equal steps", "adaptive": "rtol = atol = 1e-5", "gradient": "the same, with gradient"}
    for ax, kind in zip(axes, KINDS, strict=True):
        for case in report["cases"]:
            if case["kind"] == kind:
                line = {"float64": "-", "float32": "--"}[case["dtype"]]
                marker = {"cpu": "o", "cuda": "s"}[case["device"]]
                label = f"{case['by']}, {case['device'].upper()}, {case['dtype']}"
                colour = f"C{2 * names.index(case['by']) + (case['device'] == 'cuda')}"
                ax.loglog(*zip(*case["seconds"].items(), strict=True), line + marker, color=colour, ms=4, label=label)
        ax.set(title=titles[kind], xlabel="rows")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("seconds per solve")
    axes[0].legend(fontsize=7)
    figure.savefig(target, dpi=130)
    plt.close(figure)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most-rows", type=int, default=SIZES[-1])
    parser.add_argument("--seconds", type=float, default=30.0, help="a case ends with the first call that takes longer")
    parser.add_argument("--name", default="lorenz_ensemble")
    given = parser.parse_args()
    sizes = [n for n in SIZES if n <= given.most_rows]
    report = {"machine": machine(), "cases": []}
    report["machine"]["load"] = f"{os.getloadavg()[0]:.1f}"
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        report["machine"]["device"] = torch.cuda.get_device_name()
    for device in devices:
        report["cases"] += _cases(device, sizes, given.seconds)
    folder = Path(__file__).with_name("results")
    folder.mkdir(exist_ok=True)
    (folder / f"{given.name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / f"{given.name}.md").write_text(_table(report))
    _plot(report, folder / f"{given.name}.png")
    print(f"written: benchmarks/results/{given.name}.json, .md, .png")


if __name__ == "__main__":
    main()
