# SPDX-License-Identifier: Apache-2.0
"""Which kernel a traced field gets: one row at a time, or, for networks, several side by side; none if it is too large.

The choice depends on the field, its number type and the method, never on the rows, so that a row gives the same bits
alone and in any batch. Value and gradient of ELU networks 16-w-w-16, 100 output times on [0, 5], dopri5, 1e-5, in
milliseconds of one core (AMD EPYC with AVX-512), several rows side by side in a kernel against the torch engine:

    w, rows     kernel   torch, float32   torch, float64
    64, 64           8              109              102
    200, 64         34               98              111
    200, 512       257              316              581
    400, 64        120              185              331
    400, 512       880              735             1548
    800, 64        515              417              753

Kernels of implicit methods hold the symbolic Jacobian too, as single entries or as a loop over its columns. Seconds to
compile value and gradient, and milliseconds of a solve with its gradient, one row, kvaerno5, 1e-6, beside other work
(Brusselator on a line, and a dense linear system with rates from 1 to 1e4):

    states              compile   kernel   torch engine
    10, Brusselator         2.2      0.7         19,000
    40, Brusselator         2.0      4.5         30,000
    80, Brusselator         3.5       23
    160, Brusselator         16      145        290,000
    300, Brusselator         36      750
    20, dense               2.9      4.7
    40, dense               4.0       26        107,000
    80, dense               2.7      189

Newton's method calls the field so often that operations on small tensors never win; only compiling sets a limit.

Kernels compute in float64 whatever the tensors hold, and read each weight once for all lanes; a matrix product in
float32 does twice as much at a time, and at some width that counts for more than all else.
"""

import torch

from pyro_latentde.solve.fused.cpu import CpuKernel
from pyro_latentde.solve.fused.event_graph import KernelEvents
from pyro_latentde.solve.fused.lanes.kernel import LaneKernel
from pyro_latentde.solve.fused.trace import Trace
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.stops.schedule import Stops

__all__ = ["LARGEST", "LARGEST_STIFF", "WIDEST", "is_wide", "new_kernel", "too_large", "why_fused"]

LARGEST = 1500  # scalar statements; above, compiling takes seconds and matrix products win
LARGEST_STIFF = 3000  # of a field whose Jacobian is needed
WIDEST = {torch.float32: 250_000, torch.float64: 1_000_000}  # entries of all matrices of a network


def in_lanes(trace: Trace, method: Method, smooth: bool = True) -> bool:
    """Whether rows are advanced side by side: networks by explicit methods, where no steps end at doses or jumps."""
    return method.kind == "explicit" and trace.layered and smooth


def is_wide(trace: Trace) -> bool:
    """Whether the field is a network of more statements than a kernel of single rows holds."""
    return trace.size > LARGEST and trace.layered


def too_large(trace: Trace, method: Method, dtype: torch.dtype, device: bool, smooth: bool = True) -> str | None:
    """Why the field gets no kernel for this method, on the CPU or on a ``device``."""
    if in_lanes(trace, method, smooth) and not device:
        if trace.entries <= WIDEST[dtype]:
            return None
        kind = str(dtype).removeprefix("torch.")
        return (
            f"the network has {trace.entries} matrix entries, more than {WIDEST[dtype]}: matrix products in {kind} are "
            f"faster"
        )
    largest = LARGEST_STIFF if method.uses_newton else LARGEST
    if trace.size <= largest:
        return None
    return f"the field has {trace.size} scalar statements, more than {largest}: matrix products are faster"


def why_fused(trace: Trace, method: Method, device: bool, smooth: bool = True) -> str:
    """What the solution says of its kernel."""
    if device:
        return "the field compiles to one kernel, one thread of the device for each row"
    if in_lanes(trace, method, smooth):
        return "the field is a network of layers, and one kernel solves several rows side by side"
    return "the field compiles to one kernel"


def new_kernel(
    trace: Trace, leaves: int, method: Method, stops: Stops | None = None, events: KernelEvents | None = None
) -> CpuKernel:
    """The kernel of a field and of what happens on the way; it compiles when it is first used."""
    if events is None and in_lanes(trace, method, stops is None):
        return LaneKernel(trace.graph, trace.outputs, leaves, method, wide=is_wide(trace))
    return CpuKernel(trace.graph, trace.outputs, leaves, method, stops=stops, events=events)
