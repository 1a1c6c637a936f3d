# SPDX-License-Identifier: Apache-2.0
"""Distributions on another device or in another precision: priors are made once, modules move later."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor
from torch.distributions import Distribution, Transform

__all__ = ["placed"]

_Fn = TypeVar("_Fn", Distribution, Transform)

# what a transform remembers of its last use: its inverse, which points back, and values
_FORGOTTEN = {"_inv": None, "_cached_x_y": (None, None)}


def placed(fn: _Fn, like: Tensor) -> _Fn:
    """The same distribution on the device and in the dtype of a tensor; itself where it is so already.

    Unlike modules, torch's distributions have no ``to``. Only floating parameters change their dtype.

    Args:
        fn: a distribution or a transform, with all that is inside.
        like: a floating tensor.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> placed(dist.Normal(torch.zeros(2), 1.0).to_event(1), torch.zeros(1).double()).mean.dtype
        torch.float64
    """
    return fn if all(_like(t, like) is t for t in _tensors(fn)) else _moved(fn, like)


def _like(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like) if x.is_floating_point() else x.to(like.device)


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [t for part in _parts(x) for t in _tensors(part)]


def _parts(x: Any) -> list[Any]:
    if isinstance(x, Distribution | Transform):
        return [value for name, value in vars(x).items() if name not in _FORGOTTEN]
    if isinstance(x, dict):
        return list(x.values())
    return list(x) if isinstance(x, list | tuple) else []


def _moved(x: Any, like: Tensor) -> Any:
    if isinstance(x, Tensor):
        return _like(x, like)
    if isinstance(x, Distribution | Transform):
        other = copy.copy(x)
        moved = {name: _moved(value, like) for name, value in vars(x).items() if name not in _FORGOTTEN}
        vars(other).update(moved | {name: value for name, value in _FORGOTTEN.items() if name in vars(x)})
        return other
    if isinstance(x, dict):
        return {name: _moved(value, like) for name, value in x.items()}
    if type(x) in (list, tuple):  # not torch.Size
        return type(x)(_moved(part, like) for part in x)
    return x
