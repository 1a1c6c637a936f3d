# SPDX-License-Identifier: Apache-2.0
"""Step sizes of stochastic-gradient MCMC, step by step, and after which steps a draw is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pyro_latentde.errors import LatentDEError

__all__ = ["SCHEDULES", "Cyclical", "Polynomial", "StepPlan", "plan_steps"]

SCHEDULES = ("constant", "polynomial", "cyclical")

# At the last step "polynomial" is down to this fraction of its first step.
_LAST_OF_FIRST = 0.1
_SLACK = 1e-9


@dataclass(frozen=True)
class Polynomial:
    r"""Polynomial decay

    .. math:: \epsilon_t = a (b + t)^{-\gamma}.

    Args:
        a: factor, positive.
        b: offset, positive, in steps; below it the step size hardly falls.
        gamma: exponent. 1/3 has the smallest error for a given number of steps (Teh et al.); above 1/2 the sum of
            squares is finite, as Welling and Teh ask.

    Raises:
        LatentDEError: an argument is not positive.

    References:
        Welling & Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics, ICML.
        Teh, Thiery & Vollmer (2016), Consistency and fluctuations for SGLD, JMLR 17.

    Example:
        >>> rule = Polynomial(0.2, b=4.0, gamma=0.5)
        >>> round(rule(0), 3), round(rule(12), 3)
        (0.1, 0.05)
    """

    a: float
    b: float = 1.0
    gamma: float = 1 / 3

    def __post_init__(self) -> None:
        for name in ("a", "b", "gamma"):
            _check_positive(f"Polynomial: {name}", getattr(self, name))

    def __call__(self, step: int) -> float:
        return self.a * (self.b + step) ** -self.gamma


@dataclass(frozen=True)
class Cyclical:
    r"""Cycles that fall from a large step size to nearly zero along half a cosine

    .. math:: \epsilon_t = \frac{\epsilon_0}{2} \left( \cos \frac{\pi (t \bmod L)}{L} + 1 \right),
        \quad L = \lceil K / M \rceil

    for K steps and M cycles. The large steps find other modes, and no draw is kept from them.

    Args:
        step_size: first step size of each cycle.
        num_steps: number of steps K, warm-up included.
        cycles: number of cycles M.
        exploration: part of each cycle, in [0, 1), from which no draw is kept. Unlike in the paper it has its noise:
            it is part of the same chain.

    Raises:
        LatentDEError: an argument is not positive, or `exploration` is not below one.

    References:
        Zhang et al. (2020), Cyclical stochastic gradient MCMC for Bayesian deep learning, ICLR.

    Example:
        >>> rule = Cyclical(0.1, num_steps=8, cycles=2)
        >>> [round(rule(step), 3) for step in range(5)]
        [0.1, 0.085, 0.05, 0.015, 0.1]
    """

    step_size: float
    num_steps: int
    cycles: int = 4
    exploration: float = 0.5

    def __post_init__(self) -> None:
        for name in ("step_size", "num_steps", "cycles"):
            _check_positive(f"Cyclical: {name}", getattr(self, name))
        if not 0.0 <= self.exploration < 1.0:
            raise LatentDEError(f"Cyclical: exploration is a part of each cycle in [0, 1), got {self.exploration!r}.")

    def __call__(self, step: int) -> float:
        return 0.5 * self.step_size * (math.cos(math.pi * self._position(step)) + 1.0)

    def weight(self, step: int) -> float:
        """Whether draws may be kept after this step: 1 or 0."""
        return float(self._position(step) >= self.exploration)

    def _position(self, step: int) -> float:
        length = math.ceil(self.num_steps / self.cycles)
        return step % length / length


@dataclass(frozen=True)
class StepPlan:
    """All steps of a run.

    Args:
        step_sizes: of each step, warm-up included, ``(K,)``.
        kept: number of the step at which each draw is kept, ``(num_samples,)``, not decreasing.
    """

    step_sizes: np.ndarray
    kept: np.ndarray


def plan_steps(
    step_size: float | None,
    schedule: str | Callable[[int], float],
    num_warmup: int,
    num_samples: int,
    thinning: int = 1,
) -> StepPlan:
    r"""Step sizes of ``num_warmup + num_samples * thinning`` steps, and the steps at which a draw is kept.

    A chain with falling steps spends ever more of them in the same place, so its averages weigh each draw by its step
    size. Here the draws are kept where the sum of the step sizes passes equal marks,

    .. math:: \sum_{t \le t_j} \epsilon_t \ge \frac{j}{S} \sum_t \epsilon_t, \quad j = 1, ..., S,

    so that they all weigh the same and every plain average is the weighted one. With constant steps that is every
    ``thinning``-th; with falling ones a draw can be kept twice where steps are large, less so the larger `thinning`.
    Of :class:`Cyclical`, draws are kept evenly in the sampling part of each cycle.

    Args:
        step_size: the largest step size, for schedules by name.
        schedule: ``"constant"``; ``"polynomial"``, which falls with exponent 1/3 to a tenth at the last step;
            ``"cyclical"``, four cycles; or a function of the step (0, 1, ..., warm-up included).
        num_warmup: steps from which no draw is kept.
        num_samples: number of draws S.
        thinning: steps for each draw.

    Returns:
        The plan.

    Raises:
        LatentDEError: an unknown schedule, a step size that is not positive, no step to keep a draw from.

    Example:
        >>> plan = plan_steps(0.1, "constant", num_warmup=2, num_samples=3, thinning=2)
        >>> plan.kept
        array([3, 5, 7])
    """
    total = num_warmup + num_samples * thinning
    rule = _rule(step_size, schedule, total)
    sizes = np.array([float(rule(step)) for step in range(total)])
    bad = ~(np.isfinite(sizes) & (sizes > 0))
    if bad.any():
        first = int(bad.argmax())
        raise LatentDEError(
            f"schedule: step sizes must be positive and finite, got {sizes[first]} at step {first} of {total} "
            "(warm-up included)."
        )
    weigh = getattr(rule, "weight", None)
    weights = sizes if weigh is None else np.array([weigh(step) for step in range(total)])
    passed = np.cumsum(weights[num_warmup:])
    if not passed[-1] > 0:
        raise LatentDEError(
            f"schedule: the {total - num_warmup} steps after warm-up are all exploration, so no draw can be kept.\n"
            "Try: more samples, a shorter warm-up, or fewer cycles."
        )
    marks = passed[-1] * np.arange(1, num_samples + 1) / num_samples
    # the slack keeps rounding in the sums from moving a mark behind its step
    return StepPlan(sizes, num_warmup + np.searchsorted(passed, marks * (1 - _SLACK)))


def _rule(step_size: float | None, schedule: str | Callable[[int], float], total: int) -> Callable[[int], float]:
    if callable(schedule):
        if step_size is not None:
            raise LatentDEError(
                f"step_size={step_size!r} and a schedule that is a function both say how large steps are; "
                "leave step_size out."
            )
        return schedule
    if schedule not in SCHEDULES:
        raise LatentDEError(f"schedule: expected one of {SCHEDULES} or a function of the step, got {schedule!r}.")
    if step_size is None:
        raise LatentDEError(
            f"step_size: the schedule {schedule!r} needs one.\n"
            "Try: a hundredth of the smallest posterior variance of the unconstrained coordinates; then half of it, "
            "and see whether the posterior stays where it is."
        )
    _check_positive("step_size", step_size)
    if schedule == "polynomial":
        offset = total / (_LAST_OF_FIRST**-3.0 - 1.0)
        return Polynomial(step_size * offset ** (1 / 3), offset)
    if schedule == "cyclical":
        return Cyclical(step_size, total)
    return lambda step: step_size


def _check_positive(what: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 and math.isfinite(value)):
        raise LatentDEError(f"{what} must be a positive number, got {value!r}.")
