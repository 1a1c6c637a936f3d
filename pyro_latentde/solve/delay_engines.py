# SPDX-License-Identifier: Apache-2.0
"""Which engine solves a delay problem, and the solve as a function of its tensors."""

from torch import Tensor

from pyro_latentde.errors import SolveError
from pyro_latentde.solve.delay_field import MakeDelayed, rowwise
from pyro_latentde.solve.delay_problem import DelayProblem
from pyro_latentde.solve.delay_solve import DelaySolve
from pyro_latentde.solve.engines import batched_field, choose_engine
from pyro_latentde.solve.methods import get_method
from pyro_latentde.solve.row_function import RowFunction
from pyro_latentde.solve.settings import SolveSettings

__all__ = ["choose_delay_engine", "delay_function"]


def choose_delay_engine(posed: DelayProblem, engine: str, settings: SolveSettings) -> tuple[str, str]:
    """The engine for a delay problem, and why.

    Raises:
        SolveError: For an unknown engine, or ``engine="fused"`` where that cannot be.
    """
    return "torch", "as asked"


def delay_function(posed: DelayProblem, engine: str, settings: SolveSettings, keep: bool) -> RowFunction:
    """The solve of one engine, keeping its steps or not."""
    return _torch_function(posed, settings)


def _torch_function(posed: DelayProblem, settings: SolveSettings) -> RowFunction:
    return DelaySolve(
        _by_user(posed),
        posed.problem.leaves,
        get_method(settings.method),
        **settings.control,
        replay=_given_steps(posed, settings),
    )


def _by_user(posed: DelayProblem) -> MakeDelayed:
    """The user's own operations over rows."""
    past = None if posed.past is None else batched_field(posed.of(posed.past))
    return rowwise(batched_field(posed.of(posed.slope)), past, posed.lag, posed.state.size)


def _given_steps(posed: DelayProblem, settings: SolveSettings) -> Tensor | None:
    steps = settings.replay_steps(posed.problem)
    if steps is not None and steps.shape[2:] != (1 + posed.lags,):
        raise SolveError(
            f"replay= expects a solution of a delay equation with {posed.lags} lag(s), which knows the lags its steps "
            "were chosen for."
        )
    return steps
