# SPDX-License-Identifier: Apache-2.0
"""Which engine solves a delay problem, and the solve as a function of its tensors."""

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
    device = posed.problem.tensors[0].device
    if get_method(settings.method).kind != "explicit":
        obstacle = f"{settings.method} is implicit, and kernels of delay equations are explicit"
    elif device.type != "cpu":
        obstacle = f"the state is on {device}, and kernels of delay equations are compiled for the CPU"
    else:
        return choose_engine(posed.wide, engine, "discrete")
    if engine == "fused":
        raise SolveError(f'engine="fused" cannot solve this: {obstacle}. engine="torch" can.')
    return choose_engine(posed.wide, "torch", "discrete")[0], obstacle


def delay_function(posed: DelayProblem, engine: str, settings: SolveSettings, keep: bool) -> RowFunction:
    """The solve of one engine, keeping its steps or not; a compiled one is made once per field and method."""
    if engine == "torch":
        return _torch_function(posed, settings)
    kernels = posed.problem.info.kernels
    key = (settings, keep, posed.problem.checked)
    function = kernels.get(key)
    if function is None:
        function = _fused_function(posed, settings, keep)
        if settings.replay is None:
            kernels[key] = function
    return function


def _fused_function(posed: DelayProblem, settings: SolveSettings, keep: bool) -> RowFunction:
    from pyro_latentde.solve.fused.delay_kernel import DelayKernel, FusedDelaySolve
    from pyro_latentde.solve.fused.templates.delay_parts import DelayLayout

    problem, method = posed.problem, get_method(settings.method)
    kernels = problem.info.kernels
    if method.name not in kernels:
        trace = kernels["trace"]
        at = DelayLayout(method, posed.state.size, posed.lags, problem.leaves, posed.lag, posed.past is not None)
        kernels[method.name] = DelayKernel(trace.graph, trace.outputs, problem.leaves, method, at=at)
    kernel, given = kernels[method.name], settings.replay_steps(posed.problem, posed.lags)
    return FusedDelaySolve(kernel, settings.fused(keep, problem.checked), given)


def _torch_function(posed: DelayProblem, settings: SolveSettings) -> RowFunction:
    return DelaySolve(
        _by_user(posed),
        posed.problem.leaves,
        get_method(settings.method),
        **settings.control,
        replay=settings.replay_steps(posed.problem, posed.lags),
    )


def _by_user(posed: DelayProblem) -> MakeDelayed:
    """The user's own operations over rows."""
    past = None if posed.past is None else batched_field(posed.of(posed.past))
    return rowwise(batched_field(posed.of(posed.slope)), past, posed.lag, posed.state.size)
