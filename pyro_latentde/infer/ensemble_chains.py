# SPDX-License-Identifier: Apache-2.0
"""Many chains of Hamiltonian Monte Carlo that advance together and tune themselves on each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer.adaptation import DualAveraging, Metric, adaptation_windows
from pyro_latentde.infer.devices import OneDevice
from pyro_latentde.infer.ensemble_adaptation import TrajectoryLength, halton, root_of, stuck_chains
from pyro_latentde.infer.ensemble_kernel import Density, Points, Transition, transition

__all__ = ["EnsembleChains", "EnsembleSettings"]

FIRST_STEPS = 20  # leapfrog steps of the longest first trajectory, before any metric
FIRST_LENGTH = 1.5  # of trajectories in white coordinates: a quarter of a period of a Gaussian
STATS = ("lp", "energy", "diverging", "acceptance_rate", "step_size", "n_steps", "ode_failed", "ode_steps")


@dataclass(frozen=True)
class EnsembleSettings:
    """What does not change during a run.

    Args:
        num_warmup: iterations that tune.
        num_samples: iterations that are kept.
        target_accept: mean acceptance probability over the chains.
        dense_mass: full covariance, or variances.
        max_num_steps: most leapfrog steps of a trajectory.
        seed: of all random numbers.
    """

    num_warmup: int
    num_samples: int
    target_accept: float = 0.8
    dense_mass: bool = True
    max_num_steps: int = 1000
    seed: int = 0


class EnsembleChains:
    """G groups of C chains.

    Args:
        density: log-density and gradient of rows (G C, d).
        q: starts (G, C, d), float64; of all ranks.
        settings: of the run.
        metric: where warm-up begins, the same for all groups; by default the unit metric.
        devices: ranks, each of which advances its share of the chains.
        informed: whether the metric is better than a few draws; by default any that is given.

    Attributes:
        count: finished iterations.
        draws: (num_samples, G, C, d) of this rank, on the CPU.
        stats: name -> (num_samples, G, C).
        num_divergent, num_divergent_solves, num_failed, num_solver_steps, num_rescued: so far, warm-up included, this
            rank; the second are divergences with a failed solve on the way.

    Raises:
        LatentDEError: fewer than 4 chains in a group, or ranks that do not divide them.
    """

    def __init__(
        self,
        density: Density,
        q: Tensor,
        settings: EnsembleSettings,
        metric: Metric | None = None,
        devices: OneDevice | None = None,
        informed: bool | None = None,
    ) -> None:
        self.density, self.settings = density, settings
        self.devices = OneDevice() if devices is None else devices
        groups, self.total, dim = q.shape
        share, rest = divmod(self.total, self.devices.world)
        if self.total < 4 or rest:
            raise LatentDEError(
                f"ensemble_hmc: num_chains must be at least 4, and a multiple of the number of processes "
                f"({self.devices.world}); got {self.total}. Chains learn from each other: with few, use infer.nuts."
            )
        self.own = slice(self.devices.rank * share, (self.devices.rank + 1) * share)
        self.points = Points.at(density, q[:, self.own])
        self.generator = torch.Generator().manual_seed(settings.seed)
        first = Metric.identity(dim, settings.dense_mass) if metric is None else metric
        self.metrics, self.informed = [first] * groups, metric is not None if informed is None else informed
        self.guess = first.inverse if metric is not None and informed is False else None
        self.scale = root_of(self.metrics, q.device)
        self.windows = {stop: start for start, stop in adaptation_windows(settings.num_warmup, self.informed)}
        self.window: list[tuple[Tensor, Tensor, Tensor]] = []
        self.steps: list[DualAveraging] = []
        self.lengths: list[TrajectoryLength] = []
        for name in _COUNTS:
            setattr(self, name, 0)
        shape = (settings.num_samples, groups, share)
        self.draws = torch.zeros(*shape, dim, dtype=torch.float64)
        self.stats = {name: torch.zeros(shape, dtype=_kind(name)) for name in STATS}

    @property
    def finished(self) -> bool:
        """Whether all iterations are done."""
        return self.count == self.settings.num_warmup + self.settings.num_samples

    @property
    def num_drawn(self) -> int:
        """Draws of each chain so far."""
        return max(0, self.count - self.settings.num_warmup)

    @property
    def step_sizes(self) -> list[float]:
        """The step size of each group."""
        warm = self.count < self.settings.num_warmup
        return [steps.current if warm else steps.average for steps in self.steps]

    def iterate(self) -> None:
        """Advance all chains by one trajectory."""
        if not self.steps:
            self._begin()
        warm, jitter = self.count < self.settings.num_warmup, halton(self.count)
        sizes = self.step_sizes
        wanted = [math.ceil(jitter * length.length / size) for length, size in zip(self.lengths, sizes, strict=True)]
        num_steps = [min(max(1, n), self.settings.max_num_steps) for n in wanted]
        start = self.points
        noise, uniform = self._random()
        step = torch.tensor(sizes, dtype=torch.float64, device=noise.device)
        done = transition(self.density, start, noise, uniform, self.scale, step, num_steps)
        self.points = done.points
        self.count += 1
        self.num_gradients += max(num_steps)
        self.num_divergent += int(done.diverging.sum())
        self.num_divergent_solves += int((done.diverging & (done.failed > 0)).sum())
        self.num_failed += int(done.failed.sum())
        self.num_solver_steps += int(done.ode_steps.sum())
        if warm:
            self._learn(start, done, [n * size for n, size in zip(num_steps, sizes, strict=True)])
        else:
            self._keep(done, step, num_steps)

    def _begin(self) -> None:
        """First step sizes and lengths."""
        groups = len(self.metrics)
        sizes = self._find_step_sizes([1.0] * groups)
        self.steps = [_search_around(DualAveraging(size, self.settings.target_accept), size) for size in sizes]
        first = [FIRST_LENGTH if self.informed else FIRST_STEPS * size for size in sizes]
        self.lengths = [TrajectoryLength(length) for length in first]

    def _random(self) -> tuple[Tensor, Tensor]:
        """Momenta and uniforms of this rank; every rank draws those of all, so that ranks change nothing."""
        groups, _, dim = self.points.q.shape
        options = {"generator": self.generator, "dtype": torch.float64}
        noise = torch.randn(groups, self.total, dim, **options)
        uniform = torch.rand(groups, self.total, **options)
        device = self.points.q.device
        return noise[:, self.own].to(device), uniform[:, self.own].to(device)

    def _gather(self, *own: Tensor) -> list[Tensor]:
        """Tensors (G, C, ...) of all chains, on the CPU."""
        parts = self.devices.gather([x.cpu() for x in own])
        return [torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)]

    def _learn(self, start: Points, done: Transition, travelled: list[float]) -> None:
        white = self.scale.whiten(start.q), self.scale.whiten(done.end.q)
        x0, x1, momentum, accept, q, lp = self._gather(
            *white, done.momentum, done.accept, done.points.q, done.points.lp
        )
        for g, (steps, length) in enumerate(zip(self.steps, self.lengths, strict=True)):
            steps.update(float(accept[g].mean()))
            length.update(x0[g], x1[g], momentum[g], accept[g], travelled[g])
            # longer ones cannot be walked
            length.log_length = min(length.log_length, math.log(self.settings.max_num_steps * steps.current))
        self.window.append((q, lp, accept))
        if self.count in self.windows:
            self._close_window()
        if self.count == self.settings.num_warmup:
            self._rescue()
            self.window = []
            for length in self.lengths:
                length.settle()

    def _close_window(self) -> None:
        """Move stuck chains, estimate the metric from the others, and search the step size anew."""
        healthy = ~self._rescue()
        q = torch.stack([q for q, _, _ in self.window], dim=2).numpy()  # (G, C, n, d)
        dense, dim = self.settings.dense_mass, q.shape[-1]
        self.metrics = [Metric.estimate(q[g][healthy[g]].reshape(-1, dim), dense, self.guess) for g in range(len(q))]
        self.scale = root_of(self.metrics, self.points.q.device)
        sizes = self._find_step_sizes([1.0] * len(self.metrics))
        for steps, length, size in zip(self.steps, self.lengths, sizes, strict=True):
            _search_around(steps, size)
            if not self.informed:  # lengths were measured in other units
                length.__init__(FIRST_LENGTH)
        self.informed, self.window = True, []

    def _rescue(self) -> np.ndarray:
        """Give chains that are stuck the place of one that is not; returns which, (G, C)."""
        if not self.window:
            return np.zeros((len(self.metrics), self.total), bool)
        lp = torch.stack([lp for _, lp, _ in self.window]).mean(0).numpy()
        accept = torch.stack([accept for _, _, accept in self.window]).mean(0).numpy()
        dim = self.points.q.shape[-1]
        stuck = np.stack([stuck_chains(lp[g], accept[g], dim) for g in range(len(lp))])
        if not stuck.any():
            return stuck
        q, lp_now, grad = self._gather(self.points.q, self.points.lp, self.points.grad)
        donors = torch.arange(self.total).repeat(len(stuck), 1)
        for g, mask in enumerate(stuck):
            healthy = torch.from_numpy(np.flatnonzero(~mask))
            pick = torch.randint(len(healthy), (int(mask.sum()),), generator=self.generator)
            donors[g, torch.from_numpy(mask)] = healthy[pick]
        rows = torch.arange(len(stuck))[:, None]
        device = self.points.q.device
        moved = [x[rows, donors][:, self.own].to(device) for x in (q, lp_now, grad)]
        self.points = Points(*moved)
        self.num_rescued += int(stuck.sum())
        return stuck

    def _find_step_sizes(self, sizes: list[float]) -> list[float]:
        """Double or halve each group's step until one leapfrog step crosses a mean acceptance of .8."""
        direction = [0] * len(sizes)
        sizes = list(sizes)
        while any(d is not None for d in direction):
            noise, uniform = self._random()
            step = torch.tensor(sizes, dtype=torch.float64, device=noise.device)
            one = transition(self.density, self.points, noise, uniform, self.scale, step, [1] * len(sizes))
            (accept,) = self._gather(one.accept)
            for g, probability in enumerate(accept.mean(1).tolist()):
                if direction[g] is None:
                    continue
                way = 1 if probability > 0.8 else -1
                if direction[g] == -way:
                    direction[g] = None
                    continue
                direction[g] = way
                sizes[g] *= 2.0**way
                if not 1e-14 < sizes[g] < 1e7:
                    raise LatentDEError(_no_step_size(sizes[g], float(self.points.lp[g].max())))
        return sizes

    def _keep(self, done: Transition, step: Tensor, num_steps: list[int]) -> None:
        i = self.count - 1 - self.settings.num_warmup
        self.draws[i] = done.points.q.cpu()
        steps = torch.tensor(num_steps)[:, None]
        columns = {
            "lp": done.points.lp,
            "energy": done.energy,
            "diverging": done.diverging,
            "acceptance_rate": done.accept,
            "step_size": step[:, None],
            "n_steps": steps,
            "ode_failed": done.failed,
            "ode_steps": done.ode_steps,
        }
        for name, value in columns.items():
            self.stats[name][i] = value.cpu()

    def state(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, as tensors and plain types; this rank's part."""
        n = self.num_drawn
        return {
            "points": {"q": self.points.q, "lp": self.points.lp, "grad": self.points.grad},
            "generator": self.generator.get_state(),
            "metrics": [torch.from_numpy(metric.inverse.copy()) for metric in self.metrics],
            "informed": self.informed,
            "guess": None if self.guess is None else torch.from_numpy(self.guess.copy()),
            "window": [list(parts) for parts in self.window],
            "steps": [dict(vars(steps)) for steps in self.steps],
            "lengths": [dict(vars(length)) for length in self.lengths],
            "counts": {name: getattr(self, name) for name in _COUNTS},
            "draws": self.draws[:n].clone(),
            "stats": {name: value[:n].clone() for name, value in self.stats.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        device = self.points.q.device
        self.points = Points(**{name: value.to(device) for name, value in state["points"].items()})
        self.generator.set_state(state["generator"])
        self.metrics = [Metric(inverse.numpy()) for inverse in state["metrics"]]
        self.scale, self.informed = root_of(self.metrics, device), state["informed"]
        self.guess = None if state["guess"] is None else state["guess"].numpy()
        self.window = [tuple(parts) for parts in state["window"]]
        self.steps = [DualAveraging(1.0, self.settings.target_accept) for _ in state["steps"]]
        self.lengths = [TrajectoryLength(1.0) for _ in state["lengths"]]
        for thing, saved in zip([*self.steps, *self.lengths], [*state["steps"], *state["lengths"]], strict=True):
            vars(thing).update(saved)
        for name, value in state["counts"].items():
            setattr(self, name, value)
        n = self.num_drawn
        self.draws[:n] = state["draws"]
        for name, value in state["stats"].items():
            self.stats[name][:n] = value


_COUNTS = (
    "count",
    "num_divergent",
    "num_divergent_solves",
    "num_failed",
    "num_gradients",
    "num_rescued",
    "num_solver_steps",
)


def _search_around(steps: DualAveraging, size: float) -> DualAveraging:
    """Begin a search at a size that is right already: one chain's first steps are drawn to ten times theirs."""
    steps.restart(size)
    steps.mu = math.log(size)
    return steps


def _kind(name: str) -> torch.dtype:
    if name == "diverging":
        return torch.bool
    return torch.int64 if name in ("n_steps", "ode_failed", "ode_steps") else torch.float64


def _no_step_size(size: float, lp: float) -> str:
    if size > 1:
        return (
            "ensemble_hmc: every step size up to 1e7 is accepted, so the log-density is flat and the posterior "
            "improper.\nTry: give every latent site a proper prior."
        )
    return (
        f"ensemble_hmc: no step size down to 1e-14 is accepted at log-densities up to {lp:.6g}: the gradient does not "
        "belong to the log-density, or the starts sit on an edge of the region where the solve works.\n"
        "Try: another start, a tighter solver tolerance, checking the gradient by differences."
    )
