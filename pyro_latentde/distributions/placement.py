# SPDX-License-Identifier: Apache-2.0
"""Distributions on another device: priors are made once, modules move later."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform

__all__ = ["placed"]


# what a transform remembers of its last use: its inverse, which points back, and values
_FORGOTTEN = {"_inv": None, "_cached_x_y": (None, None)}


def placed(fn: Distribution, device: torch.device) -> Distribution:
    """The same distribution with its parameters on a device; itself where they are there already.

    Unlike modules, torch's distributions have no ``to``.

    Args:
        fn: a distribution, nested ones and transforms included.
        device: where to.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> placed(dist.Normal(torch.zeros(2), 1.0).to_event(1), torch.device("meta")).mean.device
        device(type='meta')
    """
    return fn if all(t.device == device for t in _tensors(fn)) else _moved(fn, device)


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


def _moved(x: Any, device: torch.device) -> Any:
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, Distribution | Transform):
        other = copy.copy(x)
        moved = {name: _moved(value, device) for name, value in vars(x).items() if name not in _FORGOTTEN}
        vars(other).update(moved | {name: value for name, value in _FORGOTTEN.items() if name in vars(x)})
        return other
    if isinstance(x, dict):
        return {name: _moved(value, device) for name, value in x.items()}
    if type(x) in (list, tuple):  # not torch.Size
        return type(x)(_moved(part, device) for part in x)
    return x
