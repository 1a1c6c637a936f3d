# SPDX-License-Identifier: Apache-2.0
"""Variances of a posterior from the curvature where chains start: a first metric for many coordinates."""

from collections.abc import Callable

import numpy as np

from pyro_latentde.infer.adaptation import Metric

__all__ = ["probe_metric"]


def probe_metric(
    call: Callable, positions: np.ndarray, rng: np.random.Generator, num_probes: int = 30, step: float = 1e-3
) -> Metric:
    r"""Inverse diagonal of minus the Hessian of a log-density, averaged over the chains' starts.

    .. math:: \operatorname{diag}(H) \approx \frac{1}{K} \sum_k z_k \odot \frac{g(u + h z_k) - g(u - h z_k)}{2 h},
              \qquad z_k \in \{-1, 1\}^d

    Coordinates of a hierarchy differ by orders of magnitude in their scale. From the unit metric, the first iterations
    cost a thousand leapfrog steps each; 60 gradients tell the scale to within some ten per cent.

    Args:
        call: positions (C, d) -> log-densities, gradients (C, d), and what else.
        positions: (C, d) starts.
        rng: of the signs z.
        num_probes: K, of each chain.
        step: h, in unconstrained coordinates.

    Returns:
        Diagonal metric; variances are at most 1, the unit metric's, where the curvature is small or of the wrong sign.

    References:
        Bekas, Kokiopoulou and Saad (2007), An estimator for the diagonal of a matrix, Applied Numerical Mathematics 57.

    Example:
        >>> scale = np.array([0.1, 0.5])
        >>> call = lambda u: (-0.5 * ((u / scale) ** 2).sum(1), -u / scale**2)
        >>> probe_metric(call, np.zeros((4, 2)), np.random.default_rng(0)).inverse.round(4)
        array([0.01, 0.25])
    """
    total = np.zeros(positions.shape[1])
    for _ in range(num_probes):
        z = rng.choice([-1.0, 1.0], positions.shape)
        difference = call(positions + step * z)[1] - call(positions - step * z)[1]
        total -= np.nan_to_num(z * difference / (2 * step)).mean(axis=0)
    return Metric(1.0 / np.clip(total / num_probes, 1.0, None))
