# SPDX-License-Identifier: Apache-2.0
"""One Runge-Kutta step of many rows, in plain torch operations that autograd can follow."""

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_latentde.solve.methods.catalog import Method

__all__ = ["accepts_rows", "dense_stages", "interpolate", "interpolation_weights", "main_stages", "restrict"]

Field = Callable[[Tensor, Tensor], Tensor]


def accepts_rows(f: Callable[..., Tensor]) -> bool:
    """True if ``f(t, y, rows)`` can be called, that is, if f can be evaluated on a part of its rows.

    Args:
        f: The batched field, ``f(t, y)`` or ``f(t, y, rows)``.

    Returns:
        Whether f takes a third argument by position.

    Example:
        >>> from pyro_latentde.solve.torch_engine.runge_kutta import accepts_rows
        >>> accepts_rows(lambda t, y: y), accepts_rows(lambda t, y, rows=None: y)
        (False, True)
    """
    try:
        inspect.signature(f).bind(None, None, None)
    except (TypeError, ValueError):
        return False
    return True


def restrict(f: Callable[..., Tensor], rows: Tensor, n_rows: int) -> Field:
    """f on the rows ``rows`` of ``n_rows``; all of them (in order) means f without its third argument."""
    if len(rows) == n_rows:
        return lambda t, y: f(t, y)
    return lambda t, y: f(t, y, rows)


def _combine(weights: Sequence[float], k: Sequence[Tensor]) -> Tensor:
    """Sum of ``weights[i] * k[i]`` in the order of the stages, without the zero weights."""
    total = None
    for weight, stage in zip(weights, k, strict=True):
        if weight != 0.0:
            total = weight * stage if total is None else torch.add(total, stage, alpha=weight)
    return torch.zeros_like(k[0]) if total is None else total


def main_stages(
    field: Field, method: Method, t: Tensor, y: Tensor, h: Tensor, k1: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The main stages of one step per row, and the state at its end.

    k_i = f(t + c_i h, y + h sum_j a_ij k_j),  y_new = y + h sum_i b_i k_i

    Args:
        field: f(t, y) on these rows.
        method: The method.
        t: Start of the step, ``(R,)``.
        y: State there, ``(R, D)``.
        h: Signed step, ``(R,)``.
        k1: f(t, y), ``(R, D)``.

    Returns:
        The stages, s tensors ``(R, D)``, and y_new ``(R, D)``.
    """
    width, k, inner = h.to(y.dtype)[:, None], [k1], y
    for node, row in zip(method.c[1:], method.a[1:], strict=True):
        inner = y + width * _combine(row, k)
        k.append(field(t + node * h, inner))
    return k, inner if method.fsal else y + width * _combine(method.b, k)


def dense_stages(field: Field, method: Method, t: Tensor, y: Tensor, h: Tensor, k: list[Tensor]) -> list[Tensor]:
    """``k`` and the further stages that outputs inside the step need (arguments as ``main_stages``)."""
    width, k = h.to(y.dtype)[:, None], list(k)
    for node, row in zip(method.dense_c, method.dense_a, strict=True):
        k.append(field(t + node * h, y + width * _combine(row, k)))
    return k


def interpolation_weights(method: Method, theta: Tensor, dtype: torch.dtype) -> Tensor:
    """b_i(θ) = sum_q interpolant[i][q] θ^(q+1).

    In double precision whatever the state's: the coefficients of high orders are large and cancel.

    Args:
        method: The method.
        theta: Fractions of the step, ``(M,)``.
        dtype: Dtype of the result.

    Returns:
        ``(M, S)`` for the main and further stages.
    """
    table = torch.tensor(method.interpolant, dtype=torch.float64, device=theta.device)
    theta, total = theta.to(torch.float64)[:, None], 0.0
    for coefficients in reversed(table.unbind(1)):
        total = (total + coefficients) * theta
    return total.to(dtype)


def interpolate(
    method: Method,
    theta: Tensor,
    y: Tensor,
    h: Tensor,
    k: Sequence[Tensor],
    at: Tensor,
    implicit: Tensor | None = None,
) -> Tensor:
    """y(t + θh) = y + h sum_i b_i(θ) k_i for M outputs.

    Args:
        method: The method.
        theta: Fraction of the step per output, ``(M,)``.
        y: States at the start of the step, ``(R, D)``.
        h: Signed steps, ``(R,)``.
        k: Main stages, or all stages (``dense_stages``); missing ones must have weight zero at these θ.
        at: Row of each output, ``(M,)``.
        implicit: Of a switching method, which rows took an implicit step, ``(R,)``.

    Returns:
        ``(M, D)``.
    """
    weights = interpolation_weights(method, theta, y.dtype)
    if implicit is not None:
        weights = torch.where(implicit[at, None], interpolation_weights(method.stiff, theta, y.dtype), weights)
    total = None
    for i, stage in enumerate(k):
        if implicit is not None or any(method.interpolant[i]):
            term = weights[:, i, None] * stage[at]
            total = term if total is None else total + term
    return y[at] + h.to(y.dtype)[at, None] * total
