# SPDX-License-Identifier: Apache-2.0
"""What the chains of an ensemble learn from each other while they warm up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.infer.adaptation import Metric
from pyro_latentde.infer.ensemble_kernel import Scale

__all__ = ["TrajectoryLength", "halton", "root_of", "stuck_chains"]

# Log-density by which a chain's mean may lie below that of the better chains, beyond what a Gaussian explains.
HOPELESS = 10.0
LEAST_ACCEPTANCE = 0.02


def halton(index: int) -> float:
    """Element of the Halton sequence of base 2, in (0, 1): jitter that fills the interval evenly.

    Example:
        >>> [halton(i) for i in range(4)]
        [0.5, 0.25, 0.75, 0.125]
    """
    value, weight, index = 0.0, 0.5, index + 1
    while index:
        value, weight, index = value + weight * (index & 1), weight / 2, index >> 1
    return value


class TrajectoryLength:
    r"""Length T of the trajectories of one group, tuned to move far from where chains were.

    Gradient ascent (Adam) on the logarithm of T of the ChEES criterion

    .. math:: \tfrac14 E\left[\left(|x' - E x'|^2 - |x - E x|^2\right)^2\right],

    in white coordinates x, where each trajectory is :math:`h T` long with jitter h in (0, 1). The same per unit of
    work, :math:`/ T`, prefers trajectories of a single step, and half the effective draws per gradient.

    Args:
        initial: the first length.

    References:
        Hoffman, Radul, Sountsov (2021), An adaptive MCMC scheme for setting trajectory lengths in HMC, AISTATS.
    """

    rate, memory, memory_of_squares = 0.05, 0.9, 0.95

    def __init__(self, initial: float) -> None:
        self.log_length, self.mean, self.square, self.count, self.log_average = math.log(initial), 0.0, 0.0, 0, 0.0

    @property
    def length(self) -> float:
        """The present length."""
        return math.exp(self.log_length)

    def update(self, x0: Tensor, x1: Tensor, momentum: Tensor, accept: Tensor, travelled: float) -> None:
        """Take in one iteration of C chains.

        Args:
            x0: white starts (C, d).
            x1: white ends (C, d).
            momentum: white momenta at the ends (C, d).
            accept: acceptance probabilities (C,).
            travelled: time of this trajectory, about h T.
        """
        good = x1.isfinite().all(-1) & momentum.isfinite().all(-1) & (accept > 0)
        if int(good.sum()) < 2:
            return
        x0, x1, momentum, weight = x0[good], x1[good], momentum[good], accept[good] / accept[good].sum()
        there, here = x1 - weight @ x1, x0 - x0.mean(0)
        change = there.square().sum(-1) - here.square().sum(-1)
        self._ascend(travelled * float(weight @ (change * (there * momentum).sum(-1))))

    def _ascend(self, gradient: float) -> None:
        self.count += 1
        self.mean = self.memory * self.mean + (1 - self.memory) * gradient
        self.square = self.memory_of_squares * self.square + (1 - self.memory_of_squares) * gradient**2
        mean = self.mean / (1 - self.memory**self.count)
        scale = math.sqrt(self.square / (1 - self.memory_of_squares**self.count)) + 1e-12
        self.log_length += self.rate * mean / scale
        weight = self.count**-0.5
        self.log_average += weight * (self.log_length - self.log_average)

    def settle(self) -> None:
        """Keep the average of the way."""
        if self.count:
            self.log_length = self.log_average

    def state(self) -> dict[str, float]:
        """Plain numbers to go on from."""
        return dict(vars(self))

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        vars(self).update(state)


def root_of(metrics: list[Metric], device: torch.device) -> Scale:
    """Square roots of the inverse metrics of all groups; all dense, or else all diagonal."""
    inverses = [metric.inverse for metric in metrics]
    if all(inverse.ndim == 2 for inverse in inverses):
        roots = np.stack([np.linalg.cholesky(inverse) for inverse in inverses])
    else:
        roots = np.stack([np.sqrt(v.diagonal() if v.ndim == 2 else v) for v in inverses])
    return Scale(torch.from_numpy(roots).to(device))


def stuck_chains(lp: np.ndarray, accept: np.ndarray, dim: int) -> np.ndarray:
    r"""Which chains did not move, or are somewhere without any mass.

    Where the posterior is about Gaussian, the log-density of a chain's draws has mean :math:`\max - d/2` and standard
    deviation :math:`\sqrt{d/2}`. Chains whose mean lies five of these and ten nats below the upper quartile of all
    chains sit in a mode that holds less than :math:`e^{-10}` of the mass.

    Args:
        lp: mean log-densities of C chains over a window of warm-up.
        accept: their mean acceptance probabilities.
        dim: d.

    Returns:
        (C,) booleans; none if no chain is healthy.
    """
    finite = np.where(np.isfinite(lp), lp, -np.inf)
    good = np.quantile(finite, 0.75, method="lower")
    stuck = (accept < LEAST_ACCEPTANCE) | ~(finite >= good - HOPELESS - 5.0 * math.sqrt(dim / 2))
    return np.zeros(len(lp), bool) if stuck.all() else stuck
