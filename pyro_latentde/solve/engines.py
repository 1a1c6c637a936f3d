# SPDX-License-Identifier: Apache-2.0
"""Which engine solves a problem, and the solve as a function of its tensors."""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from pyro_latentde.errors import GradientPathError, SolveError
from pyro_latentde.solve.choices import not_among
from pyro_latentde.solve.events.calls import call_condition, call_reset, event_values
from pyro_latentde.solve.events.event import Event
from pyro_latentde.solve.events.rows import MakeEvents, row_events
from pyro_latentde.solve.events.watch import capacity
from pyro_latentde.solve.lift import Lift, Untraceable, in_fresh_thread
from pyro_latentde.solve.methods.catalog import get_method
from pyro_latentde.solve.problem import Problem
from pyro_latentde.solve.row_function import RowFunction
from pyro_latentde.solve.settings import SolveSettings
from pyro_latentde.solve.torch_engine.solve import BatchedField, TorchSolve
from pyro_latentde.solve.vector_field import row_of

__all__ = [
    "ENGINES",
    "batched_events",
    "batched_field",
    "choose_engine",
    "fused_function",
    "on_device",
    "torch_function",
    "traced",
]

ENGINES = ("auto", "fused", "torch", "torchdiffeq")
MANY = 300  # kernels and settings that are remembered for a field

_LOG = logging.getLogger("pyro_latentde")


@lru_cache(maxsize=1)
def _llvm_missing() -> bool:
    missing = importlib.util.find_spec("llvmlite") is None
    if missing:
        _LOG.warning("llvmlite is not installed: solves run on the torch engine, which is slower. pip install llvmlite")
    return missing


def choose_engine(problem: Problem, engine: str, gradient: str, method: str) -> tuple[str, str]:
    """The engine for a problem, and why.

    Raises:
        SolveError: For an unknown engine, or ``engine="fused"`` where the field cannot be compiled.
        GradientPathError: For a continuous adjoint of a solve with events, doses, jumps or inputs with knots.
    """
    if engine not in ENGINES:
        raise SolveError(not_among("engine", engine, ENGINES))
    if problem.events:
        _refuse_events(engine, gradient)
    if problem.stops is not None and (gradient == "adjoint" or engine == "torchdiffeq"):
        refusal = GradientPathError if gradient == "adjoint" else SolveError
        raise refusal(
            "torchdiffeq knows no doses, jumps or inputs with knots: expected "
            f'gradient="discrete" or "forward" and engine="auto", "fused" or "torch"; got {gradient!r} and {engine!r}.'
        )
    if gradient == "adjoint":
        if engine in ("auto", "torchdiffeq"):
            return "torchdiffeq", 'gradient="adjoint" is the continuous adjoint of torchdiffeq'
        raise SolveError(f'gradient="adjoint" is computed by engine="torchdiffeq"; got engine={engine!r}.')
    if engine in ("torch", "torchdiffeq"):
        return engine, "as asked"
    obstacle = _why_not_fused(problem, method)
    if obstacle is None:
        return "fused", problem.info.kernels["why", method, problem.stops is None]
    if engine == "fused":
        raise SolveError(f'engine="fused" cannot solve this: {obstacle}. engine="torch" can.')
    return "torch", obstacle


def _refuse_events(engine: str, gradient: str) -> None:
    if gradient == "adjoint":
        raise GradientPathError(
            'gradient="adjoint" (the continuous adjoint of torchdiffeq) does not know events: at each of them the '
            'adjoint would jump. Use gradient="discrete" (the default) or "forward": both go through the event times.'
        )
    if engine == "torchdiffeq":
        raise SolveError('engine="torchdiffeq" does not know events; use engine="auto", "fused" or "torch".')


def _why_not_fused(problem: Problem, method: str) -> str | None:
    kernels, found, device = problem.info.kernels, traced(problem), on_device(problem.tensors[0])
    if isinstance(found, str):
        return found
    smooth = problem.stops is None
    if ("why", method, smooth) not in kernels:
        from pyro_latentde.solve.fused.kernel_choice import too_large, why_fused

        dtype = problem.tensors[0].dtype
        kernels["why not", method, smooth] = too_large(found, get_method(method), dtype, device, smooth)
        kernels["why", method, smooth] = why_fused(found, get_method(method), device, smooth)
    return kernels["why not", method, smooth]


def traced(problem: Problem) -> Any:
    """The traced field, or why there is none; traced once."""
    kernels = problem.info.kernels
    if "trace" not in kernels:
        kernels["trace"] = _no_kernel_for(problem.tensors[0]) or _no_events_on_device(problem) or _trace(problem)
    return kernels["trace"]


def _no_events_on_device(problem: Problem) -> str | None:
    if problem.events and on_device(problem.tensors[0]):
        return "events are found on a CUDA device by the torch engine"
    return None


def _no_kernel_for(y0: Tensor) -> str | None:
    if _llvm_missing():
        return "llvmlite is not installed"
    if y0.device.type not in ("cpu", "cuda"):
        return f"the state is on {y0.device}, and kernels are compiled for CPUs and CUDA devices"
    if y0.dtype not in (torch.float32, torch.float64):
        return f"the state has dtype {y0.dtype}"
    return _no_kernel_on_device(y0) if y0.is_cuda else None


def _no_kernel_on_device(y0: Tensor) -> str | None:
    from pyro_latentde.solve.fused.cuda.device import obstacle

    missing = obstacle()
    if missing is not None:
        _LOG.warning("solves on %s run on the torch engine, which is slower: %s", y0.device, missing)
    return missing and f"the state is on {y0.device}: {missing}"


def on_device(y0: Tensor) -> bool:
    """Whether the fused engine solves on a CUDA device."""
    return y0.is_cuda


def _trace(problem: Problem) -> Any:
    """The traced field, or why it cannot be traced."""
    from pyro_latentde.solve.fused.event_graph import KernelEvents
    from pyro_latentde.solve.fused.trace import trace_row

    info, events = problem.info, problem.events

    def call(t: Tensor, y: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        slope = info.call(problem.f, t, y, leaves)
        return torch.cat([slope, *event_values(info, events, t, y, leaves)]) if events else slope

    pairs = list(zip(problem.tensors, problem.shared, strict=True))
    pairs = pairs[: 3 + problem.field_leaves]
    rows = in_fresh_thread(lambda: [row_of(x, x.ndim if shared else x.ndim - 1) for x, shared in pairs])
    own, known = rows[3 : 3 + problem.own], rows[3 + problem.own :]
    bound_count = problem.field_leaves - problem.own - problem.info.captured_count
    bound = list(zip(problem.originals[:bound_count], known[:bound_count], strict=True))
    try:
        trace = trace_row(call, rows[2], rows[0], own, bound)
    except Untraceable as reason:
        return str(reason)
    except Exception as error:
        return f"tracing the field raised {type(error).__name__}: {error}"
    if trace.captured != problem.info.captured_count:
        return "the field captured other tensors when it was called a second time"
    if events:
        d = info.state.size
        info.kernels["events"] = KernelEvents.split(trace.outputs[d:], [e.traits for e in events], d)
        return replace(trace, outputs=trace.outputs[:d], eventful=True)
    return trace


def fused_function(problem: Problem, settings: SolveSettings, keep: bool) -> RowFunction:
    """The compiled solve, keeping its steps or not; compiled once per field and method, whatever lambda carries it."""
    kernels = problem.info.kernels
    key = (settings, keep, problem.checked, on_device(problem.tensors[0]), problem.stops)
    function = kernels.get(key)
    if function is None:
        function = _new_fused_function(problem, settings, keep)
        if settings.replay is None:
            kernels[key] = function
            if len(kernels) > MANY:
                del kernels[next(k for k in kernels if isinstance(k, tuple) and isinstance(k[0], SolveSettings))]
    return function


def _new_fused_function(problem: Problem, settings: SolveSettings, keep: bool) -> RowFunction:
    from pyro_latentde.solve.fused.kernel_choice import new_kernel
    from pyro_latentde.solve.fused.operator import FusedSolve

    kernels, name, y0 = problem.info.kernels, settings.method, problem.tensors[0]
    further = settings.fused(keep, problem.checked), settings.replay_steps(problem)
    if on_device(y0):
        return _on_device(problem, name)(*further)
    key = (name, problem.stops)
    if key not in kernels:
        kernels[key] = new_kernel(
            kernels["trace"], problem.leaves, get_method(name), problem.stops, kernels.get("events")
        )
    return FusedSolve(kernels[key], *further)


def _on_device(problem: Problem, name: str) -> Callable[..., RowFunction]:
    from pyro_latentde.solve.fused.cuda.kernel import CudaKernel
    from pyro_latentde.solve.fused.cuda.operator import CudaSolve

    kernels, dtype = problem.info.kernels, problem.tensors[0].dtype
    key = (name, problem.stops, dtype)
    if key not in kernels:
        trace, method = kernels["trace"], get_method(name)
        kernels[key] = CudaKernel(trace.graph, trace.outputs, problem.leaves, method, dtype, stops=problem.stops)
    return partial(CudaSolve, kernels[key])


def batched_field(problem: Problem) -> Callable[[Sequence[Tensor], Sequence[bool]], BatchedField]:
    """The user's field over rows: ``make(leaves, shared)`` gives ``f(t (R,), y (R, D), rows) -> (R, D)``."""
    info, f = problem.info, problem.f
    return _batched(problem, lambda t, y, leaves: info.call(f, t, y, leaves))


def batched_events(problem: Problem) -> MakeEvents:
    """The functions of the user's events over rows."""
    info = problem.info

    def both(event: Event) -> tuple[Callable, Callable | None]:
        condition = _batched(problem, lambda t, y, leaves: call_condition(info, event, t, y, leaves))
        if event.reset is None:
            return condition, None
        return condition, _batched(problem, lambda t, y, leaves: call_reset(info, event, t, y, leaves))

    return row_events([e.traits for e in problem.events], [both(e) for e in problem.events])


def _batched(problem: Problem, call: Callable[..., Tensor]) -> Callable[[Sequence[Tensor], Sequence[bool]], Callable]:
    """``call(t, y, leaves)`` of one row, over rows."""
    info, own, originals = problem.info, problem.own, problem.originals

    def one(t: Tensor, y: Tensor, *leaves: Tensor) -> Tensor:
        exchanged = {id(x): leaf for x, leaf in zip(originals, leaves[own:], strict=True)}
        lift = Lift([t, y, *leaves], exchanged, complete=True)
        with lift:
            return lift.adopt(call(t, y, leaves[:own]))

    def make(leaves: Sequence[Tensor], shared: Sequence[bool]) -> BatchedField:
        dims = (0, 0, *(None if s else 0 for s in shared))

        def mapped(t: Tensor, y: Tensor, rows: Tensor | None = None) -> Tensor:
            chosen = leaves if rows is None else [x if s else x[rows] for x, s in zip(leaves, shared, strict=True)]
            if info.batchable:
                try:
                    return torch.func.vmap(one, in_dims=dims)(t, y, *chosen)
                except RuntimeError as error:
                    info.batchable = False
                    _LOG.info("the vector field cannot be mapped over rows (%s); rows are evaluated one by one", error)
            pick = [lambda i, x=x, s=s: x if s else x[i] for x, s in zip(chosen, shared, strict=True)]
            return torch.stack([one(t[i], y[i], *(p(i) for p in pick)) for i in range(t.shape[0])])

        return mapped

    return make


def torch_function(problem: Problem, settings: SolveSettings) -> RowFunction:
    """The solve on the torch engine."""
    method, more = get_method(settings.method), {"budget": settings.memory_budget}
    more["replay"] = settings.replay_steps(problem)
    make_field = _layers(problem) or batched_field(problem)
    more["stops"] = problem.stops
    if problem.events:
        more |= {"events": batched_events(problem), "room": capacity([e.traits for e in problem.events])}
    return TorchSolve(make_field, problem.leaves, method, **settings.control, **more)


def _layers(problem: Problem) -> Callable[[Sequence[Tensor], Sequence[bool]], BatchedField] | None:
    """A large network over rows by its layers alone, which is several times faster than the field mapped over rows."""
    kernels, found = problem.info.kernels, traced(problem)
    if isinstance(found, str):
        return None
    if "layers" not in kernels:
        from pyro_latentde.solve.fused.graph_torch import batched_graph
        from pyro_latentde.solve.fused.kernel_choice import is_wide

        kernels["layers"] = batched_graph(found.graph, found.outputs) if is_wide(found) else None
    return kernels["layers"]
