# SPDX-License-Identifier: Apache-2.0
"""Sequential Monte Carlo: from one density to the next by tempering, resampling and Hamiltonian moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer.adaptation import Metric
from pyro_latentde.infer.ensemble_chains import EnsembleChains, EnsembleSettings
from pyro_latentde.infer.ensemble_kernel import Density

__all__ = ["Step", "White", "bridge", "effective_size", "move", "next_temperature", "resample", "without_data"]

LEAST_EFFECTIVE = 0.5  # of the particles, after any one reweighting
MOST_STEPS = 200  # from one density to the next
_BISECTIONS = 40


@dataclass(frozen=True)
class Step:
    """One reweighting, resampling and moving of the particles.

    Args:
        temperature: share of the new density after it, in (0, 1].
        effective: effective sample size of the weights, from 1 to the number of particles.
        log_ratio: logarithm of the mean weight; they add up to the log-ratio of the evidences.
        accept: mean acceptance of the moves.
    """

    temperature: float
    effective: float
    log_ratio: float
    accept: float


class _WithoutData(Messenger):
    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"]:
            msg["mask"] = False


def without_data(model: Callable) -> Callable:
    """The same model, in whose log-density nothing that is observed counts: that of its prior.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro import poutine
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(100.0))
        >>> poutine.trace(without_data(model)).get_trace().log_prob_sum() > -20
        tensor(True)
    """

    def prior(*args: Any, **kwargs: Any) -> Any:
        with _WithoutData():
            return model(*args, **kwargs)

    return prior


def effective_size(log_weights: Tensor) -> float:
    r"""Effective sample size :math:`(\sum w)^2 / \sum w^2` of log-weights (N,); 0 if all are minus infinity.

    Example:
        >>> effective_size(torch.tensor([0.0, 0.0, -torch.inf]))
        2.0
    """
    if not bool((log_weights > -math.inf).any()):
        return 0.0
    return float(torch.exp(2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)))


def next_temperature(change: Tensor, temperature: float, least: float) -> float:
    """The highest temperature, up to 1, whose weights keep an effective sample size.

    Args:
        change: log-density of the new minus the old density (N,), minus infinity where the new one is zero.
        temperature: the present one, in [0, 1).
        least: effective sample size to keep.

    Returns:
        In (temperature, 1]. Particles of no new density count at any step; if they leave fewer than asked for, the
        step loses ten per cent of the others.

    Example:
        >>> next_temperature(torch.zeros(8), 0.25, least=4.0)
        1.0
    """
    alive = change[change > -math.inf]
    least = min(least, 0.9 * len(alive))
    if effective_size((1.0 - temperature) * alive) >= least:
        return 1.0
    low, high = temperature, 1.0
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if effective_size((middle - temperature) * alive) >= least else (low, middle)
    return high if low == temperature else low


def resample(log_weights: Tensor, size: int, uniform: float) -> Tensor:
    """Systematic resampling.

    Args:
        log_weights: (N,), not all minus infinity.
        size: number n of particles wanted.
        uniform: one number in [0, 1).

    Returns:
        (n,) indices, in order; particle i stands there n w_i times, rounded up or down.

    References:
        Kitagawa (1996), Monte Carlo filter and smoother for non-Gaussian nonlinear state space models.

    Example:
        >>> resample(torch.tensor([0.5, 0.25, 0.25]).log(), 4, 0.5).tolist()
        [0, 0, 1, 2]
    """
    edges = log_weights.softmax(0).double().cumsum(0)
    edges = edges / edges[-1].clone()
    points = (torch.arange(size, dtype=torch.float64, device=edges.device) + uniform) / size
    return torch.searchsorted(edges, points, right=True).clamp(max=len(edges) - 1)


class White:
    r"""Coordinates :math:`x = L^{-1} (u - m)` in which particles have mean 0 and covariance 1.

    L comes from an orthogonal decomposition of the particles: their covariance would square how much narrower a
    posterior is in one direction than in another, and double precision ends at 1e8.

    Args:
        u: particles (N, d), float64.
        dense: all covariances, or variances only; variances too with fewer than 3 d particles.

    Attributes:
        has_covariances: whether it is the former.
    """

    def __init__(self, u: Tensor, dense: bool) -> None:
        n, dim = u.shape
        self.mean = u.mean(0)
        centred = (u - self.mean) / math.sqrt(n)
        scale = centred.norm(dim=0).clamp(min=1e-12)
        root, self.has_covariances = torch.diag(scale), False
        if dense and n >= 3 * dim:
            found = torch.linalg.qr(centred, mode="r").R
            self.has_covariances = bool((found.diagonal().abs() > 1e-14 * scale).all())
            root = found.T if self.has_covariances else root
        self.root = root * root.diagonal().sign()

    def whiten(self, u: Tensor) -> Tensor:
        """x of u (..., d)."""
        return torch.linalg.solve_triangular(self.root, (u - self.mean).mT, upper=False).mT

    def back(self, x: Tensor) -> Tensor:
        """u of x (..., d)."""
        return self.mean + x @ self.root.mT.to(x)

    def density(self, density: Density) -> Density:
        """A density of u, asked in x; its values stay those of u."""

        def white(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            lp, grad, failed, steps = density(self.back(x))
            return lp, grad @ self.root, failed, steps

        return white


def bridge(
    old: Density, new: Density, u: Tensor, num_moves: int, settings: EnsembleSettings, generator: torch.Generator
) -> tuple[Tensor, list[Step]]:
    r"""Carry equally weighted particles from one density to another.

    Through :math:`\pi_\lambda \propto \pi_0^{1 - \lambda} \pi_1^\lambda`, with each next temperature
    :math:`\lambda` so high that the weights keep half of the particles in effect.

    Args:
        old: density of the particles.
        new: where they go; every call has as many rows as there are particles.
        u: particles (N, d).
        num_moves: trajectories after each resampling.
        settings: target acceptance, kind of metric and longest trajectory of the moves.
        generator: of all random numbers.

    Returns:
        Particles (N, d), and the steps.

    Raises:
        LatentDEError: no particle has any new density, or the temperature does not come to 1.

    References:
        Del Moral, Doucet, Jasra (2006), Sequential Monte Carlo samplers, JRSS B 68.
        Jasra, Stephens, Doucet, Tsagaris (2011), Inference for Levy-driven stochastic volatility models via adaptive
        sequential Monte Carlo, Scandinavian Journal of Statistics 38.
    """
    temperature, steps = 0.0, []
    while temperature < 1.0:
        change = (new(u)[0] - old(u)[0]).nan_to_num(nan=-math.inf)
        if not bool((change > -math.inf).any()):
            raise LatentDEError(f"the next observation is impossible for all {len(u)} particles")
        if len(steps) == MOST_STEPS:
            raise LatentDEError(f"{MOST_STEPS} steps to the next observation lead only to {temperature:.3g} of it")
        following = next_temperature(change, temperature, LEAST_EFFECTIVE * len(u))
        weights = (following - temperature) * change
        weights = weights.where(change > -math.inf, -math.inf)
        chosen = resample(weights, len(u), float(torch.rand((), generator=generator, dtype=torch.float64)))
        target = new if following == 1.0 else _between(old, new, following)
        u, accept = move(target, u[chosen], num_moves, settings, generator)
        log_ratio = float(weights.logsumexp(0)) - math.log(len(weights))
        steps.append(Step(following, effective_size(weights), log_ratio, accept))
        temperature = following
    return u, steps


def move(
    density: Density, u: Tensor, num_moves: int, settings: EnsembleSettings, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Hamiltonian moves of particles (N, d) that have this density already; tells their mean acceptance too."""
    white = White(u, settings.dense_mass)
    seed = int(torch.randint(2**62, (), generator=generator))
    # The end of a warm-up, where chains take the places of others, is never reached: the weights see to that.
    settings = EnsembleSettings(
        10 * num_moves, 0, settings.target_accept, settings.dense_mass, settings.max_num_steps, seed
    )
    unit = Metric.identity(u.shape[-1], settings.dense_mass)
    chains = EnsembleChains(white.density(density), white.whiten(u)[None], settings, unit)
    for _ in range(num_moves):
        chains.iterate()
    accept = torch.stack([accept for _, _, accept in chains.window]).mean()
    return white.back(chains.points.q[0]), float(accept)


def _between(old: Density, new: Density, temperature: float) -> Density:
    def density(u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        lp0, grad0, failed0, steps0 = old(u)
        lp1, grad1, failed1, steps1 = new(u)
        lp = torch.lerp(lp0, lp1, temperature).nan_to_num(nan=-math.inf)
        return lp, torch.lerp(grad0, grad1, temperature), failed0 | failed1, steps0 + steps1

    return density
