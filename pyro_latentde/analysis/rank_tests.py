# SPDX-License-Identifier: Apache-2.0
"""Tests whether ranks are uniform, exact for any number of them."""

from functools import lru_cache

import numpy as np

__all__ = ["anderson_darling", "rank_p_value", "uniform_band"]

SIMULATIONS = 20_000


def anderson_darling(counts: np.ndarray) -> np.ndarray:
    r"""Distance of rank counts from uniform ones, heavy in the tails,

    .. math:: A^2 = \frac{1}{L + 1} \sum_{r=0}^{L-1} \frac{(N_r - R q_r)^2}{R\, q_r (1 - q_r)}, \quad q_r =
        \frac{r + 1}{L + 1}

    with N_r the number of ranks at most r.

    Args:
        counts: (..., L + 1), how often each rank came; R in all.

    Returns:
        (...).

    References:
        Choulakian, Lockhart, Stephens (1994), Cramer-von Mises statistics for discrete distributions.
    """
    size = counts.shape[-1]
    total = counts.sum(-1, keepdims=True)
    q = np.arange(1, size) / size
    below = np.cumsum(counts, axis=-1)[..., :-1]
    return ((below - total * q) ** 2 / (total * q * (1 - q))).sum(-1) / size


def rank_p_value(ranks: np.ndarray, num_ranks: int) -> float:
    """Probability that uniform ranks are at least as far from uniform as these.

    Args:
        ranks: (R,) integers in 0, ..., L.
        num_ranks: L.

    Returns:
        p-value, by 20,000 simulations of R uniform ranks; never zero.

    Example:
        >>> rank_p_value(np.arange(64), 63) > 0.9, rank_p_value(np.arange(64) // 2, 63) < 0.001
        (True, True)
    """
    found = anderson_darling(np.bincount(ranks, minlength=num_ranks + 1))
    return float((1 + (_null(len(ranks), num_ranks) >= found).sum()) / (1 + SIMULATIONS))


def uniform_band(total: int, num_ranks: int, probability: float = 0.99) -> np.ndarray:
    """Band (2, L + 1) in which the whole distribution function of uniform ranks lies with this probability.

    Args:
        total: R.
        num_ranks: L.
        probability: of the whole band.

    Returns:
        Least and largest share of ranks at most r, minus (r + 1) / (L + 1).

    References:
        Sailynoja, Buerkner, Vehtari (2022), Graphical test for discrete uniformity, Statistics and Computing 32.
    """
    q = np.arange(1, num_ranks + 2) / (num_ranks + 1)
    below = np.cumsum(_draws(total, num_ranks), axis=-1) / total - q
    sd = np.sqrt(np.maximum(q * (1 - q), 1e-12) / total)
    width = np.quantile(np.abs(below / sd)[:, :-1].max(-1), probability)
    return np.stack([-width * sd, width * sd])


def _draws(total: int, num_ranks: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.multinomial(total, np.full(num_ranks + 1, 1 / (num_ranks + 1)), size=SIMULATIONS)


@lru_cache(maxsize=16)
def _null(total: int, num_ranks: int) -> np.ndarray:
    return anderson_darling(_draws(total, num_ranks))
