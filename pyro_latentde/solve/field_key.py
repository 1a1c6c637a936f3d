# SPDX-License-Identifier: Apache-2.0
"""What a vector field is, for the cache: its code and everything it can see, tensors by shape and the rest by value.

Models make their fields anew at every call (``lambda t, y, p: ...`` inside the model). Two such functions have the same key when
they run the same code on tensors of the same shapes and on equal floats, so the kernel compiled for the first serves the second,
with the second's tensors as inputs. Walking takes microseconds; tracing takes milliseconds.
"""

import functools
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

__all__ = ["Walk", "walk_field"]

_SCALARS = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)
_MANY = 1000


@dataclass
class Walk:
    """The key of a field, and the tensors it can see in a fixed order."""

    parts: list[Any] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    keep: list[Any] = field(default_factory=list)
    slots: dict[int, int] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    @property
    def key(self) -> tuple:
        return tuple(self.parts)

    def visit(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._tensor(value)
        elif isinstance(value, float):
            self.parts.append(value.hex())
        elif isinstance(value, _SCALARS):
            self.parts.append((type(value), value))
        elif id(value) in self.seen:
            self.parts.append(("again", type(value).__name__))
        else:
            self.seen.add(id(value))
            self._compound(value)

    def _tensor(self, value: torch.Tensor) -> None:
        new = id(value) not in self.slots
        slot = self.slots.setdefault(id(value), len(self.tensors))
        if new:
            self.tensors.append(value)
        self.parts.append((slot, tuple(value.shape), value.dtype, value.device.type))
        if not value.dtype.is_floating_point and not torch._C._functorch.is_functorch_wrapped_tensor(value):
            self.parts.append(tuple(value.detach().reshape(-1)[:_MANY].tolist()))  # positions are baked in

    def _compound(self, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self.visit(value.__func__)
            self.visit(value.__self__)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.visit(part)
        elif isinstance(value, dict):
            self._identity(type(value))
            for k, v in list(value.items())[:_MANY]:
                self.parts.append(k if isinstance(k, _SCALARS) else id(k))
                self.visit(v)
        elif isinstance(value, (list, tuple, set, frozenset)):
            self.parts.append((type(value), len(value)))
            for v in list(value)[:_MANY]:
                self.visit(v)
        elif isinstance(value, np.ndarray):
            self.parts.append(
                (value.shape, value.dtype.str, value.tobytes() if value.size <= _MANY else id(value))
            )
            self.keep.append(value)
        elif isinstance(value, torch.nn.Module):
            self._module(value)
        else:
            self._object(value)

    def _identity(self, value: Any) -> None:
        self.parts.append(id(value))
        self.keep.append(value)  # an id stands for the object only while the object lives

    def _function(self, f: types.FunctionType) -> None:
        self._identity(f.__code__)
        for part in (f.__defaults__, f.__kwdefaults__):
            if part:
                self.visit(part)
        for cell in f.__closure__ or ():
            try:
                self.visit(cell.cell_contents)
            except ValueError:  # a cell that is not filled yet
                self.parts.append("empty")
        for name in _global_names(f.__code__):
            if name in f.__globals__:
                value = f.__globals__[name]
                if not isinstance(value, types.ModuleType):
                    self.visit(value)

    def _module(self, module: torch.nn.Module) -> None:
        """Weights and buffers as tensors, plain attributes by value; the rest of a module is its class."""
        self._identity(module)
        for child in module.modules():
            self.parts.append((type(child), child.training))
            for name, value in _attributes(child):
                if isinstance(value, (torch.Tensor, *_SCALARS)):
                    self.parts.append(name)
                    self.visit(value)
            for group in (child._parameters, child._buffers):
                for value in group.values():
                    self.visit(value)

    def _object(self, value: Any) -> None:
        self._identity(value)
        if isinstance(value, (type, types.BuiltinFunctionType, types.ModuleType)):
            return
        call = inspect.getattr_static(type(value), "__call__", None)
        if isinstance(call, types.FunctionType):
            self.visit(call)
        for name, attribute in _attributes(value):
            self.parts.append(name)
            self.visit(attribute)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    for name, attribute in list(getattr(value, "__dict__", {}).items())[:_MANY]:
        if not name.startswith("_pyro_") and name not in ("_parameters", "_buffers", "_modules"):
            yield name, attribute


@functools.lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """Names that the code, or functions written inside it, may look up in its globals."""
    inner = [n for c in code.co_consts if isinstance(c, types.CodeType) for n in _global_names(c)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))


def walk_field(f: Any) -> Walk:
    """Walk a vector field: a function, method, partial, module or callable object."""
    walk = Walk()
    walk.visit(f)
    return walk
