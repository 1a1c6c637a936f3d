# SPDX-License-Identifier: Apache-2.0
"""``odesolve``: check, choose an engine, solve, wrap."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.errors import SolveError
from pyro_latentde.solve.engines import batched_field, choose_engine, fused_function, torch_function
from pyro_latentde.solve.events.event import Event, FoundEvents, as_events
from pyro_latentde.solve.failure import failure_message
from pyro_latentde.solve.lift import peek
from pyro_latentde.solve.log_states import read_positive
from pyro_latentde.solve.methods.catalog import get_method
from pyro_latentde.solve.problem import Problem, pose
from pyro_latentde.solve.row_function import RowFunction, apply
from pyro_latentde.solve.row_solution import report_of
from pyro_latentde.solve.separable import require_separable
from pyro_latentde.solve.settings import SolveSettings
from pyro_latentde.solve.solution import Solution
from pyro_latentde.solve.stiffness import fastest_decay
from pyro_latentde.solve.stops.discontinuities import Discontinuities
from pyro_latentde.solve.stops.dose import Dose
from pyro_latentde.solve.structure import StateShape
from pyro_latentde.solve.vector_field import BoundField

__all__ = ["odesolve"]


def odesolve(
    f: Callable | BoundField,
    y0: Any,
    times: Any,
    params: Any = None,
    *,
    t0: Any = None,
    method: str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    step_size: float | None = None,
    gradient: str = "discrete",
    engine: str = "auto",
    event_dims: dict[str, int] | None = None,
    doses: Dose | Sequence[Dose] | None = None,
    jumps: Any = None,
    at_dose: str = "after",
    max_steps: int = 10_000,
    on_failure: str = "raise",
    replay: Solution | None = None,
    events: Event | Sequence[Event] | None = None,
    positive: Any = None,
    memory_budget: int | str | None = None,
) -> Solution:
    r"""Solve :math:`dy/dt = f(t, y, p),\ y(t_0) = y_0` for every row of a batch, each with its own steps.

    Args:
        f: ``f(t, y, p)`` for one row: t ``()``, y ``(D,)`` (or the structure of ``y0``), p as given; returns dy/dt
            like y, in
            units of y per unit of t. ``f(t, y)`` without parameters, modules and closures work; captured tensors and
            module weights get gradients.
        y0: Initial state, ``(*batch, D)``, or a dict or named tuple of ``(*batch,)`` scalars (vectors with
            ``event_dims``).
        times: Output times, ``(T,)`` or ``(*batch, T)``. Decreasing times integrate backwards; repeated times are
            replicates.
        params: Tensor, float, or dict, list, tuple or named tuple of these; leading dimensions are batch.
        t0: Time of ``y0``, ``()`` or ``(*batch,)``; the first time by default, needed where the times are unsorted.
        method: ``"tsit5"`` (default; dopri5 where torchdiffeq solves), ``dopri5``, ``bosh3``, ``dopri8``, ``heun``;
            with a fixed step also ``rk4``, ``midpoint``, ``euler``. Stiff equations: ``kvaerno5``, ``kvaerno3``,
            ``trbdf2`` (implicit), or ``auto``: tsit5 until stability bounds a row's steps, then kvaerno5, and back.
            Separable Hamiltonians, y = (q, p): ``leapfrog``, ``blanes_moan4`` (symplectic, fixed steps), whose
            energy does not drift.
        rtol: Relative tolerance; 1e-6 for float64, 1e-4 for float32.
        atol: Absolute tolerance in units of y; 1e-8 for float64, 1e-6 for float32.
        step_size: Take equal steps of at most this size instead of controlling the error, in units of t.
        gradient: ``"discrete"`` (exact for the accepted steps, which are held fixed), ``"forward"`` (the same by
            forward
            sensitivities: few parameters), ``"adjoint"`` (continuous adjoint, by torchdiffeq).
        engine: ``"auto"``, ``"fused"`` (one compiled kernel; CPU, CUDA), ``"torch"`` (any device), ``"torchdiffeq"``.
        event_dims: Trailing dimensions of a parameter (or structured state) that belong to one row, by name
            (``{"k": 1}``; a single tensor is called ``"p"``), where the field does not tell.
        doses: One :class:`Dose` or several, added to states at once or at constant rates; times must increase.
        jumps: Times at which the field jumps or has a kink, ``(M,)`` or ``(*batch, M)``, NaN where a row has fewer:
            steps end exactly there, and a stage at such a time belongs to the side of its own step.
        at_dose: Outputs at the very time of a dose are the state ``"after"`` it, or ``"before"`` it (a trough).
        max_steps: Most steps of a row in the whole solve, rejected ones included.
        on_failure: ``"raise"``, or ``"nan"``: failed rows are NaN with a status.
        replay: A solution whose accepted steps are taken again, without error control; a step that ended in an event
            ends where the event is now.
        events: An :class:`Event`, or several: what happens where a condition on the state changes sign. The first
            event of a row is taken first, and one at the time of a dose before it; ``solution.events`` tells what
            happened.
        positive: States that stay above 0, ``True`` for all, or names or indices, ``["hare", "lynx"]``. They are solved
            as logarithms and held to relative errors of rtol (1 + \|log y\|); what is below 1.5e-154 (float32: 1.1e-19)
            is given back as that. Results and gradients are those of y.
        memory_budget: Most memory that the steps may take until the gradient is asked for, in bytes or as ``"2 GB"``;
            None: half of what the machine has free. What does not fit is solved again during the backward pass (and
            once more for rows too long even alone), which gives the same gradient; with events it is an error.

    Returns:
        The :class:`Solution`; failed rows have zero gradients and never touch their neighbours.

    Raises:
        SolveError: If rows fail (``on_failure="raise"``), or for settings that cannot be met.
        ShapeError: For shapes, dtypes or devices that do not fit.
        DataError: For times that are not finite, or unsorted without ``t0``.
        GradientPathError: For ``gradient="adjoint"`` with events, doses, jumps or inputs with knots.

    References:
        Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", 2nd ed., Springer 1993; Hairer and
        Wanner, "Solving Ordinary Differential Equations II", 2nd ed., Springer 1996.

    Example:
        >>> import torch, pyro_latentde as lde
        >>> rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        >>> y0 = torch.ones(1, dtype=torch.float64)
        >>> solution = lde.odesolve(lambda t, y, p: -p["k"] * y, y0, torch.tensor([0.0, 1.0, 2.0]), {"k": rate})
        >>> solution.ys[:, 0].tolist()[-1].__round__(4)
        0.3679
        >>> solution.ys[-1, 0].backward()
        >>> rate.grad.item().__round__(4)
        -0.7358
    """
    if method is None and (engine == "torchdiffeq" or gradient == "adjoint"):
        method = "dopri5"  # torchdiffeq has no tsit5
    given, strict = Discontinuities(doses, jumps, at_dose), on_failure == "raise"
    change = read_positive(positive, rtol, atol, strict, doses)
    problems = pose(f, y0, times, params, t0, event_dims, given, change, as_events(events))
    first = problems[0]
    settings = SolveSettings.checked(
        method, rtol, atol, step_size, gradient, max_steps, on_failure, replay, first.tensors[0].dtype, memory_budget
    )
    engine_name, reason = choose_engine(first, engine, gradient, settings.method)
    _check_events(problems, settings, engine_name)
    require_separable(first, settings.method)
    parts = [_solve(p, engine_name, settings) for p in problems]
    ys, report, *found = parts[0] if len(parts) == 1 else _join(first, parts)
    _raise_failures(first, report, ys, found, strict)
    batch, state, solved = first.batch, first.info.state, ys
    ys, found = _not_logarithms(state, ys, found)
    ys, report, *found = _in_batch(batch, ys, report, *found)

    return Solution(
        ys=state.unflatten(ys),
        times=first.times,
        method=settings.method,
        rtol=settings.rtol,
        atol=settings.atol,
        step_size=settings.step_size,
        engine=engine_name,
        reason=reason,
        shape_of_state=state,
        memory_budget=settings.memory_budget,
        events=FoundEvents(found[0], found[2], state.unflatten(found[1])) if found else None,
        _report=report,
        _again=lambda t: _at(t, f, y0, params, first, settings, engine_name, event_dims, given, positive),
        _steps=lambda: _in_batch(batch, _accepted(problems, engine_name, settings))[0],
        _start=first.tensors[2].detach(),
        _decay=lambda row: fastest_decay(first, solved.detach(), row),
    )


def _not_logarithms(state: StateShape, ys: Tensor, found: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """States, also those at events, as the user knows them."""
    if state.logs is None:
        return ys, found
    return state.logs.to_user(ys), [*found[:1], *map(state.logs.to_user_padded, found[1:2]), *found[2:]]


def _in_batch(batch: torch.Size, *rows: Tensor) -> tuple[Tensor, ...]:
    if len(batch) == 1:  # rows are laid out as the user's batch already
        return rows
    return tuple([x.reshape(*batch, *x.shape[1:]) for x in rows])


def _check_events(problems: list[Problem], settings: SolveSettings, engine: str) -> None:
    if not problems[0].events:
        return
    if settings.memory_budget is not None and engine != "fused":
        raise SolveError("memory_budget: the torch engine keeps all steps of a solve with events; leave it out.")
    if len(problems) > 1:
        raise SolveError("events with times to both sides of t0: solve each side by itself.")
    if get_method(settings.method).kind == "symplectic":
        raise SolveError(f"method {settings.method!r} takes equal steps and knows no events; use tsit5 or dopri8.")


Rows = tuple[Tensor, ...]


def _solve(problem: Problem, engine: str, settings: SolveSettings) -> Rows:
    """ys ``(R, T, D)`` in the order of the user's times, the report ``(R, 5)``; of events times, states and numbers."""
    if engine == "torchdiffeq":
        ys, report, *found = _by_torchdiffeq(problem, settings)
    else:
        function = _function(problem, engine, settings, _wants_gradient(problem))
        layout = problem.layout
        ys, report, *found = apply(function, layout.rows, layout.shared, *problem.tensors)
    if problem.order is not None:
        order = problem.order.reshape(-1, problem.order.shape[-1]).expand(problem.rows, -1)
        back = order.argsort(dim=-1)
        ys = ys.gather(1, back[..., None].expand(ys.shape))
    return ys, report, *found


def _function(problem: Problem, engine: str, settings: SolveSettings, keep: bool) -> RowFunction:
    return fused_function(problem, settings, keep) if engine == "fused" else torch_function(problem, settings)


def _wants_gradient(problem: Problem) -> bool:
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any([t.requires_grad for t in problem.tensors])


def _join(problem: Problem, parts: list[Rows]) -> Rows:
    """Times after t0 from the forward solve, times before it from the backward one."""
    (ys, report), (ys_back, report_back) = parts
    start = problem.tensors[2]
    start = start if problem.shared[2] else start[:, None]
    times = problem.times.expand(*problem.batch, problem.times.shape[-1]).reshape(problem.rows, -1)
    ys = torch.where((times >= start)[..., None], ys, ys_back)
    status = torch.maximum(report[:, :1], report_back[:, :1])
    return ys, torch.cat([status, report[:, 1:] + report_back[:, 1:]], dim=1)


def _by_torchdiffeq(problem: Problem, settings: SolveSettings) -> Rows:
    from pyro_latentde.solve.adapters.torchdiffeq import solve_torchdiffeq

    if torch._C._are_functorch_transforms_active():
        raise SolveError(
            'engine="torchdiffeq" (also gradient="adjoint") does not run under vmap, grad and other '
            'torch.func transforms, which infer.nuts uses too. Try engine="auto" with gradient="discrete".'
        )
    rows = [t.expand(problem.rows, *t.shape) if s else t for t, s in zip(problem.tensors, problem.shared, strict=True)]
    leaves, shared = problem.tensors[3:], problem.shared[3:]  # there are no stops, see choose_engine
    out = solve_torchdiffeq(
        batched_field(problem)(leaves, shared),
        rows[0],
        rows[1],
        rows[2],
        tuple(leaves),
        get_method(settings.method),
        settings.rtol,
        settings.atol,
        settings.max_steps,
        settings.gradient == "adjoint",
        settings.step_size,
    )
    return out.ys, report_of(out, torch.zeros_like(out.status))


def _raise_failures(problem: Problem, report: Tensor, ys: Tensor, found: Sequence[Tensor], strict: bool) -> None:
    seen = peek(report) if strict else None
    if seen is not None and np.count_nonzero(seen[:, 0]):
        raise SolveError(failure_message(problem, seen[:, 0], ys, found[0] if found else None))


def _at(
    t: Tensor,
    f: Callable,
    y0: Any,
    params: Any,
    problem: Problem,
    settings: SolveSettings,
    engine: str,
    event_dims: dict[str, int] | None,
    given: Discontinuities,
    positive: Any,
) -> Any:
    """Solve again with outputs at t. The last time stays an output, so the steps are the same ones."""
    points = t.reshape(1) if t.ndim == 0 else t
    start, grid = problem.tensors[2], problem.times
    start = start if problem.shared[2] else start.reshape(problem.batch)
    end = torch.where(grid.amax(-1) > start, grid.amax(-1), grid.amin(-1))[..., None]
    low, high = (
        torch.minimum(start[..., None], grid.amin(-1, keepdim=True)),
        torch.maximum(start[..., None], grid.amax(-1, keepdim=True)),
    )
    outside = peek(((points < low) | (points > high)).any())
    if outside is not None and outside:
        raise SolveError(
            f"at() was asked for times outside the solved span {_span(low, high)}; got "
            f"{points.detach().flatten().tolist()[:6]}. "
            "Solve again with times that reach there."
        )
    lead = torch.broadcast_shapes(points.shape[:-1], end.shape[:-1])
    wanted = torch.cat([points.expand(*lead, -1), end.expand(*lead, 1)], dim=-1)
    solution = odesolve(
        f,
        y0,
        wanted,
        params,
        t0=start,
        engine=engine,
        event_dims=event_dims,
        on_failure="nan",
        events=problem.events,
        positive=positive,
        **given.keywords,
        **settings.keywords,
    )
    pick = 0 if t.ndim == 0 else slice(0, points.shape[-1])
    dim = len(problem.batch)
    return torch.utils._pytree.tree_map(lambda x: x[(slice(None),) * dim + (pick,)], solution.ys)


def _span(low: Tensor, high: Tensor) -> str:
    return f"[{low.min().item():g}, {high.max().item():g}]"


def _accepted(problems: list[Problem], engine: str, settings: SolveSettings) -> Tensor:
    """The steps of a solve as they can be taken again, ``(R, N)`` or ``(R, N, 2)``, found by solving once more."""
    from pyro_latentde.solve.step_store import find_steps

    if len(problems) > 1:
        raise SolveError("steps of a solve to both sides of t0 cannot be given as one list; solve each side.")
    if engine == "torchdiffeq":
        raise SolveError('engine="torchdiffeq" does not tell its steps; use engine="fused" or "torch".')
    problem = problems[0]
    with torch.no_grad():
        function = _function(problem, engine, settings, True)
        _, report, *_ = function.run(problem.rows, problem.shared, [t.detach() for t in problem.tensors])
        found = find_steps(report)
    return torch.as_tensor(found.plan()).to(problem.tensors[0]) if engine == "fused" else found.h
