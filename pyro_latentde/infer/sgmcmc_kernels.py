# SPDX-License-Identifier: Apache-2.0
r"""One step of stochastic-gradient MCMC for all chains: Langevin, preconditioned Langevin, Hamiltonian with friction.

All of them leave, for small steps, the law :math:`\pi_T(u) \propto \exp(\ell(u) / T)` as it is, given unbiased
estimates of the gradient of :math:`\ell`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pyro_latentde.errors import LatentDEError

__all__ = ["Hamiltonian", "Langevin", "PreconditionedLangevin"]


class Langevin:
    r"""Unadjusted Langevin step

    .. math:: u' = u + \frac{\epsilon}{2} G \nabla \ell(u) + \sqrt{\epsilon T G} \, \xi, \quad \xi \sim N(0, I)

    with a fixed diagonal G. The stationary law differs from :math:`\pi_T` by :math:`O(\epsilon)`: on a Gaussian of
    variance s^2 the variance is :math:`T s^2 / (1 - \epsilon G / (4 s^2))`.

    Args:
        temperature: T.
        metric: G, ``(d,)``, or one number for all coordinates.

    References:
        Welling & Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics, ICML.

    Example:
        >>> kernel = Langevin(temperature=1.0)
        >>> u, grad, none = np.zeros((1, 2)), np.ones((1, 2)), np.zeros(1, bool)
        >>> kernel.move(u, grad, 0.01, np.zeros((1, 2)), none).tolist()
        [[0.005, 0.005]]
    """

    def __init__(self, temperature: float = 1.0, metric: np.ndarray | float = 1.0) -> None:
        self.temperature, self.metric = temperature, metric

    def begin(self, noise: np.ndarray) -> None:
        """Be told of standard normal numbers ``(C, d)`` before the first step."""

    def adapt(self, grad: np.ndarray) -> None:
        """Learn from gradients ``(n, d)`` of a step of warm-up."""

    def state(self) -> dict[str, Any]:
        """What changes from step to step, as tensors and plain types."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""

    def move(
        self, u: np.ndarray, grad: np.ndarray, step_size: float, noise: np.ndarray, undone: np.ndarray
    ) -> np.ndarray:
        """Next positions.

        Args:
            u: positions ``(C, d)``.
            grad: gradients of the log-density there.
            step_size: epsilon.
            noise: standard normal numbers ``(C, d)``.
            undone: ``(C,)``, chains that were put back to `u`, as their last step led where there is no density.

        Returns:
            ``(C, d)``.
        """
        drift = 0.5 * step_size * self.metric * grad
        return u + drift + np.sqrt(step_size * self.temperature * self.metric) * noise

    def heat(self, step_size: float, gradient_variance: np.ndarray) -> np.ndarray:
        """By which part of the temperature gradients of this variance ``(d,)`` heat each coordinate."""
        return step_size * self.metric * gradient_variance / (4.0 * self.temperature)


class PreconditionedLangevin(Langevin):
    r"""Langevin step in the metric of RMSprop, learned in warm-up and then held

    .. math:: G = 1 / (\lambda + \sqrt V), \quad V \leftarrow a V + (1 - a) \, \overline{g^2}

    where the mean of the squared gradients is over chains, so that one chain at rest cannot make G huge; V begins at 1,
    about the metric of :class:`Langevin`. While G
    changes, the law also needs the drift :math:`\Gamma_i = \sum_j \partial G_{ij} / \partial u_j`; it is left out in
    warm-up, of which no draw is kept, and is zero afterwards.

    Args:
        temperature: T.
        decay: a, in (0, 1); in the first 1 / (1 - a) steps, V is the plain mean.
        regularization: lambda, in units of the gradient.

    References:
        Li et al. (2016), Preconditioned stochastic gradient Langevin dynamics for deep neural networks, AAAI.

    Example:
        >>> kernel = PreconditionedLangevin()
        >>> kernel.adapt(np.array([[10.0, 0.1], [10.0, 0.1]]))
        >>> kernel.metric.round(3).tolist()
        [0.141, 1.407]
    """

    def __init__(self, temperature: float = 1.0, decay: float = 0.99, regularization: float = 1e-5) -> None:
        if not 0.0 < decay < 1.0:
            raise LatentDEError(f"decay must lie between 0 and 1, got {decay!r}.")
        if not regularization > 0.0:
            raise LatentDEError(f"regularization must be positive, got {regularization!r}.")
        super().__init__(temperature)
        self.decay, self.regularization = decay, regularization
        # at a mode the first gradients are zero, and a metric made of them would throw the chains far away
        self._mean_square: np.ndarray | float = 1.0
        self._count = 0

    def adapt(self, grad: np.ndarray) -> None:
        if not len(grad):
            return
        self._count += 1
        keep = min(self.decay, self._count / (self._count + 1.0))
        self._learn(keep * self._mean_square + (1.0 - keep) * (grad**2).mean(axis=0))

    def state(self) -> dict[str, Any]:
        return {"count": self._count, "mean_square": torch.tensor(self._mean_square, dtype=torch.float64)}

    def load(self, state: Mapping[str, Any]) -> None:
        self._count = state["count"]
        if self._count:
            self._learn(state["mean_square"].numpy())

    def _learn(self, mean_square: np.ndarray) -> None:
        self._mean_square = mean_square
        self.metric = 1.0 / (self.regularization + np.sqrt(mean_square))


class Hamiltonian:
    r"""Hamiltonian step with friction, in the order kick, drift, friction, drift (BAOAB with its kicks joined)

    .. math::
        r &\leftarrow r + h G^{1/2} \nabla \ell(u), \qquad h = \sqrt\epsilon \\
        u &\leftarrow u + \tfrac h2 G^{1/2} r \\
        r &\leftarrow (1 - \alpha) r + \sqrt{T (1 - (1 - \alpha)^2) - 2 \hat\beta} \; \xi \\
        u &\leftarrow u + \tfrac h2 G^{1/2} r

    for momenta of unit mass behind the metric G, that is, of mass 1 / G. For small :math:`\alpha` the noise is
    :math:`2 (\alpha T - \hat\beta)`, that of Chen et al., which leaves out what the minibatches bring along,
    :math:`\hat\beta = (1 - \alpha / 2)^2 \epsilon G v / 2` for gradients of variance v.

    The error of the stationary law is :math:`O(\epsilon)` in the step size, :math:`O(h^2)` in time; Euler's method has
    :math:`O(h)`. On a Gaussian with full gradients positions have the exact covariance, at any stable step
    (:math:`\epsilon G < 4 s^2`). At :math:`\alpha = 1` it moves like :class:`Langevin` with the same step size.

    Args:
        temperature: T.
        metric: G, ``(d,)``, or one number.
        friction: alpha, the part of its momentum that a chain loses in each step, in (0, 1].
        gradient_variance: v, of the minibatch gradient, ``(d,)`` or one number; 0 leaves it uncorrected.

    References:
        Chen, Fox & Guestrin (2014), Stochastic gradient Hamiltonian Monte Carlo, ICML.
        Leimkuhler & Matthews (2013), Rational construction of stochastic numerical methods for molecular sampling.

    Example:
        >>> kernel = Hamiltonian(friction=1.0)
        >>> zeros, ones = np.zeros((1, 2)), np.ones((1, 2))
        >>> kernel.begin(zeros)
        >>> kernel.move(zeros, ones, 0.01, zeros, np.zeros(1, bool)).round(4).tolist()
        [[0.005, 0.005]]
    """

    def __init__(
        self,
        temperature: float = 1.0,
        metric: np.ndarray | float = 1.0,
        friction: float = 0.1,
        gradient_variance: np.ndarray | float = 0.0,
    ) -> None:
        if not 0.0 < friction <= 1.0:
            raise LatentDEError(f"friction is the part of the momentum lost in a step, in (0, 1]; got {friction!r}.")
        if not np.all(np.asarray(gradient_variance) >= 0.0):
            raise LatentDEError("gradient_variance: variances are not negative.")
        self.temperature, self.keep = temperature, 1.0 - friction
        self.metric, self.root, self.gradient_variance = metric, np.sqrt(metric), gradient_variance

    def begin(self, noise: np.ndarray) -> None:
        """Draw the first momenta from standard normal numbers ``(C, d)``."""
        self.momentum = self.kicked = np.sqrt(self.temperature) * noise

    def adapt(self, grad: np.ndarray) -> None:
        """Nothing is learned."""

    def state(self) -> dict[str, Any]:
        """Momenta, now and before the last friction."""
        return {"momentum": torch.tensor(self.momentum), "kicked": torch.tensor(self.kicked)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self.momentum, self.kicked = state["momentum"].numpy(), state["kicked"].numpy()

    def move(
        self, u: np.ndarray, grad: np.ndarray, step_size: float, noise: np.ndarray, undone: np.ndarray
    ) -> np.ndarray:
        """Next positions; see `Langevin.move`. Chains whose step was undone turn round."""
        h = np.sqrt(step_size)
        # the time reversal of what the step began with: after the kick it is minus that momentum
        back = np.nan_to_num(-self.kicked, nan=0.0, posinf=0.0, neginf=0.0)
        self.kicked = np.where(undone[:, None], back, self.momentum) + h * self.root * grad
        halfway = u + 0.5 * h * self.root * self.kicked
        self.momentum = self.keep * self.kicked + np.sqrt(self._noise_variance(step_size)) * noise
        return halfway + 0.5 * h * self.root * self.momentum

    def heat(self, step_size: float, gradient_variance: np.ndarray) -> np.ndarray:
        """By which part of the temperature gradients of this variance ``(d,)`` heat each coordinate, if corrected."""
        excess = self._brought(step_size, gradient_variance - self.gradient_variance)
        return excess / (self.temperature * (1.0 - self.keep**2))

    def _noise_variance(self, step_size: float) -> np.ndarray:
        friction = self.temperature * (1.0 - self.keep**2)
        brought = self._brought(step_size, self.gradient_variance)
        if np.any(brought > friction):
            raise LatentDEError(
                f"gradient_variance: at step size {step_size:.3g} the minibatches bring up to {np.max(brought):.3g} of "
                f"variance into the momenta, more than friction takes out, {friction:.3g}.\n"
                "Try: a smaller step_size, a larger batch_size, or more friction."
            )
        return friction - brought

    def _brought(self, step_size: float, gradient_variance: np.ndarray | float) -> np.ndarray:
        """Variance that noise of gradients amounts to where friction's own noise comes in.

        In all, a kick moves the position (1 + keep) / 2 times as far as friction's noise of the same size.
        """
        return (0.5 * (1.0 + self.keep)) ** 2 * step_size * self.metric * gradient_variance
