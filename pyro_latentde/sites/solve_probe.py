# SPDX-License-Identifier: Apache-2.0
"""Look at the vector field of every solve that a model does, from outside the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from pyro_latentde.solve.solution import Solution

__all__ = ["Look", "shown", "watch_solves"]

Look = Callable[[str, Solution, tuple[Any, ...]], None]

_LOOK: ContextVar[Look | None] = ContextVar("lde_look", default=None)


@contextmanager
def watch_solves(look: Look) -> Iterator[None]:
    """Show every solve of an ``lde`` site inside to ``look(name, solution, arguments)``.

    The arguments are those of :func:`.pose`: field, initial state, times, parameters, t0, event dimensions, jumps,
    events. It is called while the weights of the field are held, so that the field may be evaluated there,
    and only there.
    """
    token = _LOOK.set(look)
    try:
        yield
    finally:
        _LOOK.reset(token)


def shown(name: str, solution: Solution, arguments: tuple[Any, ...]) -> None:
    """Show a solve to whoever watches."""
    look = _LOOK.get()
    if look is not None:
        look(name, solution, arguments)
