# SPDX-License-Identifier: Apache-2.0
"""Where a fit runs: as it stands, or on the devices and processes of Lightning Fabric."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_latentde.data.series import Series

__all__ = ["FabricDevices", "FullPrecisionSites", "OneDevice", "make_devices"]

_PRECISIONS = ("32-true", "bf16-mixed")


class OneDevice:
    """One process, with model and data where they are."""

    rank, world = 0, 1

    def place(self, thing: Any) -> Any:
        """Modules, series and tensors, moved to this rank's device."""
        return thing

    def autocast(self) -> AbstractContextManager:
        """Context in which networks may compute in lower precision."""
        return nullcontext()

    def wrap(self, fn: Callable) -> Callable:
        """Model or guide, made safe for this precision."""
        return fn

    def average(self, flat: Tensor) -> Tensor:
        """Mean of a tensor over all ranks."""
        return flat

    def make_equal(self, tensors: list[Tensor]) -> None:
        """Give every rank the values that rank 0 has."""

    def gather(self, thing: Any) -> list[Any]:
        """A plain object of every rank, on all of them."""
        return [thing]


class FabricDevices(OneDevice):
    """The devices of Lightning Fabric. Parameters are ordinary tensors: nothing is wrapped for gradients.

    Args:
        accelerator: ``"cpu"``, ``"cuda"``, ``"auto"``, ...
        devices: how many processes on this machine, or which devices.
        strategy: Fabric's name, such as ``"ddp"``.
        num_nodes: number of machines.
        precision: ``"32-true"`` (the dtypes of model and data as they are) or ``"bf16-mixed"``.

    Raises:
        ValueError: a precision or strategy with which gradients could not be averaged by hand.
    """

    def __init__(self, accelerator: str, devices: Any, strategy: str, num_nodes: int, precision: str) -> None:
        from lightning_fabric import Fabric  # seconds to import

        self._mixed = precision != "32-true"
        self._fabric = Fabric(
            accelerator=accelerator, devices=devices, strategy=strategy, num_nodes=num_nodes, precision=precision
        )
        try:
            self._fabric.launch()
        except TypeError as error:
            raise ValueError(
                f"strategy: {strategy!r} spawns its processes from a running one. Expected are processes that run "
                "the same script: strategy='ddp' in a script, or start it by torchrun; in a notebook take one device."
            ) from error
        self.rank, self.world = self._fabric.global_rank, self._fabric.world_size

    def place(self, thing: Any) -> Any:
        """Modules, series and tensors, moved to this rank's device."""
        device = self._fabric.device
        if isinstance(thing, Mapping):
            return {name: self.place(value) for name, value in thing.items()}
        if isinstance(thing, list | tuple):
            return type(thing)(self.place(value) for value in thing)
        return thing.to(device=device) if isinstance(thing, Series | Tensor | nn.Module) else thing

    def autocast(self) -> AbstractContextManager:
        """Fabric's autocast of the precision."""
        return self._fabric.autocast()

    def wrap(self, fn: Callable) -> Callable:
        """With mixed precision, all distributions of the model or guide in full precision."""
        return FullPrecisionSites()(fn) if self._mixed else fn

    def average(self, flat: Tensor) -> Tensor:
        """Mean of a tensor over all ranks."""
        return flat if self.world == 1 else self._fabric.all_reduce(flat, reduce_op="mean")

    def make_equal(self, tensors: list[Tensor]) -> None:
        """Give every rank the values that rank 0 has."""
        if self.world > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor.detach(), 0)

    def gather(self, thing: Any) -> list[Any]:
        """A plain object of every rank, on all of them."""
        found = [thing] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(found, thing)
        return found


class FullPrecisionSites(Messenger):
    """Distributions whose parameters came out of a network in half precision, in float32.

    A draw in bfloat16 has two decimal digits, too few for the difference between a draw and its mean.
    """

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        msg["fn"] = _full_precision(msg["fn"])


def _full_precision(thing: Any) -> Any:
    if isinstance(thing, Tensor):
        return thing.float() if thing.dtype in (torch.bfloat16, torch.float16) else thing
    if not isinstance(thing, torch.distributions.Distribution):
        return thing
    parts = {name: _full_precision(part) for name, part in vars(thing).items()}
    if all(part is vars(thing)[name] for name, part in parts.items()):
        return thing
    thing = copy.copy(thing)
    thing.__dict__.update(parts)
    return thing


def make_devices(
    accelerator: str | None, devices: Any, strategy: str, num_nodes: int, precision: str, data: Any
) -> OneDevice:
    """One device as it stands when nothing else is asked for, so that nothing is imported or started.

    Args:
        accelerator: None is where the data are.
        devices: number or list of devices.
        strategy: of Fabric.
        num_nodes: number of machines.
        precision: ``"32-true"`` or ``"bf16-mixed"``.
        data: first argument of the model.

    Returns:
        The devices.

    Raises:
        ValueError: an unsupported precision.
    """
    if precision not in _PRECISIONS:
        raise ValueError(
            f"precision: expected one of {_PRECISIONS}, got {precision!r}. Double precision is a matter of data and "
            "modules, series.to(torch.float64) and module.double(); half precision alone is too coarse for densities."
        )
    if (accelerator, devices, num_nodes, precision, strategy) == (None, 1, 1, "32-true", "auto"):
        return OneDevice()
    if accelerator is None:
        home = data.times.device if isinstance(data, Series) else getattr(data, "device", torch.device("cpu"))
        accelerator = home.type
    return FabricDevices(accelerator, devices, strategy, num_nodes, precision)
