# SPDX-License-Identifier: Apache-2.0
"""Models and guides that are modules: their buffers, their mode, and names that they must not share."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from pyro_latentde.errors import LatentDEError

__all__ = ["check_names", "evaluating", "fixed_tensors", "modules_of", "quiet"]


def modules_of(model: Callable, guide: Callable) -> dict[str, nn.Module]:
    """Those of the two that are modules."""
    return {name: fn for name, fn in (("model", model), ("guide", guide)) if isinstance(fn, nn.Module)}


def fixed_tensors(model: Callable, guide: Callable) -> dict[str, Tensor]:
    """What modules keep besides trained parameters, such as running means: name -> the tensor itself."""
    found = {}
    for owner, module in modules_of(model, guide).items():
        frozen = [(name, param) for name, param in module.named_parameters() if not param.requires_grad]
        found |= {f"{owner}.{name}": tensor.detach() for name, tensor in (*module.named_buffers(), *frozen)}
    return found


@contextlib.contextmanager
def evaluating(model: Callable, guide: Callable) -> Iterator[None]:
    """Evaluation mode (no dropout, fixed running means) without gradients; each submodule's mode comes back."""
    parts = [part for module in modules_of(model, guide).values() for part in module.modules() if part.training]
    for part in parts:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part in parts:
            part.training = True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Pyro warns of each non-finite loss; here they are counted instead."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered")
        yield


def check_names(model: Callable, guide: Callable) -> None:
    """Refuse a parameter name that model and guide both have: Pyro's store would take one for the other.

    Raises:
        LatentDEError: with the name.
    """
    modules = modules_of(model, guide)
    if len(modules) == 2:
        of_guide = dict(modules["guide"].named_parameters())
        for name, param in modules["model"].named_parameters():
            if name in of_guide and of_guide[name] is not param:
                raise LatentDEError(
                    f"model and guide both have a parameter '{name}', and Pyro's store knows parameters by name only: "
                    "one of them would not be trained. Rename the attribute in one of them."
                )
