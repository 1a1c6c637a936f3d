# SPDX-License-Identifier: Apache-2.0
"""Which engine solves a delay problem, and the solve as a function of its tensors."""

from pyro_latentde.errors import SolveError
from pyro_latentde.solve.choices import not_among
from pyro_latentde.solve.delays.field import MakeDelayed, rowwise
from pyro_latentde.solve.delays.problem import DelayProblem
from pyro_latentde.solve.delays.torch_solve import DelaySolve
from pyro_latentde.solve.engines import ENGINES, batched_field, traced
from pyro_latentde.solve.methods.catalog import Method, get_method
from pyro_latentde.solve.row_function import RowFunction
from pyro_latentde.solve.settings import SolveSettings

__all__ = ["choose_delay_engine", "delay_function"]


def choose_delay_engine(posed: DelayProblem, engine: str, settings: SolveSettings) -> tuple[str, str]:
    """The engine for a delay problem, and why.

    Raises:
        SolveError: For an unknown engine, or ``engine="fused"`` where that cannot be.
    """
    if engine not in ENGINES:
        raise SolveError(not_among("engine", engine, ENGINES))
    if engine == "torch":
        return engine, "as asked"
    obstacle = _why_not_fused(posed, get_method(settings.method))
    if obstacle is None:
        return "fused", "the field compiles to one kernel"
    if engine == "fused":
        raise SolveError(f'engine="fused" cannot solve this: {obstacle}. engine="torch" can.')
    return "torch", obstacle


def _why_not_fused(posed: DelayProblem, method: Method) -> str | None:
    device = posed.problem.tensors[0].device
    if method.kind != "explicit":
        return f"{method.name} is implicit, and kernels of delay equations are explicit"
    if device.type != "cpu":
        return f"the state is on {device}, and kernels of delay equations are compiled for the CPU"
    found = traced(posed.wide)
    if isinstance(found, str):
        return found
    from pyro_latentde.solve.fused.kernel_choice import too_large

    dtype = posed.problem.tensors[0].dtype
    return too_large(found, method, dtype, True)  # these kernels take one row at a time, as those of a device


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
    from pyro_latentde.solve.fused.templates.delays.parts import DelayLayout

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
