# SPDX-License-Identifier: Apache-2.0
"""``lde.events``: event times of a Poisson process whose intensity depends on a solved state, as sites of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro.poutine.runtime import get_plates
from torch import Tensor

from pyro_latentde.data.event_times import EventTimes
from pyro_latentde.distributions.observation_laws import CategoricalLaw
from pyro_latentde.distributions.poisson_process import GridPoissonProcess, PoissonProcess
from pyro_latentde.errors import DataError, ShapeError
from pyro_latentde.sites.field_weights import held_together, no_draws
from pyro_latentde.sites.ode_record import named_errors, record_trajectory
from pyro_latentde.sites.settings import requested_times, site_settings
from pyro_latentde.solve.integrate import odesolve
from pyro_latentde.solve.solution import Solution
from pyro_latentde.solve.torch_engine.along import field_along
from pyro_latentde.solve.vector_field import BoundField

__all__ = ["events"]


def events(
    name: str,
    f: Callable,
    log_intensity: Callable,
    y0: Tensor,
    data: EventTimes | None = None,
    params: Any = None,
    *,
    start: Tensor | float | None = None,
    end: Tensor | float | None = None,
    types: int = 1,
    max_events: int = 1000,
    grid_points: int = 1001,
    states: Sequence[str] | None = None,
    event_dims: dict[str, int] | None = None,
    **settings: Any,
) -> Tensor:
    r"""Solve :math:`dz/dt = f(t, z, p)` and score, or draw, events that come at rate :math:`\lambda(t, z, p)`.

    .. math:: \log p(t_1, \dots, t_n) = \sum_i \log \lambda(t_i, z(t_i), p) - \int_a^b \lambda(t, z(t), p) dt

    The integral is one more state of the same solve, to its tolerance, and enters with weight one. Sites: `name`, the
    event times, ``inf`` after the last; ``f"{name}_marks"``, which of several types each event is, given its time;
    ``f"{name}_states"``, deterministic, the solved states and expected counts so far, at the events and the end. Rows
    belong to the enclosing plate at dim -1, or else to a plate ``f"{name}_series"`` that is made here.

    Args:
        name: name of the site of event times, and of the solve for :func:`~pyro_latentde.solver`.
        f: vector field f(t, z, p) of one row, as for :func:`~pyro_latentde.ode`.
        log_intensity: function (t, z, p) -> () or (types,), of one row: logarithm of events per unit of time.
        y0: initial state at the start, (*batch, D).
        data: N rows of events. None: events are drawn between `start` and `end`.
        params: parameters of both functions; leading dimensions are batch.
        start: when watching begins, () or (*batch,), where events are drawn; data know theirs.
        end: when it ends.
        types: number of types of events; `data` then has marks 0, ..., types - 1.
        max_events: room for the events drawn in a row.
        grid_points: draws have an intensity that is constant between that many times.
        states: names of the D coordinates.
        event_dims: dimensions of one row, by parameter name, where the functions do not tell.
        settings: of the solve, as for :func:`~pyro_latentde.odesolve`.

    Returns:
        The states at the events, (*batch, E, D); at the end of the time watched where a row has fewer events.

    Raises:
        ShapeError: shapes that do not fit, rows that do not fit the plate.
        DataError: marks that are missing or out of range, or no start and end.
        SolveError: rows fail and no Pyro handler is active.

    References:
        Rubanova, Y., Chen, R. T. Q. and Duvenaud, D. (2019). Latent ordinary differential equations for
        irregularly-sampled time series. NeurIPS 32, section 3.2.

    Example:
        >>> import torch, pyro, pyro_latentde as lde
        >>> from pyro_latentde.data import EventTimes
        >>> data = EventTimes.from_lists([[0.2, 0.7], []], start=0.0, end=1.0)
        >>> y0 = torch.zeros(2, 1).double()
        >>> trace = pyro.poutine.trace(lde.events).get_trace("e", lambda t, z: 0 * z, lambda t, z: z[0], y0, data)
        >>> trace.nodes["e"]["fn"].log_prob(data.times).round(decimals=4)  # n log 1 - 1
        tensor([-1., -1.], dtype=torch.float64)
    """
    with named_errors(name):
        _check(y0, data, start, end, types)
        failed = "nan" if pyro.poutine.runtime.am_i_wrapped() else "raise"
        keywords = {**site_settings(name, settings, f"{name}_states"), "event_dims": event_dims, "on_failure": failed}
        with held_together(f, log_intensity) as held:
            takes = (_takes_params(f), _takes_params(log_intensity))
            process = _Solve(name, held, takes, y0, params, types, states, keywords)
            if data is not None:
                return _score(process, data)
            start, end = (torch.as_tensor(x, dtype=y0.dtype, device=y0.device) for x in (start, end))
            return _draw(process, start, end, max_events, grid_points)


@dataclass(frozen=True)
class _Solve:
    """The states and, below them, the integrals of the intensities."""

    name: str
    fields: tuple[Callable | BoundField, ...]
    takes_params: tuple[bool, bool]
    y0: Tensor
    params: Any
    types: int
    states: Sequence[str] | None
    keywords: dict[str, Any]

    @property
    def size(self) -> int:
        return self.y0.shape[-1]

    @property
    def first(self) -> Tensor:
        return torch.cat([self.y0, self.y0.new_zeros(*self.y0.shape[:-1], self.types)], dim=-1)

    def solve(self, times: Tensor, start: Tensor) -> Solution:
        with no_draws():
            return odesolve(self._field(torch.exp), self.first, times, self.params, t0=start, **self.keywords)

    def log_intensities(self, solution: Solution, start: Tensor) -> Tensor:
        """(*batch, T, types), at the times of a solution."""
        field, event_dims = self._field(None), self.keywords["event_dims"]
        args = (self.first, solution.times, solution.ys, self.params)
        with no_draws():
            return field_along(field, *args, t0=start, event_dims=event_dims)[..., self.size :]

    def record(self, solution: Solution, start: Tensor) -> Tensor:
        """The site of the states; returns those at all times but the last, the end."""
        site = f"{self.name}_states"
        extra = requested_times(site)
        if extra is not None:
            extra[1][site] = self.solve(extra[0], start).ys
        counts = [self.name] if self.types == 1 else [f"{self.name}[{i}]" for i in range(self.types)]
        names = None if self.states is None else (*self.states, *counts)
        return record_trajectory(site, solution.ys, solution, names)[..., :-1, : self.size]

    def _field(self, link: Callable[[Tensor], Tensor] | None) -> Callable | BoundField:
        def joined(f: Callable, log_intensity: Callable) -> Callable:
            return _joined(f, log_intensity, self.takes_params, self.size, self.types, link)

        if not isinstance(self.fields[0], BoundField):
            return joined(*self.fields)
        return replace(
            self.fields[0], f=joined(*(b.f for b in self.fields)), held=joined(*(b.held for b in self.fields))
        )


def _joined(
    f: Callable, log_intensity: Callable, takes: tuple[bool, bool], size: int, types: int, link: Callable | None
) -> Callable:
    """Field of the states and of what the link makes of the log-intensities."""

    def field(t: Tensor, y: Tensor, p: Any = None) -> Tensor:
        z = y[:size]
        move = f(t, z, p) if takes[0] else f(t, z)
        logs = log_intensity(t, z, p) if takes[1] else log_intensity(t, z)
        if logs.shape not in ((types,), () if types == 1 else (types,)):
            raise ShapeError(
                f"log_intensity returned shape {tuple(logs.shape)}; expected {'() or ' if types == 1 else ''}({types},)"
                f" for types={types}."
            )
        logs = logs.reshape(types)
        return torch.cat([move, logs if link is None else link(logs)])

    return field


def _takes_params(function: Callable) -> bool:
    target = function.forward if isinstance(function, torch.nn.Module) else function
    kinds = [p.kind for p in inspect.signature(target).parameters.values()]
    positional = sum(k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for k in kinds)
    return positional > 2 or inspect.Parameter.VAR_POSITIONAL in kinds


def _score(process: _Solve, data: EventTimes) -> Tensor:
    name, y0 = process.name, process.y0
    data = data.to(y0.dtype, y0.device)
    plate, drop = _plate(name, len(data), y0)
    mask, value, marks = data.mask, data.times, data.marks
    times = torch.cat([torch.where(mask, value, data.end[:, None]), data.end[:, None]], dim=-1)
    start = data.start
    if drop:
        mask, value, times, start = mask[0], value[0], times[0], start[0]
        marks = None if marks is None else marks[0]
    with plate:
        solution = process.solve(times, start)
        logs = process.log_intensities(solution, start)[..., :-1, :]
        integral = solution.ys[..., -1, process.size :].sum(-1)
        pyro.sample(name, PoissonProcess(logs.logsumexp(-1), integral, mask), obs=value)
        if process.types > 1:
            if not 0 <= data.highest_mark < process.types:
                told = "no marks" if marks is None else f"marks up to {data.highest_mark}"
                raise DataError(f"types = {process.types} needs marks 0 to {process.types - 1}; the data have {told}.")
            pyro.sample(f"{name}_marks", CategoricalLaw(logs).mask(mask).to_event(1), obs=marks.to(y0.dtype))
        return process.record(solution, start)


def _draw(process: _Solve, start: Tensor, end: Tensor, max_events: int, grid_points: int) -> Tensor:
    share = torch.linspace(0, 1, grid_points, dtype=start.dtype, device=start.device)
    grid = torch.lerp(start[..., None], end[..., None], share)
    # rounding in the solver may let an integral of a rate near zero fall
    counts = process.solve(grid, start).ys[..., process.size :].sum(-1).cummax(-1)[0]
    value = pyro.sample(process.name, GridPoissonProcess(grid, counts, max_events))
    there = value.isfinite()
    times = torch.where(there, value, end[..., None])
    times = torch.cat([times, end[..., None].expand(*times.shape[:-1], 1)], dim=-1)
    solution = process.solve(times, start)
    if process.types > 1:
        logs = process.log_intensities(solution, start)[..., :-1, :]
        pyro.sample(f"{process.name}_marks", CategoricalLaw(logs).mask(there).to_event(1))
    return process.record(solution, start)


def _plate(name: str, n: int, y0: Tensor) -> tuple[AbstractContextManager, bool]:
    """The plate of the rows, and whether the batch dimension of one lone row is dropped."""
    enclosing = [frame for frame in get_plates() if frame.dim == -1]
    if enclosing and enclosing[0].size == n:
        return nullcontext(), False
    if n == 1:
        return nullcontext(), y0.shape[-2:-1] != (1,)
    if enclosing:
        raise ShapeError(
            f"{n} rows of events in plate {enclosing[0].name!r} of size {enclosing[0].size}. Index the data by the "
            "plate (`with pyro.plate(...) as i: ... data[i]`), or leave the plate, as a plate is made here."
        )
    return pyro.plate(f"{name}_series", n, dim=-1), False


def _check(y0: Any, data: Any, start: Any, end: Any, types: int) -> None:
    if not isinstance(y0, Tensor) or y0.dim() == 0:
        raise ShapeError(f"y0: expected a tensor (*batch, D), got {type(y0).__name__}; stack a structured state.")
    if data is not None and not isinstance(data, EventTimes):
        raise DataError(
            f"data: expected EventTimes, got {type(data).__name__}: EventTimes.from_lists(times, start=, end=)."
        )
    if (data is None) == (start is None or end is None):
        raise DataError("give either data, which know when they start and end, or start= and end= to draw events.")
    if types < 1:
        raise DataError(f"types = {types}; expected at least one type of events.")
