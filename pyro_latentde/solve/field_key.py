# SPDX-License-Identifier: Apache-2.0
"""What a vector field is, for the cache: its code and everything it can see, tensors by shape and the rest by value.

Models make their fields anew at every call (``lambda t, y, p: ...`` inside the model). Two such functions have the
same key when
they run the same code on tensors of the same shapes and on equal floats, so the kernel compiled for the first serves
the second, with the second's tensors as inputs. Walking takes microseconds; tracing takes milliseconds.
"""

import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pyro_latentde.solve.stops.inputs import Input

__all__ = ["Walk", "walk_field"]

_SCALARS = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)
_MANY = 1000  # numbers; larger arrays are known by a hash
_LIBRARIES = {"torch", "numpy", "pyro", "pyro_latentde", *sys.stdlib_module_names}
_EVERY_MODULE_HAS = frozenset(vars(torch.nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Walk:
    """The key of a field, and the tensors it can see in a fixed order."""

    __slots__ = ("inputs", "keep", "parts", "seen", "slots", "tensors")

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self.tensors: list[torch.Tensor] = []
        self.inputs: list[Input] = []
        self.keep: list[Any] = []
        self.slots: dict[int, int] = {}
        self.seen: dict[int, int] = {}

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
            self.parts.append(("again", self.seen[id(value)]))
        else:
            self.seen[id(value)] = len(self.seen)
            self._compound(value)

    def _tensor(self, value: torch.Tensor) -> None:
        new = id(value) not in self.slots
        slot = self.slots.setdefault(id(value), len(self.tensors))
        if new:
            self.tensors.append(value)
        self.parts.append((slot, tuple(value.shape), value.dtype, value.device.type))
        if not value.dtype.is_floating_point and not torch._C._functorch.is_functorch_wrapped_tensor(value):
            self.parts.append(_content(value.detach().cpu().numpy()))  # positions are baked in

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
            for k, v in list(value.items()):
                self.parts.append(k if isinstance(k, _SCALARS) else id(k))
                self.visit(v)
        elif isinstance(value, (list, tuple, set, frozenset)):
            self.parts.append((type(value), len(value)))
            for v in list(value):
                self.visit(v)
        elif isinstance(value, np.ndarray):
            self.parts.append((value.shape, value.dtype.str, _content(value)))
        elif isinstance(value, Input):
            self.parts.append((Input, value.kind, value.channels))
            self.inputs.append(value)
            for x in value.tensors:
                self.visit(x)
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
        if _is_library(f.__globals__.get("__name__", "")):  # code that does not change
            return
        names = _global_names(f.__code__)
        for name in names:
            if name in f.__globals__:
                value = f.__globals__[name]
                if not isinstance(value, types.ModuleType):
                    self.visit(value)
                elif not _is_library(value.__name__):
                    self._module_of_code(value, names)

    def _module_of_code(self, module: types.ModuleType, names: tuple[str, ...]) -> None:
        """What the code may read from a Python module: ``settings.RATE``."""
        for name in names:
            value = vars(module).get(name)
            if value is not None and not isinstance(value, types.ModuleType):
                self.parts.append(name)
                self.visit(value)

    def _class(self, cls: type) -> None:
        """Methods and data that a class gives its objects."""
        for holder, name in _own_attributes(cls):
            value = vars(holder).get(name)
            value = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
            self.parts.append(name)
            self.visit(value)

    def _module(self, module: torch.nn.Module) -> None:
        """Weights and buffers as tensors, plain attributes by value; the rest of a module is its class."""
        self._identity(module)
        for name, child in module.named_modules():
            cls = type(child)
            self.parts.append((name, cls, child.training))
            self._class(cls)
            for key, value in list(vars(child).items()):
                if key not in _EVERY_MODULE_HAS and not key.startswith("_pyro_"):
                    self.parts.append(key)
                    self.visit(value)
            for key in _HOOKS:
                if hooks := vars(child)[key]:
                    self.visit(hooks)
            for group in (child._parameters, child._buffers):
                for key, value in group.items():
                    self.parts.append(key)
                    self.visit(value)

    def _object(self, value: Any) -> None:
        self._identity(value)
        if isinstance(value, type):
            self._class(value)
        if isinstance(value, (type, types.BuiltinFunctionType, types.ModuleType)):
            return
        self._class(type(value))
        for name, attribute in _attributes(value):
            self.parts.append(name)
            self.visit(attribute)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    held = getattr(value, "__dict__", None)
    for name, attribute in list(held.items()) if isinstance(held, dict) else ():
        if not name.startswith("_pyro_"):
            yield name, attribute


@functools.lru_cache(maxsize=4096)
def _is_library(module: str) -> bool:
    """Whether a module is installed code, whose functions and constants stay what they are."""
    root = module.partition(".")[0]
    place = getattr(sys.modules.get(root), "__file__", None) or ""
    return root in _LIBRARIES or "site-packages" in place or "dist-packages" in place


def _content(values: np.ndarray) -> bytes | int:
    content = np.ascontiguousarray(values).tobytes()
    return content if values.size <= _MANY else hash(content)


@functools.lru_cache(maxsize=1024)
def _own_attributes(cls: type) -> tuple[tuple[type, str], ...]:
    """Where a class and its bases, libraries excepted, define methods and data; not what Python itself keeps there."""
    own = [c for c in cls.__mro__ if not _is_library(c.__module__)]
    return tuple(
        (c, name)
        for c in own
        for name, value in vars(c).items()
        if name == "__call__"
        or not name.startswith(("__", "_abc_"))
        and not isinstance(value, types.MemberDescriptorType)
    )


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
