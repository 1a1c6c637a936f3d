# SPDX-License-Identifier: Apache-2.0
"""Row functions written in differentiable torch, whose derivatives of every order PyTorch makes itself."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_latentde.solve.row_function import RowFunction

__all__ = ["TorchRows", "differentiable", "jvp_of", "pulled_back", "recordable", "vjp_of"]

Compute = Callable[[int, tuple[bool, ...], Sequence[Tensor]], list[Tensor]]


class TorchRows(RowFunction):
    """A row function from plain differentiable torch code.

    Args:
        compute: ``compute(rows, shared, tensors) -> outputs``, all of them differentiable.
        empty: The same signature, returning empty tensors of the outputs' shapes.
        count: Number of inputs.
        wrt: Inputs with derivatives.
        follows: See :class:`RowFunction`.
    """

    uniform = True

    def __init__(
        self, compute: Compute, empty: Compute, count: int, wrt: Sequence[int], follows: tuple[int | None, ...]
    ) -> None:
        super().__init__()
        self.compute, self.outputs, self.count = compute, empty, count
        self.wrt, self.follows = tuple(wrt), follows
        self.differentiable = tuple(range(len(follows)))

    def outputs(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        raise AssertionError("replaced in __init__")

    def run(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            return [t.contiguous() for t in self.compute(rows, shared, [t.detach() for t in recordable(tensors)])]

    def make_vjp(self) -> RowFunction:
        return vjp_of(self)

    def make_jvp(self) -> RowFunction:
        return jvp_of(self)


def recordable(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A recorded log-joint is replayed in inference mode, whose tensors no gradient can pass."""
    return [t.clone() if t.is_inference() else t for t in tensors]


def differentiable(tensors: Sequence[Tensor], wrt: Sequence[int]) -> list[Tensor]:
    """The same tensors, those in ``wrt`` ready for derivatives (inside a higher derivative they are already)."""
    tensors = list(tensors)
    for i in wrt:
        if not tensors[i].requires_grad:
            tensors[i] = tensors[i].detach().requires_grad_()
    return tensors


def pulled_back(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], seeds: Sequence[Tensor], keep: bool
) -> list[Tensor]:
    pairs = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(i) for i in inputs]
    grads = torch.autograd.grad(
        [o for o, _ in pairs],
        inputs,
        [s for _, s in pairs],
        create_graph=keep,
        allow_unused=True,
        materialize_grads=True,
    )
    return list(grads)


def vjp_of(function: TorchRows) -> TorchRows:
    """Inputs (x, cotangents of the outputs); outputs the cotangents of x."""
    n = function.count

    def compute(rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        keep = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            tensors = recordable(tensors)
            x = differentiable(tensors[:n], function.wrt)
            out = function.compute(rows, shared[:n], x)
            return pulled_back(out, [x[i] for i in function.wrt], tensors[n:], keep)

    def empty(rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.empty(tensors[i].shape, dtype=tensors[i].dtype, device=tensors[i].device) for i in function.wrt]

    count = n + len(function.follows)
    return TorchRows(compute, empty, count, [*function.wrt, *range(n, count)], function.wrt)


def jvp_of(function: TorchRows) -> TorchRows:
    """Inputs (x, tangents of ``x[wrt]``); outputs the tangents of the outputs, by reverse mode applied twice."""
    n = function.count

    def compute(rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        keep = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            tensors = recordable(tensors)
            x = differentiable(tensors[:n], function.wrt)
            out = function.compute(rows, shared[:n], x)
            seeds = [torch.zeros_like(o).requires_grad_() for o in out]
            bars = pulled_back(out, [x[i] for i in function.wrt], seeds, True)
            return pulled_back(bars, seeds, tensors[n:], keep)

    def empty(rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        return function.outputs(rows, shared[:n], tensors[:n])

    count = n + len(function.wrt)
    return TorchRows(compute, empty, count, [*function.wrt, *range(n, count)], function.follows)
