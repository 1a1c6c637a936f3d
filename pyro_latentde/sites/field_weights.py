# SPDX-License-Identifier: Apache-2.0
"""Weights of ``PyroModule`` vector fields: each one site of the model and one value throughout a solve."""

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pyro
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.nn import Module

from pyro_latentde.errors import ShapeError, SolveError
from pyro_latentde.solve.field_key import walk_field
from pyro_latentde.solve.vector_field import BoundField

__all__ = ["held_together", "held_weights", "no_draws"]


@contextmanager
def held_weights(f: Callable) -> Iterator[Callable | BoundField]:
    """Draw what a field takes from ``PyroModule``s, and hold it while the body solves.

    Args:
        f: A ``PyroModule``, or a function, method or object that reaches one (``lambda t, y: net(y)``).

    Returns:
        The field with its weights, to be solved inside the ``with`` block.

    Raises:
        SolveError: In the body, if the field draws anything else.
    """
    with held_together(f) as (field,), nullcontext() if isinstance(field, BoundField) else no_draws():
        yield field


@contextmanager
def held_together(*fields: Callable) -> Iterator[tuple[Callable | BoundField, ...]]:
    """As `held_weights`, for several functions that see the same draw: all plain, or all with the same tensors.

    The body may have sites of its own, and solves plain functions under `no_draws`.
    """
    seen = [part for f in fields for part in walk_field(f).keep if isinstance(part, Module)]
    modules = list({id(m): m for part in seen for m in _roots(part)}.values())
    if not modules:
        yield fields
        return
    wanted = [_wanted(fields, m) for m in modules]
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(module._pyro_context)  # one draw per weight while it is open
        sites = _touched(modules, wanted)
        values = {name: site["value"] for name, site in sites.items()}
        # a parameter without constraint is the module's own tensor, which the solver finds by itself
        bound = {n: s for n, s in sites.items() if s["type"] == "sample" or not s["value"].is_leaf}
        tensors, ranks = tuple(values[n] for n in bound), tuple(_rank(site) for site in bound.values())
        contexts = [m._pyro_context for m in modules]
        try:
            yield tuple(BoundField(f, tensors, ranks, tuple(bound), _holding(f, contexts, values)) for f in fields)
        except ShapeError as error:
            error.args = (f"{error}{_batch_hint(bound)}",)
            raise


def no_draws() -> Messenger:
    """A context in which the model cannot draw: a vector field must be a function."""
    return _Hold({})


def _wanted(fields: Sequence[Callable], module: PyroModule) -> set[str] | None:
    """Names of a module's attributes that may be read; all (None) unless the model is its own method running."""
    if not module._pyro_context.active or any(module is f for f in fields):
        return None
    return set().union(*(_names_used(f, module) for f in fields))


def _batch_hint(sites: dict[str, dict[str, Any]]) -> str:
    """Matrices drawn without ``to_event`` look like plates."""
    loose = [(n, tuple(s["fn"].batch_shape)) for n, s in sites.items() if s["type"] == "sample" and s["fn"].batch_shape]
    if not loose:
        return ""
    told = ", ".join(f"{name} has batch shape {shape}" for name, shape in loose)
    return f" The sampled weight {told}: if that is no plate, end its prior with .to_event({len(loose[0][1])})."


def _holding(f: Callable, contexts: Sequence[Any], values: dict[str, Tensor]) -> Callable:
    """``f`` with the weights that were drawn, whenever it is called."""
    caches = [dict(context.cache) for context in contexts]

    def held(*args: Any) -> Any:
        with ExitStack() as stack:
            for context, cache in zip(contexts, caches, strict=True):
                stack.enter_context(_remembering(context, cache))
            stack.enter_context(_Hold(values))
            return f(*args)

    return held


@contextmanager
def _remembering(context: Any, cache: dict[str, Tensor]) -> Iterator[None]:
    """A module's context as it was when its weights were drawn."""
    with context:
        before = context.cache
        context.cache = dict(cache)
        try:
            yield
        finally:
            context.cache = before


class _Hold(Messenger):
    """Inside the solve the weights are values, not sites; and a field must be a function, so nothing else is drawn."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _process_message(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if name in self.values:
            msg["value"], msg["done"], msg["stop"] = self.values[name], True, True
        elif msg["type"] in ("sample", "param"):
            raise SolveError(
                f"the vector field calls pyro.{msg['type']}({name!r}) while it is solved, but it is evaluated many "
                "times and must be a function: do so before lde.ode and pass the value in params, or declare it in a "
                "PyroModule field (PyroSample, PyroParam)."
            )


def _roots(module: Module) -> list[PyroModule]:
    """The PyroModules that are not part of another: Pyro does not look for them below a plain module."""
    plain = [m for m in module.modules() if not isinstance(m, PyroModule)]
    below = [child for m in plain for child in m.children() if isinstance(child, PyroModule)]
    return [module, *below] if isinstance(module, PyroModule) else below


def _touched(modules: list[PyroModule], wanted: list[set[str] | None]) -> dict[str, dict[str, Any]]:
    """The sites that reading the weights makes."""
    if not modules:
        return {}
    with pyro.poutine.trace() as trace:
        for module, names in zip(modules, wanted, strict=True):
            _touch(module, names)
    nodes = trace.trace.nodes.items()
    return {n: s for n, s in nodes if s["type"] in ("sample", "param") and not site_is_subsample(s)}


def _touch(module: PyroModule, names: set[str] | None) -> None:
    """Read every weight below a module (``names`` None), or those of its attributes that are named."""
    lazy = [n for c in type(module).__mro__ for n, v in vars(c).items() if isinstance(v, (PyroSample, PyroParam))]
    own = [n for n in module._parameters if not n.endswith("_unconstrained")]
    for name in dict.fromkeys([*lazy, *module._pyro_samples, *module._pyro_params, *own, *module._modules]):
        if names is None or name in names:
            value = getattr(module, name)  # also names the children, and registers the parameters of plain ones
            if isinstance(value, PyroModule):
                _touch(value, None)


def _rank(site: dict[str, Any]) -> int:
    """Number of dimensions that belong to one row."""
    return site["fn"].event_dim if site["type"] == "sample" else site["value"].ndim


def _names_used(f: Callable, owner: PyroModule) -> set[str]:
    """Attribute names in the code of ``f`` and of the methods of ``owner`` that it calls."""
    names: set[str] = set()
    todo = [_code(f)]
    while todo:
        code = todo.pop()
        if code is not None:
            todo.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
            new = set(code.co_names) - names
            names |= new
            todo.extend(_code(getattr(type(owner), name, None)) for name in new)
    return names


def _code(f: Any) -> types.CodeType | None:
    return getattr(getattr(f, "__func__", getattr(f, "func", f)), "__code__", None)
