# SPDX-License-Identifier: Apache-2.0
"""Ridge regression as a floor: against the same numbers by another route, and what it may see."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

import pyro_latentde as lde
from pyro_latentde.errors import DataError
from pyro_latentde.train import Split
from pyro_latentde.train.ridge import PENALTIES, ridge_forecast


def series(n: int, seed: int) -> lde.Series:
    """Six times of two values; the later ones are linear in the earlier ones, and noisy."""
    torch.manual_seed(seed)
    first = torch.randn(n, 4, 2)
    later = torch.stack([first.sum(1), first[:, 3] - first[:, 0]], dim=1) + 1.0
    values = torch.cat([first, later + 0.3 * torch.randn_like(later)], dim=1)
    return lde.Series.from_tensors(torch.arange(6.0), values)


def test_forecasts_are_those_of_least_squares_with_penalty_rows():
    split = Split(series(40, 0), series(20, 1), series(7, 2))

    def sides(part):
        values = part.values.double()
        return torch.cat([values[:, :4].flatten(1), torch.ones(len(part), 1)], 1), values[:, 4:].flatten(1)

    (x, y), (held_x, held_y), (test_x, _) = map(sides, (split.train, split.heldout, split.test))
    found = []
    for alpha in PENALTIES:
        rows = torch.cat([x, alpha**0.5 * torch.eye(9).double()])
        w = torch.linalg.lstsq(rows, torch.cat([y, torch.zeros(9, 4).double()])).solution
        found.append((float((held_x @ w - held_y).square().mean()), test_x @ w))
    expected = min(found, key=lambda pair: pair[0])[1]
    assert_close(ridge_forecast(split, 4), expected.reshape(7, 2, 2).float(), atol=1e-5, rtol=1e-5)


def test_later_values_of_the_test_series_are_not_seen():
    split = Split(series(40, 0), series(20, 1), series(7, 2))
    changed = split.test.values.clone()
    changed[:, 4:] += 100.0
    other = dataclasses.replace(split, test=dataclasses.replace(split.test, values=changed))
    assert torch.equal(ridge_forecast(split, 4), ridge_forecast(other, 4))


def test_missing_values_are_refused():
    gaps = series(7, 2)
    gaps = dataclasses.replace(gaps, mask=gaps.mask & (torch.arange(6) != 1)[:, None])
    with pytest.raises(DataError, match="needs every value"):
        ridge_forecast(Split(series(40, 0), series(20, 1), gaps), 4)
