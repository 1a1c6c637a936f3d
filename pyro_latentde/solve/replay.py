# SPDX-License-Identifier: Apache-2.0
"""Given steps, taken again in differentiable operations: the discrete adjoint of the torch engine.

The step sizes are constants of the derivative; the grid t_n = t0 + sum_(m<n) h_m moves with t0, and an output
at time t_j in step n is the interpolant at θ = (t_j - t_n) / h_n, differentiated through θ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_latentde.solve.implicit_rows import replayed_stages
from pyro_latentde.solve.methods import Method
from pyro_latentde.solve.replay_parts import Part, in_parts, parts_needed
from pyro_latentde.solve.runge_kutta import (
    accepts_rows,
    dense_stages,
    interpolate,
    main_stages,
    restrict,
)
from pyro_latentde.solve.symplectic import end_slopes, hermite, symplectic_step

__all__ = ["Plan", "follow", "plan_outputs", "replay_rows", "replay_within"]


@dataclass
class Plan:
    """Given steps and which output falls into which of them; nothing here is differentiated.

    Args:
        steps: Signed step sizes, zeros at the right, ``(R, N)``.
        kind: How each was taken, ``(R, N)``, of a switching method, else None.
        offsets: t_n - t0 for n = 0..N, ``(R, N + 1)``.
        count: Steps per row, ``(R,)``.
        step: Step of each output, -1 for y0 of a row without steps, N for outputs not reached, ``(R, T)``.
        at_end: True where the output is exactly the end of its step, ``(R, T)``.
        chunks: Flat output indices per step: first those of step -1, last those not reached.
        interior: Per step, whether any output lies strictly before its end.
    """

    steps: Tensor
    kind: Tensor | None
    offsets: Tensor
    count: Tensor
    step: Tensor
    at_end: Tensor
    chunks: list[Tensor]
    interior: list[bool]


def plan_outputs(times: Tensor, t0: Tensor, steps: Tensor, offsets: Tensor | None = None) -> Plan:
    """Decide which step each output belongs to.

    Args:
        times: Output times, sorted per row in its direction, ``(R, T)``.
        t0: Start times, ``(R,)``.
        steps: Signed step sizes, zeros at the right, ``(R, N)``, or ``(R, N, 2)`` with how each was taken.
        offsets: t_n - t0, ``(R, N + 1)``; None sums the steps.

    Returns:
        The plan.
    """
    times, t0, steps, kind = times.detach(), t0.detach(), steps.detach(), None
    if steps.ndim == 3:
        steps, kind = steps.unbind(-1)
    n_steps = steps.shape[1]
    if offsets is None:
        offsets = torch.nn.functional.pad(steps.cumsum(1), (1, 0))
    count = (steps != 0).sum(1)
    direction = torch.where((steps < 0).any(1), -1.0, 1.0).to(times)[:, None]
    grid = t0[:, None] + offsets
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
    beyond = (step >= count[:, None]) & (gap <= 1e-4 * last_step)
    step = torch.where(beyond, count[:, None] - 1, step)
    start = (count == 0)[:, None] & (times == t0[:, None])
    step = torch.where(start, -1, torch.where(step < count[:, None], step, n_steps))
    at_end = times == grid.gather(1, (step + 1).clamp(0, n_steps))

    flat = step.reshape(-1)
    sizes = torch.bincount(flat + 1, minlength=n_steps + 2).tolist()
    chunks = list(torch.argsort(flat, stable=True).split(sizes))
    inside = torch.bincount(flat[~at_end.reshape(-1)] + 1, minlength=n_steps + 2).tolist()
    return Plan(steps, kind, offsets, count, step, at_end, chunks, [size > 0 for size in inside[1:-1]])


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


def _finite_start(f: Callable[..., Tensor], y0: Tensor, t0: Tensor, count: Tensor) -> Tensor:
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
        part: Take only these of the steps.

    Returns:
        ``(R, T, D)``, NaN where not reached; of a part its outputs as they come, then state and slope at its end.
    """
    subsets, exact = accepts_rows(f), on_step is not None
    n_times = times.shape[1]
    usable = torch.ones_like(plan.count, dtype=torch.bool) if exact else _finite_start(f, y0, t0, plan.count)
    work = _work_on(f, usable if subsets else torch.ones_like(usable))
    still = _StandStill(y0, t0, plan.count, usable)

    y, t, k1 = y0[work.rows], t0[work.rows], None
    pieces = [y0[plan.chunks[0] // max(n_times, 1)]]
    if part is not None and part.first > 0:
        y, k1, pieces = part.y[work.rows], part.slope[work.rows], []
    elif bool(usable.any()):
        k1 = work.field(*still.put(work.rows, usable[work.rows], t, y))
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
        h, t = plan.steps[rows, n], t0[rows] + plan.offsets[rows, n]
        if n_active < len(active):
            t, y = still.put(rows, active, t, y)
            k1 = torch.where(active[:, None], k1, 0.0)
        implicit = None if plan.kind is None else plan.kind[rows, n] > 0
        if n > 0 and not method.fsal:
            k1 = work.field(t, y)
        elif n > 0 and implicit is not None:
            change = (implicit != (plan.kind[rows, n - 1] > 0)) & active
            k1 = torch.where(change[:, None], work.field(t, y), k1) if bool(change.any()) else k1
        k, y_new = _given_step(work.field, method, t, y, h, k1, implicit)
        if len(chunk):
            at = work.place[chunk // n_times]
            theta = (times.reshape(-1)[chunk] - t[at]) / h[at]
            inside = plan.interior[n] or not exact
            value = _interpolated(work.field, method, (t, y, h, k, y_new), theta, at, implicit, inside)
            ends = plan.at_end.reshape(-1)[chunk, None]
            pieces.append(torch.where(ends, y_new[at], value) if exact else value)
        if exact:
            on_step(n, rows[active], y_new[active], k[-1][active])
        y, k1 = y_new, k[-1]
    return _in_order(pieces, plan, y0) if part is None else part.ended(pieces, work.rows, y, k1)


def _in_order(pieces: list[Tensor], plan: Plan, y0: Tensor) -> Tensor:
    """Outputs of all steps where they belong, ``(R, T, D)``."""
    pieces = [*pieces, y0.new_full((len(plan.chunks[-1]), y0.shape[1]), torch.nan)]
    order = torch.cat(plan.chunks).argsort()
    return torch.cat(pieces)[order].reshape(*plan.step.shape, -1)


def _given_step(
    field: Callable[[Tensor, Tensor], Tensor],
    method: Method,
    t: Tensor,
    y: Tensor,
    h: Tensor,
    k1: Tensor,
    implicit: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """Stages and end of a step, by the method, or by the one of its two that each row took."""
    if method.kind == "implicit":
        return replayed_stages(field, method, t, y, h, k1)
    if method.kind == "symplectic":
        return symplectic_step(field, method, t, y, h, k1)
    if implicit is None or not bool(implicit.any()):
        return main_stages(field, method, t, y, h, k1)
    inner, y_inner = replayed_stages(field, method.stiff, t, y, torch.where(implicit, h, 0.0), k1)
    outer, y_outer = main_stages(field, method, t, y, torch.where(implicit, 0.0, h), k1)
    column = implicit[:, None]
    return [torch.where(column, a, b) for a, b in zip(inner, outer, strict=True)], torch.where(column, y_inner, y_outer)


def _interpolated(
    field: Callable[[Tensor, Tensor], Tensor],
    method: Method,
    step: tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor],
    theta: Tensor,
    at: Tensor,
    implicit: Tensor | None,
    inside: bool,
) -> Tensor:
    """Outputs of a step (t, y, h, stages, y_new); ``inside``: some lie before its end."""
    t, y, h, k, y_new = step
    if method.kind == "symplectic":
        return hermite(theta, y, y_new, h, end_slopes(field, t, y, h, y_new, k) if inside else k, at)
    stages = dense_stages(field, method, t, y, h, k) if inside else k
    return interpolate(method, theta, y, h, stages, at, implicit)


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
    make_field: Callable[[Sequence[Tensor]], Callable[..., Tensor]],
    starts: tuple[Tensor, Tensor, Tensor],
    leaves: Sequence[Tensor],
    steps: Tensor,
    method: Method,
    budget: int | None,
) -> Tensor:
    """As :func:`replay_rows`, in memory of ``budget`` bytes for its derivative, None for half of what is free.

    Args:
        make_field: From ``leaves`` to f.
        starts: y0, times and t0.
        leaves: What f depends on.
        steps: Signed step sizes, ``(R, N)``.
        method: The method.
        budget: Bytes.
    """
    y0, times, t0 = starts
    plan = plan_outputs(times, t0, steps)
    longest = int(plan.count.max()) if len(plan.count) else 0

    def run(
        span: tuple[int, int], y: Tensor, slope: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        first, grid, start, *own = tensors
        return follow(make_field(own), first, grid, start, plan, method, part=Part(*span, y, slope))

    tensors = (y0, times, t0, *leaves)
    parts = None
    if torch.is_grad_enabled() and longest:
        parts = parts_needed(run, longest, y0, tensors, budget, method.stages)
    if parts is None:
        return follow(make_field(leaves), y0, times, t0, plan, method)
    return _in_order([in_parts(run, parts, longest, y0, tensors)], plan, y0)


def replay_rows(
    f: Callable[..., Tensor], y0: Tensor, times: Tensor, t0: Tensor, steps: Tensor, method: Method
) -> Tensor:
    """Solve again along given steps, differentiably.

    The values of ``solve_rows`` to rounding; differentiable any number of times, in reverse and forward mode,
    with respect to ``y0``, ``times``, ``t0`` and whatever f closes over. Outputs the steps do not reach are
    NaN with zero gradient.

    Args:
        f: ``f(t (R,), y (R, D)) -> (R, D)``; with an optional third argument ``rows`` (indices, or None for
            all) it is evaluated only on rows that still move.
        y0: Initial states, ``(R, D)``.
        times: Output times, sorted per row in its direction of integration, ``(R, T)``.
        t0: Start times, ``(R,)``.
        steps: Signed step sizes as in ``RowSolution.steps``, zeros at the right, ``(R, N)``; constants.
        method: The method.

    Returns:
        States at ``times``, ``(R, T, D)``.

    Example:
        >>> import torch
        >>> from pyro_latentde.solve.methods import get_method
        >>> from pyro_latentde.solve.replay import replay_rows
        >>> rate = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
        >>> y0, t0 = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        >>> steps = torch.full((1, 10), 0.1, dtype=torch.float64)
        >>> times = torch.ones(1, 1, dtype=torch.float64)
        >>> ys = replay_rows(lambda t, y: -rate * y, y0, times, t0, steps, get_method("tsit5"))
        >>> ys.sum().backward()
        >>> round(rate.grad.item(), 6)
        -0.606531
    """
    return follow(f, y0, times, t0, plan_outputs(times, t0, steps), method)
