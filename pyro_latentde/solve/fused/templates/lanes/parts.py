# SPDX-License-Identifier: Apache-2.0
"""Pieces of source that the kernels of several rows share; entry i of the work array is the vector ``w[i, :]``."""

from collections.abc import Sequence
from dataclasses import dataclass

from pyro_latentde.solve.fused.templates.parts import stage_rows
from pyro_latentde.solve.methods.catalog import Method

__all__ = ["LaneLayout", "lane_blend", "lane_combine", "lane_record", "lane_stage"]

FLOATS = ("t", "h", "t_new", "start", "end", "sign", "tried", "before", "error", "total", "theta", "chosen", "slope",
          "t_bar", "offset", "rounding")  # fmt: skip
COUNTS = ("row", "fresh", "j", "accepted", "rejected", "evals", "code", "last", "retry", "unfinished", "planned", "out",
          "n", "begin")  # fmt: skip


@dataclass(frozen=True)
class LaneLayout:
    """Where things lie, for D states, all stages of a method and rows with parameters of their own.

    Args:
        lanes: Rows that are advanced side by side.
        sizes: Entries of each parameter in one row.
        own: Which of them rows do not share.
    """

    method: Method
    d: int
    lanes: int
    sizes: tuple[int, ...]
    own: tuple[bool, ...]

    @property
    def stages(self) -> int:
        return len(self.method.c) + len(self.method.dense_c)

    def __getattr__(self, name: str) -> int:
        """Places of the vectors: numbers of the rows by name, then states, then stages."""
        if name.startswith("_"):
            raise AttributeError(name)
        names = ("y", "y_new", "lam", "bar", "temp")
        if name in FLOATS:
            return FLOATS.index(name)
        if name in names:
            return len(FLOATS) + self.d * names.index(name)
        stages = ("k", "ys", "k_bar")
        return len(FLOATS) + self.d * (len(names) + self.stages * stages.index(name))

    @property
    def parameters(self) -> int:
        """Where the lanes' copies of their own parameters begin."""
        return len(FLOATS) + self.d * (5 + 3 * self.stages)

    @property
    def copies(self) -> dict[int, int]:
        places, at = {}, self.parameters
        for k, (size, own) in enumerate(zip(self.sizes, self.own, strict=True)):
            if own:
                places[k], at = at, at + size
        return places

    @property
    def free(self) -> int:
        """Where there is room for scratch, and for sums of gradients."""
        return self.parameters + sum(size for size, own in zip(self.sizes, self.own, strict=True) if own)

    def count(self, name: str) -> str:
        """A whole number of lane ``l``, in the array of counts."""
        return f"o[{len(self.sizes) + COUNTS.index(name) * self.lanes} + l]"

    @property
    def counts(self) -> int:
        return len(self.sizes) + len(COUNTS) * self.lanes

    def lane(self, place: int, index: str = "") -> str:
        """Entry ``place + index`` of lane ``l`` alone."""
        return f"w[({place} + {index}) * {self.lanes} + l]" if index else f"w[{place * self.lanes} + l]"


def lane_combine(weights: Sequence[float], base: int, d: int) -> str:
    terms = [f"{weight!r} * w[{base + s * d} + i, :]" for s, weight in enumerate(weights) if weight != 0.0]
    return " + ".join(terms) if terms else "0.0"


def lane_blend(method: Method, name: str, base: int, d: int) -> str:
    terms = [f"{name}{s} * w[{base + s * d} + i, :]" for s, row in enumerate(method.interpolant) if any(row)]
    return " + ".join(terms)


def lane_stage(at: LaneLayout, s: int, argument: int, scratch: str) -> str:
    """Stage s of the step h from (t, y), all of them vectors."""
    c, a = stage_rows(at.method)[s]
    return (
        f"for i in range({at.d}):\n"
        f"    w[{argument} + i, :] = w[{at.y} + i, :] + h * ({lane_combine(a, at.k, at.d)})\n"
        f"field(t + {c!r} * h, w, {argument}, {at.k + s * at.d}, {scratch}, p, o)"
    )


def lane_record(at: LaneLayout, h: str) -> str:
    """Keep the step; a row with more steps than there is room for is given up, and done again with more room."""
    width = at.d + 2
    return f"""spans[2 * r] = (r - lo) * most
spans[2 * r + 1] = spans[2 * r] + {at.count("accepted")} + 1
if {at.count("accepted")} >= most:
    done = min(done, r)
    {at.count("row")} = -1
else:
    place = (spans[2 * r + 1] - 1) * {width}
    buf[place] = {at.lane(at.t)}
    buf[place + 1] = {h}
    for i in range({at.d}):
        buf[place + 2 + i] = {at.lane(at.y, "i")}"""
