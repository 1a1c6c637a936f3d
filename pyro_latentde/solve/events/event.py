# SPDX-License-Identifier: Apache-2.0
"""Events: where a condition on the state changes sign, what happens to the state there, and what a solve found."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

from torch import Tensor

from pyro_latentde.errors import SolveError

__all__ = ["Event", "EventTraits", "FoundEvents", "as_events"]


class EventTraits(NamedTuple):
    """What an engine must know of an event beside its functions.

    Args:
        direction: -1 falling, +1 rising, 0 both, along the integration.
        terminal: Whether the row ends there.
        resets: Whether the state changes.
        limit: Most of them in a row.
    """

    direction: int
    terminal: bool
    resets: bool
    limit: int


@dataclass(frozen=True)
class Event:
    r"""Something that happens when a condition changes sign: :math:`c(t, y, p) = 0 \Rightarrow y := r(t, y, p)`.

    The sign is looked at where a step begins and ends and at three points between, on the interpolant; the first change
    is bracketed there, and the step is then taken again with the size at which the condition is zero at its end, to
    rounding. So the state at an event has the full order of the method. Two changes between neighbouring points cancel
    and are not seen: where that can happen, bound the steps (``step_size=``) or tighten ``rtol``. A condition that is
    zero where the solve (or a reset) starts fires only after it has left zero; a reset that carries the state across
    zero is no event. Outputs at the time of an event show the state before the reset.

    With doses, jumps or inputs with knots: an event at the very time of one comes first. Behind it the condition is
    watched from the new state, as behind a reset: a dose, or a jump of an input that the condition reads, that carries
    the condition across zero triggers nothing by itself.

    The event time moves with the parameters: with :math:`\dot y = f`,
    :math:`dt^*/d\theta = -(c_y\, y_\theta + c_\theta) / (c_t + c_y f)`, and all gradients go through it.

    Args:
        condition: ``condition(t, y, p)`` of one row, as a field is written; returns a scalar ``()``, in any unit.
        reset: ``reset(t, y, p)`` of one row: the new state, like ``y``, in its units. None: the state stays as it is,
            and the event is only written down. Both functions see states of ``positive=`` in the user's units; a reset
            of such a state to 0 or less fails the row.
        direction: +1 where the condition rises through zero, -1 where it falls, 0 both, along the integration.
        terminal: The row ends there, successfully: outputs at later times repeat the state at the event.
        max_events: Most such events in a row; one more, and the row fails with ``Status.TOO_MANY_EVENTS``.

    Raises:
        SolveError: For arguments that cannot be.

    References:
        Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, 2nd ed., Springer 1993, II.6.
        Saltation matrices: Kong et al., Proc. IEEE 112 (2024) 585.

    Example:
        A ball dropped from 5 m bounces; the speed is multiplied by -0.8.

        >>> import torch, pyro_latentde as lde
        >>> fall = lambda t, y, g: torch.stack([y[1], -g])
        >>> bounce = lde.Event(lambda t, y: y[0], lambda t, y: torch.stack([y[0], -0.8 * y[1]]), direction=-1)
        >>> y0 = torch.tensor([5.0, 0.0], dtype=torch.float64)
        >>> g = torch.tensor(9.81, dtype=torch.float64)
        >>> solution = lde.odesolve(fall, y0, torch.tensor([0.0, 3.0]), g, events=bounce)
        >>> [round(t, 4) for t in solution.events.times[:2].tolist()]
        [1.0096, 2.6251]
    """

    condition: Callable
    reset: Callable | None = None
    direction: int = 0
    terminal: bool = False
    max_events: int = 100

    def __post_init__(self) -> None:
        if not callable(self.condition):
            raise SolveError(f"Event: condition is called as condition(t, y, p); got {type(self.condition).__name__}.")
        if self.reset is not None and not callable(self.reset):
            raise SolveError(f"Event: reset is called as reset(t, y, p), or None; got {type(self.reset).__name__}.")
        if isinstance(self.direction, bool) or self.direction not in (-1, 0, 1):
            raise SolveError(
                f"Event: direction = {self.direction!r}; expected -1 (the condition falls through zero), +1 (rises) or "
                f"0 (both)."
            )
        if isinstance(self.max_events, bool) or not isinstance(self.max_events, Integral) or self.max_events < 1:
            raise SolveError(f"Event: max_events = {self.max_events!r}; expected a whole number of at least 1.")
        if self.terminal and self.reset is not None:
            raise SolveError(
                "Event: a terminal event ends the row, so that nothing can come of its reset; give reset=None, or "
                "terminal=False."
            )

    @property
    def traits(self) -> EventTraits:
        return EventTraits(
            int(self.direction),
            bool(self.terminal),
            self.reset is not None,
            1 if self.terminal else int(self.max_events),
        )


def as_events(events: Event | Sequence[Event] | None) -> tuple[Event, ...]:
    """The events of a solve as a tuple.

    Raises:
        SolveError: For anything that is no event.
    """
    if events is None:
        return ()
    given = (events,) if isinstance(events, Event) else events
    if not isinstance(given, (list, tuple)) or not all(isinstance(e, Event) for e in given):
        wrong = given if not isinstance(given, (list, tuple)) else next(e for e in given if not isinstance(e, Event))
        raise SolveError(
            f"events: expected lde.Event(condition, reset), or a list of them; got {type(wrong).__name__}."
        )
    return tuple(given)


@dataclass(frozen=True)
class FoundEvents:
    """The events of every row in the order in which they happened.

    ``E`` is the largest number there could be: the sum of ``max_events`` (1 of a terminal event). Gradients flow
    through ``times`` and ``states``; what is padded has none.

    Args:
        times: When, ``(*batch, E)``, in the unit of time, padded with NaN.
        which: Which of the events, ``(*batch, E)`` int64, padded with -1.
        states: The state then, before the reset, ``(*batch, E, D)`` or the structure of ``y0`` with ``(*batch, E,
            *event)``, padded with NaN.

    Example:
        >>> import torch, pyro_latentde as lde
        >>> half = lde.Event(lambda t, y: y[0] - 0.5, terminal=True)
        >>> solution = lde.odesolve(lambda t, y: -y, torch.ones(1).double(), torch.tensor([0.0, 9.0]), events=half)
        >>> round(solution.events.times.item(), 6), int(solution.events.count), solution.ys[-1].tolist()
        (0.693147, 1, [0.5])
    """

    times: Tensor
    which: Tensor
    states: Any

    @property
    def count(self) -> Tensor:
        """Number of events of every row, ``(*batch,)`` int64."""
        return (self.which >= 0).sum(-1)
