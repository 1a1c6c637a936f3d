# SPDX-License-Identifier: Apache-2.0
"""What must be true of what a network is given, and what to tell who gave something else."""

import torch
from torch import Tensor, nn

from pyro_latentde.errors import ShapeError

__all__ = ["check_features", "check_placement", "check_series"]


def check_placement(module: nn.Module, what: str, x: Tensor) -> None:
    """Refuse a dtype or device that is not that of the module's weights."""
    weight = next(module.parameters(), None)
    if weight is None:  # weights that are sampled sites are tensors of the moment
        return
    if x.device != weight.device:
        raise ShapeError(
            f"{_name(module)}: {what} are on {x.device}, the weights on {weight.device}. Move one of them: "
            f'`network.to("{x.device}")` or `series.to(device="{weight.device}")`.'
        )
    # Autocast changes the dtype of what one network hands to the next, and converts it again itself.
    if x.dtype != weight.dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
        raise ShapeError(
            f"{_name(module)}: {what} are {x.dtype}, the weights {weight.dtype}. Convert one of them: "
            f"`network.to({x.dtype})` or `series.to({weight.dtype})`."
        )


def check_features(module: nn.Module, x: Tensor) -> None:
    """Refuse x that is not (..., in_features) of the weights' dtype and device."""
    if x.ndim == 0 or x.shape[-1] != module.in_features:
        raise ShapeError(
            f"{_name(module)}: expected (..., {module.in_features}), got {tuple(x.shape)}. The last dimension holds "
            "the numbers of one frame or state; make the network with as many in_features."
        )
    check_placement(module, "its inputs", x)


def check_series(module: nn.Module, times: Tensor, values: Tensor, mask: Tensor) -> None:
    """Refuse times, values and mask that are not (N, T), (N, T, in_features), (N, T, in_features)."""
    n, length = times.shape if times.ndim == 2 else (-1, -1)
    expected = (n, length, module.in_features)
    if length < 1 or tuple(values.shape) != expected or tuple(mask.shape) != expected:
        raise ShapeError(
            f"{_name(module)}: expected times (N, T), values and mask (N, T, {module.in_features}); got "
            f"{tuple(times.shape)}, {tuple(values.shape)}, {tuple(mask.shape)}. A Series has all three: "
            "encoder(series.times, series.values, series.mask)."
        )
    if mask.dtype != torch.bool or not times.is_floating_point():
        raise ShapeError(
            f"{_name(module)}: expected floating times and a bool mask, True where observed; got {times.dtype} and "
            f"{mask.dtype}."
        )
    check_placement(module, "values", values)


def _name(module: nn.Module) -> str:
    return type(module).__name__
