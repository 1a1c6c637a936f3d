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
from pyro_latentde.solve.methods import get_method
from pyro_latentde.solve.problem import Problem
from pyro_latentde.solve.solution import Solution

__all__ = ["SolveSettings"]

TOLERANCES = {torch.float64: (1e-6, 1e-8), torch.float32: (1e-4, 1e-6)}
GRADIENTS = ("discrete", "forward", "adjoint")


@dataclass(frozen=True)
class SolveSettings:
    """The keywords of :func:`odesolve`, with defaults filled in."""

    method: str
    rtol: float | None
    atol: float | None
    step_size: float | None
    gradient: str
    max_steps: int
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
    ) -> "SolveSettings":
        """Raise :class:`SolveError` for what cannot be."""
        if replay is not None and not isinstance(replay, Solution):
            raise SolveError(f"replay= expects the Solution whose steps are taken again; got {type(replay).__name__}.")
        if not isinstance(max_steps, Integral) or max_steps < 1:
            raise SolveError(f"max_steps = {max_steps!r}; expected a whole number of at least 1.")
        for name, value in (("rtol", rtol), ("atol", atol), ("step_size", step_size)):
            if isinstance(value, Tensor):
                raise SolveError(
                    f"{name} is a tensor; expected a number: tolerances and steps are settings, not parameters."
                )
        settings = _checked(
            method or (replay.method if replay is not None else "tsit5"),
            rtol,
            atol,
            step_size,
            gradient,
            max_steps,
            on_failure,
            replay is not None,
        )
        return settings if replay is None else replace(settings, replay=replay)

    def for_dtype(self, dtype: torch.dtype) -> "SolveSettings":
        """Fill in the default tolerances; warn where the tolerance is finer than the numbers."""
        if self.rtol is not None and self.step_size is None and self.replay is None:
            _warn_resolution(self.rtol, dtype)
        return _for_dtype(self, dtype) if self.replay is None else _for_dtype.__wrapped__(self, dtype)

    @property
    def control(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("rtol", "atol", "max_steps", "step_size")}

    @property
    def keywords(self) -> dict[str, Any]:
        """As keywords of :func:`odesolve`."""
        return {**self.control, "method": self.method, "gradient": self.gradient, "replay": self.replay}

    def fused(self, keep: bool, checked: bool) -> Any:
        return _fused_settings(
            self.rtol, self.atol, self.max_steps, self.step_size, self.gradient == "forward", keep, checked
        )

    def replay_steps(self, problem: Problem) -> Tensor | None:
        """The steps to take again, ``(rows, N)``."""
        if self.replay is None:
            return None
        steps = self.replay.steps.detach()
        if steps.shape[:-1] != problem.batch:
            raise ShapeError(
                f"replay= is a solution of batch shape {tuple(steps.shape[:-1])}; this problem's is "
                f"{tuple(problem.batch)}. "
                "Every row takes its own steps: solve both with the same batch."
            )
        return steps.reshape(problem.rows, -1)


@lru_cache(maxsize=256)
def _checked(
    method: str,
    rtol: float | None,
    atol: float | None,
    step_size: float | None,
    gradient: str,
    max_steps: int,
    on_failure: str,
    replayed: bool,
) -> SolveSettings:
    chosen = get_method(method)
    for name, value in (("rtol", rtol), ("atol", atol), ("step_size", step_size)):
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
    if not chosen.adaptive and step_size is None and not replayed:
        raise SolveError(
            f"method {chosen.name!r} has no error estimate: give step_size=, or use tsit5, dopri5, bosh3, dopri8 or "
            f"heun."
        )
    return SolveSettings(chosen.name, rtol, atol, step_size, gradient, max_steps, None)


@lru_cache(maxsize=256)
def _for_dtype(settings: SolveSettings, dtype: torch.dtype) -> SolveSettings:
    rtol, atol = TOLERANCES.get(dtype, TOLERANCES[torch.float32])
    return replace(
        settings,
        rtol=rtol if settings.rtol is None else settings.rtol,
        atol=atol if settings.atol is None else settings.atol,
    )


@lru_cache(maxsize=256)
def _fused_settings(
    rtol: float, atol: float, max_steps: int, step_size: float | None, forward: bool, keep: bool, checked: bool
) -> Any:
    from pyro_latentde.solve.fused.operator import Settings

    return Settings(float(rtol), float(atol), max_steps, step_size, "forward" if forward else "adjoint", keep, checked)


def _warn_resolution(rtol: float, dtype: torch.dtype) -> None:
    finest = 10 * torch.finfo(dtype).eps
    if rtol < finest:
        hint = "use y0.double(), or " if dtype != torch.float64 else ""
        warnings.warn(
            f"rtol={rtol:g} is below what {dtype} resolves (about {finest:.1g}): {hint}rtol>={finest:.1g}.",
            UserWarning,
            stacklevel=4,
        )
