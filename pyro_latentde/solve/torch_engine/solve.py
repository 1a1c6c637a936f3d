# SPDX-License-Identifier: Apache-2.0
"""The torch engine as a row function: the adaptive stepper, and its accepted steps replayed for derivatives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_latentde.errors import DataError
from pyro_latentde.solve.events.rows import MakeEvents
from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.row_function import RowFunction
from pyro_latentde.solve.row_solution import empty_report, report_of
from pyro_latentde.solve.step_store import find_steps, keep_steps, new_token, tie_to
from pyro_latentde.solve.stops.rows import RowStops
from pyro_latentde.solve.stops.schedule import Stops
from pyro_latentde.solve.torch_engine.differentiable_rows import TorchRows, jvp_of, vjp_of
from pyro_latentde.solve.torch_engine.replay import along_events, replay_within
from pyro_latentde.solve.torch_engine.stepper import solve_rows

__all__ = ["TorchSolve", "per_row", "replay_function", "require_sorted", "solve_outputs"]

BatchedField = Callable[..., Tensor]
MakeField = Callable[[Sequence[Tensor], Sequence[bool]], BatchedField]


@dataclass(frozen=True)
class TorchSteps:
    """Step sizes ``(R, N)`` and status ``(R,)`` of a solve."""

    h: Tensor
    status: Tensor

    @property
    def nbytes(self) -> int:
        return self.h.numel() * self.h.element_size()

    @property
    def rows(self) -> int:
        return self.h.shape[0]


def solve_outputs(rows: int, tensors: Sequence[Tensor], room: int = 0) -> list[Tensor]:
    """Empty outputs of a solve: ys, report, and of ``room`` events the times, states and numbers."""
    y0, times = tensors[0], tensors[1]
    ys = torch.empty(rows, times.shape[-1], y0.shape[-1], dtype=y0.dtype, device=y0.device)
    found = [ys.new_empty(rows, room), ys.new_empty(rows, room, y0.shape[-1])] if room else []
    which = [torch.empty(rows, room, dtype=torch.int64, device=y0.device)] if room else []
    return [ys, empty_report(rows, y0.device), *found, *which]


def require_sorted(times: Tensor, times_shared: bool, t0: Tensor, t0_shared: bool) -> None:
    """Times that a transform held when the problem was posed must run away from t0; now they can be seen."""
    after = times - (t0 if t0_shared else t0[:, None])
    steps = after.diff(dim=-1)
    away = ((after >= 0).all(-1) & (steps >= 0).all(-1)) | ((after <= 0).all(-1) & (steps <= 0).all(-1))
    if not bool(away.all()):
        raise DataError("under vmap or grad over times, the times must be sorted, running away from t0 to one side.")


def per_row(rows: int, shared: Sequence[bool], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.expand(rows, *t.shape) if one else t for t, one in zip(tensors, shared, strict=True)]


def replay_function(
    make_field: MakeField,
    find: Callable[[int, tuple[bool, ...], Sequence[Tensor]], tuple[Tensor, Tensor]],
    method: Method,
    count: int,
    budget: int | None = None,
    along: Callable[..., Tensor] | None = None,
    stops: Stops | None = None,
    make_events: MakeEvents | None = None,
    room: int = 0,
) -> TorchRows:
    """``ys`` as a differentiable function of (y0, times, t0, parameters; report) along the accepted steps.

    With events, their times and states too.

    Args:
        make_field: From parameters and their sharing to ``f(t (R,), y (R, D), rows) -> (R, D)``.
        find: From rows, sharing and inputs (with the report) to step sizes ``(R, N)`` and status ``(R,)``.
        count: Number of inputs without the report.
        budget: Bytes for what the derivative keeps, None for half of what is free.
        along: Takes the steps again, as :func:`~pyro_latentde.solve.torch_engine.replay.replay_rows` does, which is
            taken without.
        stops: What happens at the stops, whose tensors are the last of these inputs.
        make_events: As ``make_field``, to the events.
        room: E, most events of a row.
    """
    last = count - (0 if stops is None else len(stops.names))

    def compute(rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        h, status = find(rows, shared, tensors)
        starts = tuple(per_row(rows, shared[:3], tensors[:3]))

        def make(leaves: Sequence[Tensor], times: Tensor, t0: Tensor) -> tuple[BatchedField, RowStops]:
            moments = per_row(rows, shared[last:count], leaves[last - 3 :])
            return make_field(leaves[: last - 3], shared[3:last]), RowStops.of(stops, moments, times, t0)

        h, own = h.to(starts[0]), (tensors[3:count], shared[3:count])
        if make_events is not None:
            f, stops_of_rows = make(tensors[3:count], *starts[1:])
            events = make_events(tensors[3:last], shared[3:last])
            ys, course = along_events(f, *starts, h, method, stops_of_rows, events)
            out = (ys, course.times, course.states)
        elif along is None:
            out = (replay_within(make, starts, tensors[3:count], h, method, budget),)
        else:
            out = (along(make_field(*own), *starts, h, method),)
        good = (status == 0).to(starts[0].device)
        return [_where_good(good, x) for x in out]

    def empty(rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        found = solve_outputs(rows, tensors, room)
        return [found[0], *found[2:4]]

    return TorchRows(compute, empty, count + 1, range(count), (None,) if make_events is None else (None,) * 3)


def _where_good(good: Tensor, x: Tensor) -> Tensor:
    """A failed row has zero gradient, and no NaN may reach the others' through a product with it."""
    good = good.reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(good, torch.where(good & x.isfinite(), x, 0.0), 0.0 * x.detach())


class TorchSolve(RowFunction):
    """Outputs as the fused solve: ys ``(R, T, D)``, report ``(R, 5)``, and with events what was found of them."""

    saved = (1,)
    follows = (None, None)

    def __init__(
        self,
        make_field: MakeField,
        leaves: int,
        method: Method,
        rtol: float,
        atol: float,
        max_steps: int,
        step_size: float | None,
        replay: Tensor | None,
        budget: int | None = None,
        stops: Stops | None = None,
        events: MakeEvents | None = None,
        room: int = 0,
    ) -> None:
        super().__init__()
        self.make_field, self.leaves, self.method = make_field, leaves, method
        self.budget, self.stops, self.make_events, self.room = budget, stops, events, room
        if events is not None:
            self.differentiable, self.follows = (0, 2, 3), (None,) * 5
        self.control = {"rtol": rtol, "atol": atol, "max_steps": max_steps, "step_size": step_size, "steps": replay}
        self.wrt = tuple(range(3 + leaves))

    def _solve(self, rows: int, shared: Sequence[bool], tensors: Sequence[Tensor]) -> object:
        y0, times, t0 = per_row(rows, shared[:3], tensors[:3])
        last = len(tensors) - (0 if self.stops is None else len(self.stops.names))
        f = self.make_field(tensors[3:last], shared[3:last])
        stops = RowStops.of(self.stops, per_row(rows, shared[last:], tensors[last:]), times, t0)
        events = None if self.make_events is None else self.make_events(tensors[3:last], shared[3:last])
        return solve_rows(f, y0, times, t0, self.method, **self.control, stops=stops, events=events)

    def run(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        if self.control["steps"] is None:
            require_sorted(tensors[1], shared[1], tensors[2], shared[2])
        out = self._solve(rows, shared, [t.detach() for t in tensors])
        token = new_token()
        keep_steps(token, TorchSteps(out.steps, out.status))
        found = [] if out.found is None else [out.found.times, out.found.states, out.found.which]
        return [out.ys, report_of(out, torch.arange(token, token + rows, device=out.status.device)), *found]

    def outputs(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        return solve_outputs(rows, tensors, self.room)

    def on_context(self, ctx: object, outputs: Sequence[Tensor]) -> None:
        tie_to(ctx, outputs[1])

    def _find(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        n = 3 + self.leaves
        steps = find_steps(tensors[n].detach())
        if steps is None:
            out = self._solve(rows, shared[:n], [t.detach() for t in tensors[:n]])
            steps = TorchSteps(out.steps, out.status)
        return steps.h, steps.status

    def replayed(self) -> TorchRows:
        further = {"stops": self.stops, "make_events": self.make_events, "room": self.room}
        return replay_function(self.make_field, self._find, self.method, 3 + self.leaves, self.budget, **further)

    def make_vjp(self) -> RowFunction:
        return vjp_of(self.replayed())

    def make_jvp(self) -> RowFunction:
        return jvp_of(self.replayed())
