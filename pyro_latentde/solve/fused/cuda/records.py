# SPDX-License-Identifier: Apache-2.0
"""What kernels on a CUDA device read and leave; ``fused/records.py`` is the same on the CPU."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_latentde.errors import SolveError
from pyro_latentde.solve.memory import readable, tell_once

__all__ = ["CudaBars", "CudaRecord", "CudaSteps", "DeviceLayout", "Inputs", "most_rows"]


@dataclass(frozen=True)
class DeviceLayout:
    """Where the parameters of a row lie in one buffer of all of them, and their gradients in a column of one row."""

    offsets: Tensor
    strides: Tensor
    places: Tensor
    zeros: Tensor
    lengths: tuple[int, ...]

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(rows: int, sizes: tuple[int, ...], shared: tuple[bool, ...], device: torch.device) -> "DeviceLayout":
        """``sizes``: entries of each parameter with all its rows."""
        lengths = tuple(size if one else size // max(rows, 1) for size, one in zip(sizes, shared, strict=True))
        strides = [0 if one else length for length, one in zip(lengths, shared, strict=True)]
        columns = [[sum(x[:k]) for k in range(len(x))] for x in (sizes, lengths)]
        offsets, places, steps, zeros = (
            torch.tensor(x or [0], dtype=torch.int64, device=device) for x in (*columns, strides, [0] * len(sizes))
        )
        return DeviceLayout(offsets, steps, places, zeros, lengths)

    def cut(self, column: Tensor) -> tuple[Tensor, ...]:
        """Gradients ``(entries of all parameters, R)``, parameter by parameter."""
        return column[: sum(self.lengths)].split(self.lengths)


@dataclass(frozen=True)
class Inputs:
    """The inputs of a solve, flat, in the kernel's precision; the parameters end to end."""

    rows: int
    points: int
    y0: Tensor
    times: Tensor
    t0: Tensor
    p: Tensor
    strides: tuple[int, ...]
    shared: tuple[bool, ...]
    layout: DeviceLayout


@dataclass(slots=True)
class CudaSteps:
    """The accepted steps: blocks of (members, records), where column i belongs to row ``members[i]``, if not to -1.

    A record is what it is on the CPU (:class:`pyro_latentde.solve.fused.records.Steps`), one number below the other.
    Groups of ``missing`` rows kept none: ``again`` makes their records.
    """

    blocks: list[tuple[Tensor, Tensor]]
    spans: Tensor
    status: Tensor
    width: int
    kind: str
    stopping: bool
    missing: Sequence[Tensor] = ()
    again: Callable[[Tensor], Tensor] | None = None

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows; those that kept nothing are solved again, group by group."""
        yield from self.blocks
        for members in self.missing:
            yield members, self.again(members)

    @property
    def rows(self) -> int:
        return len(self.status)

    @property
    def solved_again(self) -> int:
        return sum([len(members) for members in self.missing])

    @property
    def nbytes(self) -> int:
        return sum(records.nbytes for _, records in self.blocks)

    def plan(self) -> Tensor:
        """The steps as they are taken again: sizes; where methods alternate or steps end at stops, see RowSolution."""
        if self.kind != "switching" and not self.stopping:
            return self._column(1)
        columns, explicit = [self._column(1)], self.kind == "explicit"
        columns.append(torch.zeros_like(columns[0]) if explicit else self._column(self.width - 1))
        if self.stopping:
            columns.append(self._column(self.width - (1 if explicit else 2)))
        return torch.stack(columns, -1)

    def _column(self, c: int) -> Tensor:
        counts = self.spans[1::2] - self.spans[::2]
        most = max(1, int(counts.max())) if len(counts) else 1
        out = torch.zeros(self.rows, most, dtype=torch.float64, device=self.status.device)
        for members, records in self.pieces():
            here = (members >= 0).nonzero()[:, 0]
            values = records[c :: self.width, here][:most].t().double()
            taken = torch.arange(values.shape[1], device=values.device) < counts[members[here], None]
            out[members[here], : values.shape[1]] = torch.where(taken, values, 0.0)
        return out


def most_rows(limit: int, row: int, rows: int, steps: int, budget: int | None) -> int:
    """How many rows are solved again at once in half of ``limit`` bytes, where each takes ``row``.

    Raises:
        SolveError: If not even one fits.
    """
    at_once = limit // (2 * row)
    if not at_once:
        raise SolveError(
            f"memory_budget = {readable(limit)} is too small for the {steps:,} steps of a row on this device: expected "
            f"at least {readable(2.1 * row)}. Give more, or solve on the CPU, where rows can be cut."
        )
    if budget is None:
        tell_once(
            "cuda",
            f"backprop through {steps:,} steps x {rows:,} rows needs ~{readable(row * rows)}; solving them again in "
            f"the backward pass, {at_once:,} rows at once (at most {readable(limit)}, +1 forward). memory_budget= sets "
            "another limit than half of the free memory.",
        )
    return at_once


class CudaRecord(NamedTuple):
    """What a forward solve leaves: outputs ``(R, T, D)``, the report ``(R, 5)``, and steps if kept."""

    ys: Tensor
    report: Tensor
    steps: CudaSteps | None


class CudaBars(NamedTuple):
    """Cotangents of y0, times and t0 by row, of each parameter as it is shared; ``finite`` rows ``(R,)``."""

    y0: Tensor
    times: Tensor
    t0: Tensor
    p: list[Tensor]
    finite: Tensor
