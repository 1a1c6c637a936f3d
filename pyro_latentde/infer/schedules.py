# SPDX-License-Identifier: Apache-2.0
"""Schedules: numbers that change with the step, for learning rates, KL weights and window lengths."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Schedule", "cosine", "cyclic", "exponential", "linear", "progressive", "warmup"]


@dataclass(frozen=True)
class Schedule:
    """A function of the step (0, 1, ...) with a name and arguments: it can be compared, pickled and printed.

    Args:
        name: one of the functions of this file.
        arguments: what it was called with.

    Example:
        >>> schedule = linear(0.0, 1.0, 4)
        >>> schedule, schedule(1)
        (linear(0.0, 1.0, 4), 0.25)
    """

    name: str
    arguments: tuple[Any, ...]

    def __call__(self, step: int) -> float:
        return _RULES[self.name](step, *self.arguments)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.arguments))})"


def linear(start: float, stop: float, steps: int) -> Schedule:
    """From `start` to `stop` in a straight line over `steps` steps, then constant."""
    return Schedule("linear", (start, stop, _positive("linear", steps)))


def cosine(start: float, stop: float, steps: int) -> Schedule:
    """From `start` to `stop` along half a cosine over `steps` steps, then constant."""
    return Schedule("cosine", (start, stop, _positive("cosine", steps)))


def exponential(start: float, stop: float, steps: int) -> Schedule:
    """From `start` to `stop` by equal factors over `steps` steps, then constant; both positive."""
    if not (start > 0 and stop > 0):
        raise ValueError(f"exponential: expected positive start and stop, got {start} and {stop}")
    return Schedule("exponential", (start, stop, _positive("exponential", steps)))


def warmup(steps: int, after: float | Callable[[int], float]) -> Schedule:
    """`after`, a number or schedule, multiplied by a factor that climbs from 1 / steps to 1 in `steps` steps."""
    return Schedule("warmup", (_positive("warmup", steps), after))


def cyclic(cycles: int, ratio: float, steps: int, start: float = 0.0, stop: float = 1.0) -> Schedule:
    """Cycles that climb from `start` to `stop` and then stay there until the next one begins.

    Args:
        cycles: number of cycles in `steps` steps; afterwards the schedule stays at `stop`.
        ratio: part of a cycle, in (0, 1], in which it climbs.
        steps: number of steps.
        start: value at the beginning of each cycle.
        stop: value at the end of each climb.

    Returns:
        The schedule.

    References:
        Fu et al., "Cyclical annealing schedule: a simple approach to mitigating KL vanishing", NAACL 2019.

    Example:
        >>> schedule = cyclic(2, 0.5, 8)
        >>> [schedule(step) for step in range(9)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0]
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"cyclic: ratio is the part of a cycle that climbs, in (0, 1]; got {ratio}")
    return Schedule("cyclic", (_positive("cyclic", cycles), ratio, _positive("cyclic", steps), start, stop))


def progressive(first: int, last: int, steps: int) -> Schedule:
    """Window length that grows evenly from `first` to `last` times over `steps` steps, then constant.

    Example:
        >>> schedule = progressive(10, 50, 100)
        >>> [schedule(step) for step in (0, 50, 100, 1000)]
        [10, 30, 50, 50]
    """
    if first < 1 or last < 1:
        raise ValueError(f"progressive: windows have at least one time, got {first} and {last}")
    return Schedule("progressive", (first, last, _positive("progressive", steps)))


def _positive(what: str, number: int) -> int:
    if number < 1:
        raise ValueError(f"{what}: expected a positive number of steps or cycles, got {number}")
    return number


def _linear(step: int, start: float, stop: float, steps: int) -> float:
    return start + (stop - start) * min(step / steps, 1.0)


def _cosine(step: int, start: float, stop: float, steps: int) -> float:
    return stop + (start - stop) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def _exponential(step: int, start: float, stop: float, steps: int) -> float:
    return start * (stop / start) ** min(step / steps, 1.0)


def _warmup(step: int, steps: int, after: float | Callable[[int], float]) -> float:
    return min((step + 1) / steps, 1.0) * (after(step) if callable(after) else after)


def _cyclic(step: int, cycles: int, ratio: float, steps: int, start: float, stop: float) -> float:
    if step >= steps:
        return stop
    period = steps / cycles
    return start + (stop - start) * min((step % period) / (period * ratio), 1.0)


def _progressive(step: int, first: int, last: int, steps: int) -> int:
    return round(_linear(step, first, last, steps))


_RULES = {
    "linear": _linear,
    "cosine": _cosine,
    "exponential": _exponential,
    "warmup": _warmup,
    "cyclic": _cyclic,
    "progressive": _progressive,
}
