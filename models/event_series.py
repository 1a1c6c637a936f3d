# SPDX-License-Identifier: Apache-2.0
"""Event times in the form of a series, which encoders read and minibatches are cut from."""

import torch
from torch.nn.functional import pad

from pyro_latentde.data.event_times import EventTimes
from pyro_latentde.data.series import Series

__all__ = ["as_events", "as_series"]


def as_series(data: EventTimes, dtype: torch.dtype | None = None) -> Series:
    """Series of event times.

    Args:
        data: N rows of at most E events.
        dtype: of the series; that of the data by default.

    Returns:
        Series with times (N, E + 2): the start, where nothing is observed; the events, of value 1; the end, of value 0,
        for that nothing happened since the last event is an observation too. Shorter rows repeat their end, unobserved.

    Example:
        >>> series = as_series(EventTimes.from_lists([[0.5, 2.0], [1.0]], start=0.0, end=3.0))
        >>> series.times.tolist()
        [[0.0, 0.5, 2.0, 3.0], [0.0, 1.0, 3.0, 3.0]]
        >>> (series.values * series.mask)[..., 0].tolist(), series.mask[1].flatten().tolist()
        ([[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]], [False, True, True, False])
    """
    end = data.end[:, None]
    times = torch.cat([data.start[:, None], torch.where(data.mask, data.times, end), end], dim=-1)
    times = times if dtype is None else times.to(dtype)
    happened = pad(data.mask, (1, 1))
    seen = torch.arange(times.shape[1], device=times.device) <= data.counts[:, None] + 1
    seen[:, 0] = False
    return Series(times, happened[..., None].to(times), seen[..., None], names=("event",))


def as_events(series: Series) -> EventTimes:
    """Event times of a series made by :func:`as_series`."""
    happened = series.mask[:, 1:-1, 0] & (series.values[:, 1:-1, 0] > 0.5)
    return EventTimes(torch.where(happened, series.times[:, 1:-1], torch.inf), series.times[:, 0], series.times[:, -1])
