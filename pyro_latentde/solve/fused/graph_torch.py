# SPDX-License-Identifier: Apache-2.0
"""A scalar graph evaluated in torch, all rows at once: for derivatives of higher order than the kernels give."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_latentde.solve.fused.graph import Graph, Node, reachable

__all__ = ["batched_graph", "graph_field"]

_RENAMED: dict[str, Callable[..., Tensor]] = {
    "and": torch.logical_and,
    "or": torch.logical_or,
    "not": torch.logical_not,
    "mod": lambda a, b: a - b * torch.floor(a / b),  # remainder has no derivative by b
    "stop": torch.detach,
    "to_int": lambda x: x.to(torch.int64),
}


def _apply(op: str, arguments: list[Tensor], like: Tensor) -> Tensor:
    if op == "to_float":
        return arguments[0].to(like.dtype)
    return (_RENAMED.get(op) or getattr(torch, op))(*arguments)


def graph_field(graph: Graph, outputs: Sequence[Node]) -> Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor]:
    """``f(t (R,), y (R, D), leaves) -> (R, D)``; a leaf is flat, ``(n,)`` where shared or ``(R, n)``."""
    order = reachable(outputs)

    def field(t: Tensor, y: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        value: dict[Node, Tensor] = {}
        for node in order:
            value[node] = _value(node, value, t, y, leaves)
        return torch.stack([value[n].expand(t.shape) for n in outputs], dim=-1)

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


def _value(node: Node, value: dict[Node, Tensor], t: Tensor, y: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    if node.op == "const":
        dtype = {"b": torch.bool, "i": torch.int64}.get(node.kind, y.dtype)
        return torch.tensor(node.args[0], dtype=dtype, device=y.device)
    if node.op == "t":
        return t
    if node.op == "y":
        return y[:, node.args[0]]
    if node.op == "leaf":
        return leaves[node.args[0]][..., node.args[1]]
    if node.op == "matvec":
        matrix, vector = node.args
        at = matrix.offset + matrix.row * torch.arange(matrix.shape[0])[:, None]
        at = at + matrix.column * torch.arange(matrix.shape[1])
        x = torch.stack([value[v].expand(t.shape) for v in vector], dim=-1)
        return (leaves[matrix.leaf][..., at.to(y.device)] * x[:, None, :]).sum(-1)
    if node.op == "elem":
        return value[node.args[0]][:, node.args[1]]
    if node.op == "gather":
        leaf, offset, stride, size, index = node.args
        place = (offset + stride * value[index].clamp(0, size - 1)).expand(t.shape)
        table = leaves[leaf]
        return table[place] if table.ndim == 1 else table.gather(1, place[:, None])[:, 0]
    if node.op == "search":
        leaf, offset, stride, size, right, wanted = node.args
        knots = leaves[leaf][..., offset + stride * torch.arange(size, device=y.device)].detach()
        x = value[wanted].detach()[..., None]
        return ((knots <= x) if right else (knots < x)).sum(-1)
    return _apply(node.op, [value[a] for a in node.args], y)
