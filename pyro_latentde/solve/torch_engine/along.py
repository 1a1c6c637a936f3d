# SPDX-License-Identifier: Apache-2.0
"""A field evaluated along trajectories that were solved before."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_latentde.solve.engines import batched_field
from pyro_latentde.solve.problem import pose
from pyro_latentde.solve.row_function import apply
from pyro_latentde.solve.torch_engine.differentiable_rows import TorchRows
from pyro_latentde.solve.vector_field import BoundField

__all__ = ["field_along"]


def field_along(
    f: Callable | BoundField,
    y0: Tensor,
    times: Tensor,
    ys: Tensor,
    params: Any = None,
    *,
    t0: Tensor | None = None,
    event_dims: dict[str, int] | None = None,
) -> Tensor:
    """``f(t, y, p)`` at every time of trajectories, as the solver would call it there; with gradients.

    Args:
        f: Vector field of one row.
        y0: Initial state of the solve, ``(*batch, D)``.
        times: Its output times, ``(T,)`` or ``(*batch, T)``, all on one side of t0.
        ys: Its states, ``(*batch, T, D)``.
        params: Its parameters.
        t0: Time of ``y0``; the first time by default.
        event_dims: As for :func:`~pyro_latentde.odesolve`.

    Returns:
        ``(*batch, T, D)``, in units of y per unit of t.

    Example:
        >>> import torch, pyro_latentde as lde
        >>> y0, times = torch.ones(1), torch.linspace(0, 1, 3)
        >>> ys = lde.odesolve(lambda t, y: -2 * y, y0, times).ys
        >>> field_along(lambda t, y: -2 * y, y0, times, ys)[:, 0]
        tensor([-2.0000, -0.7358, -0.2707])
    """
    problem = pose(f, y0, times, params, t0, event_dims)[0]
    make_field = batched_field(problem)

    def compute(rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        times, ys, *leaves = tensors
        times = times.expand(rows, -1)
        row = torch.arange(rows, device=ys.device).repeat_interleave(times.shape[1])
        out = make_field(leaves, shared[2:])(times.reshape(-1), ys.reshape(row.numel(), -1), row)
        return [out.reshape(ys.shape)]

    def empty(rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.empty_like(tensors[1])]

    function = TorchRows(compute, empty, 2 + problem.leaves, range(2 + problem.leaves), (None,))
    shared = (problem.shared[1], False, *problem.shared[3:])
    states = ys.reshape(problem.rows, *ys.shape[-2:])
    (out,) = apply(function, problem.rows, shared, problem.tensors[1], states, *problem.tensors[3:])
    return out.reshape(ys.shape)
