# SPDX-License-Identifier: Apache-2.0
"""The source of a kernel of one vector field and one method, the same for every device."""

from collections.abc import Callable, Sequence

from pyro_latentde.solve.fused import templates
from pyro_latentde.solve.fused.emit import field_source
from pyro_latentde.solve.fused.graph import Graph, Node
from pyro_latentde.solve.methods import Method

__all__ = ["kernel_source"]

_TEMPLATES: dict[str, Callable[[Method, int, int], str]] = {
    "forward": templates.forward_source,
    "adjoint": templates.adjoint_source,
    "tangent": templates.tangent_source,
}


def kernel_source(graph: Graph, outputs: Sequence[Node], leaves: int, method: Method, kind: str) -> tuple[str, int]:
    """Source with a function named ``kind``, and the entries of the work array that it needs.

    Args:
        outputs: The nodes of dy_i/dt.
        leaves: Number of parameters.
        kind: ``"forward"``, ``"adjoint"`` or ``"tangent"``.
    """
    implicit, states = method.kind != "explicit", len(outputs)
    with graph.lock:
        fields = field_source(graph, outputs, tangent=kind == "tangent", jacobian=implicit)
    helpers = [templates.INSERTION_POINT, templates.FIRST_STEP, fields.source]
    if implicit:
        helpers.append(templates.newton_source(method, states))
    source = "\n".join([*helpers, _TEMPLATES[kind](method, states, leaves)])
    return source, templates.work_size(method, states, fields.scratch)
