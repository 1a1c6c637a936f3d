# SPDX-License-Identifier: Apache-2.0
"""Models and guides that are modules: their buffers, their mode, and names that they must not share."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyro_latentde.data.series import Series
from pyro_latentde.errors import LatentDEError

__all__ = ["check_names", "evaluating", "fixed_tensors", "forget_gradients", "modules_of", "quiet", "reading"]


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


def forget_gradients(model: Callable, guide: Callable) -> None:
    """Drop what an earlier run left: added to the first gradient of this one, it would set the scale of its updates."""
    for module in modules_of(model, guide).values():
        module.zero_grad(set_to_none=True)


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


def reading(guide: Callable, series: Any = None) -> contextlib.AbstractContextManager[None]:
    """While many draws for the same series are made: a guide that can encodes them once for all draws."""
    once = getattr(guide, "reading", None)
    return contextlib.nullcontext() if once is None or not isinstance(series, Series) else once(series)


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
