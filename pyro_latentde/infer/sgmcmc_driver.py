# SPDX-License-Identifier: Apache-2.0
"""What all stochastic-gradient samplers share: settings, the loop over steps, and the posterior it ends in."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_latentde.errors import LatentDEError, ShapeError
from pyro_latentde.infer.batched_log_joint import BatchedLogJoint
from pyro_latentde.infer.log_joint import LogJoint
from pyro_latentde.infer.nuts_run import split_rhat, versions
from pyro_latentde.infer.progress import Progress
from pyro_latentde.infer.run_file import RunFile, describe_run
from pyro_latentde.infer.sgmcmc_chains import Chains
from pyro_latentde.infer.sgmcmc_kernels import Hamiltonian, Langevin
from pyro_latentde.infer.sgmcmc_minibatch import MinibatchLogJoint
from pyro_latentde.infer.sgmcmc_schedules import StepPlan, plan_steps
from pyro_latentde.infer.starts import find_starts
from pyro_latentde.infer.stop_signal import StopSignal
from pyro_latentde.infer.warn_once import WarnOnce
from pyro_latentde.posterior.model_sites import ModelSites, inspect_model
from pyro_latentde.posterior.posterior import Posterior

__all__ = ["RunSettings", "diagonal_metric", "draw"]

_log = logging.getLogger("pyro_latentde")

_STEPS_BETWEEN_LOOKS = 64
# More steps than this undone among those of the draws, and a reader should act.
_MANY_UNDONE = 0.01
# So is more than this part of the variance that comes from the minibatches.
_MUCH_HEAT = 0.1


@dataclass(frozen=True)
class RunSettings:
    """Settings that mean the same to every sampler; see ``infer.sgld``.

    Raises:
        LatentDEError: a number out of its range, or an impossible schedule.
    """

    name: str
    step_size: float | None
    schedule: str | Callable[[int], float]
    num_samples: int
    num_warmup: int
    num_chains: int
    batch_size: int | None
    thinning: int
    temperature: float
    seed: int
    start: Any
    checkpoint: str | Path | None
    checkpoint_minutes: float
    progress: bool
    plan: StepPlan = field(init=False)

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("num_warmup", 0), ("num_chains", 1), ("thinning", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise LatentDEError(f"{self.name}: {name} must be an integer of at least {least}, got {value!r}.")
        if not (isinstance(self.temperature, int | float) and 0.0 < self.temperature < math.inf):
            raise LatentDEError(f"{self.name}: temperature must be a positive number, got {self.temperature!r}.")
        plan = plan_steps(self.step_size, self.schedule, self.num_warmup, self.num_samples, self.thinning)
        object.__setattr__(self, "plan", plan)

    def told(self) -> dict[str, Any]:
        """What a checkpoint must agree on; where steps fall, each of them depends on how many there are."""
        free = {"name", "checkpoint", "checkpoint_minutes", "progress", "plan"}
        free |= {"num_samples"} if self.schedule == "constant" else set()
        return {name: value for name, value in vars(self).items() if name not in free}


@WarnOnce()
def draw(
    settings: RunSettings,
    make_kernel: Callable[[int], Langevin | Hamiltonian],
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
) -> Posterior:
    """Run a stochastic-gradient sampler.

    Args:
        settings: of the run.
        make_kernel: number of coordinates -> the kernel.
        model, args, kwargs: the model and its arguments.

    Returns:
        ``Posterior``, see ``infer.sgld``.
    """
    began = time.perf_counter()
    sites = inspect_model(model, *args, **kwargs)  # before the work: it may find fault with the model
    minibatches = None
    if settings.batch_size is not None:
        minibatches = MinibatchLogJoint(model, args, kwargs, settings.batch_size, settings.seed)
    joint = LogJoint(model, args, kwargs) if minibatches is None else minibatches.joint
    kernel = make_kernel(joint.dim)
    about = {}
    if settings.checkpoint is not None:
        about = describe_run(settings.name, model, args, kwargs, kernel=kernel, **settings.told())
    file = RunFile(settings.checkpoint, settings.checkpoint_minutes, about)
    evaluate, chains = _set_up(settings, joint, minibatches, kernel, file)

    def save() -> None:
        state = {"engine": evaluate.engine, "chains": chains.state()}
        file.write(state if minibatches is None else {**state, "minibatches": minibatches.state()})

    with Progress(len(settings.plan.step_sizes), settings.name, settings.progress) as bar, StopSignal() as stop:
        _advance(chains, evaluate, bar, stop, file, save)
    if not chains.num_draws:
        raise LatentDEError(
            f"{settings.name}: interrupted at step {chains.done} of {len(settings.plan.step_sizes)}, before the first "
            f"draw, which was due at {settings.plan.kept[0] + 1}.\nTry: a smaller num_warmup, or a better start."
        )
    facts = _facts_of(settings, chains, evaluate, time.perf_counter() - began)
    posterior = _to_posterior(joint, sites, chains, (model, args, kwargs), facts)
    _summarise(chains, facts)
    return posterior


def diagonal_metric(metric: Any, dim: int) -> np.ndarray | float:
    """Variances ``(d,)`` of a fixed metric; 1 for None.

    Raises:
        ShapeError: not ``(d,)``, or not all positive.
    """
    if metric is None:
        return 1.0
    given = torch.as_tensor(metric, dtype=torch.float64).detach().cpu().numpy()
    if given.shape != (dim,) or not (np.isfinite(given) & (given > 0)).all():
        raise ShapeError(
            f"metric: expected positive variances ({dim},) of the unconstrained coordinates, got shape {given.shape}"
            f"{'' if given.shape != (dim,) else ' with entries that are not positive'}."
        )
    return given


def _set_up(
    settings: RunSettings,
    joint: LogJoint,
    minibatches: MinibatchLogJoint | None,
    kernel: Langevin | Hamiltonian,
    file: RunFile,
) -> tuple[BatchedLogJoint | MinibatchLogJoint, Chains]:
    """The batched log-joint, and the chains: at their starts, or where the checkpoint left them."""
    saved = file.saved
    if saved is None:  # a minibatch is enough to find starts
        start, engine = find_starts(joint, settings.num_chains, settings.seed, settings.start), "auto"
    else:
        file.check_length(saved["chains"]["counts"]["num_draws"], settings.num_samples)
        start, engine = saved["chains"]["arrays"]["start"].numpy(), saved["engine"]
    chains = Chains(start, settings.plan, settings.num_warmup, kernel, settings.seed)
    if saved is not None:
        chains.load(saved["chains"])
    if minibatches is None:
        return BatchedLogJoint(joint, start, engine, len(settings.plan.step_sizes)), chains
    minibatches.prepare(start)
    if saved is not None:
        minibatches.load(saved["minibatches"])
    return minibatches, chains


def _advance(
    chains: Chains, evaluate: Callable, bar: Progress, stop: StopSignal, file: RunFile, save: Callable[[], None]
) -> None:
    """Take the steps of the plan until a stop is wanted."""
    # infinities are answers here: a step too large, a gradient that overflows
    with np.errstate(all="ignore"):
        while not chains.finished and not stop.wanted:
            chains.step(evaluate)
            if chains.done % _STEPS_BETWEEN_LOOKS == 0 and bar.due():
                _show(chains, bar)
            if file.due():
                save()
    save()
    _show(chains, bar)


def _show(chains: Chains, bar: Progress) -> None:
    facts = {"steps undone": chains.num_undone, "failed solves": chains.num_failed}
    bar.update(chains.done, {**facts, "step": f"{chains.step_size:.2g}"})


def _facts_of(
    settings: RunSettings, chains: Chains, evaluate: BatchedLogJoint | MinibatchLogJoint, seconds: float
) -> dict[str, Any]:
    """The attributes of a posterior."""
    metric = chains.kernel.metric
    return {
        "inference": settings.name,
        "seed": settings.seed,
        "num_chains": settings.num_chains,
        "num_samples": chains.num_draws,
        "num_warmup": settings.num_warmup,
        "thinning": settings.thinning,
        "step_size": settings.step_size,
        "schedule": settings.schedule if isinstance(settings.schedule, str) else repr(settings.schedule),
        "temperature": settings.temperature,
        "batch_size": settings.batch_size,
        "lp_is_estimate": settings.batch_size is not None,
        "sampling_time": seconds,
        "num_gradients": chains.done * settings.num_chains,
        "log_joint_engine": evaluate.engine,
        "interrupted": chains.num_draws < settings.num_samples,
        "minibatch_heat": _heat(chains, evaluate),
        "metric": None if np.isscalar(metric) else metric.tolist(),
        "versions": versions(),
    }


def _to_posterior(
    joint: LogJoint, sites: ModelSites, chains: Chains, called: tuple[Callable, tuple, Mapping], facts: dict[str, Any]
) -> Posterior:
    drawn = chains.num_draws
    u = torch.from_numpy(chains.positions[:, :drawn].copy())
    with torch.no_grad():
        samples = joint.constrain(u.to(joint.device, joint.dtype))
    model, args, kwargs = called
    return Posterior(
        samples={name: value.cpu() for name, value in samples.items()},
        stats={name: torch.from_numpy(column[:, :drawn].copy()) for name, column in chains.stats.items()},
        sites=sites,
        model=model,
        args=args,
        kwargs=kwargs,
        attrs=facts,
    )


def _heat(chains: Chains, evaluate: BatchedLogJoint | MinibatchLogJoint) -> float:
    """By which part of the temperature the minibatches heat the hottest coordinate, at the step size of the draws."""
    if isinstance(evaluate, BatchedLogJoint):
        return 0.0
    step_size = float(chains.stats["step_size"][0, : chains.num_draws].mean())
    return float(chains.kernel.heat(step_size, evaluate.gradient_variance(chains.place)).max())


def _summarise(chains: Chains, facts: dict[str, Any]) -> None:
    """One warning through the logger: that the posterior is biased, and what else a reader must act on."""
    count, drawn = facts["num_chains"], facts["num_samples"]
    worst = split_rhat(chains.positions[:, :drawn]).max()
    text = [
        f"{facts['inference']}: {count} chains x {drawn} draws in {facts['sampling_time']:.1f} s, "
        f"{facts['num_gradients']} gradients; {chains.num_undone} steps undone, {chains.num_failed} failed solves, "
        f"R-hat at most {worst:.3f}.",
        "No step is accepted or rejected by its density, so step size and minibatches bias this posterior: compare it "
        "with infer.nuts on a part of the data, or with half the step size.",
    ]
    if facts["minibatch_heat"] > _MUCH_HEAT:
        text.append(
            "The noise of the minibatches widens some coordinate by up to "
            f"{100 * facts['minibatch_heat']:.0f} % of its variance: try a smaller step_size, a larger batch_size, or "
            "in sghmc more friction."
        )
    if facts["interrupted"]:
        text.append("Interrupted: these are the draws made so far.")
    if chains.num_undone > _MANY_UNDONE * count * max(1, int(chains.stats["n_steps"][0, :drawn].sum())):
        text.append("Many steps led where there is no density: try a smaller step_size or tighter priors.")
    if worst > 1.05:
        text.append("The chains do not agree: draw longer, or look whether they sit in different modes.")
    _log.warning(" ".join(text))
