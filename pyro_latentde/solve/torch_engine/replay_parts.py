# SPDX-License-Identifier: Apache-2.0
"""Replays that do not fit into memory: parts of the steps, each differentiated by itself.

The state and slope at the start of every part are kept, what lies in between is computed once more when the gradient
comes back to it. Where there are more parts than states that may be kept, parts are cut again, and each level costs one
more forward sweep.

References:
    Griewank, Achieving logarithmic growth of temporal and spatial complexity in reverse automatic differentiation,
    Optim. Methods Softw. 1 (1992) 35.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_latentde.errors import SolveError
from pyro_latentde.solve.memory import SMALL, Allowance, readable, tell_once

__all__ = ["Part", "Parts", "in_parts", "parts_needed"]

# Measured: what a process grows by for each tensor that autograd keeps, and for each byte in it. Nodes, memory that is
# freed in pieces too small, and gradients under way are more than the numbers themselves.
NODE, FACTOR = 1900, 2.5


@dataclass
class Part:
    """Steps from ``first`` to ``end``, with the states ``(R, D)`` and slopes ``(R, D)`` where they begin."""

    first: int
    end: int
    y: Tensor
    slope: Tensor

    def ended(self, values: list[Tensor], rows: Tensor, y: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs inside, and states and slopes of all rows where the part ends; rows left out have no steps more."""
        values = torch.cat(values) if values else self.y[:0]
        return values, self.y.index_copy(0, rows, y), self.slope.index_copy(0, rows, slope)


# From the range of steps, state, slope and inputs to outputs, state and slope at the end.
Run = Callable[[tuple[int, int], Tensor, Tensor, Sequence[Tensor]], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Parts:
    """``steps`` of the smallest part, and how many parts the larger ones are cut into (``fan``)."""

    steps: int
    fan: int

    def of(self, first: int, end: int) -> list[tuple[int, int]]:
        """The parts of a range."""
        size = self.steps
        while size * self.fan < end - first:
            size *= self.fan
        return [(a, min(a + size, end)) for a in range(first, end, size)]


class _Checkpoint(torch.autograd.Function):
    """A part whose inside is computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, run: Run, span: tuple[int, int], y: Tensor, slope: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.run, ctx.span = run, span
        ctx.save_for_backward(y, slope, *tensors)
        return run(span, y, slope, tensors)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> tuple:
        higher = torch.is_grad_enabled()
        with torch.enable_grad():
            # aliases: what leads from one input to another is not part of this function
            kept = [x.view_as(x) if higher else x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors]
            y, slope, *tensors = kept
            outputs = ctx.run(ctx.span, y, slope, tensors)
            pairs = [(o, bar) for o, bar in zip(outputs, bars, strict=True) if o.requires_grad]
            wanted = [x for x in kept if x.requires_grad]
            found = iter(_gradients(pairs, wanted, higher))
        return (None, None, *(next(found) if x.requires_grad else None for x in kept))


def _gradients(pairs: list[tuple[Tensor, Tensor]], wanted: list[Tensor], higher: bool) -> Sequence[Tensor | None]:
    if not pairs:
        return [None] * len(wanted)
    outputs, bars = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, wanted, bars, create_graph=higher, allow_unused=True)


def in_parts(run: Run, parts: Parts, steps: int, y0: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of all steps, one part after the other.

    Args:
        run: Takes steps; differentiable.
        parts: How they are cut.
        steps: How many there are.
        y0: The state at the beginning.
        tensors: Everything else that ``run`` has derivatives by.
    """

    def go(span: tuple[int, int], y: Tensor, slope: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        if not torch.is_grad_enabled() or span[1] - span[0] <= parts.steps:
            return run(span, y, slope, tensors)
        values = []
        for part in parts.of(*span):
            value, y, slope = _Checkpoint.apply(go, part, y, slope, *tensors)
            values.append(value)
        return torch.cat(values), y, slope

    return go((0, steps), y0, torch.zeros_like(y0), tensors)[0]


def parts_needed(
    run: Run, steps: int, y0: Tensor, tensors: Sequence[Tensor], budget: int | None, stages: int
) -> Parts | None:
    """How a replay is cut, None where it fits as a whole.

    Args:
        run: As in :func:`in_parts`.
        steps: How many steps there are.
        y0: The state at the beginning.
        tensors: What ``run`` depends on.
        budget: Bytes, None for half of what is free.
        stages: Stages of a step.

    Raises:
        SolveError: For a budget in which not even one step has room.
    """
    state, least = 2 * y0.numel() * y0.element_size(), steps * stages * (y0.numel() * y0.element_size() + NODE)
    if steps < 2 or (budget is None and 8 * least < SMALL):
        return None
    step, allowance = _bytes_of_step(run, y0, tensors), Allowance(budget, y0.device)
    if allowance.take(step * steps):
        return None
    half = allowance.limit // 2
    if step > half or 2 * state > half:
        raise SolveError(
            f"memory_budget = {readable(allowance.limit)} is too small for {len(y0):,} rows on the torch engine, of "
            f"which one step takes {readable(step)}: expected at least {readable(2.1 * max(step, 2 * state))}. Give "
            f"more, or fewer rows at once."
        )
    cut, levels = max(1, half // step), 1
    most, needed = half // state, -(-steps // cut)
    while (most // levels) ** levels < needed and most // (levels + 1) >= 2:
        levels += 1
    fan = most // levels
    if budget is None:
        kept = min(needed, fan * levels)
        tell_once(
            "torch",
            f"backprop through {steps:,} steps x {len(y0):,} rows needs ~{readable(step * steps)}; using {kept:,} "
            f"checkpoints ({readable(kept * state + min(cut, steps) * step)}, +{levels} forward). memory_budget= sets "
            "another limit than half of the free memory.",
        )
    return Parts(cut, fan)


def _bytes_of_step(run: Run, y0: Tensor, tensors: Sequence[Tensor]) -> int:
    """What autograd keeps of a step: that of two steps without that of one."""
    one, two = (_bytes_kept(run, n, y0, tensors) for n in (1, 2))
    return max(NODE, two - one)


def _bytes_kept(run: Run, steps: int, y0: Tensor, tensors: Sequence[Tensor]) -> int:
    kept: list[Tensor] = []
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        y0, *tensors = (x.detach().requires_grad_(x.is_floating_point()) for x in (y0, *tensors))
        result = run((0, steps), y0, torch.zeros_like(y0), tensors)
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    del result
    return int(FACTOR * sum(sizes.values())) + NODE * len(kept)
