# SPDX-License-Identifier: Apache-2.0
"""Engine "torch": every row with its own steps, in plain torch; readable reference of the fused kernels."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_latentde.errors import SolveError
from pyro_latentde.solve.events.course import ended_rows
from pyro_latentde.solve.events.rows import RowEvent
from pyro_latentde.solve.events.watch import RowEvents
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.row_solution import MAX_STEPS, NO_CONVERGENCE, NON_FINITE, OK, RowSolution
from pyro_latentde.solve.step_record import StepRecord
from pyro_latentde.solve.stops.rows import RowStops
from pyro_latentde.solve.torch_engine.adaptive import AdaptiveRows
from pyro_latentde.solve.torch_engine.plan import plan_outputs
from pyro_latentde.solve.torch_engine.replay import along_events, follow, replay_rows, settled_steps

__all__ = ["RowSolution", "replay_rows", "solve_rows"]


@torch.no_grad()
def solve_rows(
    f: Callable[..., Tensor],
    y0: Tensor,
    times: Tensor,
    t0: Tensor,
    method: Method,
    *,
    rtol: float,
    atol: float,
    max_steps: int,
    step_size: float | None = None,
    steps: Tensor | None = None,
    stops: RowStops | None = None,
    events: list[RowEvent] | None = None,
) -> RowSolution:
    """Solve every row by itself; no gradient.

    Args:
        f: ``f(t (R,), y (R, D)) -> (R, D)``; with an optional third argument ``rows`` (indices, or None for
            all) it is evaluated only on unfinished rows once fewer than half are left.
        y0: Initial states, ``(R, D)``.
        times: Output times, sorted per row in its direction of integration, ``(R, T)``.
        t0: Start times, ``(R,)``.
        method: The method.
        rtol: Relative tolerance.
        atol: Absolute tolerance, in the unit of the state.
        max_steps: Most trials, accepted or not, per row.
        step_size: Equal steps of at most this size instead of error control, in the unit of time.
        steps: Take exactly these signed steps, zeros at the right, ``(R, N)``; as in ``RowSolution``. A step that ends
            in an event gets the size with which it does.
        stops: Where steps must end.
        events: What happens on the way.

    Returns:
        The solution; rows that fail have a status, and NaN where they did not arrive.

    Raises:
        SolveError: If the method cannot choose its steps and none are given.

    Example:
        >>> import torch
        >>> from pyro_latentde.solve.methods.catalog import get_method
        >>> from pyro_latentde.solve.torch_engine.stepper import solve_rows
        >>> y0, t0 = torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        >>> times = torch.tensor([[0.5, 1.0], [0.5, 1.0]], dtype=torch.float64)
        >>> settings = {"rtol": 1e-8, "atol": 1e-10, "max_steps": 1000}
        >>> rows = solve_rows(lambda t, y: -y, y0, times, t0, get_method("tsit5"), **settings)
        >>> [round(value, 6) for value in rows.ys[0, :, 0].tolist()], rows.status.tolist()
        ([0.606531, 0.367879], [0, 0])
    """
    stops = RowStops.of(None, (), times, t0) if stops is None else stops
    if steps is not None:
        return _solve_given(f, y0, times, t0, steps, None, method, None, stops, events)
    if step_size is not None and events:
        return AdaptiveRows(f, y0, times, t0, method, rtol, atol, max_steps, step_size, stops, events).run()
    if step_size is not None:
        equal = stops.equal_steps if stops.any else _equal_steps
        steps, offsets, cut = equal(times, t0, step_size, max_steps)
        return _solve_given(f, y0, times, t0, steps, offsets, method, cut, stops)
    if not method.adaptive:
        raise SolveError(
            f"method {method.name!r} does not estimate its error: expected step_size=, got none. "
            "Give step_size, or choose tsit5, dopri5, dopri8, bosh3 or heun."
        )
    return AdaptiveRows(f, y0, times, t0, method, rtol, atol, max_steps, None, stops, events).run()


def _equal_steps(times: Tensor, t0: Tensor, step_size: float, max_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Equal steps per row, the grid's offsets k h, and which rows would need more than ``max_steps``."""
    if not step_size > 0:
        raise SolveError(f"step_size: expected a positive number of time units, got {step_size}.")
    span = times[:, -1] - t0
    needed = torch.ceil(span.abs() / step_size * (1 - 1e-12))
    needed = torch.where(torch.isfinite(needed), needed, 0.0)
    count = needed.clamp(max=max_steps).to(torch.int64)
    index = torch.arange(int(count.max()) + 1 if len(count) else 1, device=times.device)
    h = span / needed.clamp(min=1)
    offsets = h[:, None] * torch.minimum(index, count[:, None])
    offsets = torch.where(index >= needed[:, None], span[:, None], offsets)
    return torch.where(index[:-1] < count[:, None], h[:, None], 0.0), offsets, needed > max_steps


def _solve_given(
    f: Callable[..., Tensor],
    y0: Tensor,
    times: Tensor,
    t0: Tensor,
    steps: Tensor,
    offsets: Tensor | None,
    method: Method,
    cut: Tensor | None,
    stops: RowStops,
    events: list[RowEvent] | None = None,
) -> RowSolution:
    """Known steps; a row whose state or slope stops being finite fails there."""
    if events:
        steps = settled_steps(f, y0, t0, steps, method, stops, events)
    record = StepRecord.read(steps, stops.any, bool(events))
    ended = ended_rows(events, record) if events else None
    plan = plan_outputs(times, t0, record, offsets, stops, ended)
    last_good, failed = plan.count.clone(), torch.zeros_like(plan.count, dtype=torch.bool)

    def check(n: int, rows: Tensor, y: Tensor, slope: Tensor) -> None:
        finite = torch.isfinite(y).all(1)
        if n < 0 or method.fsal:
            finite &= torch.isfinite(slope).all(1)
        bad = rows[~finite]
        last_good[bad] = torch.minimum(last_good[bad], torch.tensor(max(n, 0), device=rows.device))
        failed[bad] = True
        if n < 0:
            started[bad] = False

    started = torch.ones_like(failed)
    found = None
    if events:
        ys, course = along_events(f, y0, times, t0, steps, method, stops, events, check)
        found = RowEvents(course.times, course.which, course.states)
    else:
        ys = follow(f, y0, times, t0, plan, method, check, stops)
    at_start = (times == t0[:, None]) & plan.unchanged(stops)
    reached = plan.step < last_good[:, None]
    if events:
        reached |= ended[:, None] & (last_good == plan.count)[:, None]
    ys = torch.where(reached[..., None], ys, torch.nan)
    ys = torch.where(at_start[..., None], y0[:, None], ys)

    short = cut if cut is not None else (~at_start & (plan.step == steps.shape[1])).any(1)
    short = short if ended is None else short & ~ended
    status = torch.where(short, MAX_STEPS, OK)
    lost = torch.where(started, NO_CONVERGENCE, NON_FINITE) if method.kind == "implicit" else NON_FINITE
    status = torch.where(failed, lost, status)
    rejected = (failed & started).to(torch.int64)
    trials = last_good + rejected
    n_evals = 1 + trials * method.evals
    if not method.fsal:
        n_evals = n_evals + (trials - 1).clamp(min=0)
    if method.dense_evals:
        inside = torch.where(at_start | plan.at_end | (plan.step >= last_good[:, None]), -1, plan.step)
        n_evals = n_evals + method.dense_evals * _distinct(inside)
    taken = torch.arange(steps.shape[1], device=steps.device) < last_good[:, None]
    kept = torch.where(taken if steps.ndim == 2 else taken[..., None], steps, 0.0)
    return RowSolution(ys, status, last_good, rejected, n_evals, kept[:, : _longest(last_good)], found)


def _distinct(step: Tensor) -> Tensor:
    """Number of different non-negative values per row."""
    ordered = step.sort(1).values
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return (new & (ordered >= 0)).sum(1)


def _longest(count: Tensor) -> int:
    return int(count.max()) if len(count) else 0
