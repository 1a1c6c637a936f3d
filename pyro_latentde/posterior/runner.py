# SPDX-License-Identifier: Apache-2.0
"""Run a model for many draws at once, in chunks that fit a memory budget."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_latentde.posterior.model_sites import seeded

if TYPE_CHECKING:
    from pyro_latentde.posterior.posterior import Posterior

__all__ = ["Draw", "memory_bytes", "per_chain", "run_draws", "trace_model"]

_log = logging.getLogger("pyro_latentde")
_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
# A run keeps its inputs, its outputs and about this many intermediate tensors of their size.
_WORKSPACE = 16
_MAX_TRIES = 20

Draw = Mapping[str, Tensor]


def memory_bytes(memory: str | int | float) -> int:
    """Bytes of a memory budget given as a number of bytes or as text such as ``"500MB"``.

    Example:
        >>> memory_bytes("1.5 GB")
        1500000000
    """
    if isinstance(memory, str):
        text = memory.strip().upper()
        unit = next((u for u in ("KB", "MB", "GB", "TB", "B") if text.endswith(u)), "")
        try:
            memory = float(text.removesuffix(unit)) * _UNITS[unit or "B"]
        except ValueError:
            raise ValueError(f"memory: expected bytes or text like '500MB' or '2GB', got {text!r}") from None
    if not memory > 0:
        raise ValueError(f"memory: expected a positive budget, got {memory}")
    return int(memory)


def run_draws(
    one: Callable[[Draw], dict[str, Tensor]],
    draws: Draw,
    *,
    memory: str | int = "1GB",
    seed: int = 0,
    skip_errors: bool = False,
) -> dict[str, Tensor]:
    """Apply a function of one draw to all draws.

    The function is batched by ``torch.func.vmap``, chunk by chunk. A function that cannot be batched
    (it calls ``.item()``, or branches on a value) is called draw by draw. Gradients are off.

    Args:
        one: function of one draw (name -> tensor) that returns tensors by name.
        draws: name -> ``(S, ...)``.
        memory: budget for the tensors of one chunk, in bytes or as ``"1GB"``.
        seed: seed of everything random in the function.
        skip_errors: let a draw whose call raises give NaN, if others do not raise; for distributions
            that refuse to sample with the NaN parameters of a failed solve.

    Returns:
        Name -> ``(S, ...)``.
    """
    num = next(iter(draws.values())).shape[0]
    budget = memory_bytes(memory)
    with torch.no_grad(), seeded(seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        first = _first(one, draws, min(num, _MAX_TRIES) if skip_errors else 1)
        per_draw = sum(_bytes(v) for v in first.values()) + sum(_bytes(v[0]) for v in draws.values())
        size = max(1, min(num, budget // max(1, _WORKSPACE * per_draw)))
        try:
            chunks = [
                _batched(one, {name: value[start : start + size] for name, value in draws.items()})
                for start in range(0, num, size)
            ]
            return {name: torch.cat([chunk[name] for chunk in chunks]) for name in first}
        except Exception as reason:  # whatever it is, the same call worked without batching
            _log.debug("the model cannot be batched over draws (%s); running it draw by draw", reason)
        rows = [_row(one, draws, i, first if skip_errors else None) for i in range(num)]
    return {name: torch.stack([row[name] for row in rows]) for name in first}


class _BatchedMemory(TorchFunctionMode):
    """Give new memory the batch dimension of ``vmap``.

    Distributions fill new memory with random numbers in place, which ``vmap`` refuses on memory without it.
    """

    _factories = (torch.empty, torch.zeros, torch.empty_like, torch.Tensor.new, torch.Tensor.new_empty)

    def __init__(self, zero: Tensor) -> None:
        super().__init__()
        self.zero = zero

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result + self.zero.to(result.dtype) if func in self._factories else result


class _SampleUnderVmap(Messenger):
    """Draw every site with memory that ``vmap`` accepts."""

    def __init__(self, lane: Tensor) -> None:
        super().__init__()
        self.memory = _BatchedMemory(torch.zeros_like(lane))

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["value"] is None and not msg["is_observed"] and not msg["done"] and not site_is_subsample(msg):
            with self.memory:
                msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])
            msg["done"] = True


def _batched(one: Callable[[Draw], dict[str, Tensor]], chunk: Draw) -> dict[str, Tensor]:
    size = next(iter(chunk.values())).shape[0]

    def lane(index: Tensor, draw: Draw) -> dict[str, Tensor]:
        with _SampleUnderVmap(index):
            return one(draw)

    return torch.func.vmap(lane, randomness="different")(torch.arange(size), dict(chunk))


def trace_model(
    model: Callable, draw: Draw, args: tuple, kwargs: Mapping[str, Any], new_data: bool = False
) -> poutine.Trace:
    """Trace of the model at one draw; NaN of a failed solve is data here, so values are not validated."""
    if new_data:
        model = poutine.uncondition(model)
    with pyro.validation_enabled(False):
        return poutine.trace(poutine.condition(model, data=dict(draw))).get_trace(*args, **kwargs)


def per_chain(posterior: Posterior, one: Callable[[Draw], dict[str, Tensor]], **options: Any) -> dict[str, Tensor]:
    """:func:`run_draws` over a posterior: name -> ``(chain, draw, ...)``."""
    lead = (posterior.num_chains, posterior.num_draws)
    return {name: value.unflatten(0, lead) for name, value in run_draws(one, posterior.draws(), **options).items()}


def _first(one: Callable[[Draw], dict[str, Tensor]], draws: Draw, tries: int) -> dict[str, Tensor]:
    """The first draw that works, un-batched: it makes parameters, shows sizes, and raises clear errors."""
    for i in range(tries):
        try:
            return one({name: value[i] for name, value in draws.items()})
        except Exception:
            if i == tries - 1:
                raise
    raise AssertionError("no draws")


def _row(
    one: Callable[[Draw], dict[str, Tensor]], draws: Draw, i: int, template: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    try:
        return one({name: value[i] for name, value in draws.items()})
    except Exception:
        if template is None:
            raise
        return {name: _nan_like(value) for name, value in template.items()}


def _nan_like(value: Tensor) -> Tensor:
    return torch.full_like(value, torch.nan) if value.is_floating_point() else torch.zeros_like(value)


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()
