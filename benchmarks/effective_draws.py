# SPDX-License-Identifier: Apache-2.0
"""Seconds from the call to 4,000 effective draws of the lynx-hare posterior: this package, Stan, NumPyro, Pyro.

``python benchmarks/effective_draws.py [ours] [stan] [numpyro] [pyro] [--seeds 3] [--short]``

An effective draw is one of ArviZ's bulk ESS in the parameter that has the fewest, computed here for all. All run the
same priors, likelihood and tolerance (1e-6, relative and absolute), each seed in a process of its own.

* ours: a process without any compiled code on disk, timed from the call of the function, compiling included, imports
  not. Runs are as long as it takes to reach 4,000, so that nothing is extrapolated; `nuts` and `ensemble_hmc` have
  default settings but for the number of draws.
* Stan and NumPyro: four chains, 1000 iterations of warm-up; what these took, plus 4,000 by the rate of sampling. Stan's
  compiling is stated apart and left out, as is that of NumPyro's sampling; that of its warm-up cannot be told apart.
  They are run by Pythons of their own (`peers.py`), Stan by one with ``pystan``.
* Pyro + torchdiffeq would run for hours: estimated as the gradients of our `nuts` run, cut to 4,000 effective draws,
  times the measured milliseconds of its own gradient, shared out to all cores without loss.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import arviz  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.lynx_hare_seeds import MEANS, SDS  # noqa: E402
from benchmarks.peers import python_of  # noqa: E402
from pyro_latentde.data import load_lynx_hare  # noqa: E402

__all__ = ["GOAL", "main", "quality"]

GOAL = 4000
OURS = {"ensemble_hmc": {"num_samples": 100}, "nuts": {"num_samples": 1200}}
PEERS = {
    "stan": ("stan", "peer_stan.py", {}),
    "numpyro, vectorized": ("numpyro", "peer_numpyro.py", {"chain_method": "vectorized"}),
    "numpyro, sequential": ("numpyro", "peer_numpyro.py", {"chain_method": "sequential"}),
}
LIMIT = 1800  # seconds of one run of a peer
Row = dict[str, float | str]


def quality(draws: np.ndarray) -> Row:
    """Of draws (chain, draw, 8): least bulk ESS, largest R-hat, and how far means are from posteriordb's, in sd."""
    columns = [np.ascontiguousarray(x) for x in np.moveaxis(draws, -1, 0)]
    return {
        "ess": min(float(arviz.ess(x, method="bulk")) for x in columns),
        "rhat": max(float(arviz.rhat(x)) for x in columns),
        "off_by_sd": float(np.abs((draws.mean((0, 1)) - MEANS) / SDS).max()),
    }


def _process(command: list[str], task: dict | None = None) -> tuple[dict, np.ndarray]:
    """What a fresh process without compiled code on disk says in its last line, and the draws it leaves."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"PYRO_LATENTDE_CACHE": folder, "TORCHINDUCTOR_CACHE_DIR": folder, "XDG_CACHE_HOME": folder}
        out = str(Path(folder) / "draws.npy")
        done = subprocess.run(
            command,
            input=json.dumps({**(task or {}), "out": out}),
            env={**os.environ, **caches, "CI": "1"},
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.strip().splitlines()[-1]), np.load(out)


def _run_ours() -> None:
    """In the fresh process: one run, timed from the call."""
    import pyro_latentde as lde
    from pyro_latentde.models.systems import lotka_volterra

    task, series = json.load(sys.stdin), load_lynx_hare()
    start = time.perf_counter()
    sampler = getattr(lde.infer, task["sampler"])
    posterior = sampler(lotka_volterra.model, series, seed=task["seed"], progress=False, **task["settings"])
    seconds = time.perf_counter() - start
    np.save(task["out"], np.concatenate([x.reshape(*x.shape[:2], -1) for x in posterior.samples.values()], axis=-1))
    print(json.dumps({"seconds": seconds, "gradients": posterior.attrs["num_gradients"]}))


def ours(sampler: str, seeds: int, short: bool) -> Row:
    """Medians over the seeds; every run must reach the goal."""
    settings = OURS[sampler] | ({"num_samples": 30, "num_warmup": 50} if short else {})
    runs = []
    for seed in range(seeds):
        told = {"sampler": sampler, "seed": seed, "settings": settings}
        facts, draws = _process([sys.executable, __file__, "--child"], told)
        runs.append(facts | quality(draws))
    row: Row = {"draws": draws.shape[0] * draws.shape[1]}
    row |= {name: float(median(run[name] for run in runs)) for name in ("ess", "rhat", "off_by_sd", "gradients")}
    reached = all(run["ess"] >= GOAL for run in runs)
    row["seconds_to_4000"] = float(median(run["seconds"] for run in runs)) if reached else "not reached"
    return row


def peer(name: str, seeds: int, short: bool) -> Row:
    """Medians over the seeds."""
    library, script, options = PEERS[name]
    python = python_of(library)
    if python is None:
        return {"seconds_to_4000": "not installed"}
    runs = []
    for seed in range(seeds):
        size = {"warmup": 60, "samples": 40} if short else {"warmup": 1000, "samples": 1000}
        task = {"counts": load_lynx_hare().values[0].tolist(), "seed": seed, **size, **options}
        try:
            facts, draws = _process([python, str(Path(__file__).with_name(script))], task)
        except subprocess.TimeoutExpired:
            return {"seconds_to_4000": f"not reached: seed {seed} was not done in {LIMIT} s"}
        facts |= quality(draws)
        facts["ess_per_second"] = facts["ess"] / facts["sampling"]
        runs.append({**facts, "seconds_to_4000": facts["warmup"] + GOAL / facts["ess_per_second"]})
    return {key: float(median(run[key] for run in runs)) for key in runs[0]}


def pyro(gradients: float) -> Row:
    """The estimate, from the gradients of our NUTS run."""
    from benchmarks.log_joint import CHAINS, peer_gradients
    from benchmarks.measure import best

    each = best(peer_gradients()) / CHAINS
    cores = len(os.sched_getaffinity(0))
    return {"gradient_ms": 1e3 * each, "gradients": gradients, "seconds_to_4000": gradients * each / cores}


def _show(name: str, row: Row) -> None:
    load = f"load average {os.getloadavg()[0]:.1f}"
    told = "  ".join(f"{k} {v:.4g}" if not isinstance(v, str) else f"{k}: {v}" for k, v in row.items())
    print(f"{name:31s}{told}  ({load})", flush=True)


def main() -> None:
    """Print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="*", default=["ours", "stan", "numpyro", "pyro"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="a few draws, to see that everything runs")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.child:
        return _run_ours()
    gradients = None
    for sampler in OURS if {"ours", "pyro"} & set(told.which) else ():
        row = ours(sampler, told.seeds, told.short)
        gradients = row["gradients"] * GOAL / row["ess"]  # of NUTS, which comes last
        _show(f"ours, {sampler}", row)
    for name in PEERS:
        if name.split(",")[0] in told.which:
            _show(name, peer(name, told.seeds, told.short))
    if "pyro" in told.which:
        _show("pyro + torchdiffeq, ESTIMATED", pyro(gradients))


if __name__ == "__main__":
    main()
