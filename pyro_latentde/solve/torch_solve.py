# SPDX-License-Identifier: Apache-2.0
"""The torch engine as a row function: the adaptive stepper, and its accepted steps replayed for derivatives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_latentde.errors import DataError
from pyro_latentde.solve.methods import Method
from pyro_latentde.solve.replay import replay_within
from pyro_latentde.solve.row_function import RowFunction
from pyro_latentde.solve.row_solution import empty_report, report_of
from pyro_latentde.solve.row_stops import RowStops
from pyro_latentde.solve.step_store import find_steps, keep_steps, new_token, tie_to
from pyro_latentde.solve.stepper import solve_rows
from pyro_latentde.solve.stops import Stops
from pyro_latentde.solve.torch_rows import TorchRows, jvp_of, vjp_of

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


def solve_outputs(rows: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Empty outputs of a solve: ys and report."""
    y0, times = tensors[0], tensors[1]
    return [
        torch.empty(rows, times.shape[-1], y0.shape[-1], dtype=y0.dtype, device=y0.device),
        empty_report(rows, y0.device),
    ]


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
) -> TorchRows:
    """``ys`` as a differentiable function of (y0, times, t0, parameters; report) along the accepted steps.

    Args:
        make_field: From parameters and their sharing to ``f(t (R,), y (R, D), rows) -> (R, D)``.
        find: From rows, sharing and inputs (with the report) to step sizes ``(R, N)`` and status ``(R,)``.
        count: Number of inputs without the report.
        budget: Bytes for what the derivative keeps, None for half of what is free.
        along: Takes the steps again, as :func:`~pyro_latentde.solve.replay.replay_rows` does, which is taken without.
        stops: What happens at the stops, whose tensors are the last of these inputs.
    """
    last = count - (0 if stops is None else len(stops.names))

    def compute(rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        h, status = find(rows, shared, tensors)
        starts = tuple(per_row(rows, shared[:3], tensors[:3]))

        def make(leaves: Sequence[Tensor], times: Tensor, t0: Tensor) -> tuple[BatchedField, RowStops | None]:
            moments = per_row(rows, shared[last:count], leaves[last - 3 :])
            return make_field(leaves[: last - 3], shared[3:last]), RowStops.of(stops, moments, times, t0)

        if along is None:
            ys = replay_within(make, starts, tensors[3:count], h.to(starts[0]), method, budget)
        else:
            ys = along(make_field(tensors[3:count], shared[3:count]), *starts, h.to(starts[0]), method)
        good = (status == 0).to(ys.device)[:, None, None]
        # a failed row has zero gradient, and no NaN may reach the others' through a product with it
        return [torch.where(good, torch.where(good & ys.isfinite(), ys, 0.0), 0.0 * ys.detach())]

    def empty(rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        return solve_outputs(rows, tensors)[:1]

    return TorchRows(compute, empty, count + 1, range(count), (None,))


class TorchSolve(RowFunction):
    """Outputs as the fused solve: ys ``(R, T, D)`` and report ``(R, 5)``."""

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
    ) -> None:
        super().__init__()
        self.make_field, self.leaves, self.method = make_field, leaves, method
        self.budget, self.stops = budget, stops
        self.control = {"rtol": rtol, "atol": atol, "max_steps": max_steps, "step_size": step_size, "steps": replay}
        self.wrt = tuple(range(3 + leaves))

    def _solve(self, rows: int, shared: Sequence[bool], tensors: Sequence[Tensor]) -> object:
        y0, times, t0 = per_row(rows, shared[:3], tensors[:3])
        last = len(tensors) - (0 if self.stops is None else len(self.stops.names))
        f = self.make_field(tensors[3:last], shared[3:last])
        stops = RowStops.of(self.stops, per_row(rows, shared[last:], tensors[last:]), times, t0)
        return solve_rows(f, y0, times, t0, self.method, **self.control, stops=stops)

    def run(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        if self.control["steps"] is None:
            require_sorted(tensors[1], shared[1], tensors[2], shared[2])
        out = self._solve(rows, shared, [t.detach() for t in tensors])
        token = new_token()
        keep_steps(token, TorchSteps(out.steps, out.status))
        return [out.ys, report_of(out, torch.arange(token, token + rows, device=out.status.device))]

    def outputs(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        return solve_outputs(rows, tensors)

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
        return replay_function(self.make_field, self._find, self.method, 3 + self.leaves, self.budget, stops=self.stops)

    def make_vjp(self) -> RowFunction:
        return vjp_of(self.replayed())

    def make_jvp(self) -> RowFunction:
        return jvp_of(self.replayed())
