# SPDX-License-Identifier: Apache-2.0
"""The kernels of one vector field and one method as source, the same for every device."""

from collections.abc import Callable
from dataclasses import dataclass, field

from pyro_latentde.solve.fused import templates
from pyro_latentde.solve.fused.emit import field_source
from pyro_latentde.solve.fused.graph import Graph, Node
from pyro_latentde.solve.methods import Method
from pyro_latentde.solve.stops import Stops

__all__ = ["Kernel"]

_TEMPLATES: dict[str, Callable[[Method, int, int, Stops | None], str]] = {
    "forward": templates.forward_source,
    "adjoint": templates.adjoint_source,
    "tangent": templates.tangent_source,
}


@dataclass
class Kernel:
    """A field by its ``graph`` and the nodes of dy_i/dt, the number of its parameters, a method, and where steps end.

    What a device adds to it are ``forward``, ``adjoint`` and ``tangent``: ``cpu.py`` and ``cuda.py``.
    """

    graph: Graph
    outputs: list[Node]
    leaves: int
    method: Method
    stops: Stops | None = field(default=None, kw_only=True)

    @property
    def states(self) -> int:
        return len(self.outputs)

    @property
    def width(self) -> int:
        """Numbers that are stored for each accepted step."""
        return templates.record_width(self.method, self.states, self.stops)

    @property
    def carried(self) -> int:
        """Entries of the work array that a step may hand to the next."""
        return templates.WorkLayout(self.method, self.states, self.stops, self.leaves).scratch

    def source(self, kind: str) -> tuple[str, int]:
        """Source with a function named ``kind``, ``"forward"``, ``"adjoint"`` or ``"tangent"``.

        Returns:
            The source, and the entries of the work array that it needs.
        """
        implicit, halves = self.method.uses_newton, self.method.kind == "symplectic"
        at = templates.WorkLayout(self.method, self.states, self.stops, self.leaves)
        with self.graph.lock:
            fields = field_source(self.graph, self.outputs, at, kind == "tangent", implicit, halves)
        helpers = [templates.INSERTION_POINT, templates.FIRST_STEP, fields.source]
        if implicit:
            helpers.append(templates.newton_source(self.method, self.states, self.stops, self.leaves))
        if self.stops is not None:
            helpers.append(templates.pass_stop_source(at))
        source = "\n".join([*helpers, _TEMPLATES[kind](self.method, self.states, self.leaves, self.stops)])
        return source, templates.work_size(self.method, self.states, fields.scratch, self.stops)
