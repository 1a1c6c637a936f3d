# SPDX-License-Identifier: Apache-2.0
"""Which kernel a traced field gets: one row at a time, or, for networks, several side by side; none if it is too large.

The choice depends on the field and the method alone, so that a row gives the same bits alone and in any batch.
"""

from pyro_latentde.solve.fused.cpu import CpuKernel
from pyro_latentde.solve.fused.lane_kernel import LaneKernel
from pyro_latentde.solve.fused.trace import Trace
from pyro_latentde.solve.methods import Method
from pyro_latentde.solve.stops import Stops

__all__ = ["LARGEST", "is_wide", "new_kernel", "too_large", "why_fused"]

LARGEST = 1500  # scalar statements; above, compiling takes seconds and matrix products win


def in_lanes(trace: Trace, method: Method, smooth: bool = True) -> bool:
    """Whether rows are advanced side by side: networks by explicit methods, where no steps end at doses or jumps."""
    return method.kind == "explicit" and trace.layered and smooth


def is_wide(trace: Trace) -> bool:
    """Whether the field is a network of more statements than a kernel of single rows holds."""
    return trace.size > LARGEST and trace.layered


def too_large(trace: Trace, method: Method, device: bool, smooth: bool = True) -> str | None:
    """Why the field gets no kernel for this method, on the CPU or on a ``device``."""
    if trace.size <= LARGEST or (in_lanes(trace, method, smooth) and not device):
        return None
    return f"the field has {trace.size} scalar statements, more than {LARGEST}: matrix products are faster"


def why_fused(trace: Trace, method: Method, device: bool, smooth: bool = True) -> str:
    """What the solution says of its kernel."""
    if device:
        return "the field compiles to one kernel, one thread of the device for each row"
    if in_lanes(trace, method, smooth):
        return "the field is a network of layers, and one kernel solves several rows side by side"
    return "the field compiles to one kernel"


def new_kernel(trace: Trace, leaves: int, method: Method, stops: Stops | None = None) -> CpuKernel:
    """The kernel of a field; it compiles when it is first used."""
    kind = LaneKernel if in_lanes(trace, method, stops is None) else CpuKernel
    return kind(trace.graph, trace.outputs, leaves, method, stops=stops)
