# SPDX-License-Identifier: Apache-2.0
"""Solver settings from outside the model: ``with lde.solver(...)``, and defaults in ``pyro.settings``.

The settings lie on a ``ContextVar`` stack and not on Pyro's handler stack: a message of an own type would be hidden by
``block(hide_all=True)`` and never be recorded, so settings could not reach a site inside an ELBO.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pyro
from torch import Tensor

from pyro_latentde.errors import SolveError
from pyro_latentde.solve.choices import not_among
from pyro_latentde.solve.engines import ENGINES
from pyro_latentde.solve.memory import budget_bytes
from pyro_latentde.solve.methods.catalog import get_method
from pyro_latentde.solve.settings import GRADIENTS

__all__ = ["extra_times", "requested_times", "site_settings", "solver"]

KEYWORDS = ("method", "rtol", "atol", "step_size", "gradient", "engine", "max_steps", "memory_budget", "positive")

_SETTINGS: ContextVar[tuple[tuple[frozenset[str] | None, dict[str, Any]], ...]] = ContextVar("lde_settings", default=())
_EXTRA: ContextVar[tuple[Tensor, frozenset[str] | None, dict[str, Any]] | None] = ContextVar("lde_times", default=None)

latentde_method = "tsit5"
latentde_engine = "auto"
latentde_gradient = "discrete"
latentde_max_steps = 10_000
latentde_memory_budget = None


def _valid_method(name: str) -> None:
    get_method(name)


def _valid_engine(name: str) -> None:
    if name not in ENGINES:
        raise SolveError(not_among("engine", name, ENGINES))


def _valid_gradient(name: str) -> None:
    if name not in GRADIENTS:
        raise SolveError(not_among("gradient", name, GRADIENTS))


def _valid_max_steps(count: int) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise SolveError(f"max_steps = {count!r}; expected a whole number of at least 1.")


def _valid_memory_budget(budget: int | str | None) -> None:
    budget_bytes(budget)


_VALID = {
    "method": _valid_method,
    "engine": _valid_engine,
    "gradient": _valid_gradient,
    "max_steps": _valid_max_steps,
    "memory_budget": _valid_memory_budget,
}

pyro.settings.register("latentde_method", __name__, "latentde_method", _valid_method)
pyro.settings.register("latentde_engine", __name__, "latentde_engine", _valid_engine)
pyro.settings.register("latentde_gradient", __name__, "latentde_gradient", _valid_gradient)
pyro.settings.register("latentde_max_steps", __name__, "latentde_max_steps", _valid_max_steps)
pyro.settings.register("latentde_memory_budget", __name__, "latentde_memory_budget", _valid_memory_budget)


@contextmanager
def solver(*, sites: Sequence[str] | None = None, **settings: Any) -> Iterator[None]:
    """Change how the ``lde.ode`` sites inside are solved, without touching the model.

    Nested, the innermost setting of a keyword wins; settings written at the site itself are weaker than those from
    outside.

    Args:
        sites: Names of the sites it holds for; all by default.
        settings: ``method``, ``rtol``, ``atol``, ``step_size``, ``gradient``, ``engine``, ``max_steps``,
            ``memory_budget``, ``positive`` of :func:`~pyro_latentde.odesolve`; None stands for the default.

    Raises:
        SolveError: For an unknown keyword, method, engine or gradient.

    Example:
        >>> import torch, pyro_latentde as lde
        >>> def model():
        ...     return lde.ode("z", lambda t, y: -y, torch.ones(1).double(), torch.linspace(0, 1, 3))
        >>> with lde.solver(method="dopri8", rtol=1e-10, sites=["z"]):
        ...     z = model()
    """
    _check_keywords("solver", settings)
    names = None if sites is None else frozenset([sites] if isinstance(sites, str) else sites)
    token = _SETTINGS.set((*_SETTINGS.get(), (names, settings)))
    try:
        yield
    finally:
        _SETTINGS.reset(token)


def site_settings(name: str, own: dict[str, Any], recorded: str | None = None) -> dict[str, Any]:
    """The settings of one site: its own, then those from outside, outermost first; None is the default.

    A solve whose trajectory is recorded under another name can be meant by that one, too.
    """
    _check_keywords("ode", own)
    chosen = dict(own)
    for names, settings in _SETTINGS.get():
        if names is None or name in names or recorded in names:
            chosen.update(settings)
    defaults = {
        "method": latentde_method,
        "engine": latentde_engine,
        "gradient": latentde_gradient,
        "max_steps": latentde_max_steps,
        "memory_budget": latentde_memory_budget,
    }
    return {**defaults, **{k: v for k, v in chosen.items() if v is not None}}


def _check_keywords(caller: str, settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        if key not in KEYWORDS:
            raise SolveError(not_among(f"settings of {caller}()", key, KEYWORDS))
        if value is not None and key in _VALID:
            _VALID[key](value)


@contextmanager
def extra_times(times: Tensor, sites: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Solve every ``lde.ode`` site also at other times; the model goes on with its own.

    Args:
        times: ``(T',)``.
        sites: Names of the sites; all by default.

    Returns:
        A dict, filled while the model runs: site name to states, ``(*batch, T', D)``.
    """
    store: dict[str, Any] = {}
    token = _EXTRA.set((times, None if sites is None else frozenset(sites), store))
    try:
        yield store
    finally:
        _EXTRA.reset(token)


def requested_times(name: str) -> tuple[Tensor, dict[str, Any]] | None:
    """Other times wanted for a site, and where to put its states there."""
    extra = _EXTRA.get()
    if extra is None or (extra[1] is not None and name not in extra[1]):
        return None
    return extra[0], extra[2]
