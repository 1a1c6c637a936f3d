# SPDX-License-Identifier: Apache-2.0
"""Event times as series and back."""

import torch

from pyro_latentde.data import EventTimes
from pyro_latentde.models.event_series import as_events, as_series

DATA = EventTimes.from_lists([[0.5, 2.0, 2.0], [], [1.0]], start=[0.0, 0.25, 0.5], end=[3.0, 4.0, 1.5])


def test_there_and_back():
    series = as_series(DATA)
    assert series.times.shape == (3, 5) and series.mask.sum((1, 2)).tolist() == [4, 1, 2]  # the end, too
    assert series.times[1].tolist() == [0.25, 4.0, 4.0, 4.0, 4.0]
    back = as_events(series)
    for name in ("times", "start", "end"):
        assert torch.equal(getattr(back, name), getattr(DATA, name))


def test_minibatches_keep_the_span_of_a_row():
    batch = as_events(as_series(DATA, dtype=torch.float32).batch([2, 0]))
    assert batch.times.dtype == torch.float32 and batch.counts.tolist() == [1, 3]
    assert batch.start.tolist() == [0.5, 0.0] and batch.end.tolist() == [1.5, 3.0]
