# SPDX-License-Identifier: Apache-2.0
"""One trial step of every row with its error."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_latentde.solve.events.rows import exact_step
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.torch_engine.implicit import Field, ImplicitStep, implicit_step
from pyro_latentde.solve.torch_engine.runge_kutta import main_stages

__all__ = ["Trial", "given_trial", "rms", "take_trial"]


@dataclass
class Trial:
    """A step that was tried.

    Args:
        k: Stages, each ``(R, D)``.
        y_new: State at its end, ``(R, D)``.
        error: Its norm in units of the tolerance, ``(R,)``.
        converged: False where Newton's method did not, ``(R,)``.
        evals: Evaluations of the field, ``(R,)``.
        implicit: The implicit step, if any row took one.
    """

    k: list[Tensor]
    y_new: Tensor
    error: Tensor
    converged: Tensor
    evals: Tensor
    implicit: ImplicitStep | None = None


def rms(x: Tensor) -> Tensor:
    """Root mean square over the states, ``(R,)``."""
    return torch.sqrt(torch.mean(x**2, dim=1))


def take_trial(
    field: Field,
    method: Method,
    t: Tensor,
    y: Tensor,
    h: Tensor,
    k1: Tensor,
    stiff: Tensor,
    control: tuple[float, float],
) -> Trial:
    """One step of every row; of a switching method implicit where ``stiff``, ``(R,)``."""
    if method.kind == "implicit":
        return _implicit(field, method, t, y, h, k1, control)
    if method.stiff is None or not bool(stiff.any()):
        return _explicit(field, method, t, y, h, k1, control)
    inner = _implicit(field, method.stiff, t, y, torch.where(stiff, h, 0.0), k1, control)
    if bool(stiff.all()):
        return inner
    outer = _explicit(field, method, t, y, torch.where(stiff, 0.0, h), k1, control)
    column = stiff[:, None]
    return Trial(
        [torch.where(column, a, b) for a, b in zip(inner.k, outer.k, strict=True)],
        torch.where(column, inner.y_new, outer.y_new),
        torch.where(stiff, inner.error, outer.error),
        torch.where(stiff, inner.converged, outer.converged),
        torch.where(stiff, inner.evals, outer.evals),
        inner.implicit,
    )


def given_trial(field: Field, method: Method, t: Tensor, y: Tensor, h: Tensor, k1: Tensor) -> Trial:
    """A step of given size, without its error; of an implicit method down to rounding."""
    k, y_new, converged = exact_step(field, method, t, y, h, k1, None)
    evals = torch.full_like(t, method.stages - 1, dtype=torch.int64)
    return Trial(k, y_new, torch.where(converged, 0.0, torch.nan).to(t), converged, evals)


def _explicit(
    field: Field, method: Method, t: Tensor, y: Tensor, h: Tensor, k1: Tensor, control: tuple[float, float]
) -> Trial:
    k, y_new = main_stages(field, method, t, y, h, k1)
    error = _error_norm(_errors(method, h, k), y, y_new, control).to(h)
    evals = torch.full_like(t, method.stages - 1, dtype=torch.int64)
    return Trial(k, y_new, error, torch.ones_like(t, dtype=torch.bool), evals)


def _implicit(
    field: Field, method: Method, t: Tensor, y: Tensor, h: Tensor, k1: Tensor, control: tuple[float, float]
) -> Trial:
    step = implicit_step(field, method, t, y, h, k1, control)
    errors = _errors(method, h, step.k)
    if method.filtered:
        errors = [step.filtered(error) for error in errors]
    error = _error_norm(errors, y, step.y_new, control).to(h)
    return Trial(step.k, step.y_new, error, step.converged, step.iterations, step)


def _errors(method: Method, h: Tensor, k: list[Tensor]) -> list[Tensor]:
    width, found = h.to(k[0].dtype)[:, None], []
    for row in method.errors:
        terms = [weight * stage for weight, stage in zip(row, k, strict=True) if weight != 0.0]
        found.append(width * sum(terms[1:], terms[0]))
    return found


def _error_norm(errors: list[Tensor], y: Tensor, y_new: Tensor, control: tuple[float, float]) -> Tensor:
    rtol, atol = control
    scale = atol + rtol * torch.maximum(y.abs(), y_new.abs())
    norms = [rms(error / scale) for error in errors]
    if len(norms) == 1:
        return norms[0]
    fifth, third = norms
    size = torch.sqrt(fifth**2 + 0.01 * third**2)
    return torch.where(size == 0, 0.0, fifth**2 / size)
