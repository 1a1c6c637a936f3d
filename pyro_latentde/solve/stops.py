# SPDX-License-Identifier: Apache-2.0
"""Times at which steps must end, because something happens there: what the engines know of them."""

from dataclasses import dataclass

__all__ = ["NUDGE", "Stops"]

# A field evaluated at a stop sees a time that lies this fraction of it before or after, some units in the last place.
NUDGE = 4 * 2.220446049250313e-16


@dataclass(frozen=True)
class Stops:
    """What happens at the stops of all rows; the numbers themselves are the last tensors of the solve.

    These are: times ``(M + 2,)``, increasing, the first -inf and the last inf; if ``dosed``, what is added to each of
    these states ``(M + 2, B)``; if ``infused``, by how much the constant input of each of these states changes
    ``(M + 2, K)``.

    Args:
        dosed: States to which something is added.
        infused: States with an input that is constant between stops.
        after: Outputs at a stop are the state after it, not before.
    """

    dosed: tuple[int, ...] = ()
    infused: tuple[int, ...] = ()
    after: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """What the tensors are called in messages."""
        return ("jump times", *["dose amounts"][: len(self.dosed)], *["dose rates"][: len(self.infused)])

    @property
    def ranks(self) -> tuple[int, ...]:
        """Dimensions of each tensor that belong to one row."""
        return (1, *(2 for _ in self.names[1:]))
