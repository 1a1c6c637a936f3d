# SPDX-License-Identifier: Apache-2.0
"""Draws of a model of a short series, continued to the same model of a longer one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_latentde.infer.log_joint import LogJoint
from pyro_latentde.posterior.runner import run_draws

__all__ = ["grow", "is_part"]


def is_part(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether a site of this shape is the beginning of one that is longer in at most one dimension.

    Example:
        >>> is_part((3, 2), (5, 2)), is_part((3, 2), (5, 3)), is_part((), (1,))
        (True, False, False)
    """
    if len(shape) != len(whole):
        return False
    other = [(a, b) for a, b in zip(shape, whole, strict=True) if a != b]
    return not other or (len(other) == 1 and other[0][0] < other[0][1])


class _Continue(Messenger):
    """Latent sites have given values, the longer ones at their beginning."""

    def __init__(self, given: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.given = given

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.given and not msg["is_observed"]:
            msg["value"], msg["done"] = _continued(msg["fn"], self.given[msg["name"]]), True


def _continued(fn: dist.Distribution, value: Tensor) -> Tensor:
    if tuple(fn.shape()) == tuple(value.shape):
        return value
    base = fn
    while isinstance(base, torch.distributions.Independent):
        base = base.base_dist
    if hasattr(base, "continued"):
        return base.continued(value)
    drawn = fn()
    dim = next(i for i, (a, b) in enumerate(zip(value.shape, drawn.shape, strict=True)) if a != b)
    start = value.shape[dim]
    return torch.cat([value, drawn.narrow(dim, start, drawn.shape[dim] - start)], dim=dim)


def grow(short: LogJoint, long: LogJoint, u: Tensor, seed: int) -> Tensor:
    """Particles of the short model as particles of the long one, what is new in it drawn from the prior given the rest.

    A distribution whose entries depend on each other has a method ``continued(value)`` for this; of any other the new
    entries are drawn as if they did not.

    Args:
        short, long: their sites agree, or are longer in one dimension in the long one, see `is_part`.
        u: unconstrained coordinates (N, d) of the short one.
        seed: of what is drawn.

    Returns:
        (N, d') coordinates of the long one, float64.
    """
    names = [site.name for site in long.sites]

    def one(draw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with _Continue(draw), pyro.validation_enabled(False):
            nodes = poutine.trace(long.model).get_trace(*long.args, **long.kwargs).nodes
        return {name: nodes[name]["value"] for name in names}

    with torch.no_grad():
        given = short.constrain(u.to(short.device, short.dtype))
        return long.unconstrain(run_draws(one, given, memory="1GB", seed=seed)).double()
