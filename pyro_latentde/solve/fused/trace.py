# SPDX-License-Identifier: Apache-2.0
"""From a PyTorch vector field to a scalar graph: run it once and write down what it does.

Two interception layers, both only while one row is evaluated in a fresh thread: ``Lift`` (see ``lift.py``) exchanges
captured tensors for inputs of the kernel, and :class:`Record`, a ``TorchDispatchMode``, mirrors each operator on arrays
of symbolic scalars (see ``mirrors``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from pyro_latentde.solve.fused.graph import Graph, Node, reachable
from pyro_latentde.solve.fused.lanes.emit import fits_lanes
from pyro_latentde.solve.fused.mirrors import MIRRORS, Sym, constant_sym
from pyro_latentde.solve.lift import Lift, Untraceable, in_fresh_thread, is_wrapped

__all__ = ["Trace", "trace_row"]

_RESHAPE = {"squeeze_", "unsqueeze_", "t_", "transpose_"}  # in place, but they change only how the tensor is looked at


class Record(TorchDispatchMode):
    """Repeats every operator on symbolic scalars."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.table: dict[int, tuple[torch.Tensor, Sym]] = {}
        self.lifted: Callable[[torch.Tensor], Sym | None] = lambda tensor: None

    def put(self, tensor: torch.Tensor, sym: Sym) -> None:
        self.table[id(tensor)] = (tensor, sym)

    def get(self, tensor: torch.Tensor) -> Sym:
        if id(tensor) not in self.table:
            lifted = self.lifted(tensor)
            self.put(tensor, lifted if lifted is not None else constant_sym(self.graph, tensor))
        return self.table[id(tensor)][1]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            raise Untraceable("the field uses torch.no_grad(), which a kernel does not follow; write x.detach()")
        name = func._schema.name.split("::")[-1]
        mirror = MIRRORS.get(name)
        if mirror is None and name.endswith("_") and not name.endswith("__"):
            plain = MIRRORS.get(name[:-1])
            mirror = plain if name in _RESHAPE else _in_place(plain)
        if mirror is None:
            if torch.Tag.nondeterministic_seeded in func.tags:
                raise Untraceable(f"the field calls the random operator {name}: a vector field must be a function")
            return self._decompose(func, args, kwargs, name)
        symbols = tree_map(lambda x: self.get(x) if isinstance(x, torch.Tensor) else x, (args, kwargs))
        result = func(*args, **kwargs)
        image = mirror(self.graph, *symbols[0], **symbols[1])
        self._store(result, image, name)
        return result

    def _store(self, result: Any, image: Any, name: str) -> None:
        if isinstance(result, torch.Tensor):
            if tuple(result.shape) != image.shape:
                raise Untraceable(f"operator {name} was mirrored with shape {image.shape}, torch gave {result.shape}")
            self.put(result, image)
        else:
            for one, its_image in zip(result, image, strict=True):
                self._store(one, its_image, name)

    def _decompose(self, func: Any, args: tuple, kwargs: dict, name: str) -> Any:
        decomposition = decomposition_table.get(func, func.decompose)
        with self:
            result = decomposition(*args, **kwargs)
        if result is NotImplemented:
            raise Untraceable(f"operator {name} has no scalar form here")
        return result


def _in_place(mirror: Callable | None) -> Callable | None:
    """``x.add_(y)`` from ``add``: the object array of x is overwritten, and with it every view of x."""
    if mirror is None:
        return None

    def assign(graph: Graph, target: Sym, *args: Any, **kwargs: Any) -> Sym:
        target.overwrite(mirror(graph, target, *args, **kwargs).nodes(graph))
        return target

    return assign


@dataclass(frozen=True)
class Trace:
    """A vector field as a graph, ``outputs[i]`` = dy_i/dt; leaves are the parameters, then ``captured`` tensors."""

    graph: Graph
    outputs: list[Node]
    captured: int
    eventful: bool = False

    @cached_property
    def nodes(self) -> list[Node]:
        """All that the outputs depend on, operands first."""
        return reachable(self.outputs)

    @cached_property
    def layered(self) -> bool:
        """Whether the field is a network of layers; with events on the way, rows go one by one all the same."""
        return not self.eventful and fits_lanes(self.nodes)

    @cached_property
    def entries(self) -> int:
        """Entries of the matrices of all products that stay loops."""
        shapes = [n.args[0].shape for n in self.nodes if n.op == "matvec"]
        return sum(rows * columns for rows, columns in shapes)

    @property
    def size(self) -> int:
        """Scalar statements of the field."""
        return len(self.nodes)


def trace_row(
    call: Callable[..., torch.Tensor],
    t: torch.Tensor,
    y: torch.Tensor,
    leaves: Sequence[torch.Tensor],
    bound: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
) -> Trace:
    """Trace ``call(t, y, leaves) -> (D,)`` on one row of plain tensors.

    Args:
        bound: pairs (tensor the field reads, its one-row stand-in) that count as further leaves, after ``leaves``.

    Raises:
        Untraceable: with the reason, when some operator has no scalar form.
    """

    def task() -> Trace:
        graph = Graph()
        record = Record(graph)
        row_inputs = [*leaves, *(substitute for _, substitute in bound)]
        assert not any(is_wrapped(x) for x in (t, y, *row_inputs))  # a wrapper would be taken for a constant
        lift = Lift([t, y, *row_inputs], {id(x): s for x, s in bound}, strict=True)

        def lifted(tensor: torch.Tensor) -> Sym | None:
            if not tensor.dtype.is_floating_point:
                return None
            floating = [x for x in lift.stand_ins if x.dtype.is_floating_point]
            for k, substitute in enumerate(floating, len(row_inputs)):
                if substitute is tensor:
                    return _leaf_sym(graph, tensor, k)
            return None

        record.lifted = lifted
        record.put(t, Sym(np.array(graph.leaf("t"), dtype=object)))
        record.put(y, Sym(_objects([graph.leaf("y", i) for i in range(y.numel())]).reshape(tuple(y.shape))))
        for k, leaf in enumerate(row_inputs):
            record.put(leaf, _leaf_sym(graph, leaf, k))
        with record, lift:
            out = lift.adopt(call(t, y, leaves))
        outputs = [_as_float(graph, n) for n in record.get(out).nodes(graph).reshape(-1)]
        return Trace(graph, outputs, sum(x.dtype.is_floating_point for x in lift.captured))

    return in_fresh_thread(task)


def _leaf_sym(graph: Graph, tensor: torch.Tensor, k: int) -> Sym:
    if not tensor.dtype.is_floating_point:
        return constant_sym(graph, tensor)
    return Sym(np.arange(tensor.numel()).reshape(tuple(tensor.shape)), leaf=k)


def _objects(values: list[Node]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _as_float(graph: Graph, node: Node) -> Node:
    return node if node.kind == "f" else graph.apply("to_float", node)
