# SPDX-License-Identifier: Apache-2.0
"""Mean and standard deviation of a prior: the units that networks read and write its values in."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Distribution

__all__ = ["moments"]


def moments(prior: Distribution) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation, each of the event's shape; None where they are not known or not finite.

    Args:
        prior: without batch dimensions.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> moments(dist.Normal(torch.tensor([3.0, 0.0]), torch.tensor([2.0, 1.0])).to_event(1))
        (tensor([3., 0.]), tensor([2., 1.]))
        >>> moments(dist.Cauchy(torch.zeros(2), 1.0).to_event(1)) is None
        True
    """
    try:
        mean, sd = prior.mean.detach().clone(), prior.stddev.detach().clone()
    except (NotImplementedError, AttributeError):
        return None
    if mean.shape != prior.event_shape or not bool(mean.isfinite().all() & sd.isfinite().all() & (sd > 0).all()):
        return None
    return mean.expand(prior.event_shape), sd.expand(prior.event_shape)
