# SPDX-License-Identifier: Apache-2.0
"""What a solve returns."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_latentde.solve.events.event import FoundEvents
from pyro_latentde.solve.explain import explain
from pyro_latentde.solve.methods.catalog import get_method

__all__ = ["Solution", "Status"]


class Status(enum.IntEnum):
    """How the solve of one row ended.

    ``NON_FINITE_GRADIENT`` is set by the backward pass: the solution is right, its gradient overflowed and was set to
    zero. ``NO_STEADY_STATE`` and ``SINGULAR`` are ends of a search for a steady state: nothing settles, or the state
    is one of many that lie side by side, so that it has no gradient. ``BAD_LAG``: a lag that is not
    positive and finite.
    """

    OK = 0
    MAX_STEPS = 1
    UNDERFLOW = 2
    NON_FINITE = 3
    NON_FINITE_GRADIENT = 4
    NO_CONVERGENCE = 5
    TOO_MANY_EVENTS = 6
    NO_STEADY_STATE = 10
    SINGULAR = 11
    BAD_LAG = 20

    @property
    def sentence(self) -> str:
        return _SENTENCES[self]


_SENTENCES = {
    Status.OK: "solved",
    Status.MAX_STEPS: "max_steps reached",
    Status.UNDERFLOW: "step size underflow",
    Status.NON_FINITE: "non-finite state",
    Status.NON_FINITE_GRADIENT: "non-finite gradient",
    Status.NO_CONVERGENCE: "Newton's method did not converge",
    Status.TOO_MANY_EVENTS: "too many events",
    Status.NO_STEADY_STATE: "no steady state found",
    Status.SINGULAR: "singular Jacobian at the steady state",
    Status.BAD_LAG: "a lag that is not positive and finite",
}


@dataclass(frozen=True)
class Solution:
    """The trajectories of every row and how they were found.

    Args:
        ys: States, ``(*batch, T, D)``; for dict or named-tuple states the same structure of ``(*batch, T, *event)``.
            NaN from where a row failed.
        times: Output times in the order given, ``(T,)`` or ``(*batch, T)``, in the user's unit of time.
        method: Name of the method.
        rtol: Relative tolerance.
        atol: Absolute tolerance, in units of y.
        step_size: Largest size of the equal steps; None where the tolerances chose them.
        engine: ``"fused"``, ``"torch"`` or ``"torchdiffeq"``.
        reason: Why this engine.
        shape_of_state: How one row's state is laid out as a vector.
        events: What happened on the way, :class:`~pyro_latentde.solve.events.event.FoundEvents`; None without
            ``events=``.
        memory_budget: What was asked for, in bytes; None without ``memory_budget=``.

    Example:
        >>> import torch, pyro_latentde as lde
        >>> solution = lde.odesolve(lambda t, y, k: -k * y, torch.ones(1), torch.linspace(0, 1, 3), torch.tensor(0.5))
        >>> solution.ys.shape, int(solution.status), solution.at(torch.tensor(0.25)).shape
        (torch.Size([3, 1]), 0, torch.Size([1]))
    """

    ys: Any
    times: Tensor
    method: str
    rtol: float
    atol: float
    step_size: float | None
    engine: str
    reason: str
    shape_of_state: Any = field(repr=False)
    events: FoundEvents | None = field(default=None, kw_only=True, repr=False)
    memory_budget: int | None = field(default=None, kw_only=True, repr=False)
    _report: Tensor = field(repr=False)
    _again: Callable[[Tensor], Any] = field(repr=False)
    _steps: Callable[[], Tensor] = field(repr=False)
    _start: Tensor = field(repr=False)
    _decay: Callable[[int], float] = field(repr=False)

    def __str__(self) -> str:
        """What the solve did: steps, rejections, switches, the smallest step and where, events, and what to try.

        Also what is kept in memory for the gradient, where that is more than 100 MB or a budget was given.
        """
        return explain(self)

    @property
    def status(self) -> Tensor:
        """:class:`Status` of every row, ``(*batch,)`` int64."""
        return self._report[..., 0]

    @property
    def counts(self) -> Tensor:
        """Accepted steps, rejected steps and evaluations of every row, ``(*batch, 3)`` int64; see ``stats``."""
        return self._report[..., 1:4]

    @property
    def ok(self) -> Tensor:
        """Which rows were solved, ``(*batch,)`` bool."""
        return (self.status == Status.OK) | (self.status == Status.NON_FINITE_GRADIENT)

    @property
    def stats(self) -> dict[str, Tensor]:
        """``n_accepted``, ``n_rejected``, ``n_evals`` of every row, ``(*batch,)`` int64."""
        return dict(zip(("n_accepted", "n_rejected", "n_evals"), self.counts.unbind(-1), strict=True))

    @property
    def steps(self) -> Tensor:
        """Signed sizes of the accepted steps of every row, ``(*batch, N)``, padded with 0; for ``replay=``."""
        steps = self._steps()
        return steps if steps.ndim == self.status.ndim + 1 else steps[..., 0]

    @property
    def implicit(self) -> Tensor:
        """Which accepted steps were implicit, ``(*batch, N)`` bool, False beyond the last step of a row."""
        kind = get_method(self.method).kind
        return self._steps()[..., 1] > 0 if kind == "switching" else (self.steps != 0) & (kind == "implicit")

    def at(self, t: Tensor | float) -> Any:
        r"""The states at other times in the solved span: :math:`y(t_n + \theta h) = y_n + h \sum_i b_i(\theta) k_i`.

        Args:
            t: A time, ``()``, or times ``(M,)`` shared by all rows, or ``(*batch, M)``.

        Returns:
            ``(*batch, D)`` for one time, else ``(*batch, M, D)``; gradients flow as through the solve itself.

        Raises:
            SolveError: For times outside the solved span: solve to the latest time instead.
        """
        t = torch.as_tensor(t, dtype=self.times.dtype, device=self.times.device)
        return self._again(t)
