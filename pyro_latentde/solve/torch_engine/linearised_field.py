# SPDX-License-Identifier: Apache-2.0
"""A vector field and its Jacobian df/dy, all rows at once, both differentiable."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_latentde.solve.engines import batched_field
from pyro_latentde.solve.fused.graph import Graph, Node, reachable, vjp
from pyro_latentde.solve.fused.graph_torch import batched_graph
from pyro_latentde.solve.problem import Problem
from pyro_latentde.solve.torch_engine.differentiable_rows import pulled_back
from pyro_latentde.solve.torch_engine.solve import BatchedField

__all__ = ["LinearisedField", "MakeLinearised", "linearised_field"]

LARGEST = 1000  # graph nodes; above, evaluating the user's own operations over rows is faster than single scalars


class LinearisedField(NamedTuple):
    """A field at t = 0 on chosen rows.

    Args:
        value: ``f(y (N, D), rows (N,)) -> (N, D)``.
        jacobian: ``f(y (N, D), rows (N,)) -> (N, D), (N, D, D)``: the value, and df/dy.
    """

    value: Callable[[Tensor, Tensor], Tensor]
    jacobian: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


MakeLinearised = Callable[[Sequence[Tensor], Sequence[bool]], LinearisedField]


def linearised_field(problem: Problem, engine: str) -> MakeLinearised:
    """The user's field and its Jacobian: ``make(leaves, shared)`` gives a :class:`LinearisedField`.

    Args:
        problem: Any problem of the field.
        engine: ``"fused"``: from the traced graph, where it is small; else by autograd of the user's operations.
    """
    if engine == "fused":
        outputs = _with_jacobian(problem)
        if outputs is not None:
            return _by_graph(problem, outputs)
    return _by_autograd(batched_field(problem))


def _with_jacobian(problem: Problem) -> list[Node] | None:
    """Nodes of f and, row after row, of df/dy; None where they are too many."""
    kernels = problem.info.kernels
    if "jacobian" not in kernels:
        trace = kernels["trace"]
        graph, outputs = trace.graph, list(trace.outputs)
        with graph.lock:
            nodes = [*outputs, *(entry for i in range(len(outputs)) for entry in _gradient(graph, outputs, i))]
        kernels["jacobian"] = nodes if len(reachable(nodes)) <= LARGEST else None
    return kernels["jacobian"]


def _gradient(graph: Graph, outputs: Sequence[Node], i: int) -> list[Node]:
    found = vjp(graph, [outputs[i]], [graph.const(1.0)]).scalars
    return [found.get(graph.leaf("y", j), graph.const(0.0)) for j in range(len(outputs))]


def _by_graph(problem: Problem, outputs: Sequence[Node]) -> MakeLinearised:
    graph, size = problem.info.kernels["trace"].graph, problem.info.state.size
    make_value, make_both = batched_graph(graph, outputs[:size]), batched_graph(graph, outputs)

    def make(leaves: Sequence[Tensor], shared: Sequence[bool]) -> LinearisedField:
        value, both = make_value(leaves, shared), make_both(leaves, shared)

        def jacobian(y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            out = both(_zero(y), y, rows)
            return out[:, :size], out[:, size:].unflatten(1, (size, size))

        return LinearisedField(lambda y, rows: value(_zero(y), y, rows), jacobian)

    return make


def _by_autograd(make_field: Callable[[Sequence[Tensor], Sequence[bool]], BatchedField]) -> MakeLinearised:
    def make(leaves: Sequence[Tensor], shared: Sequence[bool]) -> LinearisedField:
        field = make_field(leaves, shared)

        def jacobian(y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            """One backward pass over D copies of every row, of which copy i asks for the gradient of output i."""
            n, size = y.shape
            keep = torch.is_grad_enabled()
            with torch.enable_grad():
                copies = y.repeat(size, 1)
                copies = copies if copies.requires_grad else copies.requires_grad_()
                out = field(_zero(copies), copies, rows.repeat(size))
                seeds = torch.eye(size, dtype=y.dtype, device=y.device).repeat_interleave(n, 0)
                (slopes,) = pulled_back([out], [copies], [seeds], keep)
            value = out[:n] if keep else out[:n].detach()
            return value, slopes.reshape(size, n, size).transpose(0, 1)

        return LinearisedField(lambda y, rows: field(_zero(y), y, rows), jacobian)

    return make


def _zero(y: Tensor) -> Tensor:
    return y.new_zeros(y.shape[0])
