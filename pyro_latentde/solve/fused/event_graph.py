# SPDX-License-Identifier: Apache-2.0
"""The functions of events as nodes of the graph of their field."""

from collections.abc import Sequence
from dataclasses import dataclass

from pyro_latentde.solve.events.event import EventTraits
from pyro_latentde.solve.events.rows import MakeEvents, row_events
from pyro_latentde.solve.fused.graph import Graph, Node
from pyro_latentde.solve.fused.graph_torch import batched_graph

__all__ = ["KernelEvents", "graph_events"]


@dataclass(frozen=True)
class KernelEvents:
    """Conditions, and resets (empty where the state stays as it is), of the events that a kernel looks for."""

    traits: tuple[EventTraits, ...]
    conditions: list[Node]
    resets: list[list[Node]]

    @staticmethod
    def split(nodes: Sequence[Node], traits: Sequence[EventTraits], states: int) -> "KernelEvents":
        """From all conditions, then the resets that there are, one after the other."""
        rest, resets = list(nodes[len(traits) :]), []
        for kind in traits:
            size = states if kind.resets else 0
            resets.append(rest[:size])
            rest = rest[size:]
        return KernelEvents(tuple(traits), list(nodes[: len(traits)]), resets)


def graph_events(graph: Graph, events: KernelEvents) -> MakeEvents:
    """The same events in torch, over rows."""

    def condition(node: Node) -> object:
        make = batched_graph(graph, [node])

        def made(leaves: Sequence, shared: Sequence[bool]) -> object:
            values = make(leaves, shared)
            return lambda t, y, rows: values(t, y, rows)[:, 0]

        return made

    pairs = [
        (condition(node), batched_graph(graph, nodes) if nodes else None)
        for node, nodes in zip(events.conditions, events.resets, strict=True)
    ]
    return row_events(events.traits, pairs)
