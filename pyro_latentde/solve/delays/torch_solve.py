# SPDX-License-Identifier: Apache-2.0
"""The torch engine for delay equations as a row function: a stepper with a memory, and its steps taken again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_latentde.errors import DataError
from pyro_latentde.solve.delays.adaptive import solve_delayed_adaptive
from pyro_latentde.solve.delays.replay import replay_delayed, solve_delayed_equal, solve_delayed_given
from pyro_latentde.solve.row_solution import RowSolution
from pyro_latentde.solve.torch_engine.differentiable_rows import TorchRows
from pyro_latentde.solve.torch_engine.solve import TorchSolve, per_row, replay_function

__all__ = ["DelaySolve", "require_forward"]


class DelaySolve(TorchSolve):
    """As :class:`TorchSolve`, of a :class:`DelayedField`."""

    def _solve(self, rows: int, shared: Sequence[bool], tensors: Sequence[Tensor]) -> RowSolution:
        y0, times, t0 = per_row(rows, shared[:3], tensors[:3])
        require_forward(times, t0)
        with torch.no_grad():
            field = self.make_field(tensors[3:], shared[3:])
            y0 = field.start(y0, t0)
        control = self.control
        if control["steps"] is not None:
            return solve_delayed_given(field, y0, times, t0, control["steps"].to(t0), self.method)
        if control["step_size"] is not None:
            return solve_delayed_equal(field, y0, times, t0, self.method, control["step_size"], control["max_steps"])
        return solve_delayed_adaptive(
            field, y0, times, t0, self.method, control["rtol"], control["atol"], control["max_steps"]
        )

    def replayed(self) -> TorchRows:
        return replay_function(self.make_field, self._find, self.method, 3 + self.leaves, along=replay_delayed)


def require_forward(times: Tensor, t0: Tensor) -> None:
    """Times that a transform held when the problem was posed must not lie before t0; now they can be seen."""
    if bool((times < t0[..., None]).any()):
        raise DataError("times lie before t0: a delay equation is solved forward, from its history on.")
