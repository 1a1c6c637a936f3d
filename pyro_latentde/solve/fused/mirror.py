# SPDX-License-Identifier: Apache-2.0
"""PyTorch operators on arrays of symbolic scalars: shapes and views are NumPy's, arithmetic becomes graph nodes.

NumPy views alias as PyTorch's do, so fields written in place (``dy[0] = ...``) need nothing special.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pyro_latentde.solve.fused.graph import Graph, Matrix, Node
from pyro_latentde.solve.fused.scalar_ops import OPS
from pyro_latentde.solve.lift import Untraceable

__all__ = ["MIRRORS", "Sym", "constant_sym"]

LOOP_SIZE = 16  # products of a parameter matrix with at least this many entries stay a loop in the kernel


class Sym:
    """A symbolic tensor: an object array of nodes, or, for (views of) a parameter, an integer array of positions in it."""

    def __init__(self, array: np.ndarray, leaf: int | None = None) -> None:
        self.array, self.leaf = array, leaf

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def view(self, array: np.ndarray) -> "Sym":
        return Sym(array, self.leaf)

    def nodes(self, graph: Graph) -> np.ndarray:
        if self.leaf is None:
            return self.array
        out = np.empty(self.array.shape, dtype=object)
        for index in np.ndindex(*self.array.shape):
            out[index] = graph.leaf("leaf", self.leaf, int(self.array[index]))
        return out

    def overwrite(self, nodes: np.ndarray) -> None:
        if self.leaf is not None:
            raise Untraceable("the field writes into a parameter or captured tensor in place")
        self.array[...] = nodes


def constant_sym(graph: Graph, tensor: torch.Tensor) -> Sym:
    """A tensor of literal values: made inside the field from Python numbers, or an integer index table."""
    values = np.asarray(tensor.detach().cpu().numpy())
    out = np.empty(values.shape, dtype=object)
    for index in np.ndindex(*values.shape):
        out[index] = graph.const(values[index].item())
    return Sym(out)


def _nodes(graph: Graph, value: Any) -> np.ndarray:
    if isinstance(value, Sym):
        return value.nodes(graph)
    out = np.empty((), dtype=object)
    out[()] = graph.const(value)
    return out


def _float(graph: Graph, node: Node) -> Node:
    return node if node.kind == "f" else graph.apply("to_float", node)


def _map(graph: Graph, function: Callable[..., Node], *values: Any) -> Sym:
    """Apply a function of nodes elementwise, with broadcasting."""
    arrays = np.broadcast_arrays(*(_nodes(graph, v) for v in values))
    out = np.empty(arrays[0].shape, dtype=object)
    for index in np.ndindex(*out.shape):
        out[index] = function(*(a[index] for a in arrays))
    return Sym(out)


def _arithmetic(graph: Graph, op: str, *nodes: Node) -> Node:
    """An operation whose boolean operands count as 0 and 1, and whose mixed operands are floats."""
    if any(n.kind == "f" for n in nodes) or op == "div":
        nodes = tuple(_float(graph, n) for n in nodes)
    elif any(n.kind == "b" for n in nodes):
        nodes = tuple(n if n.kind == "i" else graph.apply("where", n, 1, 0) for n in nodes)
    return graph.apply(op, *nodes)


MIRRORS: dict[str, Callable[..., Any]] = {}


def _mirror(*names: str) -> Callable[[Callable], Callable]:
    def register(function: Callable) -> Callable:
        MIRRORS.update(dict.fromkeys(names, function))
        return function

    return register


# ---- elementwise -----------------------------------------------------------------------------------------------

_SAME_NAME_UNARY = (
    "exp expm1 log log1p log2 log10 sqrt sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf abs sign floor "
    "ceil round trunc neg"
).split()


def _unary(op: str) -> Callable:
    float_only = op not in ("abs", "neg", "sign")

    def apply(graph: Graph, x: Any, **kwargs: Any) -> Sym:
        if kwargs.get("decimals"):
            raise Untraceable("round(decimals=...) has no scalar form here")
        return _map(graph, lambda n: graph.apply(op, _float(graph, n) if float_only else n), x)

    return apply


for _name in _SAME_NAME_UNARY:
    MIRRORS[_name] = _unary(_name)
MIRRORS["fix"] = MIRRORS["trunc"]

for _name, _op in {
    "atan2": "atan2",
    "arctan2": "atan2",
    "maximum": "maximum",
    "minimum": "minimum",
    "fmax": "maximum",
    "fmin": "minimum",
    "lt": "lt",
    "le": "le",
    "gt": "gt",
    "ge": "ge",
    "eq": "eq",
    "ne": "ne",
    "mul": "mul",
    "pow": "pow",
    "remainder": "mod",
}.items():
    MIRRORS[_name] = lambda graph, a, b, _op=_op: _map(graph, lambda m, n: _arithmetic(graph, _op, m, n), a, b)

for _name, _op in {"logical_and": "and", "bitwise_and": "and", "logical_or": "or", "bitwise_or": "or"}.items():
    MIRRORS[_name] = lambda graph, a, b, _op=_op: _map(graph, lambda m, n: graph.apply(_op, m, n), a, b)
for _name, _op in {"logical_not": "not", "bitwise_not": "not", "isnan": "isnan", "isfinite": "isfinite"}.items():
    MIRRORS[_name] = lambda graph, a, _op=_op: _map(graph, lambda n: graph.apply(_op, n), a)


@_mirror("add")
def _add(graph: Graph, a: Any, b: Any, alpha: float = 1) -> Sym:
    return _map(graph, lambda m, n: _arithmetic(graph, "add", m, _arithmetic(graph, "mul", n, graph.const(alpha))), a, b)


@_mirror("sub")
def _sub(graph: Graph, a: Any, b: Any, alpha: float = 1) -> Sym:
    return _map(graph, lambda m, n: _arithmetic(graph, "sub", m, _arithmetic(graph, "mul", n, graph.const(alpha))), a, b)


@_mirror("rsub")
def _rsub(graph: Graph, a: Any, b: Any, alpha: float = 1) -> Sym:
    return _sub(graph, b, a, alpha)


@_mirror("div")
def _div(graph: Graph, a: Any, b: Any, rounding_mode: str | None = None) -> Sym:
    quotient = _map(graph, lambda m, n: _arithmetic(graph, "div", m, n), a, b)
    return quotient if rounding_mode is None else MIRRORS[rounding_mode](graph, quotient)


@_mirror("floor_divide")
def _floor_divide(graph: Graph, a: Any, b: Any) -> Sym:
    return _div(graph, a, b, "floor")


@_mirror("fmod")
def _fmod(graph: Graph, a: Any, b: Any) -> Sym:
    return _sub(graph, a, MIRRORS["mul"](graph, b, _div(graph, a, b, "trunc")))


@_mirror("reciprocal")
def _reciprocal(graph: Graph, a: Sym) -> Sym:
    return _div(graph, 1.0, a)


@_mirror("rsqrt")
def _rsqrt(graph: Graph, a: Sym) -> Sym:
    return _div(graph, 1.0, MIRRORS["sqrt"](graph, a))


@_mirror("erfc")
def _erfc(graph: Graph, a: Sym) -> Sym:
    return _sub(graph, 1.0, MIRRORS["erf"](graph, a))


@_mirror("exp2")
def _exp2(graph: Graph, a: Sym) -> Sym:
    return MIRRORS["exp"](graph, MIRRORS["mul"](graph, a, math.log(2.0)))


@_mirror("sigmoid")
def _sigmoid(graph: Graph, a: Sym) -> Sym:
    # .5 (1 + tanh(x/2)): one call, no overflow on either side, derivative s (1 - s) from the table
    half = MIRRORS["tanh"](graph, MIRRORS["mul"](graph, a, 0.5))
    return MIRRORS["mul"](graph, _add(graph, half, 1.0), 0.5)


@_mirror("softplus")
def _softplus(graph: Graph, a: Sym, beta: float = 1.0, threshold: float = 20.0) -> Sym:
    def one(x: Node) -> Node:
        z = graph.apply("mul", x, float(beta))
        # max(z, 0) + log1p(exp(-|z|)), the branch taken on z so that the slope at 0 is 1/2
        tail = graph.apply("exp", graph.apply("where", graph.apply("gt", z, 0.0), graph.apply("neg", z), z))
        soft = graph.apply(
            "add",
            graph.apply("where", graph.apply("gt", z, 0.0), z, 0.0),
            graph.apply("log1p", tail),
        )
        return graph.apply("where", graph.apply("gt", z, float(threshold)), x, graph.apply("div", soft, float(beta)))

    return _map(graph, one, a)


@_mirror("silu")
def _silu(graph: Graph, a: Sym) -> Sym:
    return MIRRORS["mul"](graph, a, _sigmoid(graph, a))


@_mirror("relu")
def _relu(graph: Graph, a: Sym) -> Sym:
    return _map(graph, lambda x: graph.apply("where", graph.apply("gt", x, 0.0), x, 0.0), a)


@_mirror("leaky_relu")
def _leaky_relu(graph: Graph, a: Sym, slope: float = 0.01) -> Sym:
    return _map(graph, lambda x: graph.apply("where", graph.apply("gt", x, 0.0), x, graph.apply("mul", x, slope)), a)


@_mirror("elu")
def _elu(graph: Graph, a: Sym, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Sym:
    def one(x: Node) -> Node:
        positive = graph.apply("gt", x, 0.0)
        # the branch not taken must stay finite, or 0 * inf would enter the derivative
        safe = graph.apply("where", positive, 0.0, graph.apply("mul", x, float(input_scale)))
        low = graph.apply("mul", float(alpha), graph.apply("expm1", safe))
        return graph.apply("mul", float(scale), graph.apply("where", positive, x, low))

    return _map(graph, one, a)


@_mirror("gelu")
def _gelu(graph: Graph, a: Sym, approximate: str = "none") -> Sym:
    mul = MIRRORS["mul"]
    if approximate == "none":
        inner = MIRRORS["erf"](graph, mul(graph, a, math.sqrt(0.5)))
    else:
        cube = mul(graph, mul(graph, a, mul(graph, a, a)), 0.044715)
        inner = MIRRORS["tanh"](graph, mul(graph, _add(graph, a, cube), math.sqrt(2.0 / math.pi)))
    return mul(graph, mul(graph, a, 0.5), _add(graph, inner, 1.0))


@_mirror("clamp")
def _clamp(graph: Graph, a: Sym, min: Any = None, max: Any = None) -> Sym:  # noqa: A002
    def bound(x: Node, limit: Node, outside: str) -> Node:
        if x.kind == "f":
            limit = _float(graph, limit)
        return graph.apply("where", graph.apply(outside, x, limit), limit, x)

    out = a
    if min is not None:
        out = _map(graph, lambda x, m: bound(x, m, "lt"), out, min)
    if max is not None:
        out = _map(graph, lambda x, m: bound(x, m, "gt"), out, max)
    return out


MIRRORS["clamp_min"] = lambda graph, a, min: _clamp(graph, a, min=min)  # noqa: A006
MIRRORS["clamp_max"] = lambda graph, a, max: _clamp(graph, a, max=max)  # noqa: A006
MIRRORS["hardtanh"] = lambda graph, a, low=-1.0, high=1.0: _clamp(graph, a, low, high)


@_mirror("where")
def _where(graph: Graph, condition: Sym, a: Any = None, b: Any = None) -> Sym:
    if a is None:
        raise Untraceable("torch.where(condition) gives positions that depend on values")

    def one(c: Node, m: Node, n: Node) -> Node:
        if m.kind != n.kind:
            m, n = _float(graph, m), _float(graph, n)
        return graph.apply("where", c, m, n)

    return _map(graph, one, condition, a, b)


@_mirror("lerp")
def _lerp(graph: Graph, a: Sym, b: Sym, weight: Any) -> Sym:
    return _add(graph, a, MIRRORS["mul"](graph, weight, _sub(graph, b, a)))


@_mirror("addcmul")
def _addcmul(graph: Graph, a: Sym, b: Sym, c: Sym, value: float = 1) -> Sym:
    return _add(graph, a, MIRRORS["mul"](graph, MIRRORS["mul"](graph, b, c), value))


@_mirror("hypot")
def _hypot(graph: Graph, a: Sym, b: Sym) -> Sym:
    mul = MIRRORS["mul"]
    return MIRRORS["sqrt"](graph, _add(graph, mul(graph, a, a), mul(graph, b, b)))


@_mirror("xlogy")
def _xlogy(graph: Graph, a: Any, b: Any) -> Sym:
    zero = MIRRORS["eq"](graph, a, 0.0)
    log = MIRRORS["log"](graph, _where(graph, zero, 1.0, b))
    return _where(graph, zero, 0.0, MIRRORS["mul"](graph, a, log))


@_mirror("logaddexp")
def _logaddexp(graph: Graph, a: Sym, b: Sym) -> Sym:
    gap = MIRRORS["abs"](graph, _sub(graph, a, b))
    tail = MIRRORS["log1p"](graph, MIRRORS["exp"](graph, MIRRORS["neg"](graph, gap)))
    return _add(graph, MIRRORS["maximum"](graph, a, b), tail)


# ---- making, copying, converting -------------------------------------------------------------------------------


@_mirror("detach")
def _detach(graph: Graph, a: Sym) -> Sym:
    return _map(graph, lambda n: graph.apply("stop", n) if n.kind == "f" else n, a)


@_mirror("alias", "lift_fresh", "lift", "contiguous")
def _same(graph: Graph, a: Sym, **kwargs: Any) -> Sym:
    return a


@_mirror("clone")
def _clone(graph: Graph, a: Sym, **kwargs: Any) -> Sym:
    return a.view(a.array.copy())


@_mirror("_to_copy")
def _to_copy(graph: Graph, a: Sym, dtype: torch.dtype | None = None, **kwargs: Any) -> Sym:
    if dtype is None or (dtype.is_floating_point and a.leaf is not None):
        return a.view(a.array.copy())
    if dtype.is_floating_point:
        return _map(graph, lambda n: _float(graph, n), a)
    if dtype == torch.bool:
        return _map(graph, lambda n: n if n.kind == "b" else graph.apply("ne", n, 0), a)
    return _map(graph, lambda n: graph.apply("to_int", n), a)


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


@_mirror("full")
def _full(graph: Graph, size: Sequence[int], value: float, dtype: torch.dtype | None = None, **kwargs: Any) -> Sym:
    return _filled(graph, size, value, dtype)


@_mirror("full_like")
def _full_like(graph: Graph, a: Sym, value: float, dtype: torch.dtype | None = None, **kwargs: Any) -> Sym:
    return _filled(graph, a.shape, value, dtype or torch.float32)


@_mirror("new_full")
def _new_full(graph: Graph, a: Sym, size: Sequence[int], value: float, **kwargs: Any) -> Sym:
    return _filled(graph, size, value, torch.float32)


def _literal(name: str) -> Callable:
    """Tensors made of Python numbers alone: let torch make them."""

    def make(graph: Graph, *args: Any, **kwargs: Any) -> Sym:
        return constant_sym(graph, getattr(torch.ops.aten, name)(*args, **kwargs))

    return make


for _name in ("arange", "eye", "linspace", "logspace", "scalar_tensor"):
    MIRRORS[_name] = _literal(_name)


@_mirror("copy_")
def _copy_(graph: Graph, target: Sym, source: Sym, non_blocking: bool = False) -> Sym:
    target.overwrite(_map(graph, lambda n: _float(graph, n), source).array)
    return target


@_mirror("fill_")
def _fill_(graph: Graph, target: Sym, value: Any) -> Sym:
    target.overwrite(_map(graph, lambda n: _float(graph, n), value).array)
    return target


@_mirror("zero_")
def _zero_(graph: Graph, target: Sym) -> Sym:
    target.overwrite(_nodes(graph, 0.0))
    return target


# ---- views and rearrangements ----------------------------------------------------------------------------------


@_mirror("view", "_unsafe_view", "reshape")
def _view(graph: Graph, a: Sym, shape: Sequence[int]) -> Sym:
    return a.view(a.array.reshape(tuple(shape)))


@_mirror("t")
def _t(graph: Graph, a: Sym) -> Sym:
    return a.view(a.array.T)


@_mirror("transpose")
def _transpose(graph: Graph, a: Sym, i: int, j: int) -> Sym:
    return a.view(np.swapaxes(a.array, i, j))


@_mirror("permute")
def _permute(graph: Graph, a: Sym, dims: Sequence[int]) -> Sym:
    return a.view(np.transpose(a.array, tuple(dims)))


@_mirror("select")
def _select(graph: Graph, a: Sym, dim: int, index: int) -> Sym:
    # squeezing a slice stays a view also for 1-d arrays, where indexing would give a bare node
    part = [slice(None)] * a.array.ndim
    index = index % a.array.shape[dim]
    part[dim] = slice(index, index + 1)
    return a.view(np.squeeze(a.array[tuple(part)], axis=dim))


@_mirror("slice")
def _slice(
    graph: Graph, a: Sym, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Sym:
    part = [slice(None)] * a.array.ndim
    part[dim] = slice(start, end, step)
    return a.view(a.array[tuple(part)])


@_mirror("unsqueeze")
def _unsqueeze(graph: Graph, a: Sym, dim: int) -> Sym:
    return a.view(np.expand_dims(a.array, dim))


@_mirror("squeeze")
def _squeeze(graph: Graph, a: Sym, dims: int | Sequence[int] | None = None) -> Sym:
    if dims is None:
        return a.view(np.squeeze(a.array))
    dims = [dims] if isinstance(dims, int) else dims
    return a.view(np.squeeze(a.array, axis=tuple(d for d in dims if a.array.ndim and a.shape[d] == 1)))


@_mirror("expand")
def _expand(graph: Graph, a: Sym, size: Sequence[int], implicit: bool = False) -> Sym:
    lead = len(size) - a.array.ndim
    shape = tuple(s if s != -1 else a.shape[i - lead] for i, s in enumerate(size))
    return a.view(np.broadcast_to(a.array, shape))


@_mirror("diagonal")
def _diagonal(graph: Graph, a: Sym, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Sym:
    return a.view(np.diagonal(a.array, offset, dim1, dim2))


@_mirror("flip")
def _flip(graph: Graph, a: Sym, dims: Sequence[int]) -> Sym:
    return a.view(np.flip(a.array, tuple(dims)).copy())


@_mirror("roll")
def _roll(graph: Graph, a: Sym, shifts: Any, dims: Any = ()) -> Sym:
    shifts = shifts if isinstance(shifts, int) else tuple(shifts)
    axes = None if dims == () or dims == [] else dims if isinstance(dims, int) else tuple(dims)
    if axes is None and not isinstance(shifts, int):
        shifts = shifts[0]
    return a.view(np.roll(a.array, shifts, axes))


@_mirror("repeat")
def _repeat(graph: Graph, a: Sym, repeats: Sequence[int]) -> Sym:
    return a.view(np.tile(a.array, tuple(repeats)))


@_mirror("cat", "concat")
def _cat(graph: Graph, parts: Sequence[Sym], dim: int = 0) -> Sym:
    return Sym(np.concatenate([p.nodes(graph) for p in parts if p.shape != (0,)], axis=dim))


@_mirror("stack")
def _stack(graph: Graph, parts: Sequence[Sym], dim: int = 0) -> Sym:
    return Sym(np.stack([p.nodes(graph) for p in parts], axis=dim))


@_mirror("unbind")
def _unbind(graph: Graph, a: Sym, dim: int = 0) -> list[Sym]:
    return [_select(graph, a, dim, i) for i in range(a.shape[dim])]


@_mirror("split")
def _split(graph: Graph, a: Sym, size: int, dim: int = 0) -> list[Sym]:
    return [_slice(graph, a, dim, i, i + size) for i in range(0, a.shape[dim], size)]


@_mirror("split_with_sizes")
def _split_with_sizes(graph: Graph, a: Sym, sizes: Sequence[int], dim: int = 0) -> list[Sym]:
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return [_slice(graph, a, dim, int(i), int(j)) for i, j in zip(starts[:-1], starts[1:], strict=True)]


@_mirror("constant_pad_nd")
def _pad(graph: Graph, a: Sym, pad: Sequence[int], value: float = 0.0) -> Sym:
    widths = [(0, 0)] * a.array.ndim
    for i in range(len(pad) // 2):
        widths[-1 - i] = (pad[2 * i], pad[2 * i + 1])
    if any(w < 0 for pair in widths for w in pair):
        raise Untraceable("padding by negative amounts has no scalar form here")
    return Sym(np.pad(a.nodes(graph), widths, constant_values=graph.const(float(value))))


def _triangle(keep: Callable) -> Callable:
    def apply(graph: Graph, a: Sym, diagonal: int = 0) -> Sym:
        mask = keep(np.ones(a.shape[-2:], dtype=bool), diagonal)
        return Sym(np.where(np.broadcast_to(mask, a.shape), a.nodes(graph), graph.const(0.0)))

    return apply


MIRRORS["tril"], MIRRORS["triu"] = _triangle(np.tril), _triangle(np.triu)


# ---- indexing --------------------------------------------------------------------------------------------------


def _known_positions(index: Sym, graph: Graph) -> np.ndarray | None:
    nodes = index.nodes(graph)
    if not all(n.op == "const" for n in nodes.reshape(-1)):
        return None
    kinds = {n.kind for n in nodes.reshape(-1)}
    return np.vectorize(lambda n: n.args[0], otypes=[bool if kinds == {"b"} else np.int64])(nodes)


def _look_up(graph: Graph, table: Sym, index: Sym) -> Sym:
    """``table[index]`` along the only dimension, with positions that are computed at run time."""
    size = table.shape[0]
    if table.leaf is not None:
        first = int(table.array[0])
        stride = int(table.array[1]) - first if size > 1 else 1
        if np.array_equal(table.array, first + stride * np.arange(size)):
            return _map(graph, lambda i: graph.gather(table.leaf, first, stride, size, i), index)
    if size > 64:
        raise Untraceable(f"indexing {size} computed values with a computed position has no scalar form here")
    entries = table.nodes(graph)

    def chain(i: Node) -> Node:
        value = entries[-1]
        for position in range(size - 2, -1, -1):
            reached = graph.apply("le", i, position)
            value = graph.apply("where", reached, _float(graph, entries[position]), _float(graph, value))
        return value

    return _map(graph, chain, index)


@_mirror("index", "_unsafe_index")
def _index(graph: Graph, a: Sym, indices: Sequence[Sym | None]) -> Sym:
    known = [None if i is None else _known_positions(i, graph) for i in indices]
    if all(i is None or k is not None for i, k in zip(indices, known, strict=True)):
        return a.view(a.array[tuple(slice(None) if k is None else k for k in known)])
    if len(indices) == 1 and indices[0].nodes(graph).reshape(-1)[0].kind == "i":
        if a.array.ndim == 1:
            return _look_up(graph, a, indices[0])
        columns = a.array.reshape(a.shape[0], -1)
        picked = [_look_up(graph, a.view(columns[:, j]), indices[0]).array for j in range(columns.shape[1])]
        return Sym(np.stack(picked, axis=-1).reshape(indices[0].shape + a.shape[1:]))
    raise Untraceable("the field selects elements by a condition on computed values, so that shapes depend on values")


@_mirror("index_select")
def _index_select(graph: Graph, a: Sym, dim: int, index: Sym) -> Sym:
    moved = a.view(np.moveaxis(a.array, dim, 0))
    picked = _index(graph, moved, [index if index.array.ndim else index.view(index.array.reshape(1))])
    return picked.view(np.moveaxis(picked.array, 0, dim))


@_mirror("take")
def _take(graph: Graph, a: Sym, index: Sym) -> Sym:
    return _index(graph, a.view(a.array.reshape(-1)), [index])


@_mirror("gather")
def _gather(graph: Graph, a: Sym, dim: int, index: Sym, sparse_grad: bool = False) -> Sym:
    if a.array.ndim == 1:
        return _index(graph, a, [index])
    known = _known_positions(index, graph)
    if known is None:
        raise Untraceable("gather with computed positions is traced for vectors only")
    return a.view(np.take_along_axis(a.array, known, dim))


@_mirror("index_put_", "index_put")
def _index_put_(graph: Graph, a: Sym, indices: Sequence[Sym | None], values: Sym, accumulate: bool = False) -> Sym:
    known = [None if i is None else _known_positions(i, graph) for i in indices]
    if any(i is not None and k is None for i, k in zip(indices, known, strict=True)):
        raise Untraceable("the field writes to positions that depend on computed values")
    if a.leaf is not None or accumulate:
        raise Untraceable("index_put into a parameter, or with accumulate=True, has no scalar form here")
    a.array[tuple(slice(None) if k is None else k for k in known)] = values.nodes(graph)
    return a


def _search(graph: Graph, grid: Sym, value: Any, right: bool) -> Sym:
    if grid.array.ndim != 1:
        raise Untraceable("searchsorted in a table of more than one dimension has no scalar form here")
    size = grid.shape[0]
    if grid.leaf is not None and size > 1:
        first = int(grid.array[0])
        stride = int(grid.array[1]) - first
        if np.array_equal(grid.array, first + stride * np.arange(size)):
            return _map(graph, lambda v: graph.search(grid.leaf, first, stride, size, right, v), value)
    below = "le" if right else "lt"
    knots = grid.nodes(graph)

    def count(v: Node) -> Node:
        total = graph.const(0)
        for knot in knots:
            total = graph.apply("add", total, graph.apply("where", graph.apply(below, knot, v), 1, 0))
        return total

    return _map(graph, count, value)


MIRRORS["searchsorted"] = lambda graph, grid, value, right=False, side=None, **kw: _search(
    graph, grid, value, right or side == "right"
)
MIRRORS["bucketize"] = lambda graph, value, grid, right=False, **kw: _search(graph, grid, value, right)


# ---- reductions and products -----------------------------------------------------------------------------------


def _reduce(graph: Graph, a: Sym, dims: Any, keepdim: bool, combine: Callable[[list[Node]], Node]) -> Sym:
    array = a.nodes(graph)
    axes = range(array.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    axes = sorted(d % array.ndim for d in axes) if array.ndim else []
    rest = [d for d in range(array.ndim) if d not in axes]
    moved = np.transpose(array, [*rest, *axes]).reshape([array.shape[d] for d in rest] + [-1])
    out = np.empty(moved.shape[:-1], dtype=object)
    for index in np.ndindex(*out.shape):
        out[index] = combine(list(moved[index]))
    if keepdim:
        out = out.reshape([1 if d in axes else array.shape[d] for d in range(array.ndim)])
    return Sym(out)


def _fold(graph: Graph, op: str) -> Callable[[list[Node]], Node]:
    def combine(nodes: list[Node]) -> Node:
        result = nodes[0]
        for node in nodes[1:]:
            result = _arithmetic(graph, op, result, node)
        return result

    return combine


@_mirror("sum")
def _sum(graph: Graph, a: Sym, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Sym:
    return _reduce(graph, a, dims, keepdim, lambda ns: graph.total(_float(graph, n) for n in ns))


@_mirror("mean")
def _mean(graph: Graph, a: Sym, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Sym:
    return _reduce(graph, a, dims, keepdim, lambda ns: graph.apply("div", graph.total(ns), float(len(ns))))


@_mirror("var")
def _var(graph: Graph, a: Sym, dims: Any = None, correction: float | None = None, keepdim: bool = False) -> Sym:
    if isinstance(dims, bool):  # the old signature var(unbiased)
        dims, correction = None, float(dims)
    correction = 1.0 if correction is None else float(correction)
    deviation = _sub(graph, a, _mean(graph, a, dims, True))
    total = _sum(graph, MIRRORS["mul"](graph, deviation, deviation), dims, keepdim)
    count = a.array.size // max(1, total.array.size)
    return _div(graph, total, count - correction)


@_mirror("std")
def _std(graph: Graph, a: Sym, *args: Any, **kwargs: Any) -> Sym:
    return MIRRORS["sqrt"](graph, _var(graph, a, *args, **kwargs))


@_mirror("native_layer_norm")
def _layer_norm(graph: Graph, a: Sym, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> tuple[Sym, Sym, Sym]:
    dims = list(range(-len(shape), 0))
    mean = _mean(graph, a, dims, True)
    rstd = _rsqrt(graph, _add(graph, _var(graph, a, dims, 0.0, True), eps))
    out = MIRRORS["mul"](graph, _sub(graph, a, mean), rstd)
    out = out if weight is None else MIRRORS["mul"](graph, out, weight)
    return out if bias is None else _add(graph, out, bias), mean, rstd


@_mirror("prod")
def _prod(graph: Graph, a: Sym, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Sym:
    return _reduce(graph, a, dims, keepdim, _fold(graph, "mul"))


@_mirror("amax")
def _amax(graph: Graph, a: Sym, dims: Any = None, keepdim: bool = False) -> Sym:
    return _reduce(graph, a, dims, keepdim, _fold(graph, "maximum"))


@_mirror("amin")
def _amin(graph: Graph, a: Sym, dims: Any = None, keepdim: bool = False) -> Sym:
    return _reduce(graph, a, dims, keepdim, _fold(graph, "minimum"))


def _extreme_with_position(largest: str) -> Callable:
    better = "gt" if largest == "maximum" else "lt"

    def apply(graph: Graph, a: Sym, dim: int | None = None, keepdim: bool = False) -> Any:
        def position(nodes: list[Node]) -> Node:
            best, where = nodes[0], graph.const(0)
            for i, node in enumerate(nodes[1:], 1):
                wins = graph.apply(better, node, best)
                best, where = graph.apply("where", wins, node, best), graph.apply("where", wins, i, where)
            return where

        values = _reduce(graph, a, dim, keepdim, _fold(graph, largest))
        return values if dim is None else (values, _reduce(graph, a, dim, keepdim, position))

    return apply


MIRRORS["max"], MIRRORS["min"] = _extreme_with_position("maximum"), _extreme_with_position("minimum")


@_mirror("any")
def _any(graph: Graph, a: Sym, dims: Any = None, keepdim: bool = False) -> Sym:
    return _reduce(graph, a, dims, keepdim, _fold_bool(graph, "or"))


@_mirror("all")
def _all(graph: Graph, a: Sym, dims: Any = None, keepdim: bool = False) -> Sym:
    return _reduce(graph, a, dims, keepdim, _fold_bool(graph, "and"))


def _fold_bool(graph: Graph, op: str) -> Callable[[list[Node]], Node]:
    def combine(nodes: list[Node]) -> Node:
        nodes = [n if n.kind == "b" else graph.apply("ne", n, 0) for n in nodes]
        result = nodes[0]
        for node in nodes[1:]:
            result = graph.apply(op, result, node)
        return result

    return combine


@_mirror("cumsum")
def _cumsum(graph: Graph, a: Sym, dim: int, dtype: Any = None) -> Sym:
    array = np.moveaxis(a.nodes(graph).copy(), dim, 0)
    for i in range(1, array.shape[0]):
        array[i : i + 1] = _add(graph, Sym(array[i - 1 : i]), Sym(array[i : i + 1])).array
    return Sym(np.moveaxis(array, 0, dim))


@_mirror("linalg_vector_norm")
def _norm(graph: Graph, a: Sym, ord: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Sym:  # noqa: A002
    if ord == 2:
        return MIRRORS["sqrt"](graph, _sum(graph, MIRRORS["mul"](graph, a, a), dim, keepdim))
    if ord == 1:
        return _sum(graph, MIRRORS["abs"](graph, a), dim, keepdim)
    if ord == math.inf:
        return _amax(graph, MIRRORS["abs"](graph, a), dim, keepdim)
    raise Untraceable(f"the vector norm of order {ord} has no scalar form here")


@_mirror("_softmax")
def _softmax(graph: Graph, a: Sym, dim: int, half_to_float: bool = False) -> Sym:
    shifted = MIRRORS["exp"](graph, _sub(graph, a, _frozen_max(graph, a, dim)))
    return _div(graph, shifted, _sum(graph, shifted, dim, True))


@_mirror("logsumexp")
def _logsumexp(graph: Graph, a: Sym, dim: Any, keepdim: bool = False) -> Sym:
    peak = _frozen_max(graph, a, dim)
    total = _sum(graph, MIRRORS["exp"](graph, _sub(graph, a, peak)), dim, True)
    out = _add(graph, MIRRORS["log"](graph, total), peak)
    return out if keepdim else _squeeze(graph, out, dim)


@_mirror("_log_softmax")
def _log_softmax(graph: Graph, a: Sym, dim: int, half_to_float: bool = False) -> Sym:
    return _sub(graph, a, _logsumexp(graph, a, dim, True))


def _frozen_max(graph: Graph, a: Sym, dim: Any) -> Sym:
    return _amax(graph, a, dim, True)


def _matrix(a: Sym) -> Matrix | None:
    """The matrix ``a`` as a regular part of one parameter, if it is one and is worth a loop."""
    if a.leaf is None or a.array.size < LOOP_SIZE or min(a.shape) == 0:
        return None
    array = a.array
    first = int(array[0, 0])
    row = int(array[1, 0]) - first if a.shape[0] > 1 else 1
    column = int(array[0, 1]) - first if a.shape[1] > 1 else 1
    regular = first + row * np.arange(a.shape[0])[:, None] + column * np.arange(a.shape[1])[None, :]
    return Matrix(a.leaf, first, row, column, a.shape) if np.array_equal(regular, array) else None


@_mirror("mv")
def _mv(graph: Graph, a: Sym, x: Sym) -> Sym:
    matrix = _matrix(a)
    vector = [_float(graph, n) for n in x.nodes(graph)]
    out = np.empty(a.shape[0], dtype=object)
    if matrix is not None:
        out[:] = graph.matvec(matrix, vector)
    else:
        rows = a.nodes(graph)
        out[:] = [graph.total(graph.apply("mul", w, v) for w, v in zip(row, vector, strict=True)) for row in rows]
    return Sym(out)


@_mirror("mm")
def _mm(graph: Graph, a: Sym, b: Sym) -> Sym:
    if _matrix(a) is None and _matrix(b) is not None:
        return _t(graph, _mm(graph, _t(graph, b), _t(graph, a)))
    columns = [_mv(graph, a, b.view(b.array[:, j])).array for j in range(b.shape[1])]
    return Sym(np.stack(columns, axis=1))


@_mirror("bmm")
def _bmm(graph: Graph, a: Sym, b: Sym) -> Sym:
    products = [_mm(graph, a.view(a.array[i]), b.view(b.array[i])).array for i in range(a.shape[0])]
    return Sym(np.stack(products))


@_mirror("dot", "vdot")
def _dot(graph: Graph, a: Sym, b: Sym) -> Sym:
    return _sum(graph, MIRRORS["mul"](graph, a, b))


@_mirror("addmm")
def _addmm(graph: Graph, c: Sym, a: Sym, b: Sym, *, beta: float = 1, alpha: float = 1) -> Sym:
    return _scaled_sum(graph, c, _mm(graph, a, b), beta, alpha)


@_mirror("addmv")
def _addmv(graph: Graph, c: Sym, a: Sym, x: Sym, *, beta: float = 1, alpha: float = 1) -> Sym:
    return _scaled_sum(graph, c, _mv(graph, a, x), beta, alpha)


@_mirror("baddbmm")
def _baddbmm(graph: Graph, c: Sym, a: Sym, b: Sym, *, beta: float = 1, alpha: float = 1) -> Sym:
    return _scaled_sum(graph, c, _bmm(graph, a, b), beta, alpha)


def _scaled_sum(graph: Graph, c: Sym, product: Sym, beta: float, alpha: float) -> Sym:
    mul = MIRRORS["mul"]
    return _add(graph, mul(graph, c, float(beta)), mul(graph, product, float(alpha)))


@_mirror("linalg_cross")
def _cross(graph: Graph, a: Sym, b: Sym, *, dim: int = -1) -> Sym:
    mul = MIRRORS["mul"]

    def turned(x: Sym, k: int) -> Sym:
        return x.view(np.roll(x.array, k, axis=dim))

    return _sub(graph, mul(graph, turned(a, -1), turned(b, -2)), mul(graph, turned(a, -2), turned(b, -1)))


@_mirror("_local_scalar_dense", "is_nonzero", "equal")
def _to_python(graph: Graph, a: Sym, *others: Sym) -> Any:
    raise Untraceable(
        "the field turns a tensor into a Python number or takes a branch on one (if, .item(), float()): "
        "write the branch with torch.where"
    )


@_mirror("nonzero", "masked_select", "unique")
def _shape_from_values(graph: Graph, *args: Any, **kwargs: Any) -> Any:
    raise Untraceable("the field makes a tensor whose shape depends on values")


assert set(_SAME_NAME_UNARY) <= set(OPS)
