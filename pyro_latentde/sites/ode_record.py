# SPDX-License-Identifier: Apache-2.0
"""How a solve is written into a Pyro trace, by the sites that solve."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyro_latentde.errors import LatentDEError, ShapeError
from pyro_latentde.sites.plate_sizes import check_plate_sizes
from pyro_latentde.solve.solution import Solution

__all__ = ["named_errors", "record_trajectory"]


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Errors say which site they come from."""
    try:
        yield
    except LatentDEError as error:
        error.args = (f"site {name!r}: {error}",)
        raise


def record_trajectory(name: str, value: Tensor, solution: Solution, states: Sequence[str] | None) -> Tensor:
    """The deterministic site of a trajectory, with how it was solved.

    Args:
        name: name of the site.
        value: (*batch, T, D), the states of `solution` side by side.
        solution: the solve.
        states: names of the D coordinates; those of a structured state by default.

    Returns:
        `value`, or what the site was conditioned on.

    Raises:
        ShapeError: a wrong number of names, or enclosing plates of other sizes than the batch.
    """
    check_plate_sizes(value.shape[:-2])
    n_steps = solution.stats["n_accepted"] + solution.stats["n_rejected"]
    record = {
        "times": solution.times,
        "states": _state_names(states, solution),
        "status": solution.status,
        "n_steps": n_steps,
        "settings": {key: getattr(solution, key) for key in ("method", "engine", "rtol", "atol", "step_size")},
    }
    return pyro.sample(
        name,
        dist.Delta(value, event_dim=2).mask(False),
        obs=value,
        infer={"_deterministic": True, "lde_ode": record},
    )


def _state_names(states: Sequence[str] | None, solution: Solution) -> tuple[str, ...] | None:
    shape = solution.shape_of_state
    if states is None:
        return shape.coordinates
    if isinstance(states, str) or len(states) != shape.size:
        told = repr(states) if isinstance(states, str) else f"{len(states)} names {tuple(states)}"
        raise ShapeError(f"states expects one name per coordinate, {shape.size} in all; got {told}.")
    return tuple(states)
