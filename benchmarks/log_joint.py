# SPDX-License-Identifier: Apache-2.0
"""Value and gradient of the lynx-hare log-joint, four chains: this package's log-joint against Pyro + torchdiffeq.

Pyro advances its chains one after the other, so its four gradients are four calls of its potential.
"""

from collections.abc import Callable

import pyro
import torch
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from benchmarks.lynx_hare import near_posterior, peer_model
from benchmarks.measure import best
from pyro_latentde.data import load_lynx_hare
from pyro_latentde.infer.batched_log_joint import BatchedLogJoint
from pyro_latentde.infer.log_joint import LogJoint
from pyro_latentde.models.systems import lotka_volterra

__all__ = ["CHAINS", "peer_gradients", "run"]

CHAINS = 4


def peer_gradients() -> Callable[[], None]:
    """A task: one gradient of each of `CHAINS` chains by Pyro + torchdiffeq."""
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(False):
        _, potential, _, _ = initialize_model(peer_model, ())
    points = torch.from_numpy(near_posterior(CHAINS))
    names = ("alpha", "beta", "gamma", "delta")

    def one(u: Tensor) -> None:
        values = {n: u[i].clone().requires_grad_() for i, n in enumerate(names)}
        values |= {"z0": u[4:6].clone().requires_grad_(), "sigma": u[6:8].clone().requires_grad_()}
        torch.autograd.grad(potential(values), list(values.values()))

    def task() -> None:
        with pyro.validation_enabled(False):
            for u in points:
                one(u)

    return task


def run() -> dict[str, dict[str, float]]:
    """Milliseconds for the four chains, by engine."""
    joint = LogJoint(lotka_volterra.model, (load_lynx_hare(),))
    points = near_posterior(CHAINS)
    theirs = best(peer_gradients())
    results = {}
    for engine in ("traced", "compiled"):
        batched = BatchedLogJoint(joint, points, engine=engine)
        ours = best(lambda batched=batched: batched(points))
        results[f"log-joint, {CHAINS} chains, {batched.engine}"] = {
            "ours_ms": 1e3 * ours,
            "pyro_torchdiffeq_ms": 1e3 * theirs,
            "ratio": theirs / ours,
        }
    return results
