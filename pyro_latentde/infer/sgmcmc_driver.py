# SPDX-License-Identifier: Apache-2.0
"""What all stochastic-gradient samplers share: settings, the loop over steps, and the posterior it ends in."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch

from pyro_latentde.errors import LatentDEError, ShapeError
from pyro_latentde.infer.batched_log_joint import BatchedLogJoint
from pyro_latentde.infer.log_joint import LogJoint
from pyro_latentde.infer.nuts_run import split_rhat
from pyro_latentde.infer.progress import Progress
from pyro_latentde.infer.sgmcmc_kernels import Hamiltonian, Langevin
from pyro_latentde.infer.sgmcmc_minibatch import MinibatchLogJoint
from pyro_latentde.infer.sgmcmc_schedules import StepPlan, plan_steps
from pyro_latentde.infer.starts import chain_generators, find_starts
from pyro_latentde.infer.stop_signal import StopSignal
from pyro_latentde.posterior.model_sites import ModelSites, inspect_model
from pyro_latentde.posterior.posterior import Posterior

__all__ = ["RunSettings", "diagonal_metric", "draw"]

_log = logging.getLogger("pyro_latentde")

_STEPS_BETWEEN_LOOKS = 64
_NUMBERS_AT_ONCE = 100_000
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


class _Chains:
    """Where all chains are, what they counted since the last draw, and the draws."""

    def __init__(self, start: np.ndarray, num_samples: int) -> None:
        num_chains, dim = start.shape
        self.ahead = start.copy()  # where the last step led
        self.place, self.grad = start.copy(), np.zeros_like(start)  # the last places with a density
        self.lp = np.full(num_chains, -np.inf)
        self.overflowed = np.zeros(num_chains, dtype=bool)
        self.num_draws, self.num_failed, self.num_undone = 0, 0, 0
        self.positions = np.empty((num_chains, num_samples, dim))
        kinds = {"lp": float, "step_size": float, "n_steps": int, "diverging": bool, "ode_failed": int}
        kinds["ode_steps"] = int
        self.stats = {name: np.zeros((num_chains, num_samples), dtype=kind) for name, kind in kinds.items()}
        self._forget()

    def settle(self, lp: list[float], grad: np.ndarray, failed: list[bool], steps: list[int]) -> np.ndarray:
        """Accept the places ahead that have a density, and put the other chains back; true for those."""
        values, failures = np.asarray(lp), np.asarray(failed)
        good = np.isfinite(values)
        self.place = np.where(good[:, None], self.ahead, self.place)
        self.grad = np.where(good[:, None], grad, self.grad)
        self.lp = np.where(good, values, self.lp)
        undone = ~good | self.overflowed
        self._steps += 1
        self._failed += failures
        self._undone |= undone
        self._solver_steps += np.asarray(steps)
        self.num_failed += int(failures.sum())
        self.num_undone += int(undone.sum())
        return undone

    def move_to(self, ahead: np.ndarray) -> None:
        """Note where the chains want to go; a step to a place that is no number is not taken."""
        self.overflowed = ~np.isfinite(ahead).all(axis=1)
        self.ahead = np.where(self.overflowed[:, None], self.place, ahead)

    def keep(self, step_size: float) -> None:
        """Make the current places a draw."""
        i = self.num_draws
        self.positions[:, i] = self.place
        values = (self.lp, step_size, self._steps, self._undone, self._failed, self._solver_steps)
        for column, value in zip(self.stats.values(), values, strict=True):
            column[:, i] = value
        self.num_draws += 1
        self._forget()

    def _forget(self) -> None:
        n = len(self.lp)
        self._steps = 0
        self._failed, self._solver_steps = np.zeros(n, dtype=int), np.zeros(n, dtype=int)
        self._undone = np.zeros(n, dtype=bool)


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
    from pyro_latentde import __version__  # the package imports this module

    began = time.perf_counter()
    sites = inspect_model(model, *args, **kwargs)  # before the work: it may find fault with the model
    evaluate, joint, start = _prepare(settings, model, args, kwargs)
    chains = _Chains(start, settings.num_samples)
    kernel = make_kernel(joint.dim)
    with Progress(len(settings.plan.step_sizes), settings.name, settings.progress) as bar, StopSignal() as stop:
        done = _advance(settings, chains, kernel, evaluate, bar, stop)
    if not chains.num_draws:
        raise LatentDEError(
            f"{settings.name}: interrupted at step {done} of {len(settings.plan.step_sizes)}, before the first draw, "
            f"which was due at {settings.plan.kept[0] + 1}.\nTry: a smaller num_warmup, or a better start."
        )
    schedule = settings.schedule if isinstance(settings.schedule, str) else repr(settings.schedule)
    facts = {
        "inference": settings.name,
        "seed": settings.seed,
        "num_chains": settings.num_chains,
        "num_samples": chains.num_draws,
        "num_warmup": settings.num_warmup,
        "thinning": settings.thinning,
        "step_size": settings.step_size,
        "schedule": schedule,
        "temperature": settings.temperature,
        "batch_size": settings.batch_size,
        "lp_is_estimate": settings.batch_size is not None,
        "sampling_time": time.perf_counter() - began,
        "num_gradients": done * settings.num_chains,
        "log_joint_engine": evaluate.engine,
        "interrupted": chains.num_draws < settings.num_samples,
        "minibatch_heat": _heat(chains, kernel, evaluate),
        "metric": None if np.isscalar(kernel.metric) else kernel.metric.tolist(),
        "versions": {"pyro_latentde": __version__, "pyro": pyro.__version__, "torch": torch.__version__},
    }
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


def _prepare(
    settings: RunSettings, model: Callable, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[BatchedLogJoint | MinibatchLogJoint, LogJoint, np.ndarray]:
    """The batched log-joint, its log-joint and the starts, which a minibatch is enough to find."""
    if settings.batch_size is None:
        joint = LogJoint(model, args, kwargs)
        start = find_starts(joint, settings.num_chains, settings.seed, settings.start)
        calls = len(settings.plan.step_sizes)
        return BatchedLogJoint(joint, start, expected_calls=calls), joint, start
    batched = MinibatchLogJoint(model, args, kwargs, settings.batch_size, settings.seed)
    start = find_starts(batched.joint, settings.num_chains, settings.seed, settings.start)
    batched.prepare(start)
    return batched, batched.joint, start


def _advance(
    settings: RunSettings,
    chains: _Chains,
    kernel: Langevin | Hamiltonian,
    evaluate: Callable,
    bar: Progress,
    stop: StopSignal,
) -> int:
    """Take the steps of the plan until a stop is wanted; how many were taken."""
    noise = _noise(settings.seed, *chains.place.shape)
    kernel.begin(next(noise))
    # infinities are answers here: a step too large, a gradient that overflows
    with np.errstate(all="ignore"):
        for step, size in enumerate(settings.plan.step_sizes):
            if stop.wanted:
                return step
            undone = chains.settle(*evaluate(chains.ahead))
            if step < settings.num_warmup:
                kernel.adapt(chains.grad[~undone])
            if step + 1 == settings.num_warmup:
                chains.num_failed = chains.num_undone = 0
                chains._forget()
            # more than one draw here where falling steps make it count twice
            while chains.num_draws < settings.num_samples and settings.plan.kept[chains.num_draws] == step:
                chains.keep(size)
            chains.move_to(kernel.move(chains.place, chains.grad, size, next(noise), undone))
            if step % _STEPS_BETWEEN_LOOKS == 0 and bar.due():
                _show(chains, bar, step + 1, size)
    _show(chains, bar, len(settings.plan.step_sizes), size)
    return len(settings.plan.step_sizes)


def _noise(seed: int, num_chains: int, dim: int) -> Iterator[np.ndarray]:
    """Standard normal numbers ``(C, d)`` without end, drawn for many steps at once: a call for each chain costs."""
    block = max(1, _NUMBERS_AT_ONCE // (num_chains * dim))
    generators = chain_generators(seed, num_chains)
    while True:
        yield from np.stack([rng.standard_normal((block, dim)) for rng in generators], axis=1)


def _show(chains: _Chains, bar: Progress, done: int, size: float) -> None:
    bar.update(done, {"steps undone": chains.num_undone, "failed solves": chains.num_failed, "step": f"{size:.2g}"})


def _to_posterior(
    joint: LogJoint, sites: ModelSites, chains: _Chains, called: tuple[Callable, tuple, Mapping], facts: dict[str, Any]
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


def _heat(chains: _Chains, kernel: Langevin | Hamiltonian, evaluate: BatchedLogJoint | MinibatchLogJoint) -> float:
    """By which part of the temperature the minibatches heat the hottest coordinate, at the step size of the draws."""
    if isinstance(evaluate, BatchedLogJoint):
        return 0.0
    step_size = float(chains.stats["step_size"][0, : chains.num_draws].mean())
    return float(kernel.heat(step_size, evaluate.gradient_variance(chains.place)).max())


def _summarise(chains: _Chains, facts: dict[str, Any]) -> None:
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
