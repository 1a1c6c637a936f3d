# SPDX-License-Identifier: Apache-2.0
"""Given steps with events on the way, taken again in differentiable operations."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_latentde.errors import SolveError
from pyro_latentde.solve.events.course import Course
from pyro_latentde.solve.events.rows import RowEvent
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.torch_engine.given_step import take_given
from pyro_latentde.solve.torch_engine.replay import Plan, finite_start, plan_outputs
from pyro_latentde.solve.torch_engine.runge_kutta import dense_stages, interpolate

__all__ = ["along_events", "replay_events", "settled_steps"]

OnStep = Callable[[int, Tensor, Tensor, Tensor], None]


def replay_events(
    f: Callable[..., Tensor],
    y0: Tensor,
    times: Tensor,
    t0: Tensor,
    steps: Tensor,
    method: Method,
    events: list[RowEvent],
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``replay_rows``: states at ``times``; times ``(R, E)`` of the events, and states there, ``(R, E, D)``."""
    ys, course = along_events(f, y0, times, t0, steps, method, events)
    return ys, course.times, course.states


def along_events(
    f: Callable[..., Tensor],
    y0: Tensor,
    times: Tensor,
    t0: Tensor,
    steps: Tensor,
    method: Method,
    events: list[RowEvent],
    on_step: OnStep | None = None,
) -> tuple[Tensor, Course]:
    """States at the times, ``(R, T, D)``, held from a terminal event on; and what happened."""
    course = Course(f, events, method, y0, t0, steps)
    plan = plan_outputs(times, t0, steps[..., :2], None, None, course.ended)
    ys = _follow(f, y0, times, t0, plan, method, on_step, course)
    if bool(course.ended.any()):
        held = course.ended[:, None] & (plan.step == plan.steps.shape[1])
        ys = torch.where(held[..., None], course.last[:, None], ys)
    return ys, course


@torch.no_grad()
def settled_steps(
    f: Callable[..., Tensor], y0: Tensor, t0: Tensor, steps: Tensor, method: Method, events: list[RowEvent]
) -> Tensor:
    """Given steps, ``(R, N, 3)``; those that end in an event with the sizes with which they do now."""
    if steps.ndim != 3 or steps.shape[2] != 3:
        raise SolveError("replay= is a solution without events; solve it with the same events= first.")
    _, course = along_events(f, y0, t0[:, None], t0, steps, method, events, lambda *_: None)
    return torch.cat([course.settled[..., None], steps[..., 1:]], -1)


def _follow(
    f: Callable[..., Tensor],
    y0: Tensor,
    times: Tensor,
    t0: Tensor,
    plan: Plan,
    method: Method,
    on_step: OnStep | None,
    course: Course,
) -> Tensor:
    """As ``replay.follow``; rows whose steps are used up are left out."""
    exact, n_times = on_step is not None, times.shape[1]
    every = torch.arange(len(y0), device=y0.device)
    usable = torch.ones_like(plan.count, dtype=torch.bool) if exact else finite_start(f, y0, t0, plan.count)
    slope = torch.zeros_like(y0)
    if bool(usable.any()):
        slope = slope.index_put((every[usable],), f(t0[usable], y0[usable], every[usable]))
        if exact:
            on_step(-1, every[usable], y0[usable], slope[usable])
    pieces = [_at_start(y0, plan.chunks[0], times, t0, slope)]
    y, k1 = y0, slope
    for n, chunk in enumerate(plan.chunks[1:-1]):
        rows = (plan.count > n).nonzero()[:, 0]
        if not len(rows):
            break

        def field(t: Tensor, y: Tensor, rows: Tensor = rows) -> Tensor:
            return f(t, y, rows)

        h, t, state = plan.steps[rows, n], course.origin[rows] + plan.offsets[rows, n], y[rows]
        implicit = None if plan.kind is None or method.stiff is None else plan.kind[rows, n] > 0
        first = k1[rows] if method.fsal or n == 0 else field(t, state)
        if n > 0 and implicit is not None:
            change = implicit != (plan.kind[rows, n - 1] > 0)
            first = torch.where(change[:, None], field(t, state), first) if bool(change.any()) else first
        happens = course.at_step(n, rows, torch.ones_like(rows, dtype=torch.bool))
        if happens is not None:
            h = course.sizes(n, happens, rows, t, state, h, first, implicit)
        step = take_given(field, method, t, state, h, first, implicit)
        if len(chunk):
            at = torch.searchsorted(rows, chunk // n_times)
            stages = dense_stages(field, method, t, state, h, step.k) if plan.interior[n] or not exact else step.k
            theta = (times.reshape(-1)[chunk] - t[at]) / h[at]
            value = interpolate(method, theta, state, h, stages, at, implicit)
            ends = plan.at_end.reshape(-1)[chunk, None]
            pieces.append(torch.where(ends, step.y_new[at], value) if exact else value)
        if exact:
            on_step(n, rows, step.y_new, step.k[-1])
        end, last = step.y_new, step.k[-1]
        if happens is not None:
            end, last = course.go_on(n, happens, rows, t + h, end, last)
        y, k1 = y.index_put((rows,), end), k1.index_put((rows,), last)
    pieces.append(y0.new_full((len(plan.chunks[-1]), y0.shape[1]), torch.nan))
    return torch.cat(pieces)[torch.cat(plan.chunks).argsort()].reshape(*times.shape, -1)


def _at_start(y0: Tensor, chunk: Tensor, times: Tensor, t0: Tensor, slope: Tensor) -> Tensor:
    """Outputs at t0 of rows without steps: y0, moving with the output time by the first slope."""
    row = chunk // max(times.shape[1], 1)
    return y0[row] + (times.reshape(-1)[chunk] - t0[row]).to(y0)[:, None] * slope[row]
