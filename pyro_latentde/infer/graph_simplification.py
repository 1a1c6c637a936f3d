# SPDX-License-Identifier: Apache-2.0
"""A recorded log-joint without what needs not be computed at every call."""

from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["simplify"]

_aten = torch.ops.aten
# Of their input they read the shape only, which a recorded graph fixes.
_OF_SHAPES = {
    getattr(_aten, name).default
    for name in ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
}
# They give their input again where the shape stays what it was.
_OF_LAYOUT = {
    getattr(getattr(_aten, name), overload)
    for name, overload in (
        ("alias", "default"),
        ("detach", "default"),
        ("expand", "default"),
        ("lift_fresh_copy", "default"),
        ("reshape", "default"),
        ("slice", "Tensor"),
        ("view", "default"),
        ("_unsafe_view", "default"),
    )
}
_WITH_NEUTRAL = {_aten.add.Tensor: 0, _aten.sub.Tensor: 0, _aten.mul.Tensor: 1, _aten.div.Tensor: 1}


def simplify(graph: fx.GraphModule, *example: Tensor) -> fx.GraphModule:
    """The same function of inputs of these shapes, with fewer operations.

    What depends on constants alone, such as the normaliser of a prior, is computed once; what is computed twice, too;
    and operations are left out that give their input again or whose result nobody reads. Of the log-joint of a small
    model, as ``make_fx`` records it through ``vmap`` and ``grad``, half are of these kinds, and at a handful of chains
    an operation costs about as much as any other.

    Args:
        graph: recorded by ``make_fx``; it is changed.
        example: inputs.

    Returns:
        ``graph``; untouched if an operation changes a tensor in place or draws random numbers.

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> x, scale = torch.ones(3), torch.tensor(2.0)
        >>> graph = make_fx(lambda x: (x + 0.0) / scale.log() + scale.log())(x)
        >>> [node.name for node in simplify(graph, x).graph.nodes if node.op == "call_function"]
        ['div', 'add_1']
    """
    if not all(_is_pure(node) for node in graph.graph.nodes):
        return graph
    results = _Results(graph)
    results.run(*example)
    _fold_constants(graph, results.of)
    _drop_copies(graph, results.of)
    _share(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


class _Results(fx.Interpreter):
    """Runs the graph and keeps what each node gave."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.of: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.of[n] = super().run_node(n)
        return self.of[n]


def _is_pure(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return True  # inputs, constants, the output, and entries of tuples
    return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags


def _fold_constants(graph: fx.GraphModule, results: dict[fx.Node, Any]) -> None:
    constant: set[fx.Node] = set()
    for node in graph.graph.nodes:
        inputs_are = all(source in constant for source in node.all_input_nodes)
        if node.op == "get_attr" or (node.op == "call_function" and (inputs_are or node.target in _OF_SHAPES)):
            constant.add(node)
    # TorchScript refuses outputs that come from no input, so that those which are constant stay computed
    spared = [node for node in graph.graph.output_node().all_input_nodes if node in constant]
    for node in spared:
        spared += [source for source in node.all_input_nodes if source not in spared]
    constant -= set(spared)
    for number, node in enumerate(list(graph.graph.nodes)):
        # tuples are no attributes of a module; their entries, constants as well, are
        used = any(user not in constant for user in node.users)
        if node.op != "call_function" or node not in constant or not used or not isinstance(results[node], Tensor):
            continue
        name = f"_folded_{number}"
        graph.register_buffer(name, results[node], persistent=False)
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.get_attr(name))
    graph.graph.eliminate_dead_code()


def _drop_copies(graph: fx.GraphModule, results: dict[fx.Node, Any]) -> None:
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        if _gives_input_again(node) and _alike(results.get(source), results[node]):
            node.replace_all_uses_with(source)


def _gives_input_again(node: fx.Node) -> bool:
    if node.target in _WITH_NEUTRAL:
        other = node.args[1]
        return not node.kwargs and not isinstance(other, fx.Node) and other == _WITH_NEUTRAL[node.target]
    return node.target in _OF_LAYOUT


def _alike(before: Any, after: Any) -> bool:
    return isinstance(before, Tensor) and before.shape == after.shape and before.dtype == after.dtype


def _share(graph: fx.GraphModule) -> None:
    """Let nodes of the same operation on the same inputs be one."""
    first: dict[Any, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        key = (node.op, str(node.target), repr(node.args), repr(sorted(node.kwargs.items())))
        if first.setdefault(key, node) is not node:
            node.replace_all_uses_with(first[key])
            graph.graph.erase_node(node)
