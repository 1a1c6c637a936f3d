# SPDX-License-Identifier: Apache-2.0
"""The kernels of one vector field and one method as source, the same for every device."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pyro_latentde.solve.events.event import EventTraits
from pyro_latentde.solve.events.watch import capacity
from pyro_latentde.solve.fused import templates
from pyro_latentde.solve.fused.emit import field_source
from pyro_latentde.solve.fused.event_graph import KernelEvents
from pyro_latentde.solve.fused.graph import Graph, Node
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.stops.schedule import Stops

__all__ = ["Kernel"]

_TEMPLATES: dict[str, Callable[..., str]] = {
    "forward": templates.forward_source,
    "adjoint": templates.adjoint_source,
    "tangent": templates.tangent_source,
}


@dataclass
class Kernel:
    """A field by its ``graph`` and the nodes of dy_i/dt, the number of its parameters, a method, and where steps end.

    What a device adds to it are ``forward``, ``adjoint`` and ``tangent``: ``cpu.py`` and ``cuda/kernel.py``.
    """

    graph: Graph
    outputs: list[Node]
    leaves: int
    method: Method
    stops: Stops | None = field(default=None, kw_only=True)
    events: KernelEvents | None = field(default=None, kw_only=True)

    @property
    def traits(self) -> tuple[EventTraits, ...]:
        """What kinds of events there are."""
        return () if self.events is None else self.events.traits

    def event_arrays(self, rows: int) -> list[np.ndarray]:
        """Of events: times ``(R, E)`` and states ``(R, E, D)``, zero; nothing without events."""
        size = capacity(self.traits)
        return [np.zeros((rows, size)), np.zeros((rows, size, self.states))] if size else []

    @property
    def states(self) -> int:
        return len(self.outputs)

    @property
    def width(self) -> int:
        """Numbers that are stored for each accepted step."""
        return templates.record_width(self.method, self.states, self.stops, self.traits)

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
        at = templates.WorkLayout(self.method, self.states, self.stops, self.leaves, self.traits)
        with self.graph.lock:
            fields = field_source(self.graph, self.outputs, at, kind, implicit, halves, self.events)
        helpers = [templates.INSERTION_POINT, templates.FIRST_STEP, fields.source]
        if implicit:
            helpers.append(templates.newton_source(self.method, self.states, self.stops, self.leaves, self.traits))
        if self.stops is not None:
            helpers.append(templates.pass_stop_source(at))
        if self.events is not None and kind == "forward":
            helpers.append(templates.event_functions(self.method, at, self.states))
        source = _TEMPLATES[kind](self.method, self.states, self.leaves, self.stops, self.traits)
        return "\n".join([*helpers, source]), at.scratch + fields.scratch
