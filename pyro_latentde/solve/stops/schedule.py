# SPDX-License-Identifier: Apache-2.0
"""Times at which steps must end, because something happens there: what the engines are told of them.

Whatever it comes from (a dose, a knot of an input, a jump of the field), a :class:`Change` says when and what;
:func:`lay_out` sorts all changes of a row into one list of *stops*, differentiably.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["NUDGE", "Change", "Stops", "lay_out"]

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


@dataclass(frozen=True)
class Change:
    """Something that happens at given times.

    Args:
        times: ``(*batch, M)``; NaN where there is nothing.
        state: The state it happens to; None: steps end there, and no more.
        amounts: What is added to the state, ``(*batch, M)``.
        rates: By how much its constant input changes, ``(*batch, M)``.
    """

    times: Tensor
    state: int | None = None
    amounts: Tensor | None = None
    rates: Tensor | None = None


def lay_out(changes: Sequence[Change], after: bool) -> tuple[Stops, tuple[Tensor, ...]]:
    """The stops of all changes, and their tensors with leading batch dimensions."""
    dosed = tuple(sorted({c.state for c in changes if c.amounts is not None}))
    infused = tuple(sorted({c.state for c in changes if c.rates is not None}))
    lead = torch.broadcast_shapes(*(c.times.shape[:-1] for c in changes))
    times = torch.cat([c.times.expand(*lead, -1) for c in changes], -1)
    times = torch.where(times.isnan(), torch.inf, times)
    order = times.detach().argsort(dim=-1, stable=True)
    ends = times.new_full((*lead, 1), torch.inf)
    tensors = [torch.cat([-ends, times.gather(-1, order), ends], -1)]
    if dosed:
        tensors.append(_table(changes, [c.amounts for c in changes], dosed, order))
    if infused:
        tensors.append(_table(changes, [c.rates for c in changes], infused, order))
    return Stops(dosed, infused, after), tuple(tensors)


def _table(changes: Sequence[Change], values: Sequence[Tensor | None], states: Sequence[int], order: Tensor) -> Tensor:
    """One row for each stop, one column for each state, ``(*batch, M + 2, len(states))``."""
    padded = [None if v is None else torch.where(c.times.isnan(), 0.0, v) for c, v in zip(changes, values, strict=True)]
    lead = torch.broadcast_shapes(order.shape[:-1], *(v.shape[:-1] for v in padded if v is not None))
    columns = []
    for state in states:
        pieces = [
            v.expand(*lead, -1) if v is not None and c.state == state else c.times.new_zeros(*lead, c.times.shape[-1])
            for c, v in zip(changes, padded, strict=True)
        ]
        columns.append(torch.cat(pieces, -1).gather(-1, order.expand(*lead, -1)))
    return torch.nn.functional.pad(torch.stack(columns, -1), (0, 0, 1, 1))
