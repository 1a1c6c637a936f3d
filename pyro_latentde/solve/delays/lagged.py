# SPDX-License-Identifier: Apache-2.0
r"""States at t - lag, from the accepted steps of the same row.

A step is no longer than the least lag, so that lagged times lie in steps that are done, or before t0. Record m of a row
is its step from :math:`t_m` to :math:`t_m + h_m` with its stages:

.. math:: y(t - \tau) = y_m + h_m \sum_i b_i(\theta) k_i^m, \qquad \theta = (t - \tau - t_m) / h_m

At the end of a record its successor begins. The first stage of a step takes the later of the two, all other stages the
earlier: a step lies to one side of every jump of a derivative, and so does the derivative by the lag.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_latentde.solve.delays.field import DelayedField
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.torch_engine.runge_kutta import interpolation_weights

__all__ = ["Nodes", "Records", "StepField", "lagged_states", "locate"]

SNAP = 1e-6  # of a step: so near to the end of a record is at it


class Records(NamedTuple):
    """Accepted steps: when each began, counted from t0 ``(Q,)``, sizes ``(Q,)``, states ``(Q, D)``, ``(Q, S, D)``."""

    offset: Tensor
    h: Tensor
    y: Tensor
    k: Tensor


class Nodes(NamedTuple):
    """Where stages of a step ask for lagged states.

    Args:
        s: Lagged times from t0, ``(A, C, L)``; differentiable.
        record: The record each lies in, -1 before t0, ``(A, C, L)``.
    """

    s: Tensor
    record: Tensor


def locate(
    grid: Tensor, count: Tensor, offset: Tensor, h: Tensor, lags: Tensor, c: Sequence[float], scale: Tensor
) -> Tensor:
    """Which record each lagged time lies in; nothing here is differentiated.

    Args:
        grid: When records began, from t0, ``(A, N)``, infinite beyond the last.
        count: Records there are, ``(A,)``.
        offset: Start of the step, from t0, ``(A,)``.
        h: Its size, ``(A,)``.
        lags: ``(A, L)``.
        c: Nodes of the stages.
        scale: Largest time that went into these differences, ``(A,)``, for their rounding.

    Returns:
        ``(A, C, L)``, -1 before t0.
    """
    nodes = torch.tensor(c, dtype=h.dtype, device=h.device)
    s = (offset[:, None] + nodes * h[:, None])[:, :, None] - lags[:, None, :]
    near = (SNAP * h.abs() + 8 * torch.finfo(h.dtype).eps * scale)[:, None, None]
    first = (nodes == 0)[None, :, None]
    sought = torch.where(first, s + near, s - near)
    before = torch.searchsorted(grid.contiguous(), sought.flatten(1).contiguous()).reshape(s.shape)
    return torch.minimum(before, count[:, None, None]) - 1


def lagged_states(
    field: DelayedField,
    method: Method,
    nodes: Nodes,
    y0: Tensor,
    t0: Tensor,
    rows: Tensor,
    gather: Callable[[Tensor, Tensor], Records],
) -> Tensor:
    """The lagged states at all nodes of a step.

    Args:
        field: The field of all rows.
        method: The method.
        nodes: Where they are asked for, of A rows.
        y0: Their states at t0, ``(A, D)``.
        t0: ``(A,)``.
        rows: Their numbers, ``(A,)``.
        gather: From positions among these rows ``(Q,)`` and records ``(Q,)`` to the records.

    Returns:
        ``(A, C, L D)``.
    """
    shape, record = nodes.s.shape, nodes.record.reshape(-1)
    at = torch.arange(shape[0], device=rows.device).repeat_interleave(shape[1] * shape[2])
    early, late = (record < 0).nonzero()[:, 0], (record >= 0).nonzero()[:, 0]
    s, found = nodes.s.reshape(-1), []
    if len(early):
        place = at[early]
        found.append(y0[place] if field.past is None else field.past(t0[place] + s[early], rows[place]))
    if len(late):
        found.append(_interpolated(method, gather(at[late], record[late]), s[late]))
    order = torch.cat([early, late]).argsort()
    return torch.cat(found)[order].reshape(shape[0], shape[1], -1)


def _interpolated(method: Method, records: Records, s: Tensor) -> Tensor:
    theta = (s - records.offset) / records.h
    weights = interpolation_weights(method, theta, records.y.dtype)[:, : records.k.shape[1], None]
    return records.y + records.h.to(records.y)[:, None] * (weights * records.k).sum(1)


class StepField:
    """The field during one step of A rows, as ``field(t, y)``: lagged states are those of the node that t is at.

    Args:
        field: The field of all rows.
        rows: Numbers of these rows, ``(A,)``; None for all.
        t: Start of the step, ``(A,)``.
        h: Size, ``(A,)``; rows that stand still have 0.
        c: Nodes of the stages.
        lagged: Lagged states at the nodes, ``(A, C, L D)``.
    """

    def __init__(
        self, field: DelayedField, rows: Tensor | None, t: Tensor, h: Tensor, c: Sequence[float], lagged: Tensor
    ) -> None:
        self.field, self.rows, self.c, self.lagged = field, rows, c, lagged
        self.moving = int(h.detach().abs().argmax()) if len(h) else 0
        self.t, self.h = t.detach(), h.detach()

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        i, node = self.moving, 0
        if len(t) and float(self.h[i]) != 0.0:
            fraction = float((t.detach()[i] - self.t[i]) / self.h[i])
            node = min(range(len(self.c)), key=lambda n: abs(self.c[n] - fraction))
        return self.field.slope(t, torch.cat([y, self.lagged[:, node]], 1), self.rows)
