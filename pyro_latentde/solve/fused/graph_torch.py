# SPDX-License-Identifier: Apache-2.0
"""A scalar graph evaluated in torch, all rows at once: for what the kernels do not give.

Derivatives of higher order, and networks too wide for a kernel: there is neither a transform nor a search for captured
tensors in each evaluation, only the operations themselves, one for a whole layer.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from pyro_latentde.solve.fused.graph import Graph, Node
from pyro_latentde.solve.fused.torch_program import Program

__all__ = ["batched_graph", "graph_field"]


def graph_field(graph: Graph, outputs: Sequence[Node]) -> Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor]:
    """``f(t (R,), y (R, D), leaves) -> (R, D)``; a leaf is flat, ``(n,)`` where shared or ``(R, n)``."""
    program, size = Program(), len(outputs)
    result = program.row(tuple(outputs))

    def field(t: Tensor, y: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        return program.run(t, y, leaves)[result].expand(len(t), size)

    return field


def batched_graph(graph: Graph, outputs: Sequence[Node]) -> Callable[[Sequence[Tensor], Sequence[bool]], Callable]:
    """As :func:`graph_field`, for leaves as the user gave them: ``make(leaves, shared)`` gives ``f(t, y, rows)``.

    A leaf is ``(...)`` where shared, else ``(R, ...)``; ``rows`` are those to evaluate, None for all.
    """
    field = graph_field(graph, outputs)

    def make(leaves: Sequence[Tensor], shared: Sequence[bool]) -> Callable[..., Tensor]:
        flat = [x.reshape(-1) if one else x.reshape(x.shape[0], -1) for x, one in zip(leaves, shared, strict=True)]

        def f(t: Tensor, y: Tensor, rows: Tensor | None = None) -> Tensor:
            chosen = flat if rows is None else [x if one else x[rows] for x, one in zip(flat, shared, strict=True)]
            return field(t, y, chosen)

        return f

    return make
