# SPDX-License-Identifier: Apache-2.0
"""Engine "torchdiffeq": the solvers of that package behind this package's contract.

torchdiffeq takes one time grid and one step for the whole batch. Rows with the same times are solved on them
together. Rows with times of their own are solved from output to output in scaled time: from t_a to t_b every
row has t = t_a + s (t_b - t_a), dy/ds = (t_b - t_a) f(t, y), with s from 0 to 1 shared.

Derivatives by time do not go through torchdiffeq: dy(t)/dt = f(t, y(t)), and moving t0 by d moves y0 by
-f(t0, y0) d.

References:
    Chen, Rubanova, Bettencourt, Duvenaud, Neural ordinary differential equations, NeurIPS 2018.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint

from pyro_latentde.errors import GradientPathError, SolveError
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.row_solution import MAX_STEPS, NON_FINITE, OK, UNDERFLOW, RowSolution

__all__ = ["solve_torchdiffeq"]

_ADAPTIVE = {"dopri5": "dopri5", "dopri8": "dopri8", "bosh3": "bosh3", "heun": "adaptive_heun"}
_FIXED = {"rk4": "rk4", "heun": "heun2", "midpoint": "midpoint", "euler": "euler"}
_FAILURES = (
    ("underflow in dt nan", NON_FINITE),
    ("underflow in dt", UNDERFLOW),
    ("max_num_steps exceeded", MAX_STEPS),
    ("non-finite values in state", NON_FINITE),
)


def solve_torchdiffeq(
    f: Callable[..., Tensor],
    y0: Tensor,
    times: Tensor,
    t0: Tensor,
    params: tuple[Tensor, ...],
    method: str | Method,
    rtol: float,
    atol: float,
    max_steps: int,
    adjoint: bool,
    step_size: float | None = None,
) -> RowSolution:
    """Solve R rows with torchdiffeq; ``ys`` carries gradients to ``y0``, ``params``, ``times`` and ``t0``.

    Args:
        f: ``f(t (R,), y (R, D)) -> (R, D)``, closing over ``params`` and nothing else that needs a gradient.
        y0: Initial states, ``(R, D)``.
        times: Output times, sorted per row in its direction of integration, ``(R, T)``.
        t0: Start times, ``(R,)``.
        params: The tensors f depends on.
        method: dopri5, dopri8, bosh3, heun; with ``step_size`` rk4, heun, midpoint, euler.
        rtol: Relative tolerance, of the root mean square over all rows.
        atol: Absolute tolerance, likewise.
        max_steps: Most steps from one output to the next.
        adjoint: Gradients by solving the adjoint equation backward instead of differentiating the steps.
        step_size: Equal steps of at most this size, in the unit of time.

    Returns:
        The solution; one row that fails makes all fail, with NaN everywhere. ``steps`` are torchdiffeq's own.

    Raises:
        SolveError: If torchdiffeq has no such method, or none that chooses its steps.
        GradientPathError: If ``adjoint`` would lose the gradient of a tensor that is not in ``params``.

    Example:
        >>> import torch
        >>> from pyro_latentde.solve.adapters.torchdiffeq import solve_torchdiffeq
        >>> rate = torch.tensor(0.5, requires_grad=True)
        >>> y0, times, t0 = torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1)
        >>> out = solve_torchdiffeq(
        ...     lambda t, y: -rate * y, y0, times, t0, (rate,), "dopri5", 1e-6, 1e-8, 100, adjoint=True
        ... )
        >>> out.ys.sum().backward()
        >>> round(rate.grad.item(), 3)
        -0.607
    """
    name = _their_name(method if isinstance(method, str) else method.name, step_size)
    if adjoint and torch.is_grad_enabled():
        _refuse_hidden_tensors(f, y0, t0, params)
    run = _Run(f, tuple(params) if adjoint else None, name, rtol, atol, max_steps, step_size)
    start, at, by = _moved_start(f, y0, t0), times.detach(), t0.detach()
    try:
        together = bool((at == at[:1]).all() and (by == by[:1]).all())
        ys = (run.on_shared_times if together else run.on_own_times)(start, at, by)
    except AssertionError as error:
        status = next((code for text, code in _FAILURES if str(error).startswith(text)), None)
        if status is None:
            raise
        # NaN everywhere, but connected: a gradient asked for is zero, not an error about a missing graph.
        nothing = sum(x.sum() * 0 for x in (y0, times, t0, *params) if x.is_floating_point())
        ys = torch.full((*times.shape, y0.shape[1]), torch.nan).to(y0) + nothing
        return run.solution(ys, torch.full_like(t0, status, dtype=torch.int64))
    finite = torch.isfinite(ys.detach()).all(2).all(1)
    return run.solution(_moved_outputs(f, ys, times), torch.where(finite, OK, NON_FINITE))


def _their_name(name: str, step_size: float | None) -> str:
    known = _ADAPTIVE if step_size is None else {**_ADAPTIVE, **_FIXED}
    if step_size is not None and not step_size > 0:
        raise SolveError(f"step_size: expected a positive number of time units, got {step_size}.")
    if step_size is None and name in _FIXED and name not in _ADAPTIVE:
        raise SolveError(
            f"method {name!r} does not estimate its error: expected step_size=, got none. "
            f"Give step_size, or choose {', '.join(_ADAPTIVE)}."
        )
    available = known if step_size is None else _FIXED
    if name not in available:
        raise SolveError(
            f"engine 'torchdiffeq' with step_size={step_size}: expected one of the methods "
            f"{', '.join(available)}; got {name!r}. Choose one of these, or engine 'torch' for the others."
        )
    return available[name]


class _Run:
    """Calls of torchdiffeq, and what it reports about them."""

    def __init__(
        self,
        f: Callable[..., Tensor],
        adjoint_params: tuple[Tensor, ...] | None,
        name: str,
        rtol: float,
        atol: float,
        max_steps: int,
        step_size: float | None,
    ) -> None:
        self.f, self.adjoint_params = f, adjoint_params
        self.name, self.rtol, self.atol = name, rtol, atol
        self.max_steps, self.step_size = max_steps, step_size
        self.evals, self.rejected, self.steps = 0, 0, []

    def on_shared_times(self, y: Tensor, times: Tensor, t0: Tensor) -> Tensor:
        grid, place = torch.unique_consecutive(torch.cat([t0[:1], times[0]]), return_inverse=True)
        sign = torch.where(grid[-1] < grid[0], -torch.ones_like(t0), torch.ones_like(t0))

        def field(t: Tensor, y: Tensor) -> Tensor:
            return self.f(t.to(t0).expand(len(y)), y)

        return self._call(field, y, grid, sign, self.step_size)[place[1:]].transpose(0, 1)

    def on_own_times(self, y: Tensor, times: Tensor, t0: Tensor) -> Tensor:
        unit, ys, begin = torch.tensor([0.0, 1.0]).to(times), [], t0
        for end in times.unbind(1):
            span = end - begin
            if bool((span != 0).any()):

                def field(s: Tensor, y: Tensor, begin: Tensor = begin, span: Tensor = span) -> Tensor:
                    return span.to(y)[:, None] * self.f(begin + s.to(begin) * span, y)

                longest = span.abs().max().item()
                step = None if self.step_size is None else min(1.0, self.step_size / longest)
                y = self._call(field, y, unit, span, step)[1]
            ys.append(y)
            begin = end
        return torch.stack(ys, 1)

    def _call(self, func: Callable[..., Tensor], y: Tensor, grid: Tensor, scale: Tensor, step: float | None) -> Tensor:
        """Solve on ``grid``; ``scale`` turns torchdiffeq's time into each row's."""
        if len(grid) == 1:
            return y[None]

        def counted(t: Tensor, y: Tensor) -> Tensor:
            self.evals += 1
            return func(t, y)

        def accept(t: Tensor, y: Tensor, dt: Tensor) -> None:
            self.steps.append(dt.detach().to(scale) * scale)

        def reject(t: Tensor, y: Tensor, dt: Tensor) -> None:
            self.rejected += 1

        options: dict[str, Any] = {"max_num_steps": self.max_steps}
        if step is None:
            counted.callback_accept_step, counted.callback_reject_step = accept, reject
            if self.name != "dopri5":
                # Between steps torchdiffeq interpolates by one quartic for all methods, for dopri8 and bosh3
                # some digits worse than the tolerance; so all but dopri5 step on the outputs.
                options["step_t"] = grid
        else:
            counted.callback_step = accept
            options = {"grid_constructor": _equal_grid(step, self.max_steps), "interp": "cubic"}
        settings = {"rtol": self.rtol, "atol": self.atol, "method": self.name, "options": options}
        if self.adjoint_params is None:
            return odeint(counted, y, grid, **settings)
        return odeint_adjoint(counted, y, grid, adjoint_params=self.adjoint_params, **settings)

    def solution(self, ys: Tensor, status: Tensor) -> RowSolution:
        def same(n: int) -> Tensor:
            return torch.full_like(status, n)

        steps = torch.stack(self.steps, 1) if self.steps else ys.new_zeros(len(status), 0)
        return RowSolution(ys, status, same(len(self.steps)), same(self.rejected), same(self.evals), steps)


def _equal_grid(step: float, max_steps: int) -> Callable[..., Tensor]:
    """torchdiffeq's ``grid_constructor`` for equal steps of at most ``step``."""

    def grid(func: Callable[..., Tensor], y0: Tensor, t: Tensor) -> Tensor:
        n = max(1, math.ceil(abs((t[-1] - t[0]).item()) / step * (1 - 1e-12)))
        # The words of the adaptive solvers' own failure, which the caller turns into a status.
        assert n <= max_steps, f"max_num_steps exceeded ({n}>{max_steps})"
        out = torch.linspace(0.0, 1.0, n + 1).to(t) * (t[-1] - t[0]) + t[0]
        return torch.cat([t[:1], out[1:-1], t[-1:]])

    return grid


def _moved_start(f: Callable[..., Tensor], y0: Tensor, t0: Tensor) -> Tensor:
    """y0 with the derivative by t0 added; its value is unchanged."""
    if not t0.requires_grad:
        return y0
    return y0 - (t0 - t0.detach()).to(y0)[:, None] * f(t0.detach(), y0)


def _moved_outputs(f: Callable[..., Tensor], ys: Tensor, times: Tensor) -> Tensor:
    """ys with the derivatives by the output times added; its values are unchanged."""
    if not times.requires_grad:
        return ys
    at = times.detach()
    slopes = torch.stack([f(at[:, j].contiguous(), ys[:, j]) for j in range(times.shape[1])], 1)
    return ys + (times - at).to(ys)[..., None] * slopes


def _refuse_hidden_tensors(f: Callable[..., Tensor], y0: Tensor, t0: Tensor, params: tuple[Tensor, ...]) -> None:
    """Raise if f depends on a tensor that needs a gradient and is not in ``params``: it would be lost."""
    with torch.enable_grad():
        out = f(t0.detach(), y0.detach())
    ends = {param.grad_fn for param in params if param.grad_fn is not None}
    leaves = {id(param) for param in params}
    waiting, seen = [out.grad_fn], set(ends)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in leaves:
            raise GradientPathError(
                "gradient='adjoint': expected the field to depend only on t, y and its params; it also uses "
                f"a tensor of shape {tuple(variable.shape)} that needs a gradient, which would be lost. "
                "Pass it in params, or use gradient='discrete'."
            )
        waiting.extend(parent for parent, _ in node.next_functions)
