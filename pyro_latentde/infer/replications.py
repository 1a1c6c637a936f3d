# SPDX-License-Identifier: Apache-2.0
"""The same model fitted to many simulated data sets at once, each a group of chains in one batched log-joint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer.ascent import ascend
from pyro_latentde.infer.batched_log_joint import BatchedLogJoint
from pyro_latentde.infer.ensemble_chains import EnsembleChains, EnsembleSettings
from pyro_latentde.infer.ensemble_run import density_of
from pyro_latentde.infer.log_joint import LogJoint
from pyro_latentde.infer.nuts_kernel import ChainRecord, run_chain
from pyro_latentde.infer.nuts_run import DENSE_UP_TO
from pyro_latentde.infer.starts import chain_generators
from pyro_latentde.sites.ode_record import solve_record

__all__ = ["METHODS", "Fits", "Replications", "Truths", "simulate_truths"]

CANDIDATES = 12  # prior draws of each replication that climb
SPARE = 64
CLIMB_STEPS = 100
SPREAD = 0.1
# All data sets wait for the one with the longest trajectories: 2**7 leapfrog steps.
MOST_STEPS, DEPTH = 128, 7
MOST_ROUNDS = 20

_log = logging.getLogger("pyro_latentde")


@dataclass(frozen=True)
class Truths:
    """Draws from the prior, and data simulated with each.

    Args:
        u: unconstrained coordinates (R, d).
        data: observed site -> (R, *site shape).
        spare: more such draws of the prior (64, d), to start from.
        num_failed: draws left out, because their solve failed or their data were not finite.
    """

    u: Tensor
    data: dict[str, Tensor]
    spare: Tensor
    num_failed: int = 0

    def __getitem__(self, rows: slice | Tensor) -> Truths:
        return Truths(self.u[rows], {name: value[rows] for name, value in self.data.items()}, self.spare)

    def __len__(self) -> int:
        return len(self.u)


@dataclass(frozen=True)
class Fits:
    """Draws of R posteriors.

    Args:
        u: unconstrained coordinates (R, C, S, d).
        num_divergent, num_failed: divergent iterations and failed solves among the kept draws.
        num_rescued: chains moved in warm-up.
    """

    u: Tensor
    num_divergent: int
    num_failed: int
    num_rescued: int = 0


class _Simulated(Messenger):
    """Observed sites draw what they observe."""

    def __init__(self) -> None:
        super().__init__()
        self.data: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if _is_data(msg):
            msg["value"] = msg["fn"].sample()
            self.data[msg["name"]] = msg["value"]


def _is_data(site: Mapping[str, Any]) -> bool:
    known = site["is_observed"] and not (site["infer"] or {}).get("_deterministic")
    return known and type(site["fn"]).__name__ not in ("_Subsample", "Delta", "Unit")


def simulate_truths(joint: LogJoint, num: int, seed: int) -> Truths:
    """Draw from the prior and simulate the model's data, as many as wanted whose solves work.

    Args:
        joint: the log-joint; its model is run as it is, with other values at the observed sites.
        num: R.
        seed: of everything drawn.

    Returns:
        The truths.

    Raises:
        LatentDEError: nothing is observed, or hardly any draw of the prior can be simulated.
    """
    names = [site.name for site in joint.sites]

    def draw(_: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        simulated = _Simulated()
        with simulated:
            trace = poutine.trace(joint.model).get_trace(*joint.args, **joint.kwargs)
        good = torch.ones((), dtype=torch.bool, device=joint.device)
        for node in trace.nodes.values():
            record = solve_record(node)
            if record and record.get("status") is not None:
                good = good & (record["status"] == 0).all()
        return {name: trace.nodes[name]["value"] for name in names}, simulated.data, good

    parts: list[tuple[Tensor, dict[str, Tensor]]] = []
    found = tried = 0
    with torch.no_grad(), torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        for _ in range(MOST_ROUNDS):
            values, data, good = _many(draw, num + SPARE)
            if not data:
                raise LatentDEError("the model observes nothing: there are no data to simulate")
            u = joint.unconstrain(values)
            good = good & u.isfinite().all(-1)
            for value in data.values():
                good = good & value.reshape(len(value), -1).isfinite().all(-1)
            parts.append((u[good], {name: value[good] for name, value in data.items()}))
            found, tried = found + int(good.sum()), tried + num + SPARE
            if found >= num + SPARE:
                break
        else:
            raise LatentDEError(
                f"only {found} of {tried} draws from the prior could be simulated, {num + SPARE} are needed. "
                "analysis.stress_test(model) tells where they fail."
            )
    u = torch.cat([part for part, _ in parts])
    together = {name: torch.cat([data[name] for _, data in parts])[:num] for name in parts[0][1]}
    return Truths(u[:num], together, u[num : num + SPARE], tried - found)


def _many(draw: Callable, num: int) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    try:
        return torch.func.vmap(draw, randomness="different")(torch.zeros(num))
    except Exception as error:  # a sampler without a batching rule, a branch on values
        _log.debug("simulations one by one: %s", error)
        runs = [draw(torch.zeros(())) for _ in range(num)]
        columns = [{name: torch.stack([run[i][name] for run in runs]) for name in runs[0][i]} for i in (0, 1)]
        return (*columns, torch.stack([run[2] for run in runs]))


class Replications:
    """A batch of replications whose log-joints are one call.

    Args:
        joint: the log-joint.
        num_groups: G, replications at once.
        num_chains: C of each.
        example: truths that stand in for data while the log-joint is recorded, at least one.
        engine: of the log-joint; see ``batched_log_joint``.
    """

    def __init__(
        self, joint: LogJoint, num_groups: int, num_chains: int, example: Truths, engine: str = "auto"
    ) -> None:
        self.joint, self.num_groups, self.num_chains = joint, num_groups, num_chains
        truths = self._filled(example)
        rows = truths.u.repeat_interleave(num_chains, 0).to("cpu", torch.float64).numpy()
        self.batched = BatchedLogJoint(joint, rows, engine, data=self._rows_of(truths, num_chains))
        self.density = density_of(self.batched)

    def give(self, truths: Truths) -> int:
        """The data of at most G replications; returns how many these are. Empty places repeat them."""
        self.truths = self._filled(truths)
        self.batched.exchange(self._rows_of(self.truths, self.num_chains))
        return len(truths)

    def starts(self, seed: int) -> Tensor:
        """Starts (G, C, d): the best place that draws of the prior climb to with the data; the truth is unseen."""
        joint, spare = self.joint, self.truths.spare
        generator = torch.Generator().manual_seed(seed)
        picked = torch.rand(self.num_groups, len(spare), generator=generator).argsort(-1)[:, :CANDIDATES].flatten()
        data = self._rows_of(self.truths, CANDIDATES)
        path, worth = ascend(lambda u: joint.value_and_grad(u, data)[:2], spare[picked.to(spare.device)], CLIMB_STEPS)
        worth = worth.nan_to_num(nan=-torch.inf)
        path, worth = path.unflatten(1, (self.num_groups, -1)), worth.unflatten(1, (self.num_groups, -1))
        centres = []
        for g in range(self.num_groups):
            best = worth[:, g].amax(0).argmax()
            enough = worth[:, g, best] >= worth[:, g, best].max() - joint.dim
            centres.append(path[int(enough.int().argmax()), g, best])
        offset = torch.randn(self.num_groups, self.num_chains, joint.dim, generator=generator, dtype=torch.float64)
        centre = torch.stack(centres).double()[:, None]
        near = centre + SPREAD * offset.to(centre)
        lp = self.density(near.flatten(0, 1))[0].unflatten(0, near.shape[:2])
        return torch.where(lp.isfinite()[..., None], near, centre)

    def _filled(self, truths: Truths) -> Truths:
        return truths[torch.arange(self.num_groups) % len(truths)]

    @staticmethod
    def _rows_of(truths: Truths, copies: int) -> dict[str, Tensor]:
        return {name: value.repeat_interleave(copies, 0) for name, value in truths.data.items()}


def fit_by_ensemble(batch: Replications, num_warmup: int, num_samples: int, seed: int) -> Fits:
    """All replications by ensemble HMC, each a group."""
    dense = batch.joint.dim <= DENSE_UP_TO
    settings = EnsembleSettings(num_warmup, num_samples, dense_mass=dense, max_num_steps=MOST_STEPS, seed=seed)
    chains = EnsembleChains(batch.density, batch.starts(seed), settings)
    while not chains.finished:
        chains.iterate()
    failed, divergent = (int(chains.stats[name].sum()) for name in ("ode_failed", "diverging"))
    return Fits(chains.draws.permute(1, 2, 0, 3), divergent, failed, chains.num_rescued)


def fit_by_nuts(batch: Replications, num_warmup: int, num_samples: int, seed: int) -> Fits:
    """All replications by NUTS, each chain on its own."""
    positions = batch.starts(seed).flatten(0, 1).cpu().numpy()
    total, dim = positions.shape
    records = [ChainRecord(num_warmup + num_samples, dim) for _ in range(total)]
    settings = {"num_warmup": num_warmup, "num_samples": num_samples, "max_tree_depth": DEPTH}
    settings["dense_mass"] = dim <= DENSE_UP_TO
    rngs = chain_generators(seed, total)
    chains = [run_chain(q.copy(), r, rng, **settings) for q, r, rng in zip(positions, records, rngs, strict=True)]
    active = dict(enumerate(chains))
    for i, chain in active.items():
        positions[i] = next(chain)
    with np.errstate(all="ignore"):
        while active:
            lp, grad, failed, steps = batch.batched(positions)
            for i, chain in list(active.items()):
                try:
                    positions[i] = chain.send((lp[i], grad[i], failed[i], steps[i]))
                except StopIteration:
                    del active[i]
    u = torch.from_numpy(np.stack([record.positions[num_warmup:] for record in records]))
    counts = (sum(int(r.stats[name][num_warmup:].sum()) for r in records) for name in ("diverging", "ode_failed"))
    return Fits(u.unflatten(0, (batch.num_groups, batch.num_chains)), *counts)


METHODS: dict[str, Callable[[Replications, int, int, int], Fits]] = {
    "ensemble_hmc": fit_by_ensemble,
    "nuts": fit_by_nuts,
}
