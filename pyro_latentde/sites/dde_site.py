# SPDX-License-Identifier: Apache-2.0
"""``lde.dde``: the solution of a delay differential equation as a named site of a Pyro model."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pyro
from torch import Tensor

from pyro_latentde.sites.field_weights import held_together, no_draws
from pyro_latentde.sites.ode_record import named_errors, record_trajectory
from pyro_latentde.sites.settings import requested_times, site_settings
from pyro_latentde.solve.delays.integrate import ddesolve
from pyro_latentde.solve.solution import Solution
from pyro_latentde.solve.vector_field import BoundField

__all__ = ["dde"]


def dde(
    name: str,
    f: Callable,
    history: Any,
    lags: Any,
    times: Any,
    params: Any = None,
    *,
    states: Sequence[str] | None = None,
    t0: Any = None,
    event_dims: dict[str, int] | None = None,
    **settings: Any,
) -> Any:
    r"""Solve :math:`dy/dt = f(t, y(t), y(t - \tau), p)` and record the trajectory as the deterministic site ``name``.

    The sibling of :func:`~pyro_latentde.ode` for equations with constant lags, which may be sampled like any
    parameter. Works under every Pyro handler, in plates and with vectorized particles; under a handler a failed row
    (also one whose lag is not positive) is NaN, which inference treats as log-density minus infinity, and without one
    it raises.

    Args:
        name: Name of the site.
        f: Vector field ``f(t, y, lagged, p)``, ``lagged`` a tuple with y(t - lag) for each lag; a ``PyroModule`` too,
            or a function that reaches one: its sampled weights are drawn once for the whole solve.
        history: The state up to t0: a constant ``(*batch, D)``, a dict or named tuple, or a function
            ``history(t, p)`` of one row.
        lags: Positive, in units of t: a float or ``()``, ``(L,)``, or ``(*batch, L)``; or a list of L numbers or
            tensors ``(*batch,)``: inside a plate, ``[tau]`` is one lag per row.
        times: Output times, ``(T,)`` or ``(*batch, T)``, not before t0.
        params: Parameters; leading dimensions are batch (plates, chains, particles).
        states: Names of the D coordinates.
        t0: Where the history ends; the first time by default.
        event_dims: Dimensions of one row, by parameter name, where the field does not tell.
        settings: ``method``, ``rtol``, ``atol``, ``step_size``, ``gradient``, ``engine``, ``max_steps`` of
            :func:`~pyro_latentde.ddesolve`; :func:`~pyro_latentde.solver` changes them from outside.

    Returns:
        The states, ``(*batch, T, D)``, or the structure of ``history`` with ``(*batch, T, *event)``. If the site is
        conditioned on, the given value.

    Raises:
        SolveError: If rows fail and no Pyro handler is active, or for settings that cannot be met.
        ShapeError: For shapes, dtypes or devices that do not fit.
        DataError: For times before t0, and lags that are not positive.
        GradientPathError: For ``gradient="adjoint"``.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_latentde as lde
        >>> def model():  # Hutchinson's delayed logistic growth with an unknown delay
        ...     tau = pyro.sample("tau", dist.LogNormal(torch.zeros(()).double(), 0.3))
        ...     grow = lambda t, y, lagged: y * (1.0 - lagged[0])
        ...     return lde.dde("z", grow, 0.5 * torch.ones(1).double(), tau, torch.linspace(0, 5, 6))
        >>> pyro.poutine.trace(model).get_trace().nodes["z"]["value"].shape
        torch.Size([6, 1])
    """
    with named_errors(name):
        solution = _solved(name, f, history, lags, times, params, t0, event_dims, settings)
        value = record_trajectory(name, _stacked(solution), solution, states)
    return solution.shape_of_state.unflatten(value)


def _solved(
    name: str,
    f: Callable,
    history: Any,
    lags: Any,
    times: Any,
    params: Any,
    t0: Any,
    event_dims: dict[str, int] | None,
    settings: dict[str, Any],
) -> Solution:
    """Solve with weights drawn and settings from outside applied, and at other times too where they are wanted."""
    failed = "nan" if pyro.poutine.runtime.am_i_wrapped() else "raise"
    keywords = {**site_settings(name, settings), "event_dims": event_dims, "on_failure": failed}
    moving = [history] if callable(history) else []
    with held_together(f, *moving) as (field, *past):
        before = past[0] if past else history
        with nullcontext() if isinstance(field, BoundField) else no_draws():
            solution = ddesolve(field, before, lags, times, params, t0=t0, **keywords)
            extra = requested_times(name)
            if extra is not None:
                start = solution.times[..., 0] if t0 is None else t0
                extra[1][name] = _stacked(ddesolve(field, before, lags, extra[0], params, t0=start, **keywords))
    return solution


def _stacked(solution: Solution) -> Tensor:
    """Structured states side by side, ``(*batch, T, D)``: what the site records."""
    return solution.shape_of_state.flatten_trajectory(solution.ys)
