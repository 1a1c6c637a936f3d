# SPDX-License-Identifier: Apache-2.0
"""Gradients of the parameters of several rows: sums over stages and steps, and over lanes where rows share them.

For each stage of a step the reverse pass leaves vectors g and x in scratch, whose product g x^T is what the stage adds
to the gradient of a matrix. All stages of a step are summed in registers before the sum in memory is touched; that of a
shared matrix is one number for each entry, the lanes added up, which keeps it small enough to stay near the processor.
"""

from pyro_latentde.solve.fused.graph import Matrix

__all__ = ["GradientSums"]

PATCH = 4  # rows and columns of a matrix that are summed together for each lane
PAIR = 2  # rows of a shared matrix that are summed together


class GradientSums:
    """Source of ``accumulate``, once for each step, and ``hand_over``, once for each chunk of rows.

    Args:
        place: First free vector of the work array.
        lanes: Rows that are advanced side by side.
        own: Parameters that rows do not share, with the entries each has.
    """

    def __init__(self, place: int, lanes: int, own: dict[int, int]) -> None:
        self.place, self.lanes, self.sizes = place, lanes, own
        self.begin()

    def begin(self) -> None:
        self.lines: list[str] = []
        self.handed: list[str] = []
        self.own, self.end = {}, self.place
        for k, size in self.sizes.items():
            self.own[k], self.end = self.end, self.end + size

    def room(self, vectors: int) -> int:
        self.end += vectors
        return self.end - vectors

    def entries(self, leaf: int, first: int, stride: int, count: int, g: int) -> None:
        """Entries first, first + stride, ... of a parameter take the vectors that begin at g."""
        own = leaf in self.own
        at = f"{self.own[leaf] + first} + i * {stride}" if own else f"{self.room(count)} + i"
        self.lines += [
            f"for i in range({count}):",
            f"    s = w[{at}, :]",
            "    for n in range(count):",
            f"        s = s + w[ws + n * size + {g} + i, :]",
            f"    w[{at}, :] = s",
        ]
        if not own:
            self.handed += [
                f"for i in range({count}):",
                "    s = 0.0",
                f"    for l in range({self.lanes}):",
                f"        s += w[({at}) * {self.lanes} + l]",
                f"    g[q[{leaf}] + {first} + i * {stride}] += s",
            ]

    def product(self, matrix: Matrix, g: int, x: int) -> None:
        """``G += sum_n g_n x_n^T`` over the stages n of a step, patch by patch."""
        if matrix.leaf in self.own:
            self._by_lane(matrix, g, x)
        else:
            self._over_lanes(matrix, g, x)

    def _by_lane(self, matrix: Matrix, g: int, x: int) -> None:
        place = self.own[matrix.leaf] + matrix.offset
        for first, last, height in _tiles(matrix.shape[0], PATCH):
            for begin, end, breadth in _tiles(matrix.shape[1], PATCH):
                cells = [(a, b) for a in range(height) for b in range(breadth)]
                at = f"w[{place} + (i + {{}}) * {matrix.row} + (j + {{}}) * {matrix.column}, :]"
                inner = [f"s{a}_{b} = {at.format(a, b)}" for a, b in cells]
                inner += _stages(g, x, height, breadth)
                inner += [f"{at.format(a, b)} = s{a}_{b}" for a, b in cells]
                self._loops((first, last, height), (begin, end, breadth), inner)

    def _over_lanes(self, matrix: Matrix, g: int, x: int) -> None:
        rows, columns = matrix.shape
        across = -(-columns // self.lanes)
        place = self.room(rows * across)
        for begin, end, breadth in _tiles(columns, self.lanes):
            for first, last, height in _tiles(rows, PAIR):
                inner = [f"s{a}_{b} = Lanes(0.0)" for a in range(height) for b in range(breadth)]
                inner += _stages(g, x, height, breadth)
                for a in range(height):
                    sums = [f"s{a}_{b}" if b < breadth else "Lanes(0.0)" for b in range(self.lanes)]
                    at = f"w[{place} + (i + {a}) * {across} + j // {self.lanes}, :]"
                    inner.append(f"{at} = {at} + sums_of({', '.join(sums)})")
                self._loops((first, last, height), (begin, end, breadth), inner)
        self.handed += [
            f"for i in range({rows}):",
            f"    for j in range({columns}):",
            f"        g[q[{matrix.leaf}] + {matrix.offset} + i * {matrix.row} + j * {matrix.column}] += "
            f"w[({place} + i * {across}) * {self.lanes} + j]",
        ]

    def _loops(self, i: tuple[int, int, int], j: tuple[int, int, int], inner: list[str]) -> None:
        self.lines += [f"for j in range{j}:", f"    for i in range{i}:", *("        " + line for line in inner)]

    def source(self) -> str:
        accumulate = "def accumulate(w: Floats, ws: int, size: int, count: int) -> float:"
        hand_over = "def hand_over(w: Floats, g: Floats, q: Ints) -> float:"
        parts = [[accumulate, *self.lines], [hand_over, *self.handed]]
        return "\n\n".join("\n    ".join([*lines, "return 0.0"]) + "\n" for lines in parts)


def _stages(g: int, x: int, height: int, breadth: int) -> list[str]:
    return [
        "for n in range(count):",
        *(f"    g{a} = w[ws + n * size + {g + a} + i, :]" for a in range(height)),
        *(f"    x{b} = w[ws + n * size + {x + b} + j, :]" for b in range(breadth)),
        *(f"    s{a}_{b} = s{a}_{b} + g{a} * x{b}" for a in range(height) for b in range(breadth)),
    ]


def _tiles(size: int, step: int) -> list[tuple[int, int, int]]:
    """(begin, end, step) of whole patches, and of the rest."""
    whole = size - size % step
    return [tile for tile in ((0, whole, step), (whole, size, size % step)) if tile[0] < tile[1]]
