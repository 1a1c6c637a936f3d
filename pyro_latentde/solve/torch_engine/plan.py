# SPDX-License-Identifier: Apache-2.0
"""Given steps and the outputs that lie in them: what is known before they are taken again."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.step_record import StepRecord
from pyro_latentde.solve.stops.rows import RowStops

__all__ = ["Plan", "plan_outputs"]


@dataclass
class Plan:
    """Given steps and which output falls into which of them; nothing here is differentiated.

    Args:
        record: The steps, each column ``(R, N)``.
        origin: From what each step begins its count: 0 for t0, the number of a stop, or -1 for an event, ``(R, N +
            1)``; None if all of them begin at t0.
        offsets: t_n - t0, or t_n - origin, for n = 0..N, ``(R, N + 1)``.
        count: Steps per row, ``(R,)``.
        step: Step of each output, -1 for y0 of a row without steps, N for outputs not reached, ``(R, T)``.
        at_end: True where the output is exactly the end of its step, ``(R, T)``.
        past: True where the output is the state after the stop at the end of its step, ``(R, T)``.
        chunks: Flat output indices per step: first those of step -1, last those not reached.
        interior: Per step, whether any output lies strictly before its end.
    """

    record: StepRecord
    origin: Tensor | None
    offsets: Tensor
    count: Tensor
    step: Tensor
    at_end: Tensor
    past: Tensor
    chunks: list[Tensor]
    interior: list[bool]

    def start(self, rows: Tensor, n: int, t0: Tensor, stops: RowStops, happened: Tensor) -> Tensor:
        """t_n of these rows; ``happened`` are the times of the last events of all rows, ``(R,)``."""
        first = t0[rows]
        if self.origin is not None:
            origin = self.origin[rows, n]
            if stops.any:
                first = torch.where(origin > 0, stops.time(rows, origin.clamp(min=0)), first)
            if self.record.event is not None:
                first = torch.where(origin < 0, happened[rows], first)
        return first + self.offsets[rows, n]

    def unchanged(self, stops: RowStops) -> Tensor:
        """Rows whose state right after the start is y0, ``(R, 1)``."""
        size = self.record.size
        if not stops.stops.after or not size.shape[1]:
            return torch.ones_like(self.count, dtype=torch.bool)[:, None]
        return ~((size[:, :1] == 0) & self.record.landing[:, :1])

    def held(self, ended: Tensor) -> Tensor:
        """Outputs behind a terminal event, ``(R, T)``."""
        return ended[:, None] & (self.step == self.record.size.shape[1])

    def implicit(self, rows: Tensor, n: int, method: Method) -> Tensor | None:
        """Of a switching method, which rows take an implicit step."""
        kind = self.record.kind
        return None if method.stiff is None or kind is None else kind[rows, n] > 0

    def begins_anew(self, rows: Tensor, n: int, method: Method, active: Tensor) -> Tensor:
        """Rows whose step does not begin with the last slope of the step before."""
        if n == 0:
            return torch.zeros_like(active)
        anew = torch.zeros_like(active) if method.fsal else torch.ones_like(active)
        if (implicit := self.implicit(rows, n, method)) is not None:
            anew = anew | (implicit != self.implicit(rows, n - 1, method)) & active
        return anew if self.origin is None else anew | self.record.breaks[rows, n - 1] & active

    def ahead(self, rows: Tensor, n: int) -> Tensor:
        """The stop ahead of step n of these rows; 1, whose time is inf, without stops."""
        mark = self.record.mark
        return torch.ones_like(rows) if mark is None or n >= mark.shape[1] else mark[rows, n].abs()


def plan_outputs(
    times: Tensor,
    t0: Tensor,
    record: StepRecord,
    offsets: Tensor | None = None,
    stops: RowStops | None = None,
    ended: Tensor | None = None,
) -> Plan:
    """Decide which step each output belongs to.

    Args:
        times: Output times, sorted per row in its direction, ``(R, T)``.
        t0: Start times, ``(R,)``.
        record: The steps; those that end in events with the sizes with which they do.
        offsets: t_n - t0, ``(R, N + 1)``; None sums the steps.
        stops: Where steps end, if anywhere.
        ended: With events on the way: rows whose last step ends in a terminal one, ``(R,)``.

    Returns:
        The plan.
    """
    times, t0, steps = times.detach(), t0.detach(), record.size.detach()
    record = record._replace(size=steps)
    after = stops is not None and stops.any and stops.stops.after
    n_steps = steps.shape[1]
    if offsets is None:
        offsets = torch.nn.functional.pad(steps.cumsum(1), (1, 0))
    count, landing = record.count, record.landing
    direction = torch.where((steps < 0).any(1), -1.0, 1.0).to(times)[:, None]
    grid, origin = t0[:, None] + offsets, None
    if record.mark is not None or record.event is not None:
        origin, offsets, grid = _from_origins(t0, record, offsets, stops)
    # Sums of steps miss the last output time by rounding: such an output is the end of the last step. One up
    # to 1e-4 of the last step further still belongs to it: finite differences move times and t0.
    last = torch.maximum(t0.abs(), times[:, -1].abs()) if times.shape[1] else t0.abs()
    finish = grid.gather(1, count[:, None])
    rounding = (n_steps + 4) * torch.finfo(times.dtype).eps * last[:, None]
    last_step = torch.nn.functional.pad(steps, (1, 0)).gather(1, count[:, None]).abs()
    gap = (times - finish).abs()
    times = torch.where(gap <= rounding, finish, times)

    ends = (direction * grid[:, 1:]).contiguous()
    if record.mark is not None and record.event is not None and n_steps:
        ends = ends.flip(1).cummin(1).values.flip(1)  # an event at a stop is there up to rounding
    step = torch.searchsorted(ends, (direction * times).contiguous())
    if n_steps and after:  # outputs at a stop belong to the step after it, if there is one
        behind = torch.searchsorted(ends, (direction * times).contiguous(), right=True)
        behind = torch.minimum(behind, count[:, None])
        here = landing.gather(1, (behind - 1).clamp(min=0)) & (times == grid.gather(1, behind))
        step = torch.where(here, torch.minimum(behind, count[:, None] - 1), step)
    beyond = (step >= count[:, None]) & (gap <= (1e-4 if ended is None else 0.1) * last_step)
    beyond = beyond if ended is None else beyond & ~ended[:, None]
    step = torch.where(beyond, count[:, None] - 1, step)
    start = (count == 0)[:, None] & (times == t0[:, None])
    step = torch.where(start, -1, torch.where(step < count[:, None], step, n_steps))
    at_end = times == grid.gather(1, (step + 1).clamp(0, n_steps))
    past = torch.zeros_like(at_end)
    if n_steps and after:
        past = (step == count[:, None] - 1) & landing.gather(1, step.clamp(0, n_steps - 1)) & at_end
    flat = step.reshape(-1)
    sizes = torch.bincount(flat + 1, minlength=n_steps + 2).tolist()
    chunks = list(torch.argsort(flat, stable=True).split(sizes))
    inside = torch.bincount(flat[~at_end.reshape(-1)] + 1, minlength=n_steps + 2).tolist()
    return Plan(record, origin, offsets, count, step, at_end, past, chunks, [size > 0 for size in inside[1:-1]])


def _from_origins(
    t0: Tensor, record: StepRecord, offsets: Tensor, stops: RowStops | None
) -> tuple[Tensor, Tensor, Tensor]:
    """From what each step counts, its offset from there, and the grid with the stops in it."""
    last_stop, last = _latest(record.landing), _latest(record.breaks)
    grid, origin = t0[:, None] + (offsets - offsets.gather(1, last_stop + 1)), torch.where(last > last_stop, -1, 0)
    if record.mark is not None and record.mark.shape[1]:
        mark = record.mark.gather(1, last_stop.clamp(min=0))
        begun = last_stop >= 0
        first = torch.where(begun, stops.times.detach().gather(1, torch.where(begun, mark, 0)), t0[:, None])
        grid = first + (offsets - offsets.gather(1, last_stop + 1))
        origin = torch.where(begun & (last == last_stop), mark, origin)
    return origin, offsets - offsets.gather(1, last + 1), grid


def _latest(which: Tensor) -> Tensor:
    """The last of these steps before step n, -1 for none, ``(R, N + 1)``."""
    number = torch.where(which, torch.arange(which.shape[1], device=which.device), -1)
    number = number.cummax(1).values if which.shape[1] else number
    return torch.nn.functional.pad(number, (1, 0), value=-1)
