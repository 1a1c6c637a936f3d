# SPDX-License-Identifier: Apache-2.0
"""Posterior draws of a Pyro model by the No-U-Turn sampler, all chains in one batched log-joint."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer.adaptation import Metric
from pyro_latentde.infer.batched_log_joint import BatchedLogJoint
from pyro_latentde.infer.curvature import probe_metric
from pyro_latentde.infer.log_joint import LogJoint
from pyro_latentde.infer.nuts_kernel import ChainRecord, run_chain
from pyro_latentde.infer.progress import Progress
from pyro_latentde.infer.run_file import RunFile, describe_run
from pyro_latentde.infer.starts import chain_generators, find_starts
from pyro_latentde.infer.stop_signal import StopSignal
from pyro_latentde.infer.warn_once import WarnOnce
from pyro_latentde.posterior.model_sites import ModelSites, inspect_model
from pyro_latentde.posterior.posterior import Posterior

__all__ = ["first_metric", "first_scales", "nuts", "split_rhat", "versions"]

_log = logging.getLogger("pyro_latentde")

# A full covariance costs d^2 operations a step and needs about 5 d draws to be known; beyond this it is asked
# for.
DENSE_UP_TO = 64
# Leapfrog steps of an iteration, warm-up included, for a posterior of ordinary difficulty.
EXPECTED_LEAPFROGS = 15
_CALLS_BETWEEN_LOOKS = 16


@WarnOnce()
def nuts(
    model: Callable,
    *args: Any,
    num_samples: int = 1000,
    num_warmup: int = 1000,
    num_chains: int = 4,
    seed: int = 0,
    target_accept: float = 0.8,
    max_tree_depth: int = 10,
    dense_mass: bool | None = None,
    start: Any = None,
    metric: np.ndarray | torch.Tensor | None = None,
    log_joint_engine: str = "auto",
    checkpoint: str | Path | None = None,
    checkpoint_minutes: float = 5.0,
    progress: bool = True,
    **kwargs: Any,
) -> Posterior:
    """Draw from the posterior of a Pyro model by the No-U-Turn sampler.

    Chains are independent of each other and advance together: each batched call of log-joint and gradient
    answers one leapfrog step of every chain, in whatever iteration each is. A failed solve is a log-density
    of minus infinity: a divergence, counted in ``ode_failed``, and the chain goes on. Ctrl-C and SIGTERM
    return what was drawn so far.

    Args:
        model: Pyro model with continuous latent sites.
        *args: its arguments.
        num_samples: draws of each chain that are kept.
        num_warmup: iterations before, which tune step size and metric.
        num_chains: number of chains.
        seed: the one seed; chain ``i`` is given the same random numbers whatever ``num_chains`` is.
        target_accept: mean acceptance probability aimed at, in (0, 1); raise it against divergences.
        max_tree_depth: a trajectory has at most ``2**max_tree_depth - 1`` leapfrog steps.
        dense_mass: adapt a full covariance (True) or variances (False); None: as the given metric, else full up to 64
            coordinates.
        start: ``"auto"``, a dictionary of site values, a fit of ``infer.fit_svi`` or a ``Posterior``; see
            ``find_starts``.
        metric: covariance ``(d, d)`` or variances ``(d,)`` of the unconstrained coordinates, site after site in the
            model's order, known from elsewhere: warm-up begins with it, and can be shorter.
        log_joint_engine: ``"auto"``, ``"loop"``, ``"eager"``, ``"traced"`` or ``"compiled"``; see
            ``batched_log_joint``.
        checkpoint: file that is written now and then, and gone on from when it exists: bit for bit on the same
            machine with as many threads. More ``num_samples`` than it holds draw the rest.
        checkpoint_minutes: least time between two writings.
        progress: show a bar on terminals, a line every half minute elsewhere.
        **kwargs: keyword arguments of the model.

    Returns:
        ``Posterior`` with samples ``(chain, draw, *site shape)`` and the statistics ``lp``, ``energy``,
        ``diverging``, ``acceptance_rate``, ``step_size``, ``n_steps``, ``tree_depth``,
        ``reached_max_tree_depth``, ``ode_failed`` (failed solves in the trajectory) and ``ode_steps`` (solver
        steps in the trajectory), each ``(chain, draw)``. ``lp`` belongs to the unconstrained coordinates.

    Raises:
        ShapeError, DataError, LatentDEError: the model cannot be sampled, and why.
        InitError: no start with a finite log-density and gradient.
        LatentDEError: interrupted before the first draw.
        CheckpointError: the checkpoint is of another run, or damaged; it is left alone.

    References:
        Hoffman & Gelman (2014), The No-U-Turn Sampler, JMLR 15.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(torch.tensor(0.0), 10.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)
        >>> y = torch.tensor([1.0, 2.0, 3.0])
        >>> posterior = nuts(model, y, num_samples=50, num_warmup=50, progress=False)
        >>> posterior.samples["mean"].shape
        torch.Size([4, 50])
    """
    _check_settings(num_samples, num_warmup, num_chains, target_accept, max_tree_depth)
    began = time.perf_counter()
    joint = LogJoint(model, args, kwargs)
    sites = inspect_model(model, *args, **kwargs)  # before the work: it may find fault with the model
    dense, metric = first_metric(joint.dim, dense_mass, metric)
    settings = {
        "num_warmup": num_warmup,
        "num_samples": num_samples,
        "target_accept": target_accept,
        "max_tree_depth": max_tree_depth,
        "dense_mass": dense,
    }
    told = {name: value for name, value in settings.items() if name != "num_samples"} | {"seed": seed, "start": start}
    told |= {"metric": None if metric is None else metric.inverse, "engine": log_joint_engine}
    about = {} if checkpoint is None else describe_run("nuts", model, args, kwargs, num_chains=num_chains, **told)
    file = RunFile(checkpoint, checkpoint_minutes, about)
    records = [ChainRecord(num_warmup + num_samples, joint.dim, keeps=file.kept) for _ in range(num_chains)]
    starts, engine = _begin(joint, records, file, settings, seed, start, log_joint_engine)
    batched = BatchedLogJoint(joint, starts, engine, (num_warmup + num_samples) * EXPECTED_LEAPFROGS)
    informed = metric is not None
    metric = first_scales(batched, starts, seed) if metric is None and joint.dim > DENSE_UP_TO else metric
    chains = [
        run_chain(q.copy(), record, rng, metric=metric, informed=informed, **settings)
        for q, record, rng in zip(starts, records, chain_generators(seed, num_chains), strict=True)
    ]

    def save() -> None:
        state = {"engine": batched.engine, "starts": torch.from_numpy(starts)}
        file.write({**state, "chains": [record.state() for record in records]})

    with Progress(num_chains * (num_warmup + num_samples), "nuts", progress) as bar, StopSignal() as stop:
        _advance(chains, records, batched, starts.copy(), bar, stop, file, save, num_warmup)
    drawn = _count_draws(records, num_warmup, num_samples)
    facts = {"inference": "nuts", "seed": seed, "num_chains": num_chains, **settings, "num_samples": drawn}
    facts |= {
        "sampling_time": time.perf_counter() - began,
        "num_gradients": sum(record.num_gradients for record in records),
        "log_joint_engine": batched.engine,
        "interrupted": stop.wanted and drawn < num_samples,
        "versions": versions(),
    }
    posterior = _to_posterior(joint, sites, records, num_warmup, facts)
    _summarise(records, num_warmup, drawn, facts)
    return posterior


def versions() -> dict[str, str]:
    """Of the packages that draws depend on."""
    from pyro_latentde import __version__  # the package imports this module

    return {"pyro_latentde": __version__, "pyro": pyro.__version__, "torch": str(torch.__version__)}


def _begin(
    joint: LogJoint,
    records: list[ChainRecord],
    file: RunFile,
    settings: dict[str, Any],
    seed: int,
    start: Any,
    engine: str,
) -> tuple[np.ndarray, str]:
    """Starts and engine: searched for, or those of the checkpoint, whose chains go into the records."""
    if file.saved is None:
        return find_starts(joint, len(records), seed, start), engine
    most = max(chain["count"] for chain in file.saved["chains"])
    file.check_length(most - settings["num_warmup"], settings["num_samples"])
    for record, chain in zip(records, file.saved["chains"], strict=True):
        record.load(chain)
    return file.saved["starts"].numpy(), file.saved["engine"]


def first_scales(batched: Callable, starts: np.ndarray, seed: int) -> Metric:
    """A metric from the curvature at the starts, for posteriors of many coordinates."""
    with np.errstate(all="ignore"):
        return probe_metric(batched, starts, chain_generators(seed, 1, stream=5)[0])


def first_metric(dim: int, dense: bool | None, given: Any) -> tuple[bool, Metric | None]:
    """Whether the metric is dense, and the metric at the start, if one is given."""
    if given is None:
        return dim <= DENSE_UP_TO if dense is None else dense, None
    inverse = torch.as_tensor(given).detach().to("cpu", torch.float64).numpy()
    dense = inverse.ndim == 2 if dense is None else dense
    return dense, Metric.given(inverse, dim, dense)


def _advance(
    chains: list,
    records: list[ChainRecord],
    batched: BatchedLogJoint,
    positions: np.ndarray,
    bar: Progress,
    stop: StopSignal,
    file: RunFile,
    save: Callable[[], None],
    num_warmup: int,
) -> None:
    """Answer the chains until all have ended or a stop is wanted; ended chains leave their last row."""
    active = []
    for chain, asking in enumerate(chains):
        try:
            positions[chain] = next(asking)
            active.append(chain)
        except StopIteration:  # its checkpoint was complete
            pass
    calls = 0
    # infinities are answers here: a step too large, a momentum that overflows
    with np.errstate(all="ignore"):
        while active and not stop.wanted:
            lp, grad, failed, steps = batched(positions)
            ended = []
            for chain in active:
                try:
                    answer = lp[chain], grad[chain], failed[chain], steps[chain]
                    positions[chain] = chains[chain].send(answer)
                except StopIteration:
                    ended.append(chain)
            if ended:
                active = [chain for chain in active if chain not in ended]
            calls += 1
            if calls % _CALLS_BETWEEN_LOOKS == 0 and bar.due():
                _show(records, num_warmup, bar)
            if file.due():
                save()
    save()
    _show(records, num_warmup, bar)


def _show(records: list[ChainRecord], num_warmup: int, bar: Progress) -> None:
    count, gradients, divergent, of_solver, steps = (
        sum(getattr(record, name) for record in records)
        for name in ("count", "num_gradients", "num_divergent", "num_divergent_solves", "num_solver_steps")
    )
    facts = {
        "phase": "warm-up" if min(record.count for record in records) < num_warmup else "sampling",
        "divergences": f"{divergent} ({of_solver} of the solver)",
        "solver steps per gradient": round(steps / max(1, gradients)),
        "step": f"{np.median([record.step_size for record in records]):.2g}",
    }
    bar.update(count, facts)


def _count_draws(records: list[ChainRecord], num_warmup: int, num_samples: int) -> int:
    shortest = min(record.count for record in records)
    if shortest <= num_warmup < num_warmup + num_samples:
        raise LatentDEError(
            f"interrupted during warm-up: the slowest chain had finished {shortest} of {num_warmup} "
            "iterations of it, so there is no draw to return.\n"
            "Try: a smaller num_warmup, a better start, or solver settings that make a gradient cheaper."
        )
    return shortest - num_warmup


def _to_posterior(
    joint: LogJoint, sites: ModelSites, records: list[ChainRecord], num_warmup: int, facts: dict[str, Any]
) -> Posterior:
    kept = slice(num_warmup, num_warmup + facts["num_samples"])
    u = torch.from_numpy(np.stack([record.positions[kept] for record in records]))
    columns = {name: [record.stats[name][kept] for record in records] for name in records[0].stats}
    stats = {name: torch.from_numpy(np.stack(column)) for name, column in columns.items()}
    with torch.no_grad():
        samples = joint.constrain(u.to(joint.device, joint.dtype))
    return Posterior(
        samples={name: value.cpu() for name, value in samples.items()},
        stats=stats,
        sites=sites,
        model=joint.model,
        args=joint.args,
        kwargs=joint.kwargs,
        attrs=facts,
    )


def _summarise(records: list[ChainRecord], num_warmup: int, drawn: int, facts: dict[str, Any]) -> None:
    """One line through the logger: information if all is well, a warning if a reader must act."""
    kept = slice(num_warmup, num_warmup + drawn)
    divergent = sum(int(record.stats["diverging"][kept].sum()) for record in records)
    failed = sum(int(record.stats["ode_failed"][kept].sum()) for record in records)
    at_limit = sum(int(record.stats["reached_max_tree_depth"][kept].sum()) for record in records)
    worst = split_rhat(np.stack([record.positions[kept] for record in records])).max()
    line = (
        f"nuts: {len(records)} chains x {drawn} draws in {facts['sampling_time']:.1f} s, "
        f"{facts['num_gradients']} gradients; {divergent} divergences, {failed} failed solves "
        f"({sum(r.num_failed for r in records) - failed} more in warm-up), R-hat at most {worst:.3f}."
    )
    advice = []
    if facts["interrupted"]:
        advice.append("Interrupted: all chains are cut to the shortest.")
    if divergent:
        advice.append("Divergences may mean bias: try target_accept=0.95 or another parameterisation.")
    if at_limit:
        advice.append(f"{at_limit} trajectories reached max_tree_depth={facts['max_tree_depth']}: they mix slowly.")
    if worst > 1.05:
        advice.append("The chains do not agree: draw longer, or look whether they sit in different modes.")
    (_log.warning if advice else _log.info)(" ".join([line, *advice]))


def split_rhat(u: np.ndarray) -> np.ndarray:
    """Rank-normalised split R-hat of draws ``(chain, draw, d)`` by coordinate; NaN below four draws.

    The larger one of ranks, and of ranks of distances from the median, as ArviZ computes it.

    References:
        Vehtari, Gelman, Simpson, Carpenter, Buerkner (2021), Rank-normalization, folding, and localization, Bayesian
        Analysis 16.
    """
    half = u.shape[1] // 2
    if half < 2:
        return np.full(u.shape[2], np.nan)
    halves = np.concatenate([u[:, :half], u[:, -half:]])
    folded = np.abs(halves - np.median(halves, axis=(0, 1)))
    return np.fmax(_rhat(_normal_scores(halves)), _rhat(_normal_scores(folded)))


def _normal_scores(x: np.ndarray) -> np.ndarray:
    """Normal quantiles of the ranks of all draws (chain, draw, d) of a coordinate."""
    flat = torch.from_numpy(x.reshape(-1, x.shape[-1]))
    ranks = (flat.argsort(0).argsort(0).double() + 1.0 - 0.375) / (len(flat) + 0.25)
    return torch.special.ndtri(ranks).reshape(x.shape).numpy()


def _rhat(x: np.ndarray) -> np.ndarray:
    within = x.var(axis=1, ddof=1).mean(axis=0)
    between = x.shape[1] * x.mean(axis=1).var(axis=0, ddof=1)
    with np.errstate(all="ignore"):
        return np.sqrt((x.shape[1] - 1) / x.shape[1] + between / (x.shape[1] * within))


def _check_settings(
    num_samples: int, num_warmup: int, num_chains: int, target_accept: float, max_tree_depth: int
) -> None:
    for name, value, least in (
        ("num_samples", num_samples, 1),
        ("num_warmup", num_warmup, 0),
        ("num_chains", num_chains, 1),
        ("max_tree_depth", max_tree_depth, 1),
    ):
        if not isinstance(value, int) or value < least:
            raise LatentDEError(f"nuts: {name} must be an integer of at least {least}, got {value!r}.")
    if not 0.0 < target_accept < 1.0:
        raise LatentDEError(f"nuts: target_accept must lie between 0 and 1, got {target_accept!r}.")
