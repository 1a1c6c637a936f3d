# SPDX-License-Identifier: Apache-2.0
"""Where in parameter space something happens: the one-sided bound that tells it best from the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

__all__ = ["Region", "best_region"]

# Fewer hits lie beyond some bound by chance; and a bound that is right less often says little.
FEWEST_HITS, LEAST_ACCURACY = 5, 0.8
# A bound on two parameters is harder to read, so it must be better by this.
_BETTER = 0.02
_MOST_COLUMNS_IN_PAIRS = 20


@dataclass(frozen=True)
class Region:
    """The half-space ``expression relation threshold``.

    Args:
        names: parameters in the expression.
        expression: a parameter, or a product or ratio of two.
        relation: ``">"`` or ``"<"``.
        threshold: in the unit of the expression.
        hits: share of the hits inside.
        misses: share of the others inside.
    """

    names: tuple[str, ...]
    expression: str
    relation: str
    threshold: float
    hits: float
    misses: float

    @property
    def accuracy(self) -> float:
        """Balanced accuracy: .5 by chance, 1 for a clean cut."""
        return 0.5 * (self.hits + 1 - self.misses)

    @property
    def complement(self) -> str:
        """The other side: ``"k < 2.1"``."""
        return f"{self.expression} {'<' if self.relation == '>' else '>'} {self.threshold:.3g}"

    def __str__(self) -> str:
        return (
            f"{100 * self.hits:.3g} % of them lie at {self.expression} {self.relation} {self.threshold:.3g}, "
            f"and {100 * self.misses:.2g} % of the draws that work"
        )


def best_region(columns: Mapping[str, np.ndarray], hit: np.ndarray, against: np.ndarray) -> Region | None:
    """The bound with the best balanced accuracy, if it is worth telling.

    Args:
        columns: parameter -> values ``(n,)``.
        hit: ``(n,)`` bool, where it happened.
        against: ``(n,)`` bool, where it did not.

    Returns:
        The region; None for less than five hits or nothing to compare with, or where no bound tells them apart.

    Example:
        >>> k = np.linspace(0, 1, 101)
        >>> str(best_region({"k": k}, k > 0.8, k <= 0.8))
        '100 % of them lie at k > 0.805, and 0 % of the draws that work'
    """
    if hit.sum() < FEWEST_HITS or not against.any():
        return None
    single = [_cut((name,), name, values, hit, against) for name, values in columns.items()]
    best = max(single, key=lambda region: region.accuracy)
    pairs = [_cut(*pair, hit, against) for pair in _pairs(columns)] if best.accuracy < 1 - _BETTER else []
    pair = max(pairs, key=lambda region: region.accuracy, default=best)
    best = pair if pair.accuracy > best.accuracy + _BETTER else best
    return best if best.accuracy >= LEAST_ACCURACY else None


def _pairs(columns: Mapping[str, np.ndarray]) -> Iterator[tuple[tuple[str, str], str, np.ndarray]]:
    positive = {name: values for name, values in columns.items() if (values > 0).all()}
    for (a, x), (b, y) in combinations(list(positive.items())[:_MOST_COLUMNS_IN_PAIRS], 2):
        yield (a, b), f"{a} * {b}", x * y
        yield (a, b), f"{a} / {b}", x / y


def _cut(names: tuple[str, ...], expression: str, values: np.ndarray, hit: np.ndarray, against: np.ndarray) -> Region:
    """The best threshold on one column, half-way between two values."""
    used = (hit | against) & np.isfinite(values)
    order = np.argsort(values[used], kind="stable")
    x, h = values[used][order], hit[used][order]
    below_hit, below_rest = np.cumsum(h) / max(1, h.sum()), np.cumsum(~h) / max(1, (~h).sum())
    # between equal values there is no threshold
    gap = np.append(x[1:] > x[:-1], False)
    score = np.where(gap, below_rest - below_hit, 0.0)
    at = int(np.abs(score).argmax())
    threshold = float(0.5 * (x[at] + x[min(at + 1, len(x) - 1)]))
    if score[at] > 0:
        return Region(names, expression, ">", threshold, float(1 - below_hit[at]), float(1 - below_rest[at]))
    return Region(names, expression, "<", threshold, float(below_hit[at]), float(below_rest[at]))
