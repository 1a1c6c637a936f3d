# SPDX-License-Identifier: Apache-2.0
"""What is expected of a law: of a prior, for the units of networks; of observations, for forecasts."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Distribution

from pyro_latentde.distributions.observation_laws import CategoricalLaw

__all__ = ["expected", "moments"]


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


def expected(law: Distribution) -> Tensor:
    """Expected values of the law of observations; of C class numbers, which have no average, the probabilities.

    Args:
        law: of batch and event shape (..., T, D) together.

    Returns:
        (..., T, D); of classes (..., T, D, C).

    Example:
        >>> import torch, pyro.distributions as dist
        >>> expected(CategoricalLaw(torch.zeros(5, 2, 4)).to_event(2)).shape
        torch.Size([5, 2, 4])
    """
    base = law
    while not isinstance(base, CategoricalLaw) and hasattr(base, "base_dist"):
        base = base.base_dist
    return base.probs if isinstance(base, CategoricalLaw) else law.mean
