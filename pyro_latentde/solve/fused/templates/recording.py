# SPDX-License-Identifier: Apache-2.0
"""What a record keeps of a step beside its time, size and state."""

from collections.abc import Callable
from dataclasses import replace

from pyro_latentde.solve.fused.templates.parts import WorkLayout, indent
from pyro_latentde.solve.methods.catalog import Method

__all__ = ["by_kind", "record_end", "record_stages", "zero_stages"]


def by_kind(method: Method, source: Callable[[Method], str]) -> str:
    """Of a switching method, one source or the other."""
    if method.stiff is None:
        return source(method)
    inner, outer = source(method.stiff), source(replace(method, stiff=None))
    return f"if stiff:\n    {indent(inner, 1)}\nelse:\n    {indent(outer, 1)}"


def record_stages(method: Method, at: WorkLayout, d: int, record: str, stages: int) -> str:
    """Implicit steps are not computed twice: their stages are stored, and how the step was taken."""
    if not method.uses_newton:
        return ""
    end = stages * d
    rest = (
        f"\nfor i in range({end}, {at.stages * d}):\n    buf[{record} + {2 + d} + i] = 0.0"
        if end < at.stages * d
        else ""
    )
    kept = f"for i in range({end}):\n    buf[{record} + {2 + d} + i] = w[{at.k} + i]{rest}"
    if method.kind == "switching" and stages > 1:
        kept = f"if stiff:\n    {indent(kept, 1)}"
    kind = "2.0" if stages == 1 else "taken" if method.kind == "implicit" else "(taken if stiff else 0.0)"
    return f"{kept}\nbuf[{record} + {at.width - 1}] = {kind}"


def zero_stages(method: Method, at: WorkLayout, d: int) -> str:
    """All stages of a step of size 0 are its first one."""
    if not method.uses_newton:
        return ""
    return f"""for s in range({at.stages}):
    for i in range({d}):
        buf[pos * {at.width} + {2 + d} + s * {d} + i] = w[{at.k} + i]
buf[pos * {at.width} + {at.width - 1}] = 2.0"""


def record_end(at: WorkLayout, record: str, mark: str, event: str = "0.0") -> str:
    """In which stop and event the step ended."""
    ends = [] if at.stops is None else [f"buf[{record} + {at.mark}] = {mark}"]
    return "\n".join([*ends, f"buf[{record} + {at.event}] = {event}"] if at.events else ends)
