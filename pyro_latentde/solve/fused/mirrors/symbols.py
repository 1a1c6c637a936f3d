# SPDX-License-Identifier: Apache-2.0
"""Symbolic tensors: arrays of graph nodes, and the table of the operators on them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pyro_latentde.solve.fused.graph import Graph, Node
from pyro_latentde.solve.lift import Untraceable

__all__ = ["MIRRORS", "Sym", "arithmetic", "as_float", "constant_sym", "elementwise", "mirror", "nodes_of"]


class Sym:
    """A symbolic tensor: an array of nodes, or, for (views of) a parameter, an integer array of positions in it."""

    def __init__(self, array: np.ndarray, leaf: int | None = None) -> None:
        self.array, self.leaf = array, leaf

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def view(self, array: np.ndarray) -> "Sym":
        return Sym(array, self.leaf)

    def nodes(self, graph: Graph) -> np.ndarray:
        if self.leaf is None:
            return self.array
        out = np.empty(self.array.shape, dtype=object)
        for index in np.ndindex(*self.array.shape):
            out[index] = graph.leaf("leaf", self.leaf, int(self.array[index]))
        return out

    def overwrite(self, nodes: np.ndarray) -> None:
        if self.leaf is not None:
            raise Untraceable("the field writes into a parameter or captured tensor in place")
        self.array[...] = nodes


def constant_sym(graph: Graph, tensor: torch.Tensor) -> Sym:
    """A tensor of literal values: made inside the field from Python numbers, or an integer index table."""
    values = np.asarray(tensor.detach().cpu().numpy())
    out = np.empty(values.shape, dtype=object)
    for index in np.ndindex(*values.shape):
        out[index] = graph.const(values[index].item())
    return Sym(out)


def nodes_of(graph: Graph, value: Any) -> np.ndarray:
    if isinstance(value, Sym):
        return value.nodes(graph)
    out = np.empty((), dtype=object)
    out[()] = graph.const(value)
    return out


def as_float(graph: Graph, node: Node) -> Node:
    return node if node.kind == "f" else graph.apply("to_float", node)


def elementwise(graph: Graph, function: Callable[..., Node], *values: Any) -> Sym:
    """Apply a function of nodes elementwise, with broadcasting."""
    arrays = np.broadcast_arrays(*(nodes_of(graph, v) for v in values))
    out = np.empty(arrays[0].shape, dtype=object)
    for index in np.ndindex(*out.shape):
        out[index] = function(*(a[index] for a in arrays))
    return Sym(out)


def arithmetic(graph: Graph, op: str, *nodes: Node) -> Node:
    """An operation whose boolean operands count as 0 and 1, and whose mixed operands are floats."""
    if any(n.kind == "f" for n in nodes) or op == "div":
        nodes = tuple(as_float(graph, n) for n in nodes)
    elif any(n.kind == "b" for n in nodes):
        nodes = tuple(n if n.kind == "i" else graph.apply("where", n, 1, 0) for n in nodes)
    return graph.apply(op, *nodes)


MIRRORS: dict[str, Callable[..., Any]] = {}


def mirror(*names: str) -> Callable[[Callable], Callable]:
    def register(function: Callable) -> Callable:
        MIRRORS.update(dict.fromkeys(names, function))
        return function

    return register
