# SPDX-License-Identifier: Apache-2.0
"""The stops of many rows in plain torch: when they are, what happens there, and what the field sees between them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_latentde.solve.stops.schedule import Stops

__all__ = ["RowStops"]

Field = Callable[[Tensor, Tensor], Tensor]


@dataclass
class RowStops:
    """Stops by their number m, ``(R,)``, in lists that begin at -inf and end at inf; ``rows`` are numbers of rows.

    Args:
        stops: What there is.
        times: ``(R, M + 2)``.
        doses: ``(R, M + 2, B)`` or None.
        rates: ``(R, M + 2, K)`` or None.
        ahead: 1 where a row goes forward in time, else -1, ``(R,)``.
    """

    stops: Stops
    times: Tensor
    doses: Tensor | None
    rates: Tensor | None
    ahead: Tensor

    @classmethod
    def of(cls, stops: Stops | None, tensors: Sequence[Tensor], times: Tensor, t0: Tensor) -> "RowStops":
        """From the last tensors of a solve, per row, and its output times and starts; without stops the empty ones."""
        ahead = torch.where((times[:, -1:] < t0[:, None]).any(1), -1, 1)
        if stops is None:
            ends = t0.detach().new_tensor([-torch.inf, torch.inf])
            return cls(Stops(after=False), ends.expand(len(t0), 2), None, None, ahead)
        moments, *tables = tensors
        doses = tables.pop(0) if stops.dosed else None
        rates = tables.pop(0).cumsum(1) if stops.infused else None
        return cls(stops, moments, doses, rates, ahead)

    @property
    def any(self) -> bool:
        """Whether there can be stops at all."""
        return self.times.shape[1] > 2

    def first(self, t0: Tensor) -> Tensor:
        """The first stop at or after the start, in the row's direction."""
        times, start = self.times.detach().contiguous(), t0.detach()[:, None].contiguous()
        left, right = (torch.searchsorted(times, start, right=side)[:, 0] for side in (False, True))
        return torch.where(self.ahead > 0, left, right - 1)

    def equal_steps(self, times: Tensor, t0: Tensor, step_size: float, max_steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Equal steps of at most this size between any two stops, with the stops they end at.

        Returns:
            Steps as in ``RowSolution``, their offsets from t0, and which rows would need more than ``max_steps``.
        """
        first, moments = self.first(t0).tolist(), self.times.tolist()
        ways = zip(moments, first, self.ahead.tolist(), t0.tolist(), times[:, -1].tolist(), strict=True)
        found = [_equal_steps(*way, step_size, self.stops.after, max_steps) for way in ways]
        size = max([1, *(len(steps) for steps in found)])
        steps = times.new_zeros(len(found), size, 3)
        for r, row in enumerate(found):
            if row:
                steps[r, : len(row)] = torch.tensor(row, dtype=steps.dtype)
        cut = torch.tensor([len(row) > max_steps for row in found], device=times.device)
        steps = steps[:, :max_steps]
        return steps, torch.nn.functional.pad(steps[..., 0].cumsum(1), (1, 0)), cut

    def time(self, rows: Tensor, m: Tensor) -> Tensor:
        return self.times[rows, m]

    def dose(self, y: Tensor, rows: Tensor, m: Tensor) -> Tensor:
        """The state after stop m, ``(N, D)``."""
        if self.doses is None:
            return y
        return y + _spread(self.doses[rows, m], self.stops.dosed, y)

    def before(self, rows: Tensor, m: Tensor, end: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Where the steps of rows end at the latest: at stop m, or at their ``end``; and whether that is a stop."""
        stop = self.time(rows, m)
        left = direction * (end - stop)
        near = left >= 0 if self.stops.after else left > 0
        return torch.where(near, stop, end), near

    def between(self, field: Field, rows: Tensor, m: Tensor, active: Tensor | None = None) -> Field:
        """The field on these rows on their way to stop m; rows that are not active see any time."""
        if not self.any:
            return field
        seen = self._on_the_way(rows, m, active)
        behind = m - self.ahead[rows]
        behind = behind if active is None else torch.where(active, behind, 0)
        rate = None if self.rates is None else self.rates[rows, behind]

        def inside(t: Tensor, y: Tensor) -> Tensor:
            slope = field(seen(t), y)
            return slope if rate is None else slope + _spread(rate, self.stops.infused, y)

        return inside

    def watched(self, function: Callable[..., Tensor], rows: Tensor, m: Tensor) -> Callable[..., Tensor]:
        """A function of (t, y, rows) of an event, as these rows see it on their way to stop m."""
        if not self.any:
            return function
        seen = self._on_the_way(rows, m, None)
        return lambda t, y, rows: function(seen(t), y, rows)

    def _on_the_way(self, rows: Tensor, m: Tensor, active: Tensor | None) -> Callable[[Tensor], Tensor]:
        """The time as it is seen: never that of a stop itself, but one next to it on the row's side."""
        behind = m - self.ahead[rows]
        if active is not None:
            m, behind = torch.where(active, m, 1), torch.where(active, behind, 0)
        ends = torch.stack([self.times[rows, m], self.times[rows, behind]]).detach()
        low, high = ends.amin(0), ends.amax(0)
        if active is not None:
            low, high = torch.where(active, low, -torch.inf), torch.where(active, high, torch.inf)
        info = torch.finfo(low.dtype)
        low = low + (4 * info.eps * low.abs().clamp(max=1e30)).clamp(min=info.tiny)
        high = high - (4 * info.eps * high.abs().clamp(max=1e30)).clamp(min=info.tiny)
        return lambda t: t + (torch.minimum(torch.maximum(t.detach(), low), high) - t).detach()


def _equal_steps(
    moments: list[float], m: int, ahead: int, t: float, end: float, step_size: float, after: bool, most: int
) -> list[tuple[float, float, float]]:
    """Those of one row; at most one more than ``most``."""
    steps: list[tuple[float, float, float]] = []
    while len(steps) <= most:
        left = ahead * (end - moments[m])
        landing = left >= 0 if after else left > 0
        target = moments[m] if landing else end
        if not landing and target == t:
            break
        count = max(1, math.ceil(abs(target - t) / step_size * (1 - 1e-12)))
        h = (target - t) / count
        steps += [(h, 0.0, -m)] * (min(count, most + 1) - 1) + [(h, 0.0, m if landing else -m)]
        if not landing:
            break
        t, m = moments[m], m + ahead
    return steps[: most + 1]


def _spread(values: Tensor, states: Sequence[int], y: Tensor) -> Tensor:
    """``(N, len(states))`` to ``(N, D)``."""
    columns = dict(zip(states, values.to(y.dtype).unbind(-1), strict=True))
    zero = torch.zeros_like(y[:, 0])
    return torch.stack([columns.get(i, zero) for i in range(y.shape[1])], -1)
