# SPDX-License-Identifier: Apache-2.0
"""Functions that act on rows independently, made differentiable, mappable and traceable in one place.

A :class:`RowFunction` computes on plain tensors, row by row, and names the functions that are its derivatives.
:func:`apply`
lifts it into PyTorch: ``backward`` (to any order the derivatives go), forward mode, ``torch.func.vmap`` (a mapped
dimension becomes
more rows, so a kernel never sees a batch dimension), ``make_fx`` and ``torch.compile`` (one opaque operator with a
number).

An input is *shared* (no row dimension, the same for all rows) or *per row* (leading dimension R).
"""

import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_latentde.solve.lift import no_transform

__all__ = ["RowFunction", "apply"]


class RowFunction(ABC):
    """A function of tensors that treats every row alike.

    Attributes:
        wrt: Which inputs have derivatives.
        differentiable: Which outputs have derivatives.
        saved: Which outputs the derivatives take as further inputs.
        uniform: Inputs come in pairs (a value and its tangent or cotangent) that must be shared or per row together.
        follows: Per output, the input whose shape and sharing it has (a gradient), or None for a per-row output.
        lasting: Solves many problems, so that its derivatives are kept; else they are made when they are asked for,
            and nothing goes round in a circle that only the garbage collector would find.
    """

    differentiable: tuple[int, ...] = (0,)
    saved: tuple[int, ...] = ()
    follows: tuple[int | None, ...] = (None,)

    wrt: tuple[int, ...] = ()
    uniform = False
    lasting = False

    def __init__(self) -> None:
        self.number = next(_NUMBERS)
        self._vjp: RowFunction | None = None
        self._jvp: RowFunction | None = None
        _REGISTRY[self.number] = self

    @abstractmethod
    def run(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Compute on plain tensors."""

    def run_some(
        self,
        rows: int,
        shared: tuple[bool, ...],
        tensors: Sequence[Tensor],
        wanted: Sequence[bool],
        ctx: Any = None,
    ) -> list[Tensor | None]:
        """As :meth:`run`; outputs that are not wanted may be None. ``ctx``: that of the function this is the vjp of."""
        return self.run(rows, shared, tensors)

    def run_on(self, ctx: Any, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        """As :meth:`run`, with the autograd context, on which things may be left for :meth:`run_some` of the vjp."""
        outputs = self.run(rows, shared, tensors)
        self.on_context(ctx, outputs)
        return outputs

    @abstractmethod
    def outputs(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Empty tensors of the shapes and types that :meth:`run` returns."""

    @abstractmethod
    def make_vjp(self) -> "RowFunction":
        """Takes the inputs, the saved outputs and the cotangents; returns the cotangents of :meth:`wrt`."""

    @abstractmethod
    def make_jvp(self) -> "RowFunction":
        """Takes the inputs, the saved outputs and the tangents of :meth:`wrt`; returns those of the outputs."""

    @property
    def vjp(self) -> "RowFunction":
        made = self._vjp or self.make_vjp()
        self._vjp = made if self.lasting else None
        return made

    @property
    def jvp(self) -> "RowFunction":
        made = self._jvp or self.make_jvp()
        self._jvp = made if self.lasting else None
        return made

    def on_context(self, ctx: Any, outputs: Sequence[Tensor]) -> None:  # noqa: B027
        """Called with the autograd context, which lives as long as the gradient may be asked for."""


_NUMBERS = itertools.count()
_REGISTRY: "weakref.WeakValueDictionary[int, RowFunction]" = weakref.WeakValueDictionary()
_TRACED: dict[int, RowFunction] = {}  # functions that a traced graph knows by number stay alive


@torch.library.custom_op("pyro_latentde::rows", mutates_args=())
def _rows_op(number: int, rows: int, shared: Sequence[int], tensors: Sequence[Tensor]) -> list[Tensor]:
    # whole numbers stand for booleans: TorchScript, which replays recorded log-joints, takes no list of booleans
    # inside an operator autograd is switched off below enable_grad(), and the torch engine's derivatives would
    # silently be zero
    excluded = torch._C._dispatch_tls_local_exclude_set() - torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutogradFunctionality
    )
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.no_grad():
        return _REGISTRY[number].run(rows, tuple(map(bool, shared)), tensors)


@_rows_op.register_fake
def _(number: int, rows: int, shared: Sequence[int], tensors: Sequence[Tensor]) -> list[Tensor]:
    return _REGISTRY[number].outputs(rows, tuple(map(bool, shared)), tensors)


def _run(function: RowFunction, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
    # the dispatcher costs more than a small solve: take it only where something is listening
    if _listening(tensors):
        _TRACED[function.number] = function
        return _rows_op(function.number, rows, [int(s) for s in shared], [_plain(t) for t in tensors])
    return function.run(rows, shared, tensors)


def _listening(tensors: Sequence[Tensor]) -> bool:
    """Whether somebody watches the dispatcher: a tracer, or tensors of a class of their own."""
    return torch._C._len_torch_dispatch_stack() > 0 or not _PLAIN.issuperset(map(type, tensors))


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def _plain(t: Tensor) -> Tensor:
    return t.data if type(t) is torch.nn.Parameter else t


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(function: RowFunction, rows: int, shared: tuple[bool, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_run(function, rows, shared, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        function, rows, shared, *tensors = inputs
        ctx.function, ctx.rows, ctx.shared = function, rows, shared
        kept = (*tensors, *[output[i] for i in function.saved])
        ctx.save_for_backward(*kept)
        if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
            # without a transform PyTorch sees by itself that whole numbers have no derivative
            ctx.mark_non_differentiable(*(o for i, o in enumerate(output) if i not in function.differentiable))
            ctx.save_for_forward(*kept)
        ctx.set_materialize_grads(len(function.differentiable) > 1)
        function.on_context(ctx, output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple:
        return _backward(ctx, cotangents)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple:
        function = ctx.function
        kept = ctx.saved_tensors
        wrt = function.wrt
        given = [tangents[3 + i] for i in wrt]
        moves = [torch.zeros_like(kept[i]) if d is None else d for i, d in zip(wrt, given, strict=True)]
        shared = (*ctx.shared, *(False for _ in function.saved), *(ctx.shared[i] for i in wrt))
        dots = apply(function.jvp, ctx.rows, shared, *kept, *moves)
        result: list[Tensor | None] = [None] * len(function.follows)
        for i, dot in zip(function.differentiable, dots, strict=True):
            result[i] = dot
        return tuple(result)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, function: RowFunction, rows: int, shared: tuple[bool, ...], *tensors: Tensor
    ) -> tuple:
        """More rows instead of a batch dimension: (B, R, ...) becomes (B R, ...)."""
        size = info.batch_size
        # the gradient of a shared, unmapped input is still one per batch element: make such inputs per row
        separate = set(range(len(shared))) if function.uniform else {i for i in function.follows if i is not None}
        flat, flat_shared = [], []
        for i, (tensor, dim, one) in enumerate(zip(tensors, in_dims[3:], shared, strict=True)):
            if dim is None and one and i not in separate:
                flat.append(tensor)
                flat_shared.append(True)
                continue
            tensor = tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
            tensor = tensor.unsqueeze(1) if one else tensor
            tensor = tensor.expand(size, rows, *tensor.shape[2:])
            flat.append(tensor.reshape(size * rows, *tensor.shape[2:]))
            flat_shared.append(False)
        out = apply(function, size * rows, tuple(flat_shared), *flat)
        result = []
        for tensor, source in zip(out, function.follows, strict=True):
            tensor = tensor.unflatten(0, (size, rows))
            result.append(tensor.sum(1) if source is not None and shared[source] else tensor)
        return tuple(result), (0,) * len(result)


class _Plain(torch.autograd.Function):
    """The same on plain tensors without transforms: with the context at hand there is less to pass around."""

    @staticmethod
    def forward(
        ctx: Any, function: RowFunction, rows: int, shared: tuple[bool, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        outputs = function.run_on(ctx, rows, shared, tensors)
        ctx.function, ctx.rows, ctx.shared = function, rows, shared
        ctx.save_for_backward(*tensors, *[outputs[i] for i in function.saved])
        ctx.set_materialize_grads(len(function.differentiable) > 1)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple:
        return _backward(ctx, cotangents, ctx)


def _backward(ctx: Any, cotangents: tuple[Tensor | None, ...], plain: Any = None) -> tuple:
    """``plain``: the context again if it is one of :class:`_Plain`."""
    function, kept, needed = ctx.function, ctx.saved_tensors, ctx.needs_input_grad[3:]
    seeds = [cotangents[i] for i in function.differentiable]
    if len(seeds) == 1 and seeds[0] is None:
        return (None,) * (3 + len(needed))
    sources = [function.follows[i] for i in function.differentiable]
    seed_shared = [source is not None and ctx.shared[source] for source in sources]
    shared = (*ctx.shared, *[False] * len(function.saved), *seed_shared)
    if torch.is_grad_enabled() or not no_transform():
        bars = apply(function.vjp, ctx.rows, shared, *kept, *seeds)
    else:  # the ordinary backward pass, straight to the numbers, and to no more of them than asked for
        wanted = [needed[i] for i in function.wrt]
        bars = function.vjp.run_some(ctx.rows, shared, (*kept, *seeds), wanted, plain)
    result: list[Tensor | None] = [None] * len(needed)
    for i, bar in zip(function.wrt, bars, strict=True):
        result[i] = bar if needed[i] else None
    return (None, None, None, *result)


def apply(function: RowFunction, rows: int, shared: tuple[bool, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Evaluate a row function on tensors of any kind: plain, requiring gradients, mapped, dual or traced.

    Args:
        rows: R, the number of rows.
        shared: Per tensor, whether it has no row dimension.
        tensors: The inputs: ``(...)`` where shared, else ``(R, ...)``.

    Returns:
        The outputs of the function.
    """
    if torch._C._are_functorch_transforms_active():
        return _Apply.apply(function, rows, shared, *tensors)
    dual = torch.autograd.forward_ad._current_level >= 0
    if not dual and not (torch.is_grad_enabled() and any([t.requires_grad for t in tensors])):
        return tuple(_run(function, rows, shared, tensors))
    # Function.apply inspects the signature of forward at every call, which takes as long as a small solve
    if dual or _listening(tensors):
        return super(torch.autograd.Function, _Apply).apply(function, rows, shared, *tensors)
    return super(torch.autograd.Function, _Plain).apply(function, rows, shared, *tensors)
