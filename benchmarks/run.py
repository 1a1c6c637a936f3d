# SPDX-License-Identifier: Apache-2.0
"""``make bench``: this package and its peers on the same cores in one run: ratios, and ``benchmarks/results.json``."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import compile_time, goku_step, gradient, log_joint, where_time_goes  # noqa: E402
from benchmarks.measure import machine  # noqa: E402


def main() -> None:
    report = {"machine": machine(), "results": {}}
    print(", ".join(f"{k} {v}" for k, v in report["machine"].items()))
    for bench in (gradient, log_joint, compile_time, goku_step, where_time_goes):
        for name, row in bench.run().items():
            report["results"][name] = row
            print(f"{name:38s}" + "  ".join(f"{k} {v:.4g}" for k, v in row.items()), end="")
            print(f"  (load {os.getloadavg()[0]:.1f})", flush=True)
    target = Path(__file__).with_name("results.json")
    target.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {target.name}")


if __name__ == "__main__":
    main()
