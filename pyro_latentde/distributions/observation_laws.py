# SPDX-License-Identifier: Apache-2.0
"""Laws of one observed number whose parameter is an unconstrained network output.

They are exact for any output, where going through a probability or a rate would round it to 0 or 1 first. Masked values
may be anything: they are set to zero, which all these laws allow, before the density is asked. Where an output is NaN,
as after a failed solve, so are the draws.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import binary_cross_entropy_with_logits

__all__ = ["BernoulliLaw", "CategoricalLaw", "ContinuousBernoulliLaw", "PoissonLaw"]


class _Law(dist.TorchDistribution):
    """A law with one unconstrained parameter, `logits`, of the batch shape."""

    arg_constraints = {"logits": constraints.real}

    def __init__(self, logits: Tensor, *, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: _Law | None = None) -> _Law:
        """The same law with a larger batch shape."""
        new = self._get_checked_instance(type(self), _instance)
        new.logits = self.logits.expand(batch_shape)
        dist.TorchDistribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def mask(self, mask: Tensor | bool) -> dist.Distribution:
        """The law where `mask` is True; elsewhere any value has log-density zero."""
        return super().mask(mask) if isinstance(mask, bool) else _Masked(self, mask)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, -inf nowhere inside the support."""
        if self._validate_args:
            self._validate_sample(value)
        return self._log_prob(value)

    def _log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError

    def _uniform(self, sample_shape: torch.Size) -> Tensor:
        shape = self._extended_shape(sample_shape)
        return torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)


class _Masked(dist.MaskedDistribution):
    """A mask in which fillers are neither judged nor scored."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(torch.where(self._mask, value, 0.0))

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return _Where(self._mask, self.base_dist.support)


class _Where(constraints.Constraint):
    """A constraint of observed values only."""

    def __init__(self, mask: Tensor, base: constraints.Constraint) -> None:
        self.mask, self.base = mask, base
        self.is_discrete, self.event_dim = base.is_discrete, base.event_dim
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return self.base.check(value) | ~self.mask


class BernoulliLaw(_Law):
    r"""0 or 1, from logits: :math:`P(1) = 1 / (1 + e^{-x})`.

    Args:
        logits: any shape.

    Example:
        >>> import torch
        >>> BernoulliLaw(torch.tensor(-300.0)).log_prob(torch.tensor(1.0))
        tensor(-300.)
    """

    support = constraints.boolean

    def _log_prob(self, value: Tensor) -> Tensor:
        logits, value = torch.broadcast_tensors(self.logits, value.to(self.logits))
        return -binary_cross_entropy_with_logits(logits, value, reduction="none")

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 (torch's signature)
        """Draws (*sample_shape, *batch_shape), 0. or 1."""
        drawn = (self._uniform(sample_shape) < self.mean).to(self.logits.dtype)
        return drawn.masked_fill(self.logits.isnan(), math.nan).detach()

    @property
    def mean(self) -> Tensor:
        """Probability of 1."""
        return self.logits.sigmoid()


class ContinuousBernoulliLaw(_Law):
    r"""A number in [0, 1], such as a grey value, with a density that is exponential in it.

    .. math:: p(v) = e^{x v} \frac{x}{e^x - 1}

    Args:
        logits: x, any shape; positive for bright, negative for dark.

    References:
        Loaiza-Ganem, G. and Cunningham, J. P. (2019). The continuous Bernoulli: fixing a pervasive error in
        variational autoencoders. NeurIPS 32.

    Example:
        >>> import torch
        >>> ContinuousBernoulliLaw(torch.tensor([0.0, 50.0])).mean
        tensor([0.5000, 0.9800])
    """

    support = constraints.unit_interval
    has_rsample = True

    def _log_prob(self, value: Tensor) -> Tensor:
        return (value - 0.5) * self.logits - _log_sinhc(0.5 * self.logits)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 (torch's signature)
        """Draws (*sample_shape, *batch_shape), differentiable in the logits, by inversion."""
        u = self._uniform(sample_shape)
        small = self.logits.abs() < 1e-3
        steep = torch.where(small, 1.0, self.logits.abs())
        from_zero = torch.log1p(u * torch.expm1(-steep)) / -steep  # dark pixels; bright ones are their mirror image
        bent = torch.where(self.logits > 0, 1 - from_zero, from_zero)
        return torch.where(small, u + 0.5 * self.logits * u * (1 - u), bent).clamp(0.0, 1.0)

    @property
    def mean(self) -> Tensor:
        """Expected value."""
        x = self.logits
        small = x.abs() < 0.1
        far = torch.where(small, 1.0, x)
        return torch.where(small, 0.5 + x / 12 - x**3 / 720 + x**5 / 30240, 0.5 + 0.5 / torch.tanh(0.5 * far) - 1 / far)


class PoissonLaw(_Law):
    r"""Counts 0, 1, 2, ... from log-rates: :math:`\log P(v) = v x - e^x - \log v!`.

    Args:
        logits: x, the logarithm of the expected count, any shape.

    Example:
        >>> import torch
        >>> PoissonLaw(torch.tensor(-300.0)).log_prob(torch.tensor(1.0))
        tensor(-300.)
    """

    support = constraints.nonnegative_integer

    def _log_prob(self, value: Tensor) -> Tensor:
        return value * self.logits - self.logits.exp() - torch.lgamma(value + 1.0)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 (torch's signature)
        """Draws (*sample_shape, *batch_shape), in the dtype of the log-rates."""
        with torch.no_grad():
            failed = self.logits.isnan()  # torch refuses to draw from these
            rate = self.mean.masked_fill(failed, 0.0)
            return torch.poisson(rate.expand(self._extended_shape(sample_shape))).masked_fill(failed, math.nan)

    @property
    def mean(self) -> Tensor:
        """Expected count."""
        return self.logits.exp()


class CategoricalLaw(_Law):
    r"""Class numbers 0, ..., C - 1, from logits: :math:`P(v) = e^{x_v} / \sum_c e^{x_c}`.

    Args:
        logits: (*batch_shape, C).

    Example:
        >>> import torch
        >>> law = CategoricalLaw(torch.tensor([0.0, 0.0, 300.0]))
        >>> law.batch_shape, law.log_prob(torch.tensor([0.0, 2.0]))
        (torch.Size([]), tensor([-300.,    0.]))
    """

    arg_constraints = {"logits": constraints.real_vector}

    def __init__(self, logits: Tensor, *, validate_args: bool | None = None) -> None:
        self.logits = logits
        dist.TorchDistribution.__init__(self, logits.shape[:-1], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: CategoricalLaw | None = None) -> CategoricalLaw:
        """The same law with a larger batch shape."""
        new = self._get_checked_instance(CategoricalLaw, _instance)
        new.logits = self.logits.expand(*batch_shape, -1)
        dist.TorchDistribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """0, ..., C - 1."""
        return constraints.integer_interval(0, self.logits.shape[-1] - 1)

    def _log_prob(self, value: Tensor) -> Tensor:
        classes = self.logits.shape[-1]
        index = value.long()
        shape = torch.broadcast_shapes(index.shape, self.logits.shape[:-1])
        logits = self.logits.log_softmax(-1).expand(*shape, classes)
        # only with value checks off is there a class out of range, which must not be read from memory
        known = (value >= 0) & (value < classes)
        picked = logits.gather(-1, index.clamp(0, classes - 1).expand(shape)[..., None])[..., 0]
        return torch.where(known, picked, -math.inf)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 (torch's signature)
        """Draws (*sample_shape, *batch_shape), in the dtype of the logits."""
        with torch.no_grad():
            failed = self.logits.isnan().any(-1)  # torch refuses to draw from these
            logits = self.logits.masked_fill(failed[..., None], 0.0)
            drawn = torch.distributions.Categorical(logits=logits, validate_args=False).sample(sample_shape)
            return drawn.to(logits.dtype).masked_fill(failed, math.nan)

    @property
    def probs(self) -> Tensor:
        """Class probabilities, (*batch_shape, C)."""
        return self.logits.softmax(-1)


def _log_sinhc(y: Tensor) -> Tensor:
    """log(sinh(y) / y), an even function, without cancellation near 0 or overflow far away."""
    small = y.abs() < 0.1
    square = torch.where(small, y, 0.0).square()
    far = torch.where(small, 1.0, y.abs())
    series = square / 6 - square**2 / 180 + square**3 / 2835
    return torch.where(small, series, far - torch.log(2 * far) + torch.log1p(-torch.exp(-2 * far)))
