# SPDX-License-Identifier: Apache-2.0
"""``lde.steady_state``: where a vector field is zero, as a named site of a Pyro model."""

from collections.abc import Callable, Sequence
from typing import Any

import pyro

from pyro_latentde.errors import SolveError
from pyro_latentde.sites.field_weights import held_weights
from pyro_latentde.sites.ode_record import named_errors, record_steady_state
from pyro_latentde.sites.settings import site_settings
from pyro_latentde.solve.choices import not_among
from pyro_latentde.solve.methods.catalog import get_method
from pyro_latentde.solve.steady.solve import STEADY_ENGINES, steady_state_solve

__all__ = ["steady_state"]

_SETTINGS = ("method", "engine", "max_steps")


def steady_state(
    name: str,
    f: Callable,
    y_guess: Any,
    params: Any = None,
    *,
    states: Sequence[str] | None = None,
    t: Any = 0.0,
    rtol: float | None = None,
    atol: float | None = None,
    max_iterations: int = 50,
    conserved: Any = None,
    stable: bool = False,
    event_dims: dict[str, int] | None = None,
    **settings: Any,
) -> Any:
    r"""Find y with :math:`f(t, y, p) = 0`, t fixed, and record it as the deterministic site ``name``.

    It is the steady state that Newton's method reaches from ``y_guess``, with trajectories to fall back on; see
    :func:`~pyro_latentde.steady_state_solve`. Gradients to parameters, sampled weights, captured tensors and ``t`` are
    those of the implicit function theorem, so that it can be what a solve starts from. Works under every Pyro handler,
    in plates and with vectorized particles, as :func:`~pyro_latentde.ode` does; under a handler a failed row is NaN,
    which inference treats as log-density minus infinity, and without one it raises.

    Args:
        name: Name of the site.
        f: Vector field ``f(t, y, p)``; a ``PyroModule`` too, or a function that reaches one: its sampled weights are
            drawn once.
        y_guess: Where to begin, ``(*batch, D)``, or a dict or named tuple.
        params: Parameters; leading dimensions are batch (plates, chains, particles).
        states: Names of the D coordinates.
        t: Time at which the field is held, ``()`` or ``(*batch,)``.
        rtol: Relative size of a last Newton correction, and tolerance of an integration.
        atol: Likewise absolute, in units of y.
        max_iterations: Most Newton iterations of a row before it is integrated.
        conserved: ``(C, D)``: linear functionals that the field conserves, held at their values at ``y_guess``.
        stable: Take the steady state that the trajectory from ``y_guess`` settles in.
        event_dims: Dimensions of one row, by parameter name, where the field does not tell.
        settings: ``method``, ``engine``, ``max_steps`` of the integration; :func:`~pyro_latentde.solver` changes them
            and the tolerances from outside, where they make sense here.

    Returns:
        The states, ``(*batch, D)``, or the structure of ``y_guess`` with ``(*batch, *event)``. If the site is
        conditioned on, the given value.

    Raises:
        SolveError: If rows fail and no Pyro handler is active, for settings that cannot be met, and for gradients of
            states that a conserved quantity not declared leaves open.
        ShapeError: For shapes, dtypes or devices that do not fit.
        DataError: For a time that is not finite.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_latentde as lde
        >>> def model():  # an infusion that stops: its steady state, and what follows
        ...     k = pyro.sample("k", dist.LogNormal(torch.zeros(()).double(), 1.0))
        ...     y0 = lde.steady_state("level", lambda t, y, k: 2.0 - k * y, torch.ones(1).double(), k)
        ...     return lde.ode("z", lambda t, y, k: -k * y, y0, torch.linspace(0, 1, 5), k)
        >>> trace = pyro.poutine.trace(model).get_trace()
        >>> trace.nodes["level"]["value"].shape, trace.nodes["z"]["value"].shape
        (torch.Size([1]), torch.Size([5, 1]))
    """
    failed = "nan" if pyro.poutine.runtime.am_i_wrapped() else "raise"
    with named_errors(name):
        keywords = _settings(name, {"rtol": rtol, "atol": atol, **settings})
        with held_weights(f) as field:
            found = steady_state_solve(
                field,
                y_guess,
                params,
                t=t,
                max_iterations=max_iterations,
                conserved=conserved,
                stable=stable,
                event_dims=event_dims,
                on_failure=failed,
                **keywords,
            )
        value = record_steady_state(name, found.shape_of_state.flatten_trajectory(found.y), found, states)
    return found.shape_of_state.unflatten(value)


def _settings(name: str, own: dict[str, Any]) -> dict[str, Any]:
    """Settings of the site and from outside; of the latter those that mean nothing here give way to the default."""
    for key in own:
        if key not in (*_SETTINGS, "rtol", "atol"):
            raise SolveError(not_among("settings of steady_state()", key, _SETTINGS))
    chosen = site_settings(name, own)
    plain = chosen["method"] == "tsit5"  # what nobody asked for: "auto" begins with it, and goes on where it gets stiff
    if own.get("method") is None and (plain or not get_method(chosen["method"]).adaptive):
        del chosen["method"]
    if own.get("engine") is None and chosen["engine"] not in STEADY_ENGINES:
        del chosen["engine"]
    return {key: chosen[key] for key in (*_SETTINGS, "rtol", "atol") if key in chosen}
