# SPDX-License-Identifier: Apache-2.0
"""Conserved quantities of a vector field, W f(y) = 0 for all y: those that are declared, and those that are found."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.errors import ShapeError, SolveError

__all__ = ["Conserved", "conserved_directions", "read_conserved", "told_directions"]


@dataclass(frozen=True)
class Conserved:
    r"""Linear functionals W y that the field conserves, and the equations they stand for.

    As :math:`W f = 0`, as many components of f follow from the others. These give way to :math:`W (y - y_g) = 0`:

    .. math:: F(y) = \mathrm{keep} \cdot f(y) + \mathrm{hold}\,(y - y_g)

    Args:
        weights: W, ``(C, D)``.
        keep: 1 for components of f that stay, 0 for the others, ``(D,)``.
        hold: W in the places of those, ``(D, D)``.
    """

    weights: Tensor
    keep: Tensor
    hold: Tensor

    def to(self, like: Tensor) -> "Conserved":
        return Conserved(*(x.to(like) for x in (self.weights, self.keep, self.hold)))


def read_conserved(given: Any, names: Sequence[str]) -> Conserved | None:
    """Read ``conserved=``.

    Args:
        given: ``(C, D)`` or ``(D,)`` numbers, or dicts from names of coordinates to numbers; None for none.
        names: Names of the D coordinates.

    Raises:
        ShapeError: For another shape, or an unknown name.
        SolveError: For functionals that are not finite, or depend on each other.
    """
    if given is None:
        return None
    weights = _rows_of_numbers(given, names)
    if weights.ndim != 2 or weights.shape[1] != len(names) or not 0 < weights.shape[0] <= len(names):
        raise ShapeError(
            f"conserved has shape {weights.shape}; expected one row of {len(names)} numbers (for {', '.join(names)}) "
            f"per conserved quantity, such as conserved=[{[1] * len(names)}] where their sum is conserved."
        )
    if not np.isfinite(weights).all():
        raise SolveError(f"conserved = {weights.tolist()}; expected finite numbers.")
    reduced, places = _reduced(weights, 1e-9 * np.abs(weights).max())
    if len(places) < len(weights):
        raise SolveError(
            f"the {len(weights)} functionals of conserved= depend on each other, only {len(places)} say something new: "
            f"{reduced[: len(places)].tolist()}."
        )
    keep, hold = np.ones(len(names)), np.zeros((len(names), len(names)))
    keep[places], hold[places] = 0.0, reduced
    return Conserved(*(torch.from_numpy(x) for x in (reduced, keep, hold)))


def _rows_of_numbers(given: Any, names: Sequence[str]) -> np.ndarray:
    given = [given] if isinstance(given, dict) else given
    if isinstance(given, (list, tuple)):
        rows = []
        for row in given:
            if isinstance(row, dict):
                unknown = sorted(set(row) - set(names))
                if unknown:
                    raise ShapeError(f"conserved names {unknown}; the states are {list(names)}.")
                row = [row.get(name, 0.0) for name in names]
            rows.append(row.detach().cpu().numpy() if isinstance(row, Tensor) else row)
        given = rows
    try:
        weights = np.array(given.detach().cpu().numpy() if isinstance(given, Tensor) else given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ShapeError(
            f"conserved = {given!r} cannot be read; expected rows of {len(names)} numbers: {error}."
        ) from error
    return weights[None] if weights.ndim == 1 else weights


def _reduced(weights: np.ndarray, smallest: float) -> tuple[np.ndarray, list[int]]:
    """Reduced row echelon form, and the column of each pivot, of which none is smaller than ``smallest``."""
    rows, places = weights.copy(), []
    for c in range(rows.shape[1]):
        i = len(places)
        r = i + np.abs(rows[i:, c]).argmax() if i < len(rows) else i
        if i == len(rows) or abs(rows[r, c]) <= smallest:
            continue
        rows[[i, r]] = rows[[r, i]]
        rows[i] /= rows[i, c]
        others = np.arange(len(rows)) != i
        rows[others] -= rows[others, c : c + 1] * rows[i]
        places.append(c)
    return rows, places


def conserved_directions(
    jacobian: np.ndarray, slopes: np.ndarray, known: np.ndarray, rounding: float = 1e-12
) -> tuple[np.ndarray, int]:
    """Functionals that a field conserves everywhere, from a singular Jacobian and values of the field elsewhere.

    Args:
        jacobian: df/dy at a steady state, ``(D, D)``.
        slopes: f at other points, ``(M, D)``.
        known: Those declared already, ``(C, D)``.
        rounding: Relative size of what is zero.

    Returns:
        The functionals not declared, ``(K, D)``, scaled to be read, and the number of further directions in which
        steady states lie side by side.

    Example:
        >>> decay = np.array([[-1.0, 0.0], [1.0, 0.0]])  # A becomes B
        >>> conserved_directions(decay, np.array([[-2.0, 2.0], [-0.3, 0.3]]), np.zeros((0, 2)))
        (array([[1., 1.]]), 0)
    """
    size = len(jacobian)
    left, values, _ = np.linalg.svd(jacobian)
    null = left[:, values <= rounding**0.5 * max(values[0], np.finfo(float).tiny)].T
    slopes = slopes[np.isfinite(slopes).all(1)]
    lengths = np.linalg.norm(slopes, axis=1)
    moving = (slopes[lengths > 0] / lengths[lengths > 0, None]).reshape(-1, size)
    turn, values, _ = np.linalg.svd(null @ moving.T) if len(null) and len(moving) else (np.eye(len(null)), (), None)
    values = np.concatenate([values, np.zeros(len(null) - len(values))])
    laws = turn[:, values <= rounding].T @ null
    new = known
    for law in _reduced(laws, 1e-6)[0]:
        more = np.vstack([new, law])
        new = more if np.linalg.matrix_rank(more, 1e-6) == len(more) else new
    return _readable(new[len(known) :]), len(null) - len(laws)


def _readable(laws: np.ndarray) -> np.ndarray:
    """Without the dust of rounding, and whole numbers where they are whole."""
    laws = np.where(np.abs(laws) < 1e-7, 0.0, laws)
    return np.where(np.abs(laws - laws.round()) < 1e-7, laws.round(), laws) + 0.0


def told_directions(laws: np.ndarray, names: Sequence[str]) -> str:
    """The functionals as sums of states.

    Example:
        >>> told_directions(np.array([[1.0, 1.0, 0.0], [0.0, -2.0, 1.0]]), ["S", "I", "R"])
        'S + I, -2 I + R'
    """

    def one(row: np.ndarray) -> str:
        terms = []
        for weight, name in zip(row, names, strict=True):
            if weight:
                size = "" if abs(weight) == 1 else f"{abs(weight):.6g} "
                sign = ("-" if weight < 0 else "") if not terms else (" - " if weight < 0 else " + ")
                terms.append(f"{sign}{size}{name}")
        return "".join(terms)

    return ", ".join(map(one, laws))
