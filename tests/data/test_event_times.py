# SPDX-License-Identifier: Apache-2.0
"""EventTimes: rows of any length, also of none; what is refused."""

import pytest
import torch

from pyro_latentde.data import EventTimes
from pyro_latentde.errors import DataError

INF = torch.inf


def data():
    return EventTimes.from_lists([[2.0, 0.5], [], [1.0]], start=0.0, end=[3.0, 2.0, 1.0], marks=[[0, 1], [], [2]])


def test_from_lists_sorts_and_pads():
    events = data()
    assert events.times.tolist() == [[0.5, 2.0], [INF, INF], [1.0, INF]]
    assert events.marks[0].tolist() == [1, 0] and events.marks[2, 0] == 2
    assert events.counts.tolist() == [2, 0, 1] and events.mask.sum() == 3
    assert events.start.tolist() == [0.0] * 3 and events.end.tolist() == [3.0, 2.0, 1.0]
    assert len(events) == 3 and "3 events, at most 2" in repr(events)
    nothing = EventTimes.from_lists([[], []], start=-1.0, end=1.0)
    assert nothing.times.shape == (2, 1) and nothing.counts.tolist() == [0, 0]


def test_rows_and_dtypes():
    events = data()
    assert events[1].counts.tolist() == [0] and events[-1].end.tolist() == [1.0]
    assert events[[2, 0]].times.tolist() == [[1.0, INF], [0.5, 2.0]] and events[:2].marks.shape == (2, 2)
    assert events[torch.tensor([True, False, True])].counts.tolist() == [2, 1]
    assert [len(row) for row in events] == [1, 1, 1]
    single = events.to(torch.float32)
    assert single.times.dtype == single.end.dtype == torch.float32 and single.marks.dtype == torch.int64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EventTimes.from_lists([], start=0.0, end=1.0), "expected N lists"),
        (lambda: EventTimes.from_lists(torch.tensor([0.5]), start=0.0, end=1.0), r"for one row, \[\[0.5, 2.0\]\]"),
        (lambda: EventTimes.from_lists([[0.5, 1.5]], start=0.0, end=1.0), r"row 0, at 1.5, outside \[0, 1\]"),
        (lambda: EventTimes.from_lists([[0.5]], start=1.0, end=1.0), "finite start < end"),
        (lambda: EventTimes.from_lists([[float("nan")]], start=0.0, end=1.0), "NaN among the times"),
        (lambda: EventTimes.from_lists([[0.5]], start=0.0, end=1.0, marks=[[0, 1]]), "one mark per event"),
        (lambda: EventTimes.from_lists([[0.5]], start=0.0, end=1.0, marks=[[-1]]), "int64 from 0"),
        (lambda: EventTimes(torch.tensor([[0.5, 0.2]]), torch.zeros(1), torch.ones(1)), "must be sorted"),
        (lambda: EventTimes(torch.tensor([0.5]), torch.zeros(1), torch.ones(1)), r"expected times \(N, E\)"),
    ],
)
def test_bad_input_is_told(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_out_of_range():
    with pytest.raises(IndexError, match="row 3 of 3"):
        data()[3]
