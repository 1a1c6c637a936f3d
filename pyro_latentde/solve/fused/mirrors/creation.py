# SPDX-License-Identifier: Apache-2.0
"""Making, copying, converting and overwriting tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pyro_latentde.solve.fused.graph import Graph
from pyro_latentde.solve.fused.mirrors.symbols import (
    MIRRORS,
    Sym,
    as_float,
    constant_sym,
    elementwise,
    mirror,
    nodes_of,
)

__all__: list[str] = []


@mirror("detach")
def _detach(graph: Graph, a: Sym) -> Sym:
    return elementwise(graph, lambda n: graph.apply("stop", n) if n.kind == "f" else n, a)


@mirror("alias", "lift_fresh", "lift", "contiguous")
def _same(graph: Graph, a: Sym, **kwargs: Any) -> Sym:
    return a


@mirror("clone")
def _clone(graph: Graph, a: Sym, **kwargs: Any) -> Sym:
    return a.view(a.array.copy())


@mirror("_to_copy")
def _to_copy(graph: Graph, a: Sym, dtype: torch.dtype | None = None, **kwargs: Any) -> Sym:
    if dtype is None or (dtype.is_floating_point and a.leaf is not None):
        return a.view(a.array.copy())
    if dtype.is_floating_point:
        return elementwise(graph, lambda n: as_float(graph, n), a)
    if dtype == torch.bool:
        return elementwise(graph, lambda n: n if n.kind == "b" else graph.apply("ne", n, 0), a)
    return elementwise(graph, lambda n: graph.apply("to_int", n), a)


def _filled(graph: Graph, shape: Sequence[int], value: Any, dtype: torch.dtype | None) -> Sym:
    out = np.empty(tuple(shape), dtype=object)
    if dtype is not None and isinstance(value, (int, float)):
        value = float(value) if dtype.is_floating_point else bool(value) if dtype == torch.bool else int(value)
    for index in np.ndindex(*out.shape):
        out[index] = graph.const(value)
    return Sym(out)


def _maker(value: float) -> Callable:
    def make(graph: Graph, size: Sequence[int], dtype: torch.dtype | None = None, **kwargs: Any) -> Sym:
        return _filled(graph, size, value, dtype or torch.float32)

    return make


def _maker_like(value: float) -> Callable:
    def make(graph: Graph, a: Sym, *size: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Sym:
        return _filled(graph, size[0] if size else a.shape, value, dtype or torch.float32)

    return make


for _name, _value in {"zeros": 0.0, "ones": 1.0, "empty": 0.0}.items():
    MIRRORS[_name] = _maker(_value)
    MIRRORS[_name + "_like"] = MIRRORS["new_" + _name] = _maker_like(_value)
MIRRORS["empty_strided"] = lambda graph, size, stride, **kw: _maker(0.0)(graph, size)
MIRRORS["new_empty_strided"] = lambda graph, a, size, stride, **kw: _maker(0.0)(graph, size)


@mirror("full")
def _full(graph: Graph, size: Sequence[int], value: float, dtype: torch.dtype | None = None, **kwargs: Any) -> Sym:
    return _filled(graph, size, value, dtype)


@mirror("full_like")
def _full_like(graph: Graph, a: Sym, value: float, dtype: torch.dtype | None = None, **kwargs: Any) -> Sym:
    return _filled(graph, a.shape, value, dtype or torch.float32)


@mirror("new_full")
def _new_full(graph: Graph, a: Sym, size: Sequence[int], value: float, **kwargs: Any) -> Sym:
    return _filled(graph, size, value, torch.float32)


def _literal(name: str) -> Callable:
    """Tensors made of Python numbers alone: let torch make them."""

    def make(graph: Graph, *args: Any, **kwargs: Any) -> Sym:
        return constant_sym(graph, getattr(torch.ops.aten, name)(*args, **kwargs))

    return make


for _name in ("arange", "eye", "linspace", "logspace", "scalar_tensor"):
    MIRRORS[_name] = _literal(_name)


@mirror("copy_")
def _copy_(graph: Graph, target: Sym, source: Sym, non_blocking: bool = False) -> Sym:
    target.overwrite(elementwise(graph, lambda n: as_float(graph, n), source).array)
    return target


@mirror("fill_")
def _fill_(graph: Graph, target: Sym, value: Any) -> Sym:
    target.overwrite(elementwise(graph, lambda n: as_float(graph, n), value).array)
    return target


@mirror("zero_")
def _zero_(graph: Graph, target: Sym) -> Sym:
    target.overwrite(nodes_of(graph, 0.0))
    return target
