# SPDX-License-Identifier: Apache-2.0
"""``make bench``: this package and its peers on the same cores in one run.

``python benchmarks/run.py [SECTION ...]`` runs some of the sections. Each prints its rows as it ends and writes
``benchmarks/results/SECTION.json``: the machine, its load before, and the rows. ``ratio`` is always the peer's time
over ours, ``bar`` what it should be at least.
"""

import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import machine  # noqa: E402

__all__ = ["SECTIONS", "main"]

SECTIONS = (
    "gradient",
    "log_joint",
    "compile_time",
    "goku_step",
    "where_time_goes",
    "stiff",
    "neural_fields",
    "lorenz_ensemble",
    "memory",
)
RESULTS = Path(__file__).with_name("results")


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run the sections named, or all."""
    chosen = sys.argv[1:] or SECTIONS
    unknown = sorted(set(chosen) - set(SECTIONS))
    if unknown:
        raise SystemExit(f"no section {unknown[0]!r}; sections are {', '.join(SECTIONS)}")
    RESULTS.mkdir(exist_ok=True)
    print(", ".join(f"{k} {v}" for k, v in machine().items()))
    for name in chosen:
        report = {"machine": machine() | {"load": round(os.getloadavg()[0], 1)}}
        report["results"] = importlib.import_module(f"benchmarks.{name}").run()
        for row, values in report["results"].items():
            print(f"{row:42s}" + "  ".join(f"{k} {_shown(v)}" for k, v in values.items()), flush=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
