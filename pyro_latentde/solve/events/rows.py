# SPDX-License-Identifier: Apache-2.0
"""Events over rows in plain torch: where a condition crosses zero in a step, and the step that ends there.

Between two neighbouring points a and b of a step a condition g changes sign; the interpolant gives a first root, by
regula falsi (Illinois) with a bisection every third time. Then the step is taken again with size h, and Newton's method
solves g(t + h, y(h)) = 0 with dg/dh = g_t + g_y f, to rounding.

References:
    Dowell, Jarratt, A modified regula falsi method, BIT 11 (1971) 168.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_latentde.solve.events.event import EventTraits
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.torch_engine.implicit import implicit_step
from pyro_latentde.solve.torch_engine.runge_kutta import main_stages

__all__ = ["LANDINGS", "MakeEvents", "RowEvent", "bracketed_root", "exact_step", "land", "rate_of", "row_events"]

Field = Callable[[Tensor, Tensor], Tensor]
LANDINGS = 20  # steps that are tried for one event; two or three do
NARROW = 1e-10  # relative width at which the search on the interpolant ends


class RowEvent(NamedTuple):
    """One event over rows.

    Args:
        traits: What kind it is.
        condition: ``c(t (R,), y (R, D), rows) -> (R,)``.
        reset: ``r(t (R,), y (R, D), rows) -> (R, D)``, or None.
    """

    traits: EventTraits
    condition: Callable[..., Tensor]
    reset: Callable[..., Tensor] | None


MakeEvents = Callable[[Sequence[Tensor], Sequence[bool]], list[RowEvent]]


def row_events(traits: Sequence[EventTraits], makers: Sequence[tuple[Callable, Callable | None]]) -> MakeEvents:
    """Events from makers of their condition and reset, as those of a field: ``make(leaves, shared)``."""

    def make(leaves: Sequence[Tensor], shared: Sequence[bool]) -> list[RowEvent]:
        pairs = [(c(leaves, shared), None if r is None else r(leaves, shared)) for c, r in makers]
        return [RowEvent(kind, c, r) for kind, (c, r) in zip(traits, pairs, strict=True)]

    return make


def rate_of(condition: Callable[..., Tensor], t: Tensor, y: Tensor, slope: Tensor, rows: Tensor) -> Tensor:
    """dg/dt = g_t + g_y . slope along the solution, ``(R,)``, without a graph."""
    with torch.enable_grad():
        t, y = t.detach().requires_grad_(), y.detach().requires_grad_()
        value = condition(t, y, rows)
        if not value.requires_grad:
            return torch.zeros_like(t)
        by_t, by_y = torch.autograd.grad(value.sum(), (t, y), allow_unused=True, materialize_grads=True)
    return by_t + (by_y * slope).sum(1).to(t)


def exact_step(
    field: Field, method: Method, t: Tensor, y: Tensor, h: Tensor, k1: Tensor, implicit: Tensor | None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Stages, end and convergence of one step of given size; of a switching method ``implicit`` says how."""
    whole = torch.ones_like(t, dtype=torch.bool)
    if method.kind == "implicit":
        step = implicit_step(field, method, t, y, h, k1, None)
        return step.k, step.y_new, step.converged
    if implicit is None or not bool(implicit.any()):
        return *main_stages(field, method, t, y, h, k1), whole
    step = implicit_step(field, method.stiff, t, y, torch.where(implicit, h, 0.0), k1, None)
    k, y_new = main_stages(field, method, t, y, torch.where(implicit, 0.0, h), k1)
    column = implicit[:, None]
    stages = [torch.where(column, a, b) for a, b in zip(step.k, k, strict=True)]
    return stages, torch.where(column, step.y_new, y_new), step.converged | ~implicit


def bracketed_root(value: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, fa: Tensor, fb: Tensor) -> Tensor:
    """A root in [a, b] of every row, where ``fa`` and ``fb`` have different signs."""
    last = torch.zeros_like(a)
    for j in range(60):
        c = 0.5 * (a + b) if j % 3 == 2 else torch.where(fb == fa, 0.5 * (a + b), (a * fb - b * fa) / (fb - fa))
        c = torch.where((c >= a) & (c <= b), c, 0.5 * (a + b))
        fc = value(c)
        right = fc * fb > 0
        right |= fc == 0
        fa = torch.where(right, torch.where(last > 0, 0.5 * fa, fa), fc)
        fb = torch.where(right, fc, torch.where(last < 0, 0.5 * fb, fb))
        a, b = torch.where(right, a, c), torch.where(right, c, b)
        last = torch.where(right, 1.0, -1.0).to(a)
        if bool(((b - a <= NARROW * b) | (fb == 0)).all()):
            break
    return torch.where((fb == 0) | (fb == fa), b, (a * fb - b * fa) / (fb - fa))


class Landing(NamedTuple):
    """Sizes ``(R,)`` of steps that end in an event, their stages, ends, convergence, what is left of g, and evals."""

    h: Tensor
    k: list[Tensor]
    y_new: Tensor
    converged: Tensor
    left: Tensor
    trials: int


def land(
    field: Field,
    method: Method,
    condition: Callable[..., Tensor],
    t: Tensor,
    y: Tensor,
    h: Tensor,
    k1: Tensor,
    implicit: Tensor | None,
    rows: Tensor,
    furthest: Tensor | None = None,
) -> Landing:
    """Change h until the condition is zero at the end of the step.

    Args:
        field: f(t, y) on these rows.
        method: The method.
        condition: g(t, y, rows).
        t: Start of the step, ``(R,)``.
        y: State there, ``(R, D)``.
        h: First guess, ``(R,)``.
        k1: Slope at the start.
        implicit: Of a switching method, which rows step implicitly.
        rows: Numbers of the rows.
        furthest: Largest step, if there is one.
    """
    eps = torch.finfo(t.dtype).eps
    before, open_ = torch.full_like(t, torch.inf), torch.ones_like(t, dtype=torch.bool)
    toward = torch.where(h < 0, -1.0, 1.0).to(t)
    for m in range(1, LANDINGS + 1):
        smallest = 4 * eps * t.abs() + torch.finfo(t.dtype).tiny
        h = torch.where(h.abs() < smallest, toward * smallest, h)
        k, y_new, converged = exact_step(field, method, t, y, h, k1, implicit)
        g = condition(t + h, y_new, rows).to(t)
        end = k[-1] if method.fsal else field(t + h, y_new)
        rate = rate_of(condition, t + h, y_new, end, rows)
        rest = 4 * eps * torch.maximum((t + h).abs(), h.abs()) * rate.abs()
        stuck = (g.abs() >= 0.5 * before) if m > 3 else torch.zeros_like(open_)
        open_ = open_ & ~((g.abs() <= rest) | stuck | ~torch.isfinite(g) | (rate == 0))
        if not bool(open_.any()):
            break
        there = h - g / rate
        there = torch.where(toward * there <= 0, 0.5 * h, there)
        if furthest is not None:
            there = torch.where(toward * there > toward * furthest, 0.5 * (h + furthest), there)
        h, before = torch.where(open_, there, h), g.abs()
    return Landing(h, k, y_new, converged & torch.isfinite(g), g.abs(), m)
