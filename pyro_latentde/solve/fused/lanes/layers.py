# SPDX-License-Identifier: Apache-2.0
"""Layers of a network found again in the scalar graph: rows of nodes that differ in an index only become one loop.

A *family* is a tuple of nodes with the same operations at every place, whose leaves advance by a fixed stride: the
units of a layer, say ``elu(elem(product, i) + leaf(2, i))`` for i = 0..19.
"""

from dataclasses import dataclass

from pyro_latentde.solve.fused.graph import Node
from pyro_latentde.solve.fused.scalar_ops import OPS

__all__ = ["Member", "Run", "Same", "family"]

INDEXED = {"elem", "leaf", "y", "seed"}


@dataclass(frozen=True)
class Same:
    """One node for all members."""

    node: Node


@dataclass(frozen=True)
class Run:
    """Leaves ``op(*owner, first + i * stride)``."""

    op: str
    owner: tuple
    first: int
    stride: int


@dataclass(frozen=True)
class Member:
    """An operation on families."""

    op: str
    nodes: tuple[Node, ...]
    args: "tuple[Same | Run | Member, ...]"


def family(
    nodes: tuple[Node, ...], known: "dict[tuple[Node, ...], Same | Run | Member | None]"
) -> Same | Run | Member | None:
    """What the nodes have in common, or None if they are of different kinds; ``known`` remembers."""
    if nodes not in known:
        known[nodes] = _family(nodes, known)
    return known[nodes]


def _family(nodes: tuple[Node, ...], known: dict) -> Same | Run | Member | None:
    first = nodes[0]
    if all(n is first for n in nodes):
        return Same(first)
    if any(n.op != first.op or len(n.args) != len(first.args) or n.kind != first.kind for n in nodes):
        return None
    if first.op in INDEXED:
        return _run(nodes)
    if first.op not in OPS:
        return None
    columns = list(zip(*(n.args for n in nodes), strict=True))
    args = tuple(family(column, known) for column in columns)
    return None if None in args else Member(first.op, nodes, args)


def _run(nodes: tuple[Node, ...]) -> Run | None:
    owners, places = {n.args[:-1] for n in nodes}, [n.args[-1] for n in nodes]
    stride = places[1] - places[0]
    if len(owners) > 1 or any(b - a != stride for a, b in zip(places, places[1:], strict=False)):
        return None
    return Run(nodes[0].op, owners.pop(), places[0], stride)
