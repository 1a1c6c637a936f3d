# SPDX-License-Identifier: Apache-2.0
"""The log-joint of many chains in one call, by the fastest means that gives the right numbers.

Four engines, each standing on the one before it:

* ``"loop"``: one row after the other with autograd; for models that cannot be vectorised;
* ``"eager"``: ``vmap`` over the rows, the model's Python runs at every call;
* ``"traced"``: the tensor operations of one eager call are recorded and replayed without the model's Python;
* ``"compiled"``: ``torch.compile`` of that record; cheapest by call, but compiling takes ten seconds.
"""

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer.graph_simplification import simplify
from pyro_latentde.infer.log_joint import LogJoint

__all__ = ["ENGINES", "BatchedLogJoint"]

ENGINES = ("auto", "loop", "eager", "traced", "compiled")

_SLOW = ("loop", "eager")  # worth a warning unless asked for

# Compiling costs 6 - 25 s. It then saves about .2 ms a call over a record that TorchScript's interpreter
# replays, and 1.5 ms over one that this interpreter refuses, so that Python replays it.
CALLS_WORTH_COMPILING = 100_000
CALLS_WITHOUT_SCRIPT = 12_000

_log = logging.getLogger("pyro_latentde")


class BatchedLogJoint:
    """Value and gradient of a log-joint at ``C`` rows at once, NumPy in and out.

    Args:
        joint: the log-joint.
        probe: ``(C, d)`` rows to build and check the engine with; later calls must have this shape.
        engine: one of ``ENGINES``; an engine that fails on the model gives way to the one before it.
        expected_calls: how often it will be called, for ``"auto"``.
        data: observed site -> ``(C, *site shape)``, where rows have data of their own; see `exchange`.

    Attributes:
        engine: the engine in use.
        reason: why, in words.
        num_calls: calls so far.

    Raises:
        LatentDEError: unknown engine.

    Example:
        >>> import pyro.distributions as dist
        >>> joint = LogJoint(lambda: pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0)))
        >>> batched = BatchedLogJoint(joint, np.zeros((4, 1)), engine="eager")
        >>> lp, grad, failed, steps = batched(np.ones((4, 1)))
        >>> grad.tolist()
        [[-1.0], [-1.0], [-1.0], [-1.0]]
    """

    def __init__(
        self,
        joint: LogJoint,
        probe: np.ndarray,
        engine: str = "auto",
        expected_calls: int = 10_000,
        data: Mapping[str, Tensor] | None = None,
    ) -> None:
        if engine not in ENGINES:
            raise LatentDEError(f"log_joint_engine: expected one of {ENGINES}, got {engine!r}.")
        self.joint, self.num_calls = joint, 0
        self._names, self._data = tuple(data or ()), tuple((data or {}).values())
        elsewhere = probe + 0.1 * np.sin(np.arange(probe.size)).reshape(probe.shape)
        self._probes = [self._tensor(probe), self._tensor(elsewhere)]
        self._expected_calls = expected_calls
        self.engine, self.reason, self._call = self._build(engine)
        as_wished = engine == self.engine or (engine == "auto" and self.engine not in _SLOW)
        tell = _log.info if as_wished else _log.warning
        tell("log-joint engine %r: %s", self.engine, self.reason)

    def __call__(self, u: np.ndarray) -> tuple[list[float], np.ndarray, list[bool], list[int]]:
        """Log-densities, gradients ``(C, d)`` in float64, failed flags and solver steps for rows ``u``."""
        lp, grad, failed, steps = self.tensors(self._tensor(u))
        grad = grad.to("cpu", torch.float64)
        return lp.tolist(), grad.numpy(), failed.tolist(), steps.tolist()

    def tensors(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same, tensors in and out, where the log-joint is at home."""
        self.num_calls += 1
        with torch.inference_mode(self.engine in ("traced", "compiled")):
            return self._call(u, *self._data)

    def any_rows(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same for any number of rows, as many at once as there are chains; all with the data of the first."""
        size = len(self._probes[0])
        parts = [self.tensors(_filled(part, size)) for part in u.split(size)]
        return tuple(torch.cat(column)[: len(u)] for column in zip(*parts, strict=True))

    def exchange(self, data: Mapping[str, Tensor]) -> None:
        """Other data of the same sites and shapes; what was recorded or compiled stays in use."""
        self._data = tuple(data[name] for name in self._names)

    def _tensor(self, u: np.ndarray) -> Tensor:
        return torch.from_numpy(u).to(self.joint.device, self.joint.dtype)

    def _build(self, wanted: str) -> tuple[str, str, Callable]:
        loop = partial(self._flat, self.joint.value_and_grad_in_a_loop)
        eager = partial(self._flat, self.joint.value_and_grad)
        if wanted == "loop":
            return "loop", "asked for", loop
        try:
            expected = [eager(u, *self._data) for u in self._probes]
        except Exception as error:  # whatever the model does that vmap cannot: .item(), random operations
            loop(self._probes[0], *self._data)  # a fault of the model itself is raised here, as it is
            return "loop", f"the model cannot be vectorised over chains ({_first_line(error)})", loop
        if wanted == "eager":
            return "eager", "asked for", eager
        try:
            with pyro.validation_enabled(False):
                graph = make_fx(lambda u, *data: eager(u, *data))(self._probes[0], *self._data)
                graph = simplify(graph, self._probes[0], *self._data)
            traced = _replay(graph, self._probes[0], *self._data)
            trouble = self._difference(traced, expected)
        except Exception as error:
            trouble = _first_line(error)
        if trouble:
            return "eager", f"recording the model failed ({trouble})", eager
        if wanted == "auto":
            pays = CALLS_WITHOUT_SCRIPT if traced is graph else CALLS_WORTH_COMPILING
            wanted = "compiled" if self._expected_calls >= pays else "traced"
        if wanted == "traced":
            return "traced", "the model's tensor operations are recorded and replayed", traced
        return self._compile(graph, traced, expected)

    def _compile(self, graph: torch.fx.GraphModule, traced: Callable, expected: list) -> tuple[str, str, Callable]:
        if self.joint.device.type == "cpu" and not _has_compiler():
            return "traced", "torch.compile needs a C++ compiler and none was found", traced
        try:
            with warnings.catch_warnings(), torch.inference_mode():
                warnings.simplefilter("ignore")  # of the compiler, about itself
                compiled = torch.compile(graph, fullgraph=True, dynamic=False)
                trouble = self._difference(compiled, expected)
        except Exception as error:
            trouble = _first_line(error)
        if trouble:
            return "traced", f"torch.compile failed ({trouble})", traced
        return "compiled", "compiled by torch.compile", compiled

    def _flat(self, function: Callable, u: Tensor, *data: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        lp, grad, (failed, steps) = function(u, dict(zip(self._names, data, strict=True)))
        return lp, grad, failed, steps

    def _difference(self, call: Callable, expected: list) -> str:
        """Why ``call`` is not the eager function, from its answers at two sets of rows; empty if it is."""
        tolerance = 1e-8 if self.joint.dtype == torch.float64 else 1e-3
        for u, right in zip(self._probes, expected, strict=True):
            with torch.inference_mode():
                got = call(u.clone(), *self._data)
            for name, a, b in zip(("log-density", "gradient"), got, right, strict=False):
                size = float(1 + b.nan_to_num(0, 0, 0).abs().max())
                if not torch.allclose(a, b, rtol=tolerance, atol=tolerance * size):
                    return f"it gives another {name} than the model: does the model branch on values?"
        return ""


def _filled(u: Tensor, size: int) -> Tensor:
    """Rows, repeated until there are enough of them."""
    return u if len(u) == size else u[torch.arange(size, device=u.device) % len(u)]


def _replay(graph: torch.fx.GraphModule, *example: Tensor) -> Callable:
    """The recorded graph, run by TorchScript's interpreter where this torch still has it.

    The interpreter spends 1 us on an operation where the graph's own Python spends 4, and needs no compiler.
    It is deprecated, so nothing but speed may depend on it.
    """
    if not hasattr(torch.jit, "trace"):
        return graph
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            return torch.jit.trace(lambda *inputs: graph(*inputs), example, check_trace=False)
    except Exception:
        return graph


def _has_compiler() -> bool:
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
    return any(shutil.which(name) for name in names if name)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
