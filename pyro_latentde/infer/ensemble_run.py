# SPDX-License-Identifier: Apache-2.0
"""Posterior draws of a Pyro model by many chains that learn from each other."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.errors import CheckpointError, LatentDEError
from pyro_latentde.infer.adaptation import Metric
from pyro_latentde.infer.batched_log_joint import BatchedLogJoint
from pyro_latentde.infer.devices import OneDevice, make_devices
from pyro_latentde.infer.ensemble_chains import EnsembleChains, EnsembleSettings
from pyro_latentde.infer.log_joint import LogJoint
from pyro_latentde.infer.nuts_run import DENSE_UP_TO, first_metric, first_scales, split_rhat, versions
from pyro_latentde.infer.progress import Progress
from pyro_latentde.infer.run_file import RunFile, describe_run
from pyro_latentde.infer.starts import find_many_starts
from pyro_latentde.infer.stop_signal import StopSignal
from pyro_latentde.infer.warn_once import WarnOnce
from pyro_latentde.posterior.model_sites import inspect_model
from pyro_latentde.posterior.posterior import Posterior

__all__ = [
    "advance",
    "check_settings",
    "density_of",
    "ensemble_hmc",
    "facts_of",
    "start_ensemble",
    "summarise",
    "to_posterior",
]

EXPECTED_LEAPFROGS = 8  # of an iteration, for a posterior of ordinary difficulty

MANY_ROWS = 32

_log = logging.getLogger("pyro_latentde")


@WarnOnce()
def ensemble_hmc(
    model: Callable,
    *args: Any,
    num_samples: int = 200,
    num_warmup: int = 200,
    num_chains: int = 64,
    seed: int = 0,
    target_accept: float = 0.8,
    max_num_steps: int = 1000,
    dense_mass: bool | None = None,
    start: Any = None,
    metric: np.ndarray | Tensor | None = None,
    log_joint_engine: str = "auto",
    checkpoint: str | Path | None = None,
    checkpoint_minutes: float = 5.0,
    accelerator: str | None = None,
    devices: Any = 1,
    strategy: str = "auto",
    num_nodes: int = 1,
    progress: bool = True,
    **kwargs: Any,
) -> Posterior:
    """Draw from the posterior of a Pyro model by Hamiltonian Monte Carlo with cross-chain adaptation.

    All chains take trajectories of the same length in one batched log-joint, and warm up together: the step size
    from the mean acceptance of all chains, the metric from all their places, the trajectory length by the ChEES
    criterion. Chains that do not move, or that sit where there is no mass, take the place of another during warm-up
    (``num_rescued``). A failed solve is a log-density of minus infinity. Ctrl-C and SIGTERM return what was drawn.

    Against `nuts`: many more effective draws per second where a batch of rows costs little more than one; chains are
    short, so that several modes stay with the chains that found them.

    Args:
        model: Pyro model with continuous latent sites.
        *args: its arguments.
        num_samples: draws of each chain that are kept.
        num_warmup: iterations before.
        num_chains: number of chains, at least 4; from some tens on they know more of the posterior than one chain.
        seed: the one seed.
        target_accept: mean acceptance probability aimed at, in (0, 1); raise it against divergences.
        max_num_steps: most leapfrog steps of a trajectory.
        dense_mass: adapt a full covariance (True) or variances (False); None: full up to 64 coordinates.
        start: ``"auto"``, a dictionary of site values, a fit of ``infer.fit_svi`` or a ``Posterior``; see
            ``find_starts``.
        metric: covariance (d, d) or variances (d,) of the unconstrained coordinates, known from elsewhere.
        log_joint_engine: ``"auto"``, ``"eager"``, ``"traced"`` or ``"compiled"``; see ``batched_log_joint``.
        checkpoint: file that is written now and then, and gone on from when it exists: bit for bit on the same
            machine with as many threads. More ``num_samples`` than it holds draw the rest.
        checkpoint_minutes: least time between two writings.
        accelerator: of Lightning Fabric, as in ``fit_svi``; None: where the data are.
        devices: number of processes, or which devices; the chains are shared out, and tune themselves on all.
        strategy: of Fabric; ``"ddp"`` in a script, or start it by torchrun.
        num_nodes: number of machines.
        progress: show a bar on terminals, a line every half minute elsewhere.
        **kwargs: keyword arguments of the model.

    Returns:
        ``Posterior`` with samples ``(chain, draw, *site shape)`` and the statistics ``lp``, ``energy``,
        ``diverging``, ``acceptance_rate``, ``step_size``, ``n_steps``, ``ode_failed`` and ``ode_steps``, each
        ``(chain, draw)``.

    Raises:
        ShapeError, DataError, LatentDEError: the model cannot be sampled, and why.
        InitError: no start with a finite log-density and gradient.
        CheckpointError: the checkpoint is of another run, or damaged; it is left alone.

    References:
        Hoffman, Radul, Sountsov (2021), An adaptive MCMC scheme for setting trajectory lengths in Hamiltonian Monte
        Carlo, AISTATS.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(torch.tensor(0.0), 10.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)
        >>> y = torch.tensor([1.0, 2.0, 3.0])
        >>> posterior = ensemble_hmc(model, y, num_chains=16, num_samples=50, num_warmup=50, progress=False)
        >>> posterior.samples["mean"].shape
        torch.Size([16, 50])
    """
    check_settings(num_samples, num_warmup, num_chains, target_accept, max_num_steps)
    began = time.perf_counter()
    ranks = make_devices(accelerator, devices, strategy, num_nodes, "32-true", args[0] if args else None)
    model, args, kwargs = ranks.place(model), ranks.place(args), ranks.place(kwargs)
    joint = LogJoint(model, args, kwargs)
    sites = inspect_model(model, *args, **kwargs)
    dense, metric = first_metric(joint.dim, dense_mass, metric)
    settings = EnsembleSettings(num_warmup, num_samples, target_accept, dense, max_num_steps, seed)
    told = {"start": start, "metric": None if metric is None else metric.inverse, "engine": log_joint_engine}
    told |= {name: value for name, value in vars(settings).items() if name != "num_samples"}
    about = (
        {}
        if checkpoint is None
        else describe_run("ensemble_hmc", model, args, kwargs, num_chains=num_chains, world=ranks.world, **told)
    )
    file = RunFile(_own_path(checkpoint, ranks), checkpoint_minutes, about)
    batched, chains = _set_up(joint, settings, file, ranks, num_chains, start, metric, log_joint_engine)
    with Progress(num_warmup + num_samples, "ensemble_hmc", progress and not ranks.rank) as bar, StopSignal() as stop:
        advance(chains, bar, stop, lambda: {"engine": batched.engine, "chains": chains.state()}, file)
    if not chains.num_drawn:
        raise LatentDEError(
            f"interrupted during warm-up, after {chains.count} of {num_warmup} iterations: there is no draw to return."
        )
    facts = facts_of(chains, settings, batched.engine, time.perf_counter() - began)
    posterior = to_posterior(joint, sites, chains, facts)
    summarise(posterior, chains)
    return posterior


def _own_path(checkpoint: str | Path | None, ranks: OneDevice) -> Path | None:
    """Each rank keeps its own chains."""
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    return path if ranks.world == 1 else path.with_name(f"{path.name}.rank{ranks.rank}")


def _set_up(
    joint: LogJoint,
    settings: EnsembleSettings,
    file: RunFile,
    ranks: OneDevice,
    num_chains: int,
    start: Any,
    metric: Metric | None,
    engine: str,
) -> tuple[BatchedLogJoint, EnsembleChains]:
    """The log-joint of this rank's chains, and the chains: at their starts, or where the checkpoint left them."""
    own = -(-num_chains // ranks.world)
    if file.saved is None:
        expected_calls = (settings.num_warmup + settings.num_samples) * EXPECTED_LEAPFROGS
        batched, positions = start_ensemble(joint, num_chains, own, settings.seed, start, engine, expected_calls)
    else:
        file.check_length(len(file.saved["chains"]["draws"]), settings.num_samples)
        there = file.saved["chains"]["points"]["q"][0].to("cpu", torch.float64).numpy()
        batched = BatchedLogJoint(joint, there, file.saved["engine"])
        positions = np.concatenate(ranks.gather(there))
    informed = metric is not None
    if metric is None and joint.dim > DENSE_UP_TO and not settings.dense_mass:
        found = ranks.gather(first_scales(batched, positions[:own], settings.seed).inverse)
        metric = Metric(np.mean(found, axis=0))
    starts = torch.from_numpy(positions).to(joint.device)[None]
    chains = EnsembleChains(density_of(batched), starts, settings, metric, ranks, informed=informed)
    if file.saved is not None:
        chains.load(file.saved["chains"])
        counts = ranks.gather(chains.count)
        if len(set(counts)) > 1:
            raise CheckpointError(
                f"{file.path}: the ranks stopped after {counts} iterations (killed while they wrote?) and "
                "cannot go on together. The files were left as they are. Try: begin anew with another path."
            )
    return batched, chains


def facts_of(chains: EnsembleChains, settings: EnsembleSettings, engine: str, seconds: float) -> dict[str, Any]:
    """The attributes of a posterior."""
    return {
        "inference": "ensemble_hmc",
        **vars(settings),
        "num_chains": chains.total,
        "num_samples": chains.num_drawn,
        "trajectory_length": chains.lengths[0].length,
        "num_rescued": sum(chains.devices.gather(chains.num_rescued)) // chains.devices.world,
        "sampling_time": seconds,
        "num_gradients": chains.num_gradients * chains.total,
        "log_joint_engine": engine,
        "interrupted": not chains.finished,
        "versions": versions(),
    }


def start_ensemble(
    joint: LogJoint, num_chains: int, own: int, seed: int, start: Any, engine: str, expected_calls: int
) -> tuple[BatchedLogJoint, np.ndarray]:
    """The log-joint of the rank's own chains, and the starts (C, d) of all, which climb with it."""
    found: list[BatchedLogJoint] = []

    def record(candidates: Tensor) -> Callable:
        rows = candidates[torch.arange(own) % len(candidates)].to("cpu", torch.float64).numpy()
        found.append(BatchedLogJoint(joint, rows, engine, expected_calls))
        return found[0].any_rows

    # with few chains the record would be called many times for each step of all candidates
    positions = find_many_starts(joint, num_chains, seed, start, record if own >= MANY_ROWS else None)
    if not found:
        found.append(BatchedLogJoint(joint, positions[:own], engine, expected_calls))
    return found[0], positions


def density_of(batched: BatchedLogJoint) -> Callable:
    """The log-joint as the chains ask for it, in float64."""
    dtype = batched.joint.dtype

    def density(u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        lp, grad, failed, steps = batched.tensors(u.to(dtype))
        return lp.double(), grad.double(), failed, steps

    return density


def advance(chains: EnsembleChains, bar: Progress, stop: StopSignal, state: Callable[[], dict], file: RunFile) -> None:
    """Iterate to the end or until a stop is wanted; write the state and show the progress now and then."""
    stopped = False
    while not chains.finished and not stopped:
        chains.iterate()
        # ranks that stopped or wrote at different iterations would wait for each other, or go on from different ones
        wishes = chains.devices.gather((stop.wanted, file.due()))
        stopped = any(wanted for wanted, _ in wishes)
        if wishes[0][1]:
            file.write(state())
        if bar.due() or chains.finished:
            warm, own = chains.count <= chains.settings.num_warmup, chains.points.q.shape[1]
            facts = {
                "phase": "warm-up" if warm else "sampling",
                "divergences": f"{chains.num_divergent} ({chains.num_divergent_solves} of the solver)",
                "solver steps per gradient": round(chains.num_solver_steps / (chains.num_gradients * own)),
                "step": f"{chains.step_sizes[0]:.2g}",
            }
            bar.update(chains.count, facts)
    file.write(state())


def to_posterior(joint: LogJoint, sites: Any, chains: EnsembleChains, facts: dict[str, Any]) -> Posterior:
    """Draws and statistics of all ranks, (chain, draw, ...)."""
    n = chains.num_drawn
    kept = {"u": chains.draws[:n, 0], **{name: value[:n, 0] for name, value in chains.stats.items()}}
    parts = chains.devices.gather({name: value.transpose(0, 1).contiguous() for name, value in kept.items()})
    whole = {name: torch.cat([part[name] for part in parts]) for name in kept}
    with torch.no_grad():
        samples = joint.constrain(whole.pop("u").to(joint.device, joint.dtype))
    return Posterior(
        samples={name: value.cpu() for name, value in samples.items()},
        stats=whole,
        sites=sites,
        model=joint.model,
        args=joint.args,
        kwargs=joint.kwargs,
        attrs=facts,
    )


def summarise(posterior: Posterior, chains: EnsembleChains) -> None:
    """One line through the logger: information if all is well, a warning if a reader must act."""
    facts, n = posterior.attrs, chains.num_drawn
    divergent = int(posterior.stats["diverging"].sum())
    failed = int(posterior.stats["ode_failed"].sum())
    worst = split_rhat(chains.draws[:n, 0].transpose(0, 1).numpy()).max()
    at_limit = facts["trajectory_length"] >= 0.9 * facts["max_num_steps"] * chains.step_sizes[0]
    line = (
        f"{facts['inference']}: {facts['num_chains']} chains x {n} draws in {facts['sampling_time']:.1f} s, "
        f"{facts['num_gradients']} gradients; {divergent} divergences, {failed} failed solves, "
        f"{facts['num_rescued']} chains moved in warm-up, R-hat at most {worst:.3f}."
    )
    advice = []
    if facts["interrupted"]:
        advice.append("Interrupted.")
    if divergent:
        advice.append("Divergences may mean bias: try target_accept=0.95 or another parameterisation.")
    if at_limit:
        advice.append(f"Trajectories are as long as max_num_steps={facts['max_num_steps']} allows: they mix slowly.")
    if worst > 1.05:
        advice.append("The chains do not agree: warm up longer, or look whether they sit in different modes.")
    (_log.warning if advice else _log.info)(" ".join([line, *advice]))


def check_settings(
    num_samples: int, num_warmup: int, num_chains: int, target_accept: float, max_num_steps: int
) -> None:
    """Refuse settings that no run can have."""
    for name, value, least in (
        ("num_samples", num_samples, 1),
        ("num_warmup", num_warmup, 0),
        ("num_chains", num_chains, 4),
        ("max_num_steps", max_num_steps, 1),
    ):
        if not isinstance(value, int) or value < least:
            raise LatentDEError(f"ensemble_hmc: {name} must be an integer of at least {least}, got {value!r}.")
    if not 0.0 < target_accept < 1.0:
        raise LatentDEError(f"ensemble_hmc: target_accept must lie between 0 and 1, got {target_accept!r}.")
