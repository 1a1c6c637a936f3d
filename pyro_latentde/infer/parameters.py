# SPDX-License-Identifier: Apache-2.0
"""A model or guide with parameters of its own, as fitted or as constants."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import nn

from pyro_latentde.posterior.model_sites import seeded

__all__ = ["constant", "fitted", "with_params"]


def with_params(fn: Callable, state: Mapping[str, Any]) -> Callable:
    """The function run with its own parameters in Pyro's store, whatever else is in it.

    Args:
        fn: model or guide.
        state: of a parameter store, ``{"params": ..., "constraints": ...}``.
    """
    if not state["params"] and not isinstance(fn, nn.Module):
        return fn

    @functools.wraps(fn, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        # A copy of the dictionaries: the run must not add to what was fitted.
        with pyro.get_param_store().scope({name: dict(value) for name, value in state.items()}):
            return fn(*args, **kwargs)

    return run


def fitted(model: Callable, state: Mapping[str, Any], args: tuple, kwargs: Mapping[str, Any]) -> Callable:
    """The model with its fitted parameters, or the model itself if it has none."""
    run = with_params(model, state)
    if isinstance(model, nn.Module) and any(True for _ in model.parameters()):
        return run
    if not state["params"]:
        return model
    with seeded(0), torch.no_grad(), pyro.validation_enabled(False):
        found = poutine.trace(run, param_only=True).get_trace(*args, **kwargs)
    return run if any(name in state["params"] for name in found.nodes) else model


def constant(fn: Callable, state: Mapping[str, Any]) -> Callable:
    """The same with parameters that have no gradients; a module is copied, in evaluation mode, and on its own then."""
    if isinstance(fn, nn.Module):
        fn = copy.deepcopy(fn).eval().requires_grad_(False)
    params = {name: value.detach().clone() for name, value in state["params"].items()}
    return with_params(fn, {**state, "params": params})
