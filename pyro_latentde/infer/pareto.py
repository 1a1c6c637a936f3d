# SPDX-License-Identifier: Apache-2.0
"""How heavy the tail of importance weights is: the shape of a generalized Pareto distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_latentde.errors import LatentDEError

__all__ = ["pareto_shape"]

# The tail of this many draws has five weights, the fewest that a fit makes sense of.
FEWEST = 25
# Largest weights that agree to within this are no tail; what differs may be rounding.
NO_TAIL = 0.01
# A prior of the shape worth so many weights, around this mean.
PRIOR_WEIGHTS, PRIOR_SHAPE = 10, 0.5


def pareto_shape(log_weights: Tensor) -> Tensor:
    r"""Shape k of the generalized Pareto distribution of the largest of K importance weights

    .. math:: P(w - u > x) = (1 + k x / \sigma)^{-1/k},

    of the :math:`\min(K/5, 3\sqrt{K})` weights above u. Weights have finite moments up to order 1/k.

    Args:
        log_weights: (K, N), not normalised; NaN counts as a weight of zero.

    Returns:
        (N,) in float64: 0 where the largest weights are equal, infinity where less than five weights are not zero
        beside the largest.

    Raises:
        LatentDEError: fewer than 25 weights.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling", JMLR 25 (2024).
        Zhang and Stephens, "A new and efficient estimation method for the generalized Pareto distribution",
        Technometrics 51 (2009).

    Example:
        >>> uniform = (torch.arange(1000.0) + 0.5) / 1000
        >>> round(float(pareto_shape(-0.8 * uniform.log()[:, None])), 1)  # weights uniform^-0.8
        0.8
    """
    count = len(log_weights)
    if count < FEWEST:
        raise LatentDEError(f"a Pareto shape needs at least {FEWEST} draws, and 1000 to be worth much; got {count}.")
    size = math.ceil(min(count / 5, 3 * math.sqrt(count)))
    rows = log_weights.detach().to("cpu", torch.float64).T.nan_to_num(nan=-math.inf, neginf=-math.inf)
    rows = rows.sort(dim=-1).values[:, -size - 1 :]
    return torch.tensor([_shape_of_tail(row) for row in rows], dtype=torch.float64)


def _shape_of_tail(log_weights: Tensor) -> float:
    """Shape from the largest log-weights, ascending; the first of them is the threshold."""
    if log_weights[-1] == -math.inf:
        return math.inf
    weights = (log_weights - log_weights[-1]).exp()
    if weights[0] > 1 - NO_TAIL:
        return 0.0
    # below the smallest number of full precision they are zeros
    above = weights[weights > max(float(weights[0]), torch.finfo(torch.float64).tiny)] - weights[0]
    n = len(above)
    if n < 5:
        return math.inf
    shape = _fit(above)
    return (n * shape + PRIOR_WEIGHTS * PRIOR_SHAPE) / (n + PRIOR_WEIGHTS)


def _fit(x: Tensor) -> float:
    """Posterior mean of theta = -k / sigma on Zhang and Stephens' grid, then the k that is likeliest with it."""
    n = len(x)
    m = 30 + math.isqrt(n)
    quartile = x[int(n / 4 + 0.5) - 1]
    grid = 1 / x[-1] + (1 - (m / (torch.arange(m, dtype=x.dtype) + 0.5)).sqrt()) / (3 * quartile)
    shapes = torch.log1p(-grid[:, None] * x).mean(-1)
    likelihood = n * ((-grid / shapes).log() - shapes - 1)
    theta = (grid * likelihood.softmax(0)).sum()
    return float(torch.log1p(-theta * x).mean())
