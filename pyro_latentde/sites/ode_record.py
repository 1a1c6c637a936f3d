# SPDX-License-Identifier: Apache-2.0
"""How a solve is written into a Pyro trace, by the sites that solve."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyro_latentde.errors import LatentDEError, ShapeError
from pyro_latentde.sites.plate_sizes import check_plate_sizes
from pyro_latentde.solve.solution import Solution
from pyro_latentde.solve.steady.solve import SteadyState
from pyro_latentde.solve.structure import StateShape

__all__ = ["named_errors", "record_steady_state", "record_trajectory", "solve_record"]


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
        "states": _state_names(states, solution.shape_of_state),
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


def record_steady_state(name: str, value: Tensor, found: SteadyState, states: Sequence[str] | None) -> Tensor:
    """The deterministic site of a steady state, with how it was found; the sibling of :func:`record_trajectory`.

    Args:
        name: name of the site.
        value: (*batch, D), the states of `found` side by side.
        found: the steady state.
        states: names of the D coordinates; those of a structured state by default.

    Returns:
        `value`, or what the site was conditioned on.

    Raises:
        ShapeError: a wrong number of names, or enclosing plates of other sizes than the batch.
    """
    check_plate_sizes(value.shape[:-1])
    record = {
        "states": _state_names(states, found.shape_of_state),
        "status": found.status,
        "n_steps": found.n_steps,
        "iterations": found.iterations,
        "settings": found.settings,
    }
    return pyro.sample(
        name,
        dist.Delta(value, event_dim=1).mask(False),
        obs=value,
        infer={"_deterministic": True, "lde_steady_state": record},
    )


def solve_record(node: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a node of a trace records of the solve or the search behind it, if there was one.

    Its ``"status"`` is None where a trajectory of many segments does not tell how it went.
    """
    infer = node.get("infer") or {}
    return infer.get("lde_ode") or infer.get("lde_steady_state")


def _state_names(states: Sequence[str] | None, shape: StateShape) -> tuple[str, ...] | None:
    if states is None:
        return shape.coordinates
    if isinstance(states, str) or len(states) != shape.size:
        told = repr(states) if isinstance(states, str) else f"{len(states)} names {tuple(states)}"
        raise ShapeError(f"states expects one name per coordinate, {shape.size} in all; got {told}.")
    return tuple(states)
