# SPDX-License-Identifier: Apache-2.0
"""Weights of a fitted pair of model and guide in one file of tensors and plain types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_latentde.infer import checkpoint
from pyro_latentde.infer.svi_modules import modules_of
from pyro_latentde.posterior.model_sites import seeded

__all__ = ["load_weights", "save_weights"]

_FORMAT = "pyro_latentde weights 1"
_ADVICE = "Make model and guide with the same sizes as those that were saved."


def save_weights(
    path: Path, model: Callable, guide: Callable, weights: Mapping[str, Tensor], attrs: Mapping[str, Any]
) -> Path:
    """Write all tensors of modules, the parameters of functions, and those attributes that are plain.

    Args:
        path: the file.
        model: the model.
        guide: the guide.
        weights: all trained parameters by name.
        attrs: facts about the fit.

    Returns:
        The path.
    """
    modules = {owner: module.state_dict() for owner, module in modules_of(model, guide).items()}
    inside = {id(param) for module in modules_of(model, guide).values() for param in module.parameters()}
    content = {
        "format": _FORMAT,
        "modules": {owner: {k: _copy(v) for k, v in tensors.items()} for owner, tensors in modules.items()},
        "params": {name: _copy(param) for name, param in weights.items() if id(param) not in inside},
        "laws": _laws(guide),
        "attrs": {name: value for name, value in attrs.items() if _is_plain(value)},
    }
    checkpoint.write(path, content)
    return path


def load_weights(
    path: Path, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Read weights into a model and a guide.

    Args:
        path: file of :func:`save_weights`.
        model: the model.
        guide: the guide.
        args: their arguments; with none, only modules can be loaded.
        kwargs: their keyword arguments.

    Returns:
        State of a parameter store; the parameters by name; attributes of the fit.

    Raises:
        CheckpointError: what is in the file is not what model and guide have.
    """
    content = checkpoint.read(path, _FORMAT)
    state: dict[str, Any] = {"params": {}, "constraints": {}}
    weights: dict[str, Tensor] = {}
    if args or kwargs:
        with seeded(0), torch.no_grad(), pyro.get_param_store().scope(state), pyro.validation_enabled(False):
            with poutine.trace(param_only=True) as found:
                guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
                poutine.replay(model, trace=guide_trace)(*args, **kwargs)
        for name, node in found.trace.nodes.items():
            value = node["value"]
            weights[name] = value.unconstrained() if hasattr(value, "unconstrained") else value
    modules = modules_of(model, guide)
    inside = {id(param) for module in modules.values() for param in module.parameters()}
    loose = {name: param for name, param in weights.items() if id(param) not in inside}
    advice = _ADVICE
    if not (args or kwargs):
        advice += (
            " Parameters of functions and AutoGuides exist after a run only: give the data, Fit.load(..., series)."
        )
    ours = {f"{owner}.{name}": t for owner, module in modules.items() for name, t in module.state_dict().items()}
    ours |= loose
    theirs = {f"{owner}.{name}": t for owner, tensors in content["modules"].items() for name, t in tensors.items()}
    theirs |= content["params"]
    checkpoint.compare(path, _shapes(theirs), _shapes(ours), advice)
    laws = {name: law for name, law in _laws(guide).items() if name in content.get("laws", {})}
    saved = {name: content["laws"][name] for name in laws}
    checkpoint.compare(path, saved, laws, "Give the guide the priors that it was trained with.")
    with torch.no_grad():
        for name, value in theirs.items():
            ours[name].copy_(value)
    return state, weights, content["attrs"]


def _laws(guide: Callable) -> dict[str, str]:
    """Priors whose units and supports an amortized guide works in: with others the same weights say other things."""
    return {f"prior of {name}": law for name, law in getattr(guide, "laws", {}).items()}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {f"weight {name}": f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
