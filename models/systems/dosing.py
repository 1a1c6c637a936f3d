# SPDX-License-Identifier: Apache-2.0
"""Doses of a drug: known for each series, or the same for all."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_latentde.data.series import Series

__all__ = ["FLOOR", "doses_of", "full_depot", "given_doses", "with_doses"]

FLOOR = 1e-7  # mg, below which an amount counts as this much: a logarithm needs one, at the time of the dose too


def doses_of(series: Series | None, dose: float, like: Tensor) -> Tensor:
    """The dose of each series: its first covariate, or else `dose`.

    Args:
        series: N series, or None.
        dose: mg, for series without covariates.
        like: a tensor of the wanted dtype and device.

    Returns:
        (N,) from the covariates of several series, else a scalar (mg).

    Raises:
        ValueError: `dose` is wanted and not positive.

    Example:
        >>> import torch
        >>> from pyro_latentde.data import Series
        >>> from pyro_latentde.models.systems.dosing import doses_of
        >>> series = Series.from_tensors([1.0, 2.0], torch.rand(2, 2, 1), covariates=[[100.0], [200.0]])
        >>> doses_of(series, 320.0, torch.zeros(())).tolist(), doses_of(None, 320.0, torch.zeros(())).item()
        ([100.0, 200.0], 320.0)
    """
    if series is None or series.covariates is None:
        return given_doses(dose).to(like)
    doses = series.covariates[:, 0].to(like)
    return doses[0] if len(series) == 1 else doses


def given_doses(dose: float | Sequence[float]) -> Tensor:
    """Doses that a user has written down, float64: a scalar, or (N,) (mg).

    Raises:
        ValueError: one that is not positive, or no row of numbers.
    """
    amounts = list(dose) if isinstance(dose, Sequence) else [dose]
    if not amounts or not all(amount > 0 for amount in amounts):
        raise ValueError(f"dose: expected a positive amount (mg), or one for each series; got {dose}")
    return torch.tensor(dose, dtype=torch.float64)


def full_depot(doses: Tensor, num_states: int) -> Tensor:
    """The state right after an oral dose: all of it in the depot, the first state.

    Args:
        doses: (*batch,) (mg).
        num_states: S.

    Returns:
        (*batch, S) (mg).

    Example:
        >>> import torch
        >>> from pyro_latentde.models.systems.dosing import full_depot
        >>> full_depot(torch.tensor([100.0, 200.0]), 3).tolist()
        [[100.0, 0.0, 0.0], [200.0, 0.0, 0.0]]
    """
    return torch.cat([doses[..., None], doses.new_zeros(*doses.shape, num_states - 1)], dim=-1)


def with_doses(series: Series, dose: float | Sequence[float]) -> Series:
    """The series, with doses of their own as the covariate; one dose for all needs none."""
    if isinstance(dose, Sequence):
        return replace(series, covariates=given_doses(dose)[:, None])
    return series
