# SPDX-License-Identifier: Apache-2.0
"""The chains of a stochastic-gradient sampler: their noise, their steps, what they count, and the draws."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from pyro_latentde.infer.sgmcmc_kernels import Hamiltonian, Langevin
from pyro_latentde.infer.sgmcmc_schedules import StepPlan
from pyro_latentde.infer.starts import chain_generators

__all__ = ["Chains", "Noise"]

_NUMBERS_AT_ONCE = 100_000
_ARRAYS = ("start", "ahead", "place", "grad", "lp", "overflowed", "_failed", "_undone", "_solver_steps")
_COUNTS = ("done", "num_draws", "num_failed", "num_undone", "_steps")


class Noise:
    """Standard normal numbers ``(C, d)`` without end, drawn for many steps at once: a call for each chain costs.

    Args:
        seed: of the run.
        num_chains: C.
        dim: d.

    Example:
        >>> one, two = Noise(0, num_chains=2, dim=3), Noise(1, num_chains=2, dim=3)
        >>> _ = one.take()
        >>> two.load(one.state())
        >>> bool((one.take() == two.take()).all())
        True
    """

    def __init__(self, seed: int, num_chains: int, dim: int) -> None:
        self._generators = chain_generators(seed, num_chains)
        self._shape = (max(1, _NUMBERS_AT_ONCE // (num_chains * dim)), dim)
        self._draw()

    def take(self) -> np.ndarray:
        """The numbers of the next step."""
        if self._taken == len(self._block):
            self._draw()
        self._taken += 1
        return self._block[self._taken - 1]

    def state(self) -> dict[str, Any]:
        """The generators before the block at hand, and how much of it was taken."""
        return {"generators": json.dumps(self._before), "taken": self._taken}  # numbers of 128 bits

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        for rng, before in zip(self._generators, json.loads(state["generators"]), strict=True):
            rng.bit_generator.state = before
        self._draw()
        self._taken = state["taken"]

    def _draw(self) -> None:
        self._before = [rng.bit_generator.state for rng in self._generators]
        self._block = np.stack([rng.standard_normal(self._shape) for rng in self._generators], axis=1)
        self._taken = 0


class Chains:
    """Where all chains are, what they counted since the last draw, and the draws.

    Args:
        start: ``(C, d)``.
        plan: all steps.
        num_warmup: steps of which the kernel learns; counts begin after them.
        kernel: says where a step leads.
        seed: of the noise.

    Attributes:
        done: steps taken.
        num_draws: draws kept.
        num_failed, num_undone: failed solves and undone steps, of all chains.
        positions: draws ``(C, num_samples, d)``, of which the first `num_draws` are there.
        stats: statistic -> ``(C, num_samples)``.
    """

    def __init__(
        self, start: np.ndarray, plan: StepPlan, num_warmup: int, kernel: Langevin | Hamiltonian, seed: int
    ) -> None:
        (num_chains, dim), num_samples = start.shape, len(plan.kept)
        self.start, self.plan, self.kernel, self._num_warmup = start, plan, kernel, num_warmup
        self.ahead = start.copy()  # where the last step led
        self.place, self.grad = start.copy(), np.zeros_like(start)  # the last places with a density
        self.lp = np.full(num_chains, -np.inf)
        self.overflowed = np.zeros(num_chains, dtype=bool)
        self.done, self.num_draws, self.num_failed, self.num_undone = 0, 0, 0, 0
        self.positions = np.empty((num_chains, num_samples, dim))
        kinds = {"lp": float, "step_size": float, "n_steps": int, "diverging": bool, "ode_failed": int}
        kinds["ode_steps"] = int
        self.stats = {name: np.zeros((num_chains, num_samples), dtype=kind) for name, kind in kinds.items()}
        self._forget()
        self._noise = Noise(seed, num_chains, dim)
        kernel.begin(self._noise.take())

    @property
    def finished(self) -> bool:
        """Whether all steps of the plan were taken."""
        return self.done >= len(self.plan.step_sizes)

    @property
    def step_size(self) -> float:
        """Of the next step, or of the last one at the end."""
        return float(self.plan.step_sizes[min(self.done, len(self.plan.step_sizes) - 1)])

    def step(self, evaluate: Callable) -> None:
        """Ask for the density where the last step led, learn, keep what is due, and move on."""
        size = self.plan.step_sizes[self.done]
        undone = self._settle(*evaluate(self.ahead))
        if self.done < self._num_warmup:
            self.kernel.adapt(self.grad[~undone])
        if self.done + 1 == self._num_warmup:
            self.num_failed = self.num_undone = 0
            self._forget()
        # more than one draw here where falling steps make it count twice
        while self.num_draws < len(self.plan.kept) and self.plan.kept[self.num_draws] == self.done:
            self._keep(size)
        self._move_to(self.kernel.move(self.place, self.grad, size, self._noise.take(), undone))
        self.done += 1

    def state(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, as tensors and plain types."""
        n = self.num_draws
        return {
            "arrays": {name: torch.tensor(getattr(self, name)) for name in _ARRAYS},
            "counts": {name: getattr(self, name) for name in _COUNTS},
            "positions": torch.tensor(self.positions[:, :n]),
            "stats": {name: torch.tensor(column[:, :n]) for name, column in self.stats.items()},
            "kernel": self.kernel.state(),
            "noise": self._noise.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        values = {name: tensor.numpy() for name, tensor in state["arrays"].items()} | state["counts"]
        for name, value in values.items():
            setattr(self, name, value)
        n = self.num_draws
        self.positions[:, :n] = state["positions"].numpy()
        for name, column in state["stats"].items():
            self.stats[name][:, :n] = column.numpy()
        self.kernel.load(state["kernel"])
        self._noise.load(state["noise"])

    def _settle(self, lp: list[float], grad: np.ndarray, failed: list[bool], steps: list[int]) -> np.ndarray:
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

    def _move_to(self, ahead: np.ndarray) -> None:
        """Note where the chains want to go; a step to a place that is no number is not taken."""
        self.overflowed = ~np.isfinite(ahead).all(axis=1)
        self.ahead = np.where(self.overflowed[:, None], self.place, ahead)

    def _keep(self, step_size: float) -> None:
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
