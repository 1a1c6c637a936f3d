# SPDX-License-Identifier: Apache-2.0
"""What one chain learns while it warms up: the step size and the metric.

As in Stan: dual averaging of the logarithm of the step size, and an inverse metric estimated from the
draws of windows that double in length.
"""

import math

import numpy as np

from pyro_latentde.errors import LatentDEError, ShapeError

__all__ = ["DualAveraging", "Metric", "adaptation_windows"]


class DualAveraging:
    r"""Steer the step size so that the mean acceptance probability approaches a target.

    .. math:: \log\varepsilon_t = \mu - \frac{\sqrt t}{\gamma (t + t_0)} \sum_{i \le t} (\delta - a_i)

    Args:
        initial: step size to start from; the search is drawn towards ten times this value.
        target: wanted mean acceptance probability :math:`\delta`, in (0, 1).

    References:
        Hoffman & Gelman (2014), The No-U-Turn Sampler, section 3.2.

    Example:
        >>> steps = DualAveraging(0.1, target=0.8)
        >>> steps.update(1.0)  # accepted with certainty: the step may grow
        >>> steps.current > 0.1
        True
    """

    gamma, t0, kappa = 0.05, 10.0, 0.75

    def __init__(self, initial: float, target: float) -> None:
        self.target = target
        self.restart(initial)

    def restart(self, initial: float) -> None:
        """Forget the history and start again from ``initial``."""
        self.current = initial
        self.log_average = 0.0
        self.mu = math.log(10.0 * initial)
        self.shortfall = 0.0
        self.count = 0

    def update(self, accept: float) -> None:
        """Take in one transition's mean acceptance probability, in [0, 1]."""
        self.count += 1
        weight = 1.0 / (self.count + self.t0)
        self.shortfall += weight * (self.target - accept - self.shortfall)
        log_step = self.mu - math.sqrt(self.count) / self.gamma * self.shortfall
        weight = self.count**-self.kappa
        self.log_average += weight * (log_step - self.log_average)
        self.current = math.exp(log_step)

    @property
    def average(self) -> float:
        """The averaged step size, to be kept once warm-up is over."""
        return math.exp(self.log_average) if self.count else self.current


class Metric:
    """Euclidean metric of the kinetic energy, kept as the inverse: an estimate of the posterior covariance.

    Args:
        inverse: ``(d,)`` variances (diagonal metric) or ``(d, d)`` covariance (dense metric).

    Example:
        >>> Metric(np.array([4.0, 1.0])).velocity(np.array([1.0, 1.0]))
        array([4., 1.])
    """

    def __init__(self, inverse: np.ndarray) -> None:
        self.inverse = inverse
        if inverse.ndim == 1:
            self._spread = 1.0 / np.sqrt(inverse)
            self.velocity = inverse.__mul__
        else:
            # momentum ~ N(0, inverse^-1): with inverse = L L^T, L^-T z has that covariance
            self._spread = np.linalg.inv(np.linalg.cholesky(inverse)).T.copy()
            self.velocity = inverse.dot

    @classmethod
    def identity(cls, dim: int, dense: bool) -> "Metric":
        """The unit metric on ``dim`` coordinates."""
        return cls(np.eye(dim) if dense else np.ones(dim))

    @classmethod
    def given(cls, inverse: np.ndarray, dim: int, dense: bool) -> "Metric":
        """A metric from a covariance ``(d, d)`` or variances ``(d,)``, reduced or widened to the kind asked for.

        Raises:
            ShapeError: of another size.
            LatentDEError: not finite, or not positive definite.
        """
        if inverse.shape not in ((dim,), (dim, dim)):
            raise ShapeError(
                f"metric: expected variances ({dim},) or a covariance ({dim}, {dim}) of the unconstrained coordinates, "
                f"got shape {inverse.shape}."
            )
        if dense:
            inverse = np.diag(inverse) if inverse.ndim == 1 else 0.5 * (inverse + inverse.T)
        elif inverse.ndim == 2:
            inverse = inverse.diagonal().copy()
        finite = bool(np.isfinite(inverse).all())
        if not finite or (np.linalg.eigvalsh(inverse) if dense else inverse).min() <= 0:
            raise LatentDEError(
                f"metric: {'not positive definite' if finite else 'not finite'}. Variances must be positive; a "
                "covariance of fewer draws than coordinates is singular, give variances then."
            )
        return cls(inverse)

    @classmethod
    def estimate(cls, draws: np.ndarray, dense: bool, guess: np.ndarray | None = None) -> "Metric":
        """Estimate the metric from ``draws`` of shape ``(n, d)``, shrunk towards a small multiple of one as
        in Stan, or towards variances ``guess`` ``(d,)``, which count as five draws.

        With fewer than 1.5 d draws a covariance is close to singular, and variances are safer.
        """
        n = len(draws)
        shrink = n / (n + 5.0)
        if guess is not None and not dense:
            return cls(shrink * draws.var(axis=0, ddof=1) + (1.0 - shrink) * guess)
        floor = 1e-3 * 5.0 / (n + 5.0)
        if not dense or n < 1.5 * draws.shape[1]:
            return cls(shrink * draws.var(axis=0, ddof=1) + floor)
        covariance = np.atleast_2d(np.cov(draws, rowvar=False))
        return cls(shrink * covariance + floor * np.eye(draws.shape[1]))

    def momentum(self, rng: np.random.Generator) -> np.ndarray:
        """Draw a momentum ``(d,)`` from the normal distribution whose precision is ``inverse``."""
        z = rng.standard_normal(len(self.inverse))
        return self._spread * z if self.inverse.ndim == 1 else self._spread.dot(z)


def adaptation_windows(num_warmup: int, informed: bool = False) -> list[tuple[int, int]]:
    """Windows ``[start, stop)`` of warm-up iterations whose draws estimate the metric.

    The first window opens after 10 iterations and is 15 long, each next is twice as long, and the last is
    stretched to 50 iterations before the end, which only tune the step size. Stan waits 75 iterations for
    chains to arrive in the typical set; ours start there, and a crude early metric saves a quarter of the
    leapfrog steps of the warm-up on the lynx-hare posterior. What an early window learns wrongly is forgotten
    with the next. Short warm-ups are scaled down; under 20 iterations the metric is not adapted. A metric given at the
    start tells more than a few draws do: then one window takes it all.

    Args:
        num_warmup: number of warm-up iterations.
        informed: whether the metric at the start was given.

    Returns:
        The windows, in order, without gaps.

    Example:
        >>> adaptation_windows(1000)
        [(10, 25), (25, 55), (55, 115), (115, 235), (235, 950)]
    """
    if num_warmup < 20:
        return []
    start, size, end = (
        min(10, num_warmup // 10),
        min(15, num_warmup // 5),
        num_warmup - min(50, num_warmup // 10),
    )
    windows = []
    while start < end:
        stop = start + size
        # a next window of twice the length must still fit, else this one is the last
        if informed or stop + 2 * size > end:
            stop = end
        windows.append((start, stop))
        start, size = stop, 2 * size
    return windows
