# SPDX-License-Identifier: Apache-2.0
"""``ddesolve``: delay differential equations with constant lags, checked, solved and wrapped as ``odesolve`` does."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_latentde.errors import GradientPathError, SolveError
from pyro_latentde.solve.delays.engines import choose_delay_engine, delay_function
from pyro_latentde.solve.delays.failure import raise_delay_failures
from pyro_latentde.solve.delays.problem import DelayProblem, pose_delays
from pyro_latentde.solve.lift import peek
from pyro_latentde.solve.methods.catalog import get_method
from pyro_latentde.solve.row_function import apply
from pyro_latentde.solve.settings import SolveSettings
from pyro_latentde.solve.solution import Solution
from pyro_latentde.solve.step_store import find_steps
from pyro_latentde.solve.vector_field import BoundField

__all__ = ["ddesolve"]


def ddesolve(
    f: Callable | BoundField,
    history: Any,
    lags: Any,
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
    max_steps: int = 10_000,
    on_failure: str = "raise",
    replay: Solution | None = None,
    memory_budget: int | str | None = None,
) -> Solution:
    r"""Solve :math:`dy/dt = f(t, y(t), y(t - \tau_1), ..., y(t - \tau_L), p)` with :math:`y = ` history up to t0.

    By the method of steps: no step is longer than the least lag, lagged states are interpolated in the row's own
    accepted steps, and the points :math:`t_0 + \sum_l k_l \tau_l`, where a derivative of the solution jumps, are ends
    of steps, so that the order of the method is kept. A lag much smaller than the span costs span / lag steps at
    least. Lags are constants of a row (they may be parameters, with gradients), equations of neutral type (with
    lagged derivatives) and lags that depend on the state are not solved.

    Args:
        f: ``f(t, y, lagged, p)`` for one row: t ``()``, y ``(D,)`` (or the structure of the state), ``lagged`` a tuple
            with y(t - lag) for each lag in their order, ``lagged[0]`` also where there is one lag, p as given;
            returns dy/dt like y, in units of y per unit of t. ``f(t, y, lagged)`` without parameters works.
        history: The state up to t0: a constant ``(*batch, D)`` (or a dict or named tuple of ``(*batch,)``), or a
            function ``history(t, p)`` (or ``history(t)``) of one row, with the state at t <= t0; y(t0) is history(t0).
            Jumps inside it are not looked for. Gradients flow to the constant, or to what the function uses.
        lags: Positive, in units of t: a float or ``()``, ``(L,)``, or per row ``(*batch, L)``; or a list of L numbers
            or tensors ``(*batch,)``. The last dimension always counts lags: one lag per row is ``(*batch, 1)``.
        times: Output times, ``(T,)`` or ``(*batch, T)``, not before t0; repeated times are replicates.
        params: Tensor, float, or dict, list, tuple or named tuple of these; leading dimensions are batch.
        t0: Where the history ends, ``()`` or ``(*batch,)``; the first time by default.
        method: ``"tsit5"`` (default), ``dopri5``, ``bosh3``, ``dopri8``, ``heun``; with a fixed step also ``rk4``,
            ``midpoint``, ``euler``. Stiff equations: ``kvaerno5``, ``kvaerno3``, ``trbdf2``, on the torch engine.
        rtol: Relative tolerance; 1e-6 for float64, 1e-4 for float32.
        atol: Absolute tolerance in units of y; 1e-8 for float64, 1e-6 for float32.
        step_size: Between breaking points take equal steps of at most this size, in units of t.
        gradient: ``"discrete"`` (exact for the accepted steps, which are held fixed), or ``"forward"`` (the same by
            forward sensitivities).
        engine: ``"auto"``, ``"fused"`` (one compiled kernel; CPU), ``"torch"`` (any device).
        event_dims: Trailing dimensions of a parameter (or structured state) that belong to one row, by name.
        max_steps: Most steps of a row in the whole solve, rejected ones included.
        on_failure: ``"raise"``, or ``"nan"``: failed rows (also those whose lag is not positive) are NaN.
        replay: A solution of a delay equation whose accepted steps are taken again, without error control.
        memory_budget: Only None: all steps are looked back at, so none can be left out.

    Returns:
        The :class:`Solution`; failed rows have zero gradients and never touch their neighbours.

    Raises:
        SolveError: If rows fail (``on_failure="raise"``), or for settings that cannot be met.
        ShapeError: For shapes, dtypes or devices that do not fit.
        DataError: For times that are not finite or before t0, and lags that are not positive.
        GradientPathError: For ``gradient="adjoint"``.

    References:
        Bellen, A. and Zennaro, M. (2003). Numerical Methods for Delay Differential Equations, Oxford.
        Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", 2nd ed., Springer 1993, II.17.

    Example:
        >>> import torch, pyro_latentde as lde
        >>> lag = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        >>> one, times = torch.ones(1, dtype=torch.float64), torch.tensor([0.0, 1.0, 2.0])
        >>> solution = lde.ddesolve(lambda t, y, lagged: -lagged[0], one, lag, times)
        >>> [round(y, 6) for y in solution.ys[:, 0].tolist()]  # 1, 1 - t, 1 - t + (t - lag)^2 / 2
        [1.0, 0.0, -0.5]
        >>> solution.ys[-1, 0].backward()
        >>> round(lag.grad.item(), 6)
        -1.0
    """
    _check_settings(method, gradient, engine)
    posed = pose_delays(f, history, lags, times, params, t0, event_dims, on_failure == "raise" and replay is None)
    first = posed.problem
    _no_budget(memory_budget)
    settings = SolveSettings.checked(
        method, rtol, atol, step_size, gradient, max_steps, on_failure, replay, first.tensors[0].dtype
    )
    _check_method(settings.method)
    engine_name, reason = choose_delay_engine(posed, engine, settings)
    function = delay_function(posed, engine_name, settings, _wants_gradient(first.tensors))
    ys, report = apply(function, first.rows, first.shared, *first.tensors)
    ys = _as_given(ys, first.order, first.rows)
    if on_failure == "raise":
        raise_delay_failures(posed, report, ys)
    batch = first.batch
    if len(batch) != 1:
        ys, report = ys.reshape(*batch, *ys.shape[1:]), report.reshape(*batch, 5)

    def again(t: Tensor) -> Any:
        keywords = {**settings.keywords, "engine": engine_name, "event_dims": event_dims, "on_failure": "nan"}
        return _at(t, posed, lambda times, start: ddesolve(f, history, lags, times, params, t0=start, **keywords))

    def steps() -> Tensor:
        found = _accepted(posed, engine_name, settings)
        return found.reshape(*batch, *found.shape[1:])

    return Solution(
        ys=posed.state.unflatten(ys),
        times=first.times,
        method=settings.method,
        rtol=settings.rtol,
        atol=settings.atol,
        step_size=settings.step_size,
        engine=engine_name,
        reason=reason,
        shape_of_state=posed.state,
        _report=report,
        _again=again,
        _steps=steps,
        _start=first.tensors[2].detach(),
        _decay=lambda row: math.nan,  # the field alone does not tell how fast a delay equation decays
    )


def _check_settings(method: str | None, gradient: str, engine: str) -> None:
    if gradient == "adjoint":
        raise GradientPathError(
            'gradient="adjoint": a delay equation has only the discrete gradient, exact for the accepted steps: leave '
            'gradient out, or give "discrete" (or "forward").'
        )
    if engine == "torchdiffeq":
        raise SolveError('engine="torchdiffeq" does not solve delay equations; expected "auto", "fused" or "torch".')


def _no_budget(memory_budget: Any) -> None:
    if memory_budget is not None:
        raise SolveError(
            f"memory_budget = {memory_budget!r}: a delay equation looks back at all of its steps, so none can be left "
            "out; expected None. Solve fewer rows at once."
        )


def _check_method(method: str) -> None:
    if get_method(method).kind not in ("explicit", "implicit"):
        raise SolveError(
            f'method {method!r} does not solve delay equations: give "tsit5", or "kvaerno5" where they are stiff.'
        )


def _wants_gradient(tensors: tuple[Tensor, ...]) -> bool:
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _as_given(ys: Tensor, order: Tensor | None, rows: int) -> Tensor:
    """From sorted times back to the order of the user's."""
    if order is None:
        return ys
    back = order.reshape(-1, order.shape[-1]).expand(rows, -1).argsort(dim=-1)
    return ys.gather(1, back[..., None].expand(ys.shape))


def _at(t: Tensor, posed: DelayProblem, solve: Callable[[Tensor, Tensor], Solution]) -> Any:
    """Solve again with outputs at t. The last time stays an output, so the steps are the same ones."""
    problem = posed.problem
    points = t.reshape(1) if t.ndim == 0 else t
    start = problem.tensors[2]
    start = start if problem.shared[2] else start.reshape(problem.batch)
    end = problem.times.amax(-1, keepdim=True)
    outside = peek(((points < start[..., None]) | (points > end)).any())
    if outside is not None and outside:
        raise SolveError(
            f"at() was asked for times outside the solved span [{start.min().item():g}, {end.max().item():g}]; got "
            f"{points.detach().flatten().tolist()[:6]}. Solve again with times that reach there; before t0 the state "
            "is the history."
        )
    lead = torch.broadcast_shapes(points.shape[:-1], end.shape[:-1])
    solution = solve(torch.cat([points.expand(*lead, -1), end.expand(*lead, 1)], dim=-1), start)
    pick = 0 if t.ndim == 0 else slice(0, points.shape[-1])
    dim = len(problem.batch)
    return torch.utils._pytree.tree_map(lambda x: x[(slice(None),) * dim + (pick,)], solution.ys)


def _accepted(posed: DelayProblem, engine: str, settings: SolveSettings) -> Tensor:
    """Sizes of the accepted steps, and the lags they were chosen for, ``(R, N, 1 + L)``, by solving once more."""
    problem = posed.problem
    with torch.no_grad():
        function = delay_function(posed, engine, settings, True)
        _, report = function.run(problem.rows, problem.shared, [t.detach() for t in problem.tensors])
        found = find_steps(report)
    return torch.from_numpy(found.plan()).to(problem.tensors[0]) if engine == "fused" else found.h
