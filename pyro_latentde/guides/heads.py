# SPDX-License-Identifier: Apache-2.0
"""Heads of amortized guides: a context vector in, a distribution of unconstrained numbers out.

Every head starts narrow, at standard deviation .1 for any context, around means that differ from series to series.
A decoder then learns from states that tell about their series; wide posteriors at the start hide that under noise, and
training ends with a decoder that ignores them. The KL term costs 1.8 nats for each number against a standard normal
prior, and widens what the data do not determine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyro_latentde.errors import LatentDEError, ShapeError

__all__ = ["FlowHead", "FullRankHead", "NormalHead", "make_head"]

_LEAST_SD = 1e-6  # the logarithm of an underflown scale would be infinite in float32


class NormalHead(nn.Module):
    r"""Independent normals with means and standard deviations from the context.

    .. math:: q(x \mid c) = \prod_i N(x_i \mid \mu_i(c), \sigma_i(c)^2), \quad \sigma = \mathrm{softplus}(s(c))

    Args:
        in_features: length H of the context.
        size: number P of values.
        hidden: widths of ReLU layers before the output; none by default, since the encoder is a network already.
        sd: standard deviation at the start, in unconstrained units.

    Raises:
        ShapeError: a context of another length.

    Example:
        >>> import torch
        >>> from pyro_latentde.guides.heads import NormalHead
        >>> q = NormalHead(8, 3)(torch.randn(5, 8))
        >>> q.batch_shape, q.event_shape, q.stddev[0]
        (torch.Size([5]), torch.Size([3]), tensor([0.1000, 0.1000, 0.1000], grad_fn=<SelectBackward0>))
    """

    def __init__(self, in_features: int, size: int, hidden: Sequence[int] = (), *, sd: float = 0.1) -> None:
        super().__init__()
        if not sd > _LEAST_SD:
            raise LatentDEError(
                f"{type(self).__name__}: sd = {sd}; expected a positive standard deviation, such as .1."
            )
        widths = [in_features, *hidden]
        layers = [m for a, b in zip(widths, widths[1:], strict=False) for m in (nn.Linear(a, b), nn.ReLU())]
        self.in_features, self.size, self.width = in_features, size, widths[-1]
        self.body = nn.Sequential(*layers)
        self.loc = nn.Linear(self.width, size)
        self.scale = _constant_linear(self.width, size, _inverse_softplus(sd - _LEAST_SD))

    def forward(self, context: Tensor) -> dist.Distribution:
        """Contexts (..., H) to a distribution of batch shape (...) and event shape (P,)."""
        loc, sd, _ = self._loc_and_sd(context)
        return dist.Normal(loc, sd).to_event(1)

    def _loc_and_sd(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means and standard deviations (..., P), and the features (..., W) that they come from."""
        if context.shape[-1] != self.in_features:
            raise ShapeError(
                f"{type(self).__name__}: expected contexts (..., {self.in_features}), got {tuple(context.shape)}. Its "
                "in_features is the encoder's out_features, plus whatever is appended to its output."
            )
        features = self.body(context)
        return _wide(self.loc(features)), softplus(_wide(self.scale(features))) + _LEAST_SD, features


class FullRankHead(NormalHead):
    r"""A normal with full covariance, for values that trade off against each other.

    .. math:: q(x \mid c) = N(x \mid \mu(c), L L^T), \quad L = \mathrm{diag}(\sigma(c)) (I + A(c))

    with A strictly lower triangular, zero at the start: correlations do not depend on the scale of the values.

    Args:
        in_features: length H of the context.
        size: number P of values.
        hidden: widths of ReLU layers before the output.
        sd: standard deviation at the start, in unconstrained units.

    Example:
        >>> import torch
        >>> from pyro_latentde.guides.heads import FullRankHead
        >>> q = FullRankHead(8, 3)(torch.randn(5, 8))
        >>> q.scale_tril.shape, q.event_shape
        (torch.Size([5, 3, 3]), torch.Size([3]))
    """

    def __init__(self, in_features: int, size: int, hidden: Sequence[int] = (), *, sd: float = 0.1) -> None:
        super().__init__(in_features, size, hidden, sd=sd)
        self.below = _constant_linear(self.width, size * (size - 1) // 2, 0.0) if size > 1 else None
        place = torch.zeros(size * (size - 1) // 2, size, size)
        row, column = torch.tril_indices(size, size, -1)
        place[torch.arange(len(row)), row, column] = 1.0
        self.register_buffer("place", place, persistent=False)

    def forward(self, context: Tensor) -> dist.Distribution:
        """Contexts (..., H) to a distribution of batch shape (...) and event shape (P,)."""
        loc, sd, features = self._loc_and_sd(context)
        unit = torch.eye(self.size, dtype=sd.dtype, device=sd.device)
        if self.below is not None:
            # a product with constants, and not an assignment: it runs under every torch.func transform
            unit = unit + torch.tensordot(_wide(self.below(features)), self.place.to(sd), 1)
        return dist.MultivariateNormal(loc, scale_tril=sd[..., None] * unit)


class FlowHead(NormalHead):
    r"""A conditional normalizing flow around a normal, for posteriors that are skewed, curved or have several modes.

    .. math:: x = \mu(c) + \sigma(c)\, T_c(\epsilon), \quad \epsilon \sim N(0, I)

    T is autoregressive and the identity at the start, so that training begins as with `NormalHead`.
    Drawing takes P passes through each transform, its log-density one.

    Args:
        in_features: length H of the context.
        size: number P of values.
        hidden: widths of ReLU layers before the output.
        sd: standard deviation at the start, in unconstrained units.
        kind: ``"nsf"``, rational-quadratic splines within five standard deviations; or ``"maf"``, affine.
        transforms: number of autoregressive transforms, in alternating order.
        units: widths of the networks in each transform.

    Raises:
        ImportError: zuko is not installed.

    References:
        Papamakarios, G., Pavlakou, T. and Murray, I. (2017). Masked autoregressive flow for density estimation.
        NeurIPS 30. Durkan, C., Bekasov, A., Murray, I. and Papamakarios, G. (2019). Neural spline flows. NeurIPS 32.

    Example:
        >>> import torch
        >>> from pyro_latentde.guides.heads import FlowHead
        >>> q = FlowHead(8, 3)(torch.randn(5, 8))
        >>> q.rsample((7,)).shape, q.log_prob(torch.zeros(5, 3)).shape
        (torch.Size([7, 5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        in_features: int,
        size: int,
        hidden: Sequence[int] = (),
        *,
        sd: float = 0.1,
        kind: str = "nsf",
        transforms: int = 2,
        units: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__(in_features, size, hidden, sd=sd)
        try:
            from zuko import flows
        except ImportError as error:
            raise ImportError(
                "FlowHead needs zuko: pip install 'pyro-latentde[flows]'. FullRankHead does without."
            ) from error
        kinds = {"nsf": flows.NSF, "maf": flows.MAF}
        if kind not in kinds:
            raise LatentDEError(f"FlowHead: kind = {kind!r}; expected one of {', '.join(map(repr, kinds))}.")
        self.flow = kinds[kind](size, self.width, transforms=transforms, hidden_features=tuple(units))
        for transform in self.flow.transform.transforms:
            _zero(transform.hyper[-1])  # zero parameters are the identity, of splines and of affine maps

    def forward(self, context: Tensor) -> dist.Distribution:
        """Contexts (..., H) to a distribution of batch shape (...) and event shape (P,)."""
        loc, sd, features = self._loc_and_sd(context)
        return _Flow(loc, sd, self.flow(features))


class _Flow(dist.TorchDistribution):
    """``loc + scale * T(noise)`` with a zuko flow as the law of ``T(noise)``."""

    arg_constraints = {"loc": constraints.real_vector, "scale": constraints.independent(constraints.positive, 1)}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, flow: torch.distributions.Distribution) -> None:
        self.loc, self.scale, self.flow = loc, scale, flow
        super().__init__(loc.shape[:-1], loc.shape[-1:])

    def expand(self, batch_shape: torch.Size, _instance: _Flow | None = None) -> _Flow:
        new = self._get_checked_instance(_Flow, _instance)
        shape = torch.Size(batch_shape)
        new.loc, new.scale = (x.expand(*shape, -1) for x in (self.loc, self.scale))
        new.flow = self.flow.expand(shape)
        super(_Flow, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 (torch's signature)
        return self.loc + self.scale * self.flow.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.flow.log_prob((value - self.loc) / self.scale) - self.scale.log().sum(-1)


_HEADS = {"normal": NormalHead, "full_rank": FullRankHead, "flow": FlowHead}


def make_head(kind: str | Callable[[int, int], nn.Module], in_features: int, size: int) -> nn.Module:
    """A head by its name.

    Args:
        kind: ``"normal"``, ``"full_rank"``, ``"flow"``, or a function (in_features, size) -> module.
        in_features: length of the context.
        size: number of values.

    Returns:
        The head.

    Raises:
        LatentDEError: an unknown name.
    """
    if callable(kind):
        return kind(in_features, size)
    if kind not in _HEADS:
        raise LatentDEError(
            f"head = {kind!r}; expected one of {', '.join(map(repr, _HEADS))}, or a function "
            "(in_features, size) -> module."
        )
    return _HEADS[kind](in_features, size)


def _constant_linear(in_features: int, out_features: int, value: float) -> nn.Linear:
    """A layer that gives one value for any input, until it is trained."""
    layer = _zero(nn.Linear(in_features, out_features))
    nn.init.constant_(layer.bias, value)
    return layer


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _inverse_softplus(y: float) -> float:
    return y + math.log(-math.expm1(-y))


def _wide(x: Tensor) -> Tensor:
    """Means, scales and their log-densities want more digits than autocast leaves."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
