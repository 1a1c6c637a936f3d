# SPDX-License-Identifier: Apache-2.0
"""One ESDIRK step of many rows in plain torch: simplified Newton, and the stages once more for autograd.

Stage i solves k = f(t + c_i h, base + h gamma k), base = y + h sum_(j<i) a_ij k_j, in the unknown z = h gamma k by
z += (I - h gamma J)^-1 (h gamma f(base + z) - z).

References:
    Hairer, Wanner, Solving Ordinary Differential Equations II, 2nd ed., Springer 1996, IV.8.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_latentde.solve.methods.catalog import Method

__all__ = ["ImplicitStep", "implicit_step", "jacobian", "replayed_stages"]

Field = Callable[[Tensor, Tensor], Tensor]

GOAL = 1e-3  # what Newton's method may leave undone, in units of the tolerance
MOST = 8
EXACT_RTOL, EXACT_MOST = 1e-12, 20  # given steps are solved down to rounding
# A value that is constant, improved so many times by Newton's method in operations that autograd follows, has the
# derivatives of the solution up to this order.
ORDERS = 3


@dataclass
class ImplicitStep:
    """What a step gave: stages, state at its end, which rows converged, iterations, df/dy, and Newton's matrix."""

    k: list[Tensor]
    y_new: Tensor
    converged: Tensor
    iterations: Tensor
    jacobian: Tensor
    matrix: tuple[Tensor, Tensor]

    def filtered(self, error: Tensor) -> Tensor:
        """(I - h gamma J)^-1 error, ``(R, D)``: what is left of it where the equations are stiff."""
        return torch.linalg.lu_solve(*self.matrix, error[..., None])[..., 0]


def jacobian(field: Field, t: Tensor, y: Tensor) -> Tensor:
    """df_i/dy_j of every row, ``(R, D, D)``, without a graph; rows do not touch each other."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        slopes = field(t.detach(), y)
        if not slopes.requires_grad:
            return y.new_zeros(*y.shape, y.shape[1])
        seeds = slopes.sum(0).unbind()
        rows = [torch.autograd.grad(s, y, retain_graph=True, materialize_grads=True)[0] for s in seeds]
    return torch.stack(rows, 1)


def _weighted(weights: Sequence[float], k: Sequence[Tensor]) -> Tensor:
    return sum((w * stage for w, stage in zip(weights, k, strict=True) if w != 0.0), torch.zeros_like(k[0]))


def _newton_matrix(hg: Tensor, jac: Tensor) -> tuple[Tensor, Tensor]:
    eye = torch.eye(jac.shape[-1], dtype=jac.dtype, device=jac.device)
    lu, pivots, _ = torch.linalg.lu_factor_ex(eye - hg[:, None, None] * jac)
    return lu, pivots


@torch.no_grad()
def implicit_step(
    field: Field,
    method: Method,
    t: Tensor,
    y: Tensor,
    h: Tensor,
    k1: Tensor,
    tolerance: tuple[float, float] | None,
) -> ImplicitStep:
    """All stages of one step.

    Args:
        field: f(t, y) on these rows.
        method: An implicit method.
        t: Start of the step, ``(R,)``.
        y: State there, ``(R, D)``.
        h: Signed step, ``(R,)``; rows with 0 stand still.
        k1: Slope there, ``(R, D)``.
        tolerance: rtol and atol of the solve, or None: down to rounding, with a Jacobian for each iteration.

    Returns:
        The step.
    """
    hg, width = (method.gamma * h).to(y.dtype), h.to(y.dtype)[:, None]
    exact, moving = tolerance is None, h != 0
    jac = jacobian(field, t, y)
    matrix = _newton_matrix(hg, jac)
    rtol, atol = tolerance or (EXACT_RTOL, EXACT_RTOL * y.abs().amax(1, keepdim=True).clamp(min=1e-300))
    k, y_new, good, count = [k1], y, torch.ones_like(moving), torch.zeros_like(h, dtype=torch.int64)
    for c, row, guess in list(zip(method.c, method.a, method.predictor, strict=True))[1:]:
        base, z = y + width * _weighted(row[:-1], k), hg[:, None] * _weighted(guess, k)
        busy, last = good & moving, torch.full_like(hg, torch.inf)
        for m in range(EXACT_MOST if exact else MOST):
            y_new = base + z
            slope = field(t + c * h, y_new)
            if exact:
                matrix = _newton_matrix(hg, jacobian(field, t + c * h, y_new))
            delta = torch.linalg.lu_solve(*matrix, (hg[:, None] * slope - z)[..., None])[..., 0]
            z = torch.where(busy[:, None], z + delta, z)
            y_new = base + z
            norm = (delta / (atol + rtol * torch.maximum(y.abs(), y_new.abs()))).square().mean(1).sqrt()
            count += busy
            done, lost = _judge(exact, m, norm, last)
            good, busy, last = good & ~(busy & lost), busy & ~done & ~lost, norm
            if not bool(busy.any()):
                break
        good = good & ~busy
        k.append(torch.where(moving[:, None], z / hg[:, None], k1))
    return ImplicitStep(k, torch.where(moving[:, None], y_new, y), good, count, jac, matrix)


def _judge(exact: bool, m: int, norm: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that have converged, and rows that will not."""
    lost = ~torch.isfinite(norm)
    if exact:
        return (norm < 100.0) | ((norm >= last) & (norm < 1e4) & (m > 1)), lost
    rate = norm / last
    left = rate / (1.0 - rate) * norm
    return (norm < GOAL * 1e-1) | ((m > 0) & (rate < 1.0) & (left < GOAL)), lost | ((m > 0) & (rate >= 1.0))


def replayed_stages(
    field: Field, method: Method, t: Tensor, y: Tensor, h: Tensor, k1: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Stages and the state at the end of one step, differentiable up to order 3 by the implicit function theorem."""
    hg, width = (method.gamma * h).to(y.dtype), h.to(y.dtype)[:, None]
    found = implicit_step(field, method, t.detach(), y.detach(), h.detach(), k1.detach(), None)
    solved = torch.where(found.converged, 0.0, torch.nan)[:, None].to(y.dtype)
    k, inner = [k1], y
    for c, row, value in zip(method.c[1:], method.a[1:], found.k[1:], strict=True):
        base = y + width * _weighted(row[:-1], k)
        at = (base + hg[:, None] * value).detach()
        matrix = _newton_matrix(hg.detach(), jacobian(field, t + c * h, at))
        for _ in range(ORDERS):
            residual = value - field(t + c * h, base + hg[:, None] * value)
            value = value - torch.linalg.lu_solve(*matrix, residual[..., None])[..., 0]
        value = torch.where((h != 0)[:, None], value, k1) + solved
        k.append(value)
        inner = base + hg[:, None] * value
    return k, inner
