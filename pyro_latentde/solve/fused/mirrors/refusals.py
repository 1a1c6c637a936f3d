# SPDX-License-Identifier: Apache-2.0
"""Operators that no scalar graph can hold, and why."""

from typing import Any

from pyro_latentde.solve.fused.graph import Graph
from pyro_latentde.solve.fused.mirrors.symbols import Sym, mirror
from pyro_latentde.solve.lift import Untraceable

__all__: list[str] = []


@mirror("_local_scalar_dense", "is_nonzero", "equal")
def _to_python(graph: Graph, a: Sym, *others: Sym) -> Any:
    raise Untraceable(
        "the field turns a tensor into a Python number or takes a branch on one (if, .item(), float()): "
        "write the branch with torch.where"
    )


@mirror("nonzero", "masked_select", "unique")
def _shape_from_values(graph: Graph, *args: Any, **kwargs: Any) -> Any:
    raise Untraceable("the field makes a tensor whose shape depends on values")
