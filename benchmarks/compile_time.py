# SPDX-License-Identifier: Apache-2.0
"""Seconds from a new field to its first gradient, with the engine started: compiled, and from the disk cache.

Each measurement is a process of its own. "Started" means that another field has been solved and differentiated before.
"""

import json
import os
import subprocess
import sys
import tempfile

__all__ = ["run"]

_SCRIPT = """
import json, time, torch
import pyro_latentde as lde

def first(f, p):
    p = torch.tensor(p, dtype=torch.float64, requires_grad=True)
    start = time.perf_counter()
    lde.odesolve(f, torch.ones(2).double(), torch.linspace(0, 1, 5), p).ys.sum().backward()
    return time.perf_counter() - start

first(lambda t, y, p: -p[0] * y, [1.0])
def field(t, y, p):
    u, v = y
    return torch.stack([p[0] * u - p[1] * u * v, -p[2] * v + p[3] * u * v])
print(json.dumps(first(field, [0.5, 0.3, 0.8, 0.2])))
"""


def _first_gradient(cache: str) -> float:
    environment = {**os.environ, "PYRO_LATENTDE_CACHE": cache}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def run() -> dict[str, dict[str, float]]:
    """Best of five for each."""
    compiled, loaded = [], []
    for _ in range(5):
        with tempfile.TemporaryDirectory() as cache:
            compiled.append(_first_gradient(cache))
            loaded.append(_first_gradient(cache))
    return {
        "new field, compiled": {"seconds": min(compiled), "bar": 5.0},
        "new field, from disk": {"seconds": min(loaded), "bar": 0.05},
    }
