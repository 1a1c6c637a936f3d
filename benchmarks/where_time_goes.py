# SPDX-License-Identifier: Apache-2.0
"""Where the time of the lynx-hare posterior goes: a gradient by number of chains, and an ensemble run by part."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyro_latentde as lde  # noqa: E402
from benchmarks.lynx_hare import near_posterior  # noqa: E402
from benchmarks.measure import best  # noqa: E402
from pyro_latentde.data import load_lynx_hare  # noqa: E402
from pyro_latentde.infer.batched_log_joint import BatchedLogJoint  # noqa: E402
from pyro_latentde.infer.ensemble_chains import EnsembleChains  # noqa: E402
from pyro_latentde.infer.log_joint import LogJoint  # noqa: E402
from pyro_latentde.models.systems import lotka_volterra  # noqa: E402
from pyro_latentde.solve.fused.cpu import CpuKernel  # noqa: E402

__all__ = ["run"]

CHAINS = (1, 4, 16, 64, 256, 1024, 4096)
COMPILED_CHAINS = (4, 64, 4096)  # torch.compile takes some ten seconds for each
RUNS = {64: 200, 256: 50}  # chains of an ensemble run: its draws of each
PARTS = {
    "sampler": [(EnsembleChains, "iterate")],
    "log_joint": [(BatchedLogJoint, "tensors")],
    "solve": [(CpuKernel, "forward"), (CpuKernel, "adjoint")],
}


class _Clock:
    """Seconds of each part without the parts inside it; what the start-up does belongs to the start-up."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("setup", *PARTS), 0.0)
        self.stack, self.since = ["setup"], time.perf_counter()

    def turn(self) -> None:
        """Charge the time since the last turn to the part at hand."""
        now = time.perf_counter()
        self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    def timed(self, part: str, method: Callable) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.turn()
            self.stack.append(part if part == "sampler" or self.stack[-1] != "setup" else "setup")
            try:
                return method(*args, **kwargs)
            finally:
                self.turn()
                self.stack.pop()

        return wrapped


def _gradients() -> dict[str, dict[str, float]]:
    """Microseconds per chain and gradient, by engine."""
    joint = LogJoint(lotka_volterra.model, (load_lynx_hare(),))
    results = {}
    for chains in CHAINS:
        points, row = near_posterior(chains), {}
        for engine in ("traced", "compiled") if chains in COMPILED_CHAINS else ("traced",):
            batched = BatchedLogJoint(joint, points, engine=engine)
            row[f"{batched.engine}_us"] = 1e6 * best(partial(batched, points), least=0.1, repeats=3) / chains
        results[f"a chain's gradient, {chains} chains"] = row
    return results


def _ensemble(chains: int, draws: int) -> dict[str, float]:
    """Seconds of a run with its kernels on disk: setting up (starts, recording the model), and while it iterates."""
    series = load_lynx_hare()
    sample = partial(lde.infer.ensemble_hmc, lotka_volterra.model, series, num_chains=chains, progress=False)
    sample(num_samples=1, num_warmup=1)
    clock = _Clock()
    with ExitStack() as patches:
        for part, methods in PARTS.items():
            for owner, name in methods:
                patches.enter_context(patch.object(owner, name, clock.timed(part, getattr(owner, name))))
        posterior = sample(num_samples=draws)
        clock.turn()
    total = sum(clock.seconds.values())
    row = {"seconds": total} | {f"{part}_share": seconds / total for part, seconds in clock.seconds.items()}
    return row | {"us_per_chain_and_gradient": 1e6 * total / posterior.attrs["num_gradients"]}


def run() -> dict[str, dict[str, float]]:
    """Both tables."""
    runs = {f"ensemble_hmc, {chains} chains": _ensemble(chains, draws) for chains, draws in RUNS.items()}
    return _gradients() | runs


if __name__ == "__main__":
    for label, result in run().items():
        print(f"{label:38s}" + "  ".join(f"{k} {v:.4g}" for k, v in result.items()))
    print(f"load average {os.getloadavg()[0]:.1f}")
