# SPDX-License-Identifier: Apache-2.0
"""The data sets that come with the package."""

import torch

from pyro_latentde.data import load_boarding_school, load_lynx_hare


def test_lynx_hare():
    series = load_lynx_hare()
    assert series.times.shape == (1, 21) and series.values.shape == (1, 21, 2)
    assert torch.equal(series.times[0], torch.arange(1900.0, 1921.0, dtype=torch.float64))
    assert series.names == ("hare", "lynx") and series.complete and series.values.dtype == torch.float64
    # first and last row, the two peaks, and the totals of the published table
    assert series.values[0, 0].tolist() == [30.0, 4.0] and series.values[0, -1].tolist() == [24.7, 8.6]
    assert series.values[0].amax(0).tolist() == [77.4, 59.4]
    assert torch.allclose(series.values[0].sum(0), torch.tensor([715.7, 423.5], dtype=torch.float64))


def test_boarding_school():
    series = load_boarding_school()
    assert torch.equal(series.times[0], torch.arange(1.0, 15.0, dtype=torch.float64))
    assert series.names == ("in_bed",) and series.complete and series.values.dtype == torch.float64
    # the peak, on the sixth day, both ends and the total of the published figure
    counts = series.values[0, :, 0]
    assert counts.argmax() == 5 and counts.max() == 298
    assert counts[0] == 3 and counts[-1] == 4 and counts.sum() == 1559
