# SPDX-License-Identifier: Apache-2.0
"""Given steps, taken again in differentiable operations: the discrete adjoint of the torch engine.

Step sizes are constants here; the grid t_n = t0 + sum_(m<n) h_m moves with t0, and an output at time t_j in
step n is the interpolant at θ = (t_j - t_n) / h_n, differentiated through θ. Steps after a stop or an event move with
it; a step that ends in an event has the size with which it does (``events/course.py``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_latentde.solve.events.course import Course
from pyro_latentde.solve.events.rows import RowEvent
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.step_record import StepRecord
from pyro_latentde.solve.stops.rows import RowStops
from pyro_latentde.solve.torch_engine.given_step import GivenStep, after_stop, stopped, take_given
from pyro_latentde.solve.torch_engine.plan import Plan, plan_outputs
from pyro_latentde.solve.torch_engine.replay_parts import Part, in_parts, parts_needed
from pyro_latentde.solve.torch_engine.runge_kutta import accepts_rows, restrict

__all__ = ["along_events", "finite_start", "follow", "replay_rows", "replay_within", "settled_steps"]

OnStep = Callable[[int, Tensor, Tensor, Tensor], None]


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
    on_step: OnStep | None = None,
    stops: RowStops | None = None,
    course: Course | None = None,
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
        course: Events on the way, if there are any.
        part: Take only these of the steps; without events.

    Returns:
        ``(R, T, D)``, NaN where not reached; of a part its outputs as they come, then state and slope at its end.
    """
    subsets, exact = accepts_rows(f), on_step is not None
    stops = RowStops.of(None, (), times, t0) if stops is None else stops
    usable = torch.ones_like(plan.count, dtype=torch.bool) if exact else finite_start(f, y0, t0, plan.count)
    work = _work_on(f, usable if subsets else torch.ones_like(usable))
    still = _StandStill(y0, t0, plan.count, usable)

    y, t, k1 = y0[work.rows], t0[work.rows], None
    pieces = [y0[plan.chunks[0] // max(times.shape[1], 1)]]
    if part is not None and part.first > 0:
        y, k1, pieces = part.y[work.rows], part.slope[work.rows], []
    elif bool(usable.any()):
        k1 = _first_slope(work, still, plan, usable, t, y, stops)
        if exact:
            on_step(-1, work.rows, y, k1)
        else:
            pieces[0] = _at_start(pieces[0], plan.chunks[0], times, t0, k1, usable, work)
    for n in range(len(plan.chunks) - 2):
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
        h, t = plan.record.size[rows, n], plan.start(rows, n, t0, stops, t0 if course is None else course.now)
        if n_active < len(active):
            t, y = still.put(rows, active, t, y)
            k1 = torch.where(active[:, None], k1, 0.0)
        field = stops.between(work.field, rows, plan.ahead(rows, n), active)
        anew = plan.begins_anew(rows, n, method, active)
        if bool(anew.any()):
            k1 = torch.where(anew[:, None], field(t, y), k1)
        implicit = plan.implicit(rows, n, method)
        fired = None if course is None else course.at_step(n, rows, active)
        if fired is not None:
            h = course.sizes(n, fired, rows, t, y, h, k1, implicit)
        step = take_given(field, method, t, y, h, k1, implicit)
        y, k1 = _after_step(step, plan, times, n, work, exact, stops, pieces), step.k[-1]
        if exact:
            on_step(n, rows[active], y[active], k1[active])
        if fired is not None:
            y = course.go_on(n, fired, rows, t + h, y)
        if stops.any:
            y = torch.where(plan.record.landing[rows, n, None], stops.dose(y, rows, plan.ahead(rows, n)), y)
    return _in_order(pieces, plan, y0) if part is None else part.ended(pieces, work.rows, y, k1)


def _in_order(pieces: list[Tensor], plan: Plan, y0: Tensor) -> Tensor:
    """Outputs of all steps where they belong, ``(R, T, D)``."""
    pieces = [*pieces, y0.new_full((len(plan.chunks[-1]), y0.shape[1]), torch.nan)]
    order = torch.cat(plan.chunks).argsort()
    return torch.cat(pieces)[order].reshape(*plan.step.shape, -1)


def _first_slope(
    work: _Work, still: _StandStill, plan: Plan, usable: Tensor, t: Tensor, y: Tensor, stops: RowStops
) -> Tensor:
    """f at the starts."""
    field = stops.between(work.field, work.rows, plan.ahead(work.rows, 0), (plan.count > 0)[work.rows])
    return field(*still.put(work.rows, usable[work.rows], t, y))


def _after_step(
    step: GivenStep, plan: Plan, times: Tensor, n: int, work: _Work, exact: bool, stops: RowStops, pieces: list[Tensor]
) -> Tensor:
    """The state at the end of step n, ``(R, D)``; the outputs that lie in it become one more of the ``pieces``."""
    chunk, rows = plan.chunks[n + 1], work.rows
    y = stopped(step, stops, plan.record.mark[rows, n], rows, exact) if stops.any else step.y_new
    if not len(chunk):
        return y
    at, moments = work.place[chunk // times.shape[1]], times.reshape(-1)[chunk]
    value = step.at(moments, at, plan.interior[n] or not exact)
    if exact:
        value = torch.where(plan.at_end.reshape(-1)[chunk, None], y[at], value)
    if bool((past := plan.past.reshape(-1)[chunk]).any()):
        behind = after_stop(work.field, stops, plan.record.mark[rows, n], rows, y)
        value = torch.where(past[:, None], behind(moments, at), value)
    pieces.append(value)
    return y


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
    make: Callable[[Sequence[Tensor], Tensor, Tensor], tuple[Callable[..., Tensor], RowStops]],
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
    plan = plan_outputs(times, t0, StepRecord.read(steps, stops.any, False), None, stops)
    longest = int(plan.count.max()) if len(plan.count) else 0

    def run(
        span: tuple[int, int], y: Tensor, slope: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        first, grid, start, *own = tensors
        field, moments = make(own, grid, start)
        return follow(field, first, grid, start, plan, method, None, moments, None, Part(*span, y, slope))

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
    record = StepRecord.read(steps, stops is not None and stops.any, False)
    return follow(f, y0, times, t0, plan_outputs(times, t0, record, None, stops), method, None, stops)


def along_events(
    f: Callable[..., Tensor],
    y0: Tensor,
    times: Tensor,
    t0: Tensor,
    steps: Tensor,
    method: Method,
    stops: RowStops,
    events: Sequence[RowEvent],
    on_step: OnStep | None = None,
) -> tuple[Tensor, Course]:
    """As :func:`replay_rows`: states at the times, held from a terminal event on; and what happened."""
    record = StepRecord.read(steps, stops.any, True)
    course = Course(f, events, method, stops, y0, t0, record)
    plan = plan_outputs(times, t0, record, None, stops, course.ended)
    ys = follow(f, y0, times, t0, plan, method, on_step, stops, course)
    if bool(course.ended.any()):
        ys = torch.where(plan.held(course.ended)[..., None], course.last[:, None], ys)
    return ys, course


@torch.no_grad()
def settled_steps(
    f: Callable[..., Tensor],
    y0: Tensor,
    t0: Tensor,
    steps: Tensor,
    method: Method,
    stops: RowStops,
    events: Sequence[RowEvent],
) -> Tensor:
    """Given steps; those that end in an event with the sizes with which they do now."""
    _, course = along_events(f, y0, t0[:, None], t0, steps, method, stops, events, lambda *_: None)
    return torch.cat([course.settled[..., None], steps[..., 1:]], -1)
