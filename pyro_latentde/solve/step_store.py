# SPDX-License-Identifier: Apache-2.0
"""Accepted steps between a forward solve and its gradient, known by a number that can travel through any transform.

A solve returns one token per row, ``number * 2**32 + row``. Its gradient finds the steps by the tokens; where they are
gone (many
solves later), or the rows were rearranged by a transform, the gradient solves again, which gives the same steps.
"""

import itertools
import os
import threading
from collections import OrderedDict
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["HasSteps", "Tie", "find_steps", "keep_steps", "new_token", "steps_kept", "tie_to"]


class HasSteps(Protocol):
    """Steps of a solve, of any engine."""

    nbytes: int
    rows: int
    solved_again: int  # rows that kept nothing: the gradient solves them again


_BUDGET = 1 << 30
_ALWAYS = 8  # newest solves kept whatever their size
_FREE = 256  # newest solves kept that no autograd context holds: they end with nothing that could be noticed
_numbers = itertools.count(1)
_lock = threading.RLock()  # a garbage collection inside the lock may forget steps
_store: "OrderedDict[int, HasSteps]" = OrderedDict()
_free: "OrderedDict[int, None]" = OrderedDict()
_read: "OrderedDict[int, None]" = OrderedDict()  # those of _free whose gradient was taken: mostly it is taken once
_used = 0


def new_token() -> int:
    """The token of the first row of a solve; row r has this plus r."""
    return next(_numbers) << 32


def keep_steps(token: int, steps: HasSteps) -> None:
    """Store the steps of the solve whose first row has this token."""
    global _used
    size = steps.nbytes  # asked for before: a garbage collection in between may change what is used
    with _lock:
        _store[token >> 32] = steps
        _free[token >> 32] = None
        _used += size
        while _used > _BUDGET and len(_store) > _ALWAYS:
            _forget(next(iter(_store)))
        if len(_free) > _FREE:
            _forget(next(iter(_free)))


def _forget(number: int) -> None:
    global _used
    _free.pop(number, None)
    _read.pop(number, None)
    steps = _store.pop(number, None)
    if steps is not None:
        _used -= steps.nbytes


def find_steps(report: Tensor) -> HasSteps | None:
    """The steps of exactly the rows of this report, in this order, if they are still there."""
    values = report.numpy(force=True)[:, 4]
    steps = _steps_of(values)
    if steps is None:
        return None
    number = values.item(0) >> 32
    with _lock:
        if number in _free:
            _read[number] = None
            if len(_read) > _ALWAYS:
                _forget(next(iter(_read)))
    return steps


def steps_kept(report: Tensor) -> HasSteps | None:
    """As :func:`find_steps`, for a look: it does not count as taking a gradient."""
    return _steps_of(report.numpy(force=True)[:, 4])


def _steps_of(tokens: np.ndarray) -> HasSteps | None:
    if tokens.size == 0:
        return None
    first = tokens.item(0)
    steps = _store.get(first >> 32)
    if steps is None or first & 0xFFFFFFFF or steps.rows != tokens.size:
        return None
    if tokens.size > 1 and not bool((tokens[1:] - tokens[:-1] == 1).all()):
        return None
    return steps


class Tie:
    """Finds the steps of one solve, and forgets them when it is gone."""

    def __init__(self, token: int) -> None:
        self.number = token >> 32
        _free.pop(self.number, None)

    def steps(self) -> HasSteps | None:
        return _store.get(self.number)

    def __del__(self) -> None:
        with _lock:
            _forget(self.number)


def tie_to(owner: Any, report: Tensor) -> None:
    """Forget the steps when ``owner`` (an autograd context) is gone: no gradient can be asked for any more.

    Under a transform the context of this level is gone long before the gradient is asked for at another level.
    """
    transformed = torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0
    if not transformed and report.numel():
        owner.steps_tie = Tie(report[0, 4].item())


def _fresh_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fresh_lock)
