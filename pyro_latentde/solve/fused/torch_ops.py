# SPDX-License-Identifier: Apache-2.0
"""What the operations of a scalar graph are called in torch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_latentde.solve.fused.graph import Node

__all__ = ["apply_op", "constant"]

_RENAMED: dict[str, Callable[..., Tensor]] = {
    "and": torch.logical_and,
    "or": torch.logical_or,
    "not": torch.logical_not,
    "mod": lambda a, b: a - b * torch.floor(a / b),  # remainder has no derivative by b
    "stop": torch.detach,
    "to_int": lambda x: x.to(torch.int64),
}


def apply_op(op: str, arguments: Sequence[Tensor], like: Tensor) -> Tensor:
    """``op`` elementwise; floats become those of ``like``."""
    if op == "to_float":
        return arguments[0].to(like.dtype)
    return (_RENAMED.get(op) or getattr(torch, op))(*arguments)


def constant(node: Node, like: Tensor) -> Tensor:
    """The value of a constant, with the dtype of its kind and the device of ``like``."""
    dtype = {"b": torch.bool, "i": torch.int64}.get(node.kind, like.dtype)
    return torch.tensor(node.args[0], dtype=dtype, device=like.device)
