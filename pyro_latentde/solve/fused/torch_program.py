# SPDX-License-Identifier: Apache-2.0
"""A graph as a list of torch operations on all rows, with one operation for a whole layer."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_latentde.solve.fused.graph import Matrix, Node, reachable
from pyro_latentde.solve.fused.lanes.layers import Member, Run, Same, family
from pyro_latentde.solve.fused.torch_ops import apply_op, constant

__all__ = ["Program"]

Values = list[Tensor]
Step = Callable[[Values, Tensor, Tensor, Sequence[Tensor]], Tensor]


class Program:
    """Steps in order, each of which makes one value: ``(R,)`` or ``()`` of a node, ``(R, n)`` or ``(n,)`` of a row."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.nodes: dict[Node, int] = {}
        self.rows: dict[tuple[Node, ...], int] = {}
        self.known: dict = {}

    def run(self, t: Tensor, y: Tensor, leaves: Sequence[Tensor]) -> Values:
        """All values at t ``(R,)`` and y ``(R, D)``; leaves are flat, ``(n,)`` where shared or ``(R, n)``."""
        values: Values = []
        for step in self.steps:
            values.append(step(values, t, y, leaves))
        return values

    def put(self, step: Step) -> int:
        self.steps.append(step)
        return len(self.steps) - 1

    def each(self, nodes: Sequence[Node]) -> list[int]:
        """Nodes by themselves."""
        self.products(nodes)
        for node in reachable(nodes, self.nodes):
            if node not in self.nodes:
                self.nodes[node] = self._node(node)
        return [self.nodes[node] for node in nodes]

    def products(self, nodes: Sequence[Node]) -> None:
        """Matrix products that the nodes depend on, in order."""
        for node in reachable(nodes, self.nodes):
            if node.op == "matvec" and node not in self.nodes:
                self.nodes[node] = self._product(node)

    def _node(self, node: Node) -> int:
        if node.op == "const":
            return self.put(lambda values, t, y, leaves: constant(node, y))
        if node.op == "t":
            return self.put(lambda values, t, y, leaves: t)
        if node.op == "y":
            return self.put(lambda values, t, y, leaves: y[:, node.args[0]])
        if node.op == "leaf":
            return self.put(lambda values, t, y, leaves: leaves[node.args[0]][..., node.args[1]])
        if node.op == "elem":
            product, i = self.nodes[node.args[0]], node.args[1]
            return self.put(lambda values, t, y, leaves: values[product][:, i])
        if node.op in ("gather", "search"):
            return self._looked_up(node)
        places = [self.nodes[a] for a in node.args]
        return self.put(lambda values, t, y, leaves: apply_op(node.op, [values[p] for p in places], y))

    def _looked_up(self, node: Node) -> int:
        *_, wanted = node.args
        leaf, offset, stride, size = node.args[:4]
        place, right = self.nodes[wanted], node.op == "search" and node.args[4]

        def gather(values: Values, t: Tensor, y: Tensor, leaves: Sequence[Tensor]) -> Tensor:
            index, table = (offset + stride * values[place].clamp(0, size - 1)).expand(t.shape), leaves[leaf]
            return table[index] if table.ndim == 1 else table.gather(1, index[:, None])[:, 0]

        def search(values: Values, t: Tensor, y: Tensor, leaves: Sequence[Tensor]) -> Tensor:
            knots = leaves[leaf][..., offset + stride * torch.arange(size, device=y.device)].detach()
            x = values[place].detach()[..., None]
            return ((knots <= x) if right else (knots < x)).sum(-1)

        return self.put(gather if node.op == "gather" else search)

    def _product(self, node: Node) -> int:
        matrix, vector = node.args
        x, view = self.row(vector), _view(matrix)

        def product(values: Values, t: Tensor, y: Tensor, leaves: Sequence[Tensor]) -> Tensor:
            weights, inputs = view(leaves[matrix.leaf]), values[x].expand(len(t), matrix.shape[1])
            if weights.ndim == 2:
                return torch.nn.functional.linear(inputs, weights)
            return torch.bmm(weights, inputs[..., None])[..., 0]

        return self.put(product)

    def row(self, nodes: tuple[Node, ...]) -> int:
        """Nodes side by side."""
        if nodes not in self.rows:
            self.products(nodes)
            self.rows[nodes] = self._row(nodes)
        return self.rows[nodes]

    def _row(self, nodes: tuple[Node, ...]) -> int:
        kind = family(nodes, self.known) if len(nodes) > 1 else None
        if kind is None:
            places = self.each(nodes)
            return self.put(lambda v, t, y, leaves: torch.stack([v[p].expand(t.shape) for p in places], dim=-1))
        if isinstance(kind, Same):
            (place,) = self.each([kind.node])
            return self.put(lambda v, t, y, leaves: v[place][..., None] if v[place].ndim else v[place])
        if isinstance(kind, Run):
            return self._run(kind, len(nodes))
        if _is_elu(kind):
            inside = self.row(_members(nodes, 1))
            return self.put(lambda v, t, y, leaves: torch.nn.functional.elu(v[inside]))
        places = [self.row(_members(nodes, i)) for i in range(len(kind.args))]
        return self.put(lambda v, t, y, leaves: apply_op(kind.op, [v[p] for p in places], y))

    def _run(self, run: Run, size: int) -> int:
        chosen = _slice(run.first, run.stride, size)
        if run.op == "y":
            return self.put(lambda v, t, y, leaves: y[:, chosen])
        if run.op == "leaf":
            return self.put(lambda v, t, y, leaves: leaves[run.owner[0]][..., chosen])
        product = self.nodes[run.owner[0]]
        return self.put(lambda v, t, y, leaves: v[product][:, chosen])


def _is_elu(kind: Member) -> bool:
    """``x if x > 0 else expm1(0 if x > 0 else x)``: five operations that torch has as one."""
    if kind.op != "where" or not isinstance(kind.args[2], Member) or kind.args[2].op != "expm1":
        return False
    positive, x, (safe,) = kind.args[0], kind.args[1], kind.args[2].args
    zero = isinstance(safe, Member) and safe.op == "where" and isinstance(safe.args[1], Same) and safe.args[1].node
    return (
        bool(zero)
        and zero.op == "const"
        and zero.args[0] == 0
        and safe.args == (positive, Same(zero), x)
        and isinstance(positive, Member)
        and (positive.op, positive.args) == ("gt", (x, Same(zero)))
    )


def _members(nodes: tuple[Node, ...], i: int) -> tuple[Node, ...]:
    return tuple(n.args[i] for n in nodes)


def _slice(first: int, stride: int, size: int) -> slice | list[int]:
    return slice(first, first + stride * size, stride) if stride > 0 else [first + i * stride for i in range(size)]


def _view(matrix: Matrix) -> Callable[[Tensor], Tensor]:
    """From a flat parameter, ``(n,)`` or ``(R, n)``, to the matrix in it: a view where its entries lie together."""
    rows, columns = matrix.shape
    span = slice(matrix.offset, matrix.offset + rows * columns)
    if (matrix.row, matrix.column) == (columns, 1):
        return lambda leaf: leaf[..., span].unflatten(-1, (rows, columns))
    if (matrix.row, matrix.column) == (1, rows):
        return lambda leaf: leaf[..., span].unflatten(-1, (columns, rows)).mT
    at = matrix.offset + matrix.row * torch.arange(rows)[:, None] + matrix.column * torch.arange(columns)
    return lambda leaf: leaf[..., at.to(leaf.device)]
