# SPDX-License-Identifier: Apache-2.0
"""One given step of many rows in operations that autograd follows: its stages, its outputs, and the stop at its end."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_latentde.solve.methods.catalog import Method, get_method
from pyro_latentde.solve.stops.rows import RowStops
from pyro_latentde.solve.torch_engine.implicit import replayed_stages
from pyro_latentde.solve.torch_engine.runge_kutta import dense_stages, interpolate, main_stages
from pyro_latentde.solve.torch_engine.symplectic import end_slopes, hermite, symplectic_step

__all__ = ["GivenStep", "after_stop", "stopped", "take_given"]

Field = Callable[[Tensor, Tensor], Tensor]


@dataclass
class GivenStep:
    """A step that was taken: ``t``, ``h`` ``(R,)``; states, stages ``(R, D)``; ``implicit`` of a switching method."""

    field: Field
    method: Method
    t: Tensor
    y: Tensor
    h: Tensor
    k: list[Tensor]
    y_new: Tensor
    implicit: Tensor | None

    def at(self, times: Tensor, rows: Tensor, inside: bool) -> Tensor:
        """The state at times ``(M,)`` of these rows, by the interpolant; a step of size 0 is its tangent."""
        width = torch.where(self.h == 0, 1.0, self.h)
        theta = (times - self.t[rows]) / width[rows]
        if self.method.kind == "symplectic":
            ends = end_slopes(self.field, self.t, self.y, self.h, self.y_new, self.k) if inside else self.k
            return hermite(theta, self.y, self.y_new, self.h, ends, rows)
        stages = dense_stages(self.field, self.method, self.t, self.y, self.h, self.k) if inside else self.k
        return interpolate(self.method, theta, self.y, width, stages, rows, self.implicit)


def take_given(
    field: Field, method: Method, t: Tensor, y: Tensor, h: Tensor, k1: Tensor, implicit: Tensor | None
) -> GivenStep:
    """Stages and end of a step, by the method, or by the one of its two that each row took."""
    if method.kind == "implicit":
        k, y_new = replayed_stages(field, method, t, y, h, k1)
    elif method.kind == "symplectic":
        k, y_new = symplectic_step(field, method, t, y, h, k1)
    elif implicit is None or not bool(implicit.any()):
        k, y_new = main_stages(field, method, t, y, h, k1)
    else:
        inner, y_inner = replayed_stages(field, method.stiff, t, y, torch.where(implicit, h, 0.0), k1)
        outer, y_outer = main_stages(field, method, t, y, torch.where(implicit, 0.0, h), k1)
        column = implicit[:, None]
        k = [torch.where(column, a, b) for a, b in zip(inner, outer, strict=True)]
        y_new = torch.where(column, y_inner, y_outer)
    return GivenStep(field, method, t, y, h, k, y_new, implicit)


def stopped(step: GivenStep, stops: RowStops, mark: Tensor, rows: Tensor, exact: bool) -> Tensor:
    """The state at the end of the step, ``(R, D)``; where that is a stop (``mark`` > 0), it moves with the stop."""
    landing = mark > 0
    moment = torch.where(landing, stops.time(rows, mark.abs()), step.t + step.h)
    moved = landing
    if exact:
        gap = (moment - step.t - step.h).abs()
        moved = landing & (gap > 64 * torch.finfo(step.t.dtype).eps * moment.abs())
    if not bool(moved.any()):
        return step.y_new
    every = torch.arange(len(rows), device=rows.device)
    end = torch.where(moved[:, None], step.at(moment, every, True), step.y_new)
    at_start = moved & (step.h == 0)
    return torch.where(at_start[:, None], _stretched(step, moment, at_start), end) if bool(at_start.any()) else end


def _stretched(step: GivenStep, moment: Tensor, rows: Tensor) -> Tensor:
    """The end of steps of size 0, to a stop at the start, as the method takes them when the stop or the start moves.

    Their interpolant is a tangent: first derivatives are right, second ones are not. At size 0 the derivatives of any
    method are those of the solution, up to its order; an explicit one needs no system of equations there.
    """
    h = torch.where(rows, moment - step.t, 0.0)
    method = get_method("tsit5") if step.method.kind == "implicit" else step.method
    return take_given(step.field, method, step.t, step.y, h, step.k[0], None).y_new


def after_stop(
    field: Field, stops: RowStops, mark: Tensor, rows: Tensor, y: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """The state at times next to the stop where the row ended, after what happened there."""
    m = torch.where(mark > 0, mark, 1)
    moment, behind = stops.time(rows, m), stops.dose(y, rows, m)
    slope = stops.between(field, rows, m + stops.ahead[rows], mark > 0)(moment, behind)

    def at(times: Tensor, place: Tensor) -> Tensor:
        return behind[place] + (times - moment[place]).to(y.dtype)[:, None] * slope[place]

    return at
