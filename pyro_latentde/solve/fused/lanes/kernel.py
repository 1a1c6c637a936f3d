# SPDX-License-Identifier: Apache-2.0
"""Kernels of networks: several rows are advanced side by side, one in each lane of the processor's vectors."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pyro_latentde.solve.fused import templates
from pyro_latentde.solve.fused.cpu import SMALL, Arrays, CpuKernel
from pyro_latentde.solve.fused.kernel_cache import load_kernel
from pyro_latentde.solve.fused.lanes.emit import lane_source
from pyro_latentde.solve.fused.lanes.math import lane_math
from pyro_latentde.solve.fused.lanes.sums import GradientSums
from pyro_latentde.solve.fused.machine_code import target

__all__ = ["LaneKernel", "lane_count"]

ROWS_PER_CHUNK = 128  # one more turn of all lanes in each chunk for every so many rows


def lane_count() -> int:
    """Rows side by side: as many floats as a vector of this processor holds, or two vectors of a lesser one."""
    return 8 if "+avx512f" in target()[1].split(",") else 4


@dataclass
class LaneKernel(CpuKernel):
    """The compiled solve of a network by an explicit method.

    A row goes through the same arithmetic in whatever lane and company, so that it gives the same bits alone. There is
    one machine code for each choice of parameters that rows share. A ``wide`` network has no kernel for tangents, which
    is one of single rows and would be as long as the network.
    """

    lanes: int = field(default_factory=lane_count)
    codes: dict = field(default_factory=dict)
    cuts = False

    def chunk(self, rows: int) -> int:
        return self.lanes * max(1, rows // ROWS_PER_CHUNK)

    def room(self, counts: np.ndarray) -> int:
        return len(counts) * (int(counts.max()) + 2)

    def expect(self, taken: list[int], spans: np.ndarray) -> None:
        """Every row has the same room: what the longest needs."""
        longest = int((spans[1::2] - spans[::2]).max())
        self.steps_per_row = max(longest, 0.5 * (self.steps_per_row + longest))

    def forward_kernel(self, a: Arrays) -> tuple[Callable, int, int]:
        return self._code("forward", a)

    def adjoint_kernel(self, a: Arrays) -> tuple[Callable, int, int]:
        return self._code("adjoint", a)

    def _code(self, kind: str, a: Arrays) -> tuple[Callable, int, int]:
        own = tuple(not one for one in a.shared[3:])
        code = self.codes.get((kind, own))
        if code is None:
            _, lengths, strides, _ = a.layout.columns
            sizes = tuple(stride or length for length, stride in zip(lengths, strides, strict=True))
            code = self.codes[kind, own] = self._compile(kind, sizes, own)
        return code

    def _compile(self, kind: str, sizes: tuple[int, ...], own: tuple[bool, ...]) -> tuple[Callable, int, int]:
        at = templates.LaneLayout(self.method, self.states, self.lanes, sizes, own)
        mine = {k: size for k, size in enumerate(sizes) if own[k]}
        sums = GradientSums(at.free, self.lanes, mine) if kind == "adjoint" else None
        with self.graph.lock:
            fields = lane_source(self.graph, self.outputs, at.copies, sums)
        if sums is None:
            template, size = templates.lanes_forward_source(at), at.free + fields.scratch
        else:
            template = templates.lanes_adjoint_source(at, sums.own, sums.end, fields.scratch)
            size = sums.end + at.stages * fields.scratch
        source = "\n".join([lane_math(), fields.source, template])
        return load_kernel(source, kind, SMALL, self.lanes), self.lanes * size, at.counts
