# SPDX-License-Identifier: Apache-2.0
"""How to solve: method, tolerances, limits, checked once."""

import math
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from pyro_latentde.errors import ShapeError, SolveError
from pyro_latentde.solve.choices import not_among
from pyro_latentde.solve.lift import in_fresh_thread
from pyro_latentde.solve.memory import budget_bytes
from pyro_latentde.solve.methods.catalog import get_method
from pyro_latentde.solve.problem import Problem
from pyro_latentde.solve.solution import Solution
from pyro_latentde.solve.step_record import width

__all__ = ["SolveSettings"]

TOLERANCES = {torch.float64: (1e-6, 1e-8), torch.float32: (1e-4, 1e-6)}
GRADIENTS = ("discrete", "forward", "adjoint")


@dataclass(frozen=True, eq=False)  # equal keywords give the same object, so that it is its own key
class SolveSettings:
    """The keywords of :func:`odesolve`, with defaults filled in."""

    method: str
    rtol: float | None
    atol: float | None
    step_size: float | None
    gradient: str
    max_steps: int
    memory_budget: int | None
    replay: Solution | None

    @staticmethod
    def checked(
        method: str | None,
        rtol: float | None,
        atol: float | None,
        step_size: float | None,
        gradient: str,
        max_steps: int,
        on_failure: str,
        replay: Solution | None,
        dtype: torch.dtype,
        memory_budget: int | str | None = None,
    ) -> "SolveSettings":
        """Fill in the defaults; warn where the tolerance is finer than the numbers of this dtype.

        Raises:
            SolveError: For what cannot be.
        """
        if replay is not None and not isinstance(replay, Solution):
            raise SolveError(f"replay= expects the Solution whose steps are taken again; got {type(replay).__name__}.")
        replayed = replay is not None
        method = method or (replay.method if replayed else "tsit5")
        budget = budget_bytes(memory_budget)
        try:
            settings = _checked(method, rtol, atol, step_size, gradient, max_steps, on_failure, replayed, dtype, budget)
        except TypeError:  # a list where a number belongs cannot be looked up, but there is a message for it
            settings = _checked.__wrapped__(
                method, rtol, atol, step_size, gradient, max_steps, on_failure, replayed, dtype, budget
            )
        if rtol is not None and rtol < _FINEST[dtype] and step_size is None and not replayed:
            _warn_resolution(rtol, dtype)
        return replace(settings, replay=replay) if replayed else settings

    @property
    def control(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("rtol", "atol", "max_steps", "step_size")}

    @property
    def keywords(self) -> dict[str, Any]:
        """As keywords of :func:`odesolve`."""
        own = {k: getattr(self, k) for k in ("method", "gradient", "memory_budget", "replay")}
        return {**self.control, **own}

    def fused(self, keep: bool, checked: bool) -> Any:
        """As the fused engine needs them."""
        from pyro_latentde.solve.fused.operator import Settings

        sensitivity = "forward" if self.gradient == "forward" else "adjoint"
        control = float(self.rtol), float(self.atol), self.max_steps, self.step_size
        return Settings(*control, sensitivity, keep, checked, self.memory_budget)

    def replay_steps(self, problem: Problem, lags: int = 0) -> Tensor | None:
        """The steps to take again, ``(rows, N)``; where methods alternate ``(rows, N, 2)`` with how each was taken.

        Those of a delay equation with ``lags`` lags are ``(rows, N, 1 + lags)``.
        """
        if self.replay is None:
            return None
        steps = in_fresh_thread(lambda: self.replay._steps().detach())  # the caller's transforms have no part in it
        batch = self.replay.status.shape
        if batch != problem.batch:
            raise ShapeError(
                f"replay= is a solution of batch shape {tuple(batch)}; this problem's is "
                f"{tuple(problem.batch)}. "
                "Every row takes its own steps: solve both with the same batch."
            )
        stops, alternates = problem.stops is not None, get_method(self.method).stiff is not None
        columns = 1 + lags if lags else width(alternates, stops, bool(problem.events))
        expected = (columns,) if columns > 1 else ()
        if steps.shape[len(batch) + 1 :] != expected:
            kind = f"a delay equation with {lags} lag(s)" if lags else f"an equation without lags by {self.method!r}"
            jumps = "and with doses, jumps or inputs with knots" if stops else "and without doses, jumps or knots"
            events = " and with events" if problem.events else ""
            raise SolveError(
                f"replay= expects a solution of {kind} {jumps}{events}, whose steps say as much as this solve needs."
            )
        return steps.reshape(problem.rows, *steps.shape[len(batch) :])


@lru_cache(maxsize=256, typed=True)  # True is no tolerance, although 1 is
def _checked(
    method: str,
    rtol: float | None,
    atol: float | None,
    step_size: float | None,
    gradient: str,
    max_steps: int,
    on_failure: str,
    replayed: bool,
    dtype: torch.dtype,
    budget: int | None,
) -> SolveSettings:
    chosen = get_method(method)
    if not isinstance(max_steps, Integral) or max_steps < 1:
        raise SolveError(f"max_steps = {max_steps!r}; expected a whole number of at least 1.")
    for name, value in (("rtol", rtol), ("atol", atol), ("step_size", step_size)):
        if isinstance(value, Tensor):
            raise SolveError(
                f"{name} is a tensor; expected a number: tolerances and steps are settings, not parameters."
            )
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise SolveError(f"{name} = {value!r}; expected a number.")
        if value is not None and not (math.isfinite(value) and (value > 0 or (value == 0 and name != "step_size"))):
            raise SolveError(f"{name} = {value}; expected a positive number.")
    if gradient not in GRADIENTS:
        raise SolveError(not_among("gradient", gradient, GRADIENTS))
    if on_failure not in ("raise", "nan"):
        raise SolveError(not_among("on_failure", on_failure, ("raise", "nan")))
    if rtol == 0 and atol == 0:
        raise SolveError("rtol and atol are both 0: no step is small enough; expected one of them to be positive.")
    if chosen.stiff is not None and step_size is not None:
        raise SolveError(
            f"method {chosen.name!r} changes between two methods by their step sizes: it takes no step_size=. "
            f"Give {chosen.stiff.name!r} for stiff equations, or tsit5."
        )
    if not chosen.adaptive and step_size is None and not replayed:
        raise SolveError(
            f"method {chosen.name!r} has no error estimate: give step_size=, or use tsit5, dopri5, bosh3, dopri8 or "
            f"heun."
        )
    usual_rtol, usual_atol = TOLERANCES[dtype]
    rtol, atol = usual_rtol if rtol is None else rtol, usual_atol if atol is None else atol
    return SolveSettings(chosen.name, rtol, atol, step_size, gradient, max_steps, budget, None)


_FINEST = {dtype: 10 * torch.finfo(dtype).eps for dtype in TOLERANCES}


def _warn_resolution(rtol: float, dtype: torch.dtype) -> None:
    hint = "use y0.double(), or " if dtype != torch.float64 else ""
    warnings.warn(
        f"rtol={rtol:g} is below what {dtype} resolves (about {_FINEST[dtype]:.1g}): {hint}rtol>={_FINEST[dtype]:.1g}.",
        UserWarning,
        stacklevel=4,
    )
