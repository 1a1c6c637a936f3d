# SPDX-License-Identifier: Apache-2.0
"""Finding and exchanging the tensors a vector field captures.

A tensor that a field did not get as an argument and did not make itself was captured: from a closure, a global, a
module. Were it
left where it is, a kernel or an autograd function would treat it as a constant, and its gradient would be silently
lost. So each is exchanged, by identity, for a stand-in that is an input like any other.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from pyro_latentde.errors import GradientPathError, ShapeError

__all__ = ["Lift", "Untraceable", "in_fresh_thread", "is_wrapped", "no_transform", "peek", "stand_in"]


class Untraceable(Exception):
    """The field cannot be written as a scalar graph; the message says why."""


_HIDDEN_FROM_DISPATCH = {"tolist", "numpy", "__array__"}


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a functorch transform holds the tensor, so that it has no values to look at."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def no_transform() -> bool:
    """Whether no transform, tracer or forward-mode level is active."""
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
    )


def peek(tensor: torch.Tensor) -> np.ndarray | None:
    """The values of a tensor, or None where a transform or tracer hides them."""
    if is_wrapped(tensor) or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return None
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0:
        # a grad level would wrap even a plain tensor
        with torch._C._DisableFuncTorch(), _disable_current_modes():
            return tensor.detach().cpu().numpy()
    return tensor.numpy(force=True)


def stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """A plain tensor of the same shape, type and (where they can be seen) values."""
    if is_wrapped(tensor):
        if not tensor.dtype.is_floating_point:
            raise Untraceable("the field captures an integer or boolean tensor that a vmap maps over")
        return torch.full(tuple(tensor.shape), 0.5, dtype=tensor.dtype, device=tensor.device)
    return tensor.detach().clone()


class Lift(TorchFunctionMode):
    """Exchanges captured tensors for stand-ins and lists them, in order of first use, in ``captured``.

    Args:
        inputs: Tensors that were not captured.
        substitutes: What to exchange, by the identity of the captured tensor.
        strict: Refuse what leaves PyTorch (``.numpy()``, ``.tolist()``), which a tracer would not see.
        complete: ``substitutes`` has every captured tensor that needs a gradient; another one is an error.
    """

    def __init__(
        self,
        inputs: Sequence[torch.Tensor],
        substitutes: "dict[int, torch.Tensor] | None" = None,
        strict: bool = False,
        complete: bool = False,
    ) -> None:
        super().__init__()
        self.strict, self.complete = strict, complete
        self.known: dict[int, torch.Tensor] = {id(x): x for x in inputs}
        self.swapped: dict[int, torch.Tensor] = dict(substitutes or {})
        self.known.update((id(x), x) for x in self.swapped.values())
        self.captured: list[torch.Tensor] = []
        self.stand_ins: list[torch.Tensor] = []

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self.strict and getattr(func, "__name__", "") in _HIDDEN_FROM_DISPATCH:
            raise Untraceable(f"the field calls Tensor.{func.__name__}(), which leaves PyTorch")
        args = tree_map(self._exchange, args)
        kwargs = tree_map(self._exchange, kwargs) if kwargs else {}
        if func is torch.Tensor.__getitem__:
            args = _computed_positions(*args)
        result = func(*args, **kwargs)
        tree_map(self._remember, result)
        return result

    def _remember(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self.known[id(value)] = value

    def _exchange(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or id(value) in self.known:
            return value
        if id(value) not in self.swapped and self.complete:
            return _refuse_gradient(value)
        if id(value) not in self.swapped:
            with _disable_current_modes():  # else the recorder would see it as made inside, of constants
                substitute = stand_in(value)
            self.known[id(substitute)] = substitute
            self.swapped[id(value)] = substitute
            self.captured.append(value)
            self.stand_ins.append(substitute)
        return self.swapped[id(value)]

    def adopt(self, value: Any) -> Any:
        """The field's result, where it returns a captured tensor itself (``lambda t, y: k``)."""
        return tree_map(self._exchange, value)


def _refuse_gradient(value: torch.Tensor) -> torch.Tensor:
    if value.dtype.is_floating_point and (value.requires_grad or is_wrapped(value)):
        raise GradientPathError(
            f"a tensor of shape {tuple(value.shape)} that needs a gradient appeared in the vector field only during "
            f"the solve "
            "(behind a branch?): its gradient would be lost. Pass it as a parameter, f(t, y, p)."
        )
    return value


def _computed_positions(tensor: torch.Tensor, key: Any) -> tuple[torch.Tensor, Any]:
    """``x[i]`` with a 0-d integer tensor i reads i's value in Python; selecting with a 1-d index does not."""
    parts = list(key) if isinstance(key, tuple) else [key]
    if any(isinstance(part, str) for part in parts):
        raise ShapeError(
            f"the vector field reads [{key!r}] of a tensor of shape {tuple(tensor.shape)}: names need params (or y0) "
            f"as a dict, "
            f"{{{key!r}: ...}}."
        )
    if any(part is Ellipsis for part in parts):
        return tensor, key
    dim = 0
    for position, part in enumerate(parts):
        if isinstance(part, torch.Tensor) and part.ndim == 0 and part.dtype in (torch.int64, torch.int32):
            tensor = torch.index_select(tensor, dim, part.reshape(1))
            parts[position] = 0
        dim += part is not None
    return tensor, tuple(parts) if isinstance(key, tuple) else parts[0]


def in_fresh_thread(task: Callable[[], Any]) -> Any:
    """Run ``task`` where no dispatch mode or functorch level of the caller is active: they are thread-local."""
    box: dict[str, Any] = {}

    def run() -> None:
        try:
            box["result"] = task()
        except BaseException as error:
            box["error"] = error

    thread = threading.Thread(target=run, name="pyro_latentde-trace")
    thread.start()
    thread.join()
    if "error" in box:
        raise box["error"]
    return box["result"]
