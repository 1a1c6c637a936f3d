# SPDX-License-Identifier: Apache-2.0
"""``lde.ode``: the solution of a differential equation as a named site of a Pyro model."""

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_latentde.errors import LatentDEError, ShapeError
from pyro_latentde.sites.field_weights import held_weights
from pyro_latentde.sites.ode_record import named_errors, record_trajectory
from pyro_latentde.sites.settings import requested_times, site_settings
from pyro_latentde.sites.solve_probe import shown
from pyro_latentde.solve.choices import not_among
from pyro_latentde.solve.events.event import Event, as_events
from pyro_latentde.solve.integrate import odesolve
from pyro_latentde.solve.solution import Solution
from pyro_latentde.solve.stops.dose import Dose

__all__ = ["ode", "solve_at_site"]


def ode(
    name: str,
    f: Callable,
    y0: Any,
    times: Any,
    params: Any = None,
    *,
    states: Sequence[str] | None = None,
    t0: Any = None,
    event_dims: dict[str, int] | None = None,
    doses: Dose | Sequence[Dose] | None = None,
    jumps: Any = None,
    at_dose: str = "after",
    shooting: Any = None,
    events: Event | Sequence[Event] | None = None,
    **settings: Any,
) -> Any:
    r"""Solve :math:`dy/dt = f(t, y, p),\ y(t_0) = y_0` and record the trajectory as the deterministic site ``name``.

    Works under every Pyro handler (``trace``, ``replay``, ``condition``, ``block``, ``mask``, ``scale``, ``do``),
    in plates, with vectorized particles and ``Predictive(parallel=True)``. Under a handler a failed row is NaN, which
    inference treats as log-density minus infinity; without one it raises. In your own ``SVI.step`` Pyro's validation
    raises on NaN: switch it off with ``pyro.enable_validation(False)``, or use ``infer.fit_svi``.

    Args:
        name: Name of the site.
        f: Vector field ``f(t, y, p)``; a ``PyroModule`` too, or a function that reaches one: its sampled weights are
            drawn once for the whole solve, as sites of the model.
        y0: Initial state, ``(*batch, D)``, or a dict or named tuple.
        times: Output times, ``(T,)`` or ``(*batch, T)``.
        params: Parameters; leading dimensions are batch (plates, chains, particles).
        states: Names of the D coordinates, ``("hare", "lynx")``.
        t0: Time of ``y0``; the first time by default.
        event_dims: Dimensions of one row, by parameter name, where the field does not tell.
        doses: One :class:`~pyro_latentde.Dose` or several, into states by number or by name (also one of ``states``).
        jumps: Times at which the field jumps, ``(M,)`` or ``(*batch, M)``.
        at_dose: Outputs at the time of a dose are the state ``"after"`` it, or ``"before"``.
        shooting: A ``models.Shooting``: the trajectory in segments with starts of their own, for long series of
            oscillating or chaotic systems. Its sites are "shots" and "continuity".
        events: An :class:`~pyro_latentde.Event`, or several, with doses too. What happened is returned too, and its
            times are the deterministic site ``"{name}.events"``, ``(*batch, E)``, padded with NaN.
        settings: ``method``, ``rtol``, ``atol``, ``step_size``, ``gradient``, ``engine``, ``max_steps``,
            ``memory_budget``, ``positive`` (also by the names in ``states``) of :func:`~pyro_latentde.odesolve`;
            :func:`~pyro_latentde.solver` changes them from outside.

    Returns:
        The states, ``(*batch, T, D)``, or the structure of ``y0`` with ``(*batch, T, *event)``. If the site is
        conditioned on, the given value. With ``events`` a pair: the states, and
        :class:`~pyro_latentde.solve.events.event.FoundEvents`, whose times and states have gradients, for a
        likelihood of spike or hitting times.

    Raises:
        SolveError: If rows fail and no Pyro handler is active, or for settings that cannot be met.
        ShapeError: For shapes, dtypes or devices that do not fit.
        LatentDEError: For a ``shooting`` of another type, or with events.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_latentde as lde
        >>> def model():
        ...     k = pyro.sample("k", dist.LogNormal(torch.zeros(()).double(), 1.0))
        ...     return lde.ode("z", lambda t, y, k: -k * y, torch.ones(1).double(), torch.linspace(0, 1, 5), k)
        >>> pyro.poutine.trace(model).get_trace().nodes["z"]["value"].shape
        torch.Size([5, 1])
    """
    if shooting is not None:
        if not hasattr(shooting, "trajectory"):
            raise LatentDEError(
                f"ode {name!r}: shooting: expected models.Shooting(length, sd), got {type(shooting).__name__}."
            )
        if doses is not None or jumps is not None or events is not None:
            raise LatentDEError(f"ode {name!r}: shooting takes no doses, no jumps and no events.")
        keywords = {**settings, "event_dims": event_dims}
        return shooting.trajectory(name, f, y0, torch.as_tensor(times), params, states, keywords, t0=t0)
    with named_errors(name):
        given = {"doses": _numbered(doses, states), "jumps": jumps, "at_dose": at_dose, "events": as_events(events)}
        settings = {**settings, "positive": _by_index(settings.get("positive"), states)}
        keywords = {**settings, "t0": t0, "event_dims": event_dims, "given": given}
        solution = solve_at_site(name, f, y0, times, params, **keywords)
        value = record_trajectory(name, _stacked(solution), solution, states)
        if events is not None:
            pyro.deterministic(f"{name}.events", solution.events.times, event_dim=1)
    states_found = solution.shape_of_state.unflatten(value)
    return states_found if events is None else (states_found, solution.events)


def solve_at_site(
    name: str,
    f: Callable,
    y0: Any,
    times: Any,
    params: Any = None,
    *,
    t0: Any = None,
    event_dims: dict[str, int] | None = None,
    given: dict[str, Any] | None = None,
    **settings: Any,
) -> Solution:
    """Solve as :func:`ode` does, weights drawn and settings from outside applied, without recording a site.

    ``given``: doses and jumps, as keywords of :func:`~pyro_latentde.odesolve`.
    """
    failed = "nan" if pyro.poutine.runtime.am_i_wrapped() else "raise"
    keywords = {**site_settings(name, settings), "event_dims": event_dims, "on_failure": failed, **(given or {})}
    with held_weights(f) as field:
        solution = odesolve(field, y0, times, params, t0=t0, **keywords)
        shown(name, solution, (field, y0, times, params, t0, event_dims))
        extra = requested_times(name)
        if extra is not None:
            start = solution.times[..., 0] if t0 is None else t0
            extra[1][name] = _stacked(odesolve(field, y0, extra[0], params, t0=start, **keywords))
    return solution


def _by_index(positive: Any, states: Sequence[str] | None) -> Any:
    """Names of coordinates that the site gives, as indices."""
    if states is None or positive is None or isinstance(positive, bool):
        return positive
    chosen = [positive] if isinstance(positive, (str, int)) else list(positive)
    unknown = [one for one in chosen if isinstance(one, str) and one not in states]
    if unknown:
        raise ShapeError(not_among("positive", unknown[0], states))
    return [list(states).index(one) if isinstance(one, str) else one for one in chosen]


def _numbered(doses: Dose | Sequence[Dose] | None, states: Sequence[str] | None) -> Dose | Sequence[Dose] | None:
    """Doses into states by the names of the coordinates."""
    if states is None or doses is None:
        return doses
    listed = [doses] if isinstance(doses, Dose) else doses
    return [d.into(list(states).index(d.state)) if getattr(d, "state", None) in states else d for d in listed]


def _stacked(solution: Solution) -> Tensor:
    """Structured states side by side, ``(*batch, T, D)``: what the site records."""
    return solution.shape_of_state.flatten_trajectory(solution.ys)
