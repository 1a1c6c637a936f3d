# SPDX-License-Identifier: Apache-2.0
"""Normal distribution restricted to an interval."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.special import erfcx, ndtri

__all__ = ["TruncatedNormal"]


class TruncatedNormal(dist.TorchDistribution):
    r"""Normal(loc, scale) given that low < x < high.

    .. math:: p(x) = \frac{\phi((x - \mu) / \sigma)}{\sigma (\Phi(\beta) - \Phi(\alpha))}, \quad
        \alpha = (low - \mu) / \sigma,\ \beta = (high - \mu) / \sigma

    This is the law behind a constrained ``normal(mu, sigma)`` statement in Stan, there without the constant.
    It is neither a folded nor a clipped normal. Densities are exact far out in the tails; draws are as long
    as the interval begins within about 35 scales of `loc`.

    Args:
        loc: mean of the untruncated normal, any shape.
        scale: its standard deviation, positive, broadcast against `loc`.
        low: lower bound, a number; ``-math.inf`` for none.
        high: upper bound, a number; ``math.inf`` for none.

    Raises:
        ValueError: ``low >= high``; or, with validation on, `scale` is not positive.

    References:
        Robert, C. P. (1995). Simulation of truncated normal variables. Statistics and Computing 5, 121-125.

    Example:
        >>> import torch
        >>> from pyro_latentde.distributions import TruncatedNormal
        >>> prior = TruncatedNormal(torch.tensor(1.0), torch.tensor(0.5), low=0.0)
        >>> round(prior.mean.item(), 4), prior.support
        (1.0276, GreaterThan(lower_bound=0.0))
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    has_rsample = True

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float,
        low: float = 0.0,
        high: float = math.inf,
        *,
        validate_args: bool | None = None,
    ) -> None:
        if not low < high:
            raise ValueError(f"TruncatedNormal: expected low < high, got low = {low}, high = {high}")
        self.loc, self.scale = broadcast_all(loc, scale)
        self.low, self.high = float(low), float(high)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The open interval; one-sided where a bound is infinite."""
        if math.isinf(self.low) and math.isinf(self.high):
            return constraints.real
        if math.isinf(self.high):
            return constraints.positive if self.low == 0 else constraints.greater_than(self.low)
        if math.isinf(self.low):
            return constraints.less_than(self.high)
        return constraints.interval(self.low, self.high)

    def expand(self, batch_shape: torch.Size, _instance: TruncatedNormal | None = None) -> TruncatedNormal:
        """The same distribution with a larger batch shape."""
        new = self._get_checked_instance(TruncatedNormal, _instance)
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        new.low, new.high = self.low, self.high
        super(TruncatedNormal, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _bounds(self) -> tuple[Tensor, Tensor, Tensor]:
        """Standardised bounds (a, b), mirrored (sign -1) where both are positive.

        Left of the mean, small probabilities keep all their digits; right of it they are differences to 1.
        """
        # An infinite bound is a constant: differentiated by the scale, it would give 0 x inf.
        a, b = (
            torch.full_like(self.loc, bound) if math.isinf(bound) else (bound - self.loc) / self.scale
            for bound in (self.low, self.high)
        )
        mirror = a > 0
        sign = torch.where(mirror, -1.0, 1.0).to(a.dtype)
        return torch.where(mirror, -b, a), torch.where(mirror, -a, b), sign

    def _log_mass(self) -> Tensor:
        a, b, _ = self._bounds()
        if math.isinf(self.low) and math.isinf(self.high):
            return torch.zeros_like(a)
        log_b = _log_ndtr(b)
        return log_b + torch.log(-torch.expm1(_log_ndtr(a) - log_b))

    def log_prob(self, value: Tensor) -> Tensor:
        """Normalised log-density, -inf outside the interval."""
        if self._validate_args:
            self._validate_sample(value)
        z = (value - self.loc) / self.scale
        log_p = -0.5 * z.square() - self.scale.log() - 0.5 * math.log(2 * math.pi) - self._log_mass()
        return torch.where((value < self.low) | (value > self.high), -math.inf, log_p)

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of a value at most this large."""
        a, b, sign = self._bounds()
        z = (sign * (value - self.loc) / self.scale).clamp(min=a, max=b)
        below = (_ndtr(z) - _ndtr(a)) / (_ndtr(b) - _ndtr(a))
        return torch.where(sign > 0, below, 1 - below)

    def icdf(self, probability: Tensor) -> Tensor:
        """Inverse of `cdf`."""
        a, b, sign = self._bounds()
        p = torch.where(sign > 0, probability, 1 - probability)
        z = ndtri(_ndtr(a) + p * (_ndtr(b) - _ndtr(a)))
        # Rounding may end on a bound, which the open support does not hold.
        dtype = self.loc.dtype
        low, high = (torch.tensor(bound, dtype=dtype, device=z.device) for bound in (self.low, self.high))
        low, high = torch.nextafter(low, high), torch.nextafter(high, low)
        return (self.loc + self.scale * sign * z).clamp(min=low, max=high)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 (torch's signature)
        """Draws (*sample_shape, *batch_shape), differentiable in loc and scale, by inversion."""
        tiny = torch.finfo(self.loc.dtype).tiny
        u = torch.rand(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        return self.icdf(u.clamp(min=tiny))

    @property
    def mean(self) -> Tensor:
        """Mean of the truncated law."""
        return self.loc + self.scale * self._moments()[0]

    @property
    def variance(self) -> Tensor:
        """Variance of the truncated law."""
        first, second = self._moments()
        return self.scale.square() * (1 + second - first.square())

    def _moments(self) -> tuple[Tensor, Tensor]:
        """(phi(a) - phi(b)) / mass and (a phi(a) - b phi(b)) / mass, mean and part of the variance."""
        a, b, sign = self._bounds()
        log_mass = self._log_mass()
        pa, pb = (torch.exp(-0.5 * (x.square() + math.log(2 * math.pi)) - log_mass) for x in (a, b))
        weighted = [torch.where(x.isinf(), torch.zeros_like(x), x * p) for x, p in ((a, pa), (b, pb))]
        return sign * (pa - pb), weighted[0] - weighted[1]


def _log_ndtr(x: Tensor) -> Tensor:
    """log Phi(x) with all digits in both tails (torch's own has no rule for `vmap`)."""
    below, above = x.clamp(max=0.0), x.clamp(min=0.0)
    tail = (0.5 * erfcx(-below / math.sqrt(2))).log() - 0.5 * below.square()
    return torch.where(x < 0, tail, torch.log1p(-0.5 * torch.erfc(above / math.sqrt(2))))


def _ndtr(x: Tensor) -> Tensor:
    # torch.special.ndtr is (1 + erf) / 2, whose digits are gone 8 standard deviations below the mean.
    return 0.5 * torch.erfc(-x / math.sqrt(2))
