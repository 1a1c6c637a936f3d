# SPDX-License-Identifier: Apache-2.0
"""Timing, best of five, and the name of the machine."""

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

__all__ = ["best", "machine"]


def best(task: Callable[[], object], least: float = 0.2, repeats: int = 5) -> float:
    """Seconds per call: the best of ``repeats`` runs, each of at least ``least`` seconds."""
    task()
    start = time.perf_counter()
    task()
    calls = max(1, int(least / max(time.perf_counter() - start, 1e-9)))
    results = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            task()
        results.append((time.perf_counter() - start) / calls)
    return min(results)


def machine() -> dict[str, str | int]:
    """Processor, cores this process may use, and versions."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    packages = {name: version(name) for name in ("torch", "llvmlite", "pyro-ppl", "torchdiffeq")}
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **packages,
    }
