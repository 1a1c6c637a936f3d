# SPDX-License-Identifier: Apache-2.0
"""Given steps, taken again in differentiable operations: the discrete adjoint of the torch engine.

Step sizes are constants here; the grid t_n = t0 + sum_(m<n) h_m moves with t0, and an output at time t_j in
step n is the interpolant at θ = (t_j - t_n) / h_n, differentiated through θ. Steps after a stop move with it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.stops.rows import RowStops
from pyro_latentde.solve.torch_engine.given_step import GivenStep, after_stop, stopped, take_given
from pyro_latentde.solve.torch_engine.replay_parts import Part, in_parts, parts_needed
from pyro_latentde.solve.torch_engine.runge_kutta import accepts_rows, restrict

__all__ = ["Plan", "finite_start", "follow", "plan_outputs", "replay_rows", "replay_within"]

Field = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Plan:
    """Given steps and which output falls into which of them; nothing here is differentiated.

    Args:
        steps: Signed step sizes, zeros at the right, ``(R, N)``.
        kind: How each was taken, ``(R, N)``, of a switching method, else None.
        marks: The stop ahead of each step, negative where it does not end there, ``(R, N)``; None without stops.
        origin: The stop from which each step begins its count, 0 for t0, ``(R, N)``; None without stops.
        offsets: t_n - t0, or t_n - origin, for n = 0..N, ``(R, N + 1)``.
        count: Steps per row, ``(R,)``.
        step: Step of each output, -1 for y0 of a row without steps, N for outputs not reached, ``(R, T)``.
        at_end: True where the output is exactly the end of its step, ``(R, T)``.
        past: True where the output is the state after the stop at the end of its step, ``(R, T)``.
        chunks: Flat output indices per step: first those of step -1, last those not reached.
        interior: Per step, whether any output lies strictly before its end.
    """

    steps: Tensor
    kind: Tensor | None
    marks: Tensor | None
    origin: Tensor | None
    offsets: Tensor
    count: Tensor
    step: Tensor
    at_end: Tensor
    past: Tensor
    chunks: list[Tensor]
    interior: list[bool]

    def start(self, rows: Tensor, n: int, t0: Tensor, stops: RowStops | None) -> Tensor:
        """t_n of these rows."""
        first = t0[rows]
        if stops is not None:
            origin = self.origin[rows, n]
            first = torch.where(origin > 0, stops.time(rows, origin), first)
        return first + self.offsets[rows, n]

    def unchanged(self, stops: RowStops | None) -> Tensor:
        """Rows whose state right after the start is y0, ``(R, 1)``."""
        if stops is None or not stops.stops.after or not self.steps.shape[1]:
            return torch.ones_like(self.count, dtype=torch.bool)[:, None]
        return ~((self.steps[:, :1] == 0) & (self.marks[:, :1] > 0))

    def implicit(self, rows: Tensor, n: int, method: Method) -> Tensor | None:
        """Of a switching method, which rows take an implicit step."""
        return None if method.stiff is None or self.kind is None else self.kind[rows, n] > 0

    def begins_anew(self, rows: Tensor, n: int, method: Method, active: Tensor) -> Tensor:
        """Rows whose step does not begin with the last slope of the step before."""
        if n == 0:
            return torch.zeros_like(active)
        anew = torch.zeros_like(active) if method.fsal else torch.ones_like(active)
        if (implicit := self.implicit(rows, n, method)) is not None:
            anew = anew | (implicit != self.implicit(rows, n - 1, method)) & active
        return anew if self.marks is None else anew | (self.marks[rows, n - 1] > 0) & active

    def field(self, field: Field, rows: Tensor, n: int, stops: RowStops | None, active: Tensor) -> Field:
        """What the step sees of the field."""
        if stops is None or n >= self.steps.shape[1]:
            return field
        return stops.between(field, rows, self.marks[rows, n].abs(), active)


def plan_outputs(
    times: Tensor,
    t0: Tensor,
    steps: Tensor,
    offsets: Tensor | None = None,
    stops: RowStops | None = None,
    ended: Tensor | None = None,
) -> Plan:
    """Decide which step each output belongs to.

    Args:
        times: Output times, sorted per row in its direction, ``(R, T)``.
        t0: Start times, ``(R,)``.
        steps: As in ``RowSolution.steps``; signed sizes, zeros at the right.
        offsets: t_n - t0, ``(R, N + 1)``; None sums the steps.
        stops: Where steps end, if anywhere.
        ended: With events on the way: rows whose last step ends in a terminal one, ``(R,)``.

    Returns:
        The plan.
    """
    times, t0, steps, kind, marks = times.detach(), t0.detach(), steps.detach(), None, None
    if steps.ndim == 3:
        steps, kind, *more = steps.unbind(-1)
        marks = more[0].to(torch.int64) if more else None
    n_steps = steps.shape[1]
    if offsets is None:
        offsets = torch.nn.functional.pad(steps.cumsum(1), (1, 0))
    count = (steps != 0).sum(1) if marks is None else ((steps != 0) | (marks > 0)).sum(1)
    direction = torch.where((steps < 0).any(1), -1.0, 1.0).to(times)[:, None]
    grid, origin, landing = t0[:, None] + offsets, None, torch.zeros_like(steps, dtype=torch.bool)
    if marks is not None:
        landing = marks > 0
        origin, offsets, grid = _from_stops(t0, steps, marks, offsets, stops)
    # Sums of steps miss the last output time by rounding: such an output is the end of the last step. One up
    # to 1e-4 of the last step further still belongs to it: finite differences move times and t0.
    last = torch.maximum(t0.abs(), times[:, -1].abs()) if times.shape[1] else t0.abs()
    finish = grid.gather(1, count[:, None])
    rounding = (n_steps + 4) * torch.finfo(times.dtype).eps * last[:, None]
    last_step = torch.nn.functional.pad(steps, (1, 0)).gather(1, count[:, None]).abs()
    gap = (times - finish).abs()
    times = torch.where(gap <= rounding, finish, times)

    ends = (direction * grid[:, 1:]).contiguous()
    step = torch.searchsorted(ends, (direction * times).contiguous())
    if stops is not None and stops.stops.after:  # outputs at a stop belong to the step after it, if there is one
        behind = torch.searchsorted(ends, (direction * times).contiguous(), right=True)
        here = landing.gather(1, step.clamp(max=n_steps - 1)) & (times == grid.gather(1, (step + 1).clamp(max=n_steps)))
        step = torch.where(here, torch.minimum(behind, count[:, None] - 1), step)
    beyond = (step >= count[:, None]) & (gap <= (1e-4 if ended is None else 0.1) * last_step)
    beyond = beyond if ended is None else beyond & ~ended[:, None]
    step = torch.where(beyond, count[:, None] - 1, step)
    start = (count == 0)[:, None] & (times == t0[:, None])
    step = torch.where(start, -1, torch.where(step < count[:, None], step, n_steps))
    at_end = times == grid.gather(1, (step + 1).clamp(0, n_steps))
    past = torch.zeros_like(at_end)
    if n_steps and stops is not None and stops.stops.after:
        past = (step == count[:, None] - 1) & landing.gather(1, step.clamp(0, n_steps - 1)) & at_end
    flat = step.reshape(-1)
    sizes = torch.bincount(flat + 1, minlength=n_steps + 2).tolist()
    chunks = list(torch.argsort(flat, stable=True).split(sizes))
    inside = torch.bincount(flat[~at_end.reshape(-1)] + 1, minlength=n_steps + 2).tolist()
    return Plan(
        steps, kind, marks, origin, offsets, count, step, at_end, past, chunks, [size > 0 for size in inside[1:-1]]
    )


def _from_stops(
    t0: Tensor, steps: Tensor, marks: Tensor, offsets: Tensor, stops: RowStops
) -> tuple[Tensor, Tensor, Tensor]:
    """From which stop each step counts (0: from t0), its offset from there, and the grid with the stops in it."""
    n_steps = steps.shape[1]
    number = torch.arange(n_steps, device=steps.device).expand_as(steps)
    latest = torch.where(marks > 0, number, -1).cummax(1).values if n_steps else number
    latest = torch.nn.functional.pad(latest, (1, 0), value=-1)  # the last step before that ended at a stop
    begun = latest >= 0
    origin = torch.where(begun, marks.gather(1, latest.clamp(min=0)), 0) if n_steps else latest.clamp(min=0)
    offsets = offsets - offsets.gather(1, latest + 1)
    times = stops.times.detach()
    grid = torch.where(begun, times.gather(1, origin), t0[:, None]) + offsets
    return origin, offsets, grid


@dataclass
class _Work:
    """The rows being integrated: their numbers, where each row stands among them, the field on them."""

    rows: Tensor
    place: Tensor
    field: Callable[[Tensor, Tensor], Tensor]


def _work_on(f: Callable[..., Tensor], keep: Tensor) -> _Work:
    rows = keep.nonzero()[:, 0]
    return _Work(rows, keep.cumsum(0) - 1, restrict(f, rows, len(keep)))


class _StandStill:
    """Where rows with nothing to do are evaluated: at their own start, or that of a row that could start."""

    def __init__(self, y0: Tensor, t0: Tensor, count: Tensor, usable: Tensor) -> None:
        own = torch.arange(len(count), device=count.device)
        donor = torch.where(count > 0, own, torch.where(usable, count + 1, 0).argmax())
        self.t, self.y = t0.detach()[donor], y0.detach()[donor]

    def put(self, rows: Tensor, active: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(active, t, self.t[rows]), torch.where(active[:, None], y, self.y[rows])


def finite_start(f: Callable[..., Tensor], y0: Tensor, t0: Tensor, count: Tensor) -> Tensor:
    """Rows that may be evaluated under autograd at their start: with steps, or with a finite f(t0, y0)."""
    if bool((count > 0).all()):
        return count > 0
    with torch.no_grad():
        y, t = y0.detach(), t0.detach()
        finite = torch.isfinite(y).all(1) & torch.isfinite(f(t, y)).all(1)
    return (count > 0) | finite


def follow(
    f: Callable[..., Tensor],
    y0: Tensor,
    times: Tensor,
    t0: Tensor,
    plan: Plan,
    method: Method,
    on_step: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
    stops: RowStops | None = None,
    part: Part | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Take the steps of ``plan`` and interpolate its outputs.

    Rows whose steps are used up are dropped when fewer than half remain and f can be evaluated on some of its
    rows; until then they stand still where f is known to be finite, so that they add no NaN to gradients.

    Args:
        f: ``f(t (R,), y (R, D)) -> (R, D)``, optionally with a third argument ``rows``.
        y0: Initial states, ``(R, D)``.
        times: Output times, ``(R, T)``.
        t0: Start times, ``(R,)``.
        plan: From ``plan_outputs``.
        method: The method.
        on_step: Called with the step number, the rows, y_new and the last stage after each step; its presence
            also makes outputs at the end of a step y_new exactly, which is right for values only.
        stops: Where steps end, if anywhere.
        part: Take only these of the steps.

    Returns:
        ``(R, T, D)``, NaN where not reached; of a part its outputs as they come, then state and slope at its end.
    """
    subsets, exact = accepts_rows(f), on_step is not None
    n_times = times.shape[1]
    usable = torch.ones_like(plan.count, dtype=torch.bool) if exact else finite_start(f, y0, t0, plan.count)
    work = _work_on(f, usable if subsets else torch.ones_like(usable))
    still = _StandStill(y0, t0, plan.count, usable)

    y, t, k1 = y0[work.rows], t0[work.rows], None
    pieces = [y0[plan.chunks[0] // max(n_times, 1)]]
    if part is not None and part.first > 0:
        y, k1, pieces = part.y[work.rows], part.slope[work.rows], []
    elif bool(usable.any()):
        field = plan.field(work.field, work.rows, 0, stops, (plan.count > 0)[work.rows])
        k1 = field(*still.put(work.rows, usable[work.rows], t, y))
        if exact:
            on_step(-1, work.rows, y, k1)
        else:
            pieces[0] = _at_start(pieces[0], plan.chunks[0], times, t0, k1, usable, work)
    for n, chunk in enumerate(plan.chunks[1:-1]):
        if part is not None and not part.first <= n < part.end:
            continue
        active = plan.count[work.rows] > n
        n_active = int(active.sum())
        if n_active == 0:
            break
        if subsets and 2 * n_active < len(active):
            y, k1 = y[active], k1[active]
            work = _work_on(f, plan.count > n)
            active = active[active]
        rows = work.rows
        h, t = plan.steps[rows, n], plan.start(rows, n, t0, stops)
        if n_active < len(active):
            t, y = still.put(rows, active, t, y)
            k1 = torch.where(active[:, None], k1, 0.0)
        field = plan.field(work.field, rows, n, stops, active)
        anew = plan.begins_anew(rows, n, method, active)
        if bool(anew.any()):
            k1 = torch.where(anew[:, None], field(t, y), k1)
        step = take_given(field, method, t, y, h, k1, plan.implicit(rows, n, method))
        y, k1 = step.y_new, step.k[-1]
        if stops is not None:
            y = stopped(step, stops, plan.marks[rows, n], rows, exact)
        if len(chunk):
            pieces.append(_outputs(step, y, plan, times, n, work, exact, stops))
        if exact:
            on_step(n, rows[active], y[active], k1[active])
        if stops is not None:
            y = torch.where((plan.marks[rows, n] > 0)[:, None], stops.dose(y, rows, plan.marks[rows, n].abs()), y)
    return _in_order(pieces, plan, y0) if part is None else part.ended(pieces, work.rows, y, k1)


def _in_order(pieces: list[Tensor], plan: Plan, y0: Tensor) -> Tensor:
    """Outputs of all steps where they belong, ``(R, T, D)``."""
    pieces = [*pieces, y0.new_full((len(plan.chunks[-1]), y0.shape[1]), torch.nan)]
    order = torch.cat(plan.chunks).argsort()
    return torch.cat(pieces)[order].reshape(*plan.step.shape, -1)


def _outputs(
    step: GivenStep, y: Tensor, plan: Plan, times: Tensor, n: int, work: _Work, exact: bool, stops: RowStops | None
) -> Tensor:
    """The outputs of step n, whose end is y, ``(R, D)``."""
    chunk, rows = plan.chunks[n + 1], work.rows
    at, moments = work.place[chunk // times.shape[1]], times.reshape(-1)[chunk]
    value = step.at(moments, at, plan.interior[n] or not exact)
    if exact:
        value = torch.where(plan.at_end.reshape(-1)[chunk, None], y[at], value)
    if stops is not None and bool((past := plan.past.reshape(-1)[chunk]).any()):
        behind = after_stop(work.field, stops, plan.marks[rows, n], rows, y)
        value = torch.where(past[:, None], behind(moments, at), value)
    return value


def _at_start(
    value: Tensor, chunk: Tensor, times: Tensor, t0: Tensor, k1: Tensor, usable: Tensor, work: _Work
) -> Tensor:
    """Outputs at t0 of rows without steps: y0, moving with the output time by the first slope."""
    if len(chunk) == 0:
        return value
    row = chunk // times.shape[1]
    slope = torch.where(usable[row, None], k1[work.place[row].clamp(0)], 0.0)
    return value + (times.reshape(-1)[chunk] - t0[row]).to(value.dtype)[:, None] * slope


def replay_within(
    make: Callable[[Sequence[Tensor], Tensor, Tensor], tuple[Callable[..., Tensor], RowStops | None]],
    starts: tuple[Tensor, Tensor, Tensor],
    leaves: Sequence[Tensor],
    steps: Tensor,
    method: Method,
    budget: int | None,
) -> Tensor:
    """As :func:`replay_rows`, in memory of ``budget`` bytes for its derivative, None for half of what is free.

    Args:
        make: From ``leaves``, times and t0 to f and the stops.
        starts: y0, times and t0.
        leaves: What f and the stops depend on.
        steps: Steps as in ``RowSolution.steps``.
        method: The method.
        budget: Bytes.
    """
    y0, times, t0 = starts
    f, stops = make(leaves, times, t0)
    plan = plan_outputs(times, t0, steps, None, stops)
    longest = int(plan.count.max()) if len(plan.count) else 0

    def run(
        span: tuple[int, int], y: Tensor, slope: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        first, grid, start, *own = tensors
        field, moments = make(own, grid, start)
        return follow(field, first, grid, start, plan, method, None, moments, Part(*span, y, slope))

    tensors = (y0, times, t0, *leaves)
    needed = torch.is_grad_enabled() and longest > 0
    parts = parts_needed(run, longest, y0, tensors, budget, method.stages) if needed else None
    if parts is None:
        return follow(f, y0, times, t0, plan, method, None, stops)
    return _in_order([in_parts(run, parts, longest, y0, tensors)], plan, y0)


def replay_rows(
    f: Callable[..., Tensor],
    y0: Tensor,
    times: Tensor,
    t0: Tensor,
    steps: Tensor,
    method: Method,
    stops: RowStops | None = None,
) -> Tensor:
    """Solve again along given steps, differentiably.

    The values of ``solve_rows`` to rounding; differentiable any number of times, in reverse and forward mode,
    with respect to ``y0``, ``times``, ``t0`` and whatever f closes over. Outputs the steps do not reach are
    NaN with zero gradient.

    Args:
        f: ``f(t (R,), y (R, D)) -> (R, D)``; with a third argument ``rows`` it is evaluated on moving rows only.
        y0: Initial states, ``(R, D)``.
        times: Output times, sorted per row in its direction of integration, ``(R, T)``.
        t0: Start times, ``(R,)``.
        steps: Signed step sizes as in ``RowSolution.steps``, zeros at the right, ``(R, N)``; constants.
        method: The method.
        stops: Where the steps end, if anywhere.

    Returns:
        States at ``times``, ``(R, T, D)``.

    Example:
        >>> import torch
        >>> from pyro_latentde.solve.methods.catalog import get_method
        >>> from pyro_latentde.solve.torch_engine.replay import replay_rows
        >>> rate = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
        >>> y0, t0 = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        >>> steps = torch.full((1, 10), 0.1, dtype=torch.float64)
        >>> times = torch.ones(1, 1, dtype=torch.float64)
        >>> ys = replay_rows(lambda t, y: -rate * y, y0, times, t0, steps, get_method("tsit5"))
        >>> ys.sum().backward()
        >>> round(rate.grad.item(), 6)
        -0.606531
    """
    return follow(f, y0, times, t0, plan_outputs(times, t0, steps, None, stops), method, None, stops)
