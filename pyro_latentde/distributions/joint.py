# SPDX-License-Identifier: Apache-2.0
"""Independent named scalars as one vector, for a site that holds all parameters of a system."""

from __future__ import annotations

from collections.abc import Mapping

import pyro.distributions as dist
import torch
from pyro.distributions.util import is_validation_enabled
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import Transform

from pyro_latentde.errors import LatentDEError, ShapeError

__all__ = ["Joint", "ProductConstraint", "ProductTransform"]


class Joint(dist.TorchDistribution):
    r"""Product of P scalar distributions, each with its name and its own support, over vectors of length P.

    .. math:: p(x) = \prod_{i=1}^{P} p_i(x_i)

    The parts may have batch shapes, as under a population prior; they are broadcast. Values are checked by the
    `Joint`, and only while Pyro's validation is on, so a prior that was made once for all runs as any other in
    inference, where validation is off.

    Args:
        parts: name -> continuous distribution of event shape (); units are the user's.

    Attributes:
        names: the P names, in the order of the vector's entries.
        parts: name -> distribution, of the batch shape of the whole.

    Raises:
        ShapeError: a part is a distribution of vectors.
        LatentDEError: no part, or a discrete one.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyro_latentde.distributions import Joint
        >>> prior = Joint({"length": dist.Uniform(1.0, 2.0), "mass": dist.LogNormal(0.0, 0.5)})
        >>> prior.event_shape, prior.mean
        (torch.Size([2]), tensor([1.5000, 1.1331]))
        >>> prior.as_dict(torch.tensor([1.2, 0.9]))
        {'length': tensor(1.2000), 'mass': tensor(0.9000)}
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, parts: Mapping[str, dist.Distribution], *, validate_args: bool | None = None) -> None:
        for name, part in parts.items():
            _check_part(name, part)
        if not parts:
            raise LatentDEError("Joint: no parts; expected {name: scalar distribution, ...} with at least one.")
        batch = torch.broadcast_shapes(*(part.batch_shape for part in parts.values()))
        self.parts = {name: _unchecked(part.expand(batch)) for name, part in parts.items()}
        super().__init__(batch, torch.Size([len(parts)]), validate_args=validate_args)

    @property
    def names(self) -> tuple[str, ...]:
        """The P names."""
        return tuple(self.parts)

    @property
    def has_rsample(self) -> bool:
        """Whether draws of every part are differentiable in its parameters."""
        return all(part.has_rsample for part in self.parts.values())

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Product of the supports of the parts."""
        return ProductConstraint([part.support for part in self.parts.values()])

    def as_dict(self, value: Tensor) -> dict[str, Tensor]:
        """Vectors (..., P) as name -> (...)."""
        if value.shape[-1:] != self.event_shape:
            raise ShapeError(
                f"Joint of {self.names}: expected values (..., {len(self.names)}), got {tuple(value.shape)}."
            )
        return dict(zip(self.names, value.unbind(-1), strict=True))

    def expand(self, batch_shape: torch.Size, _instance: Joint | None = None) -> Joint:
        """The same distribution with a larger batch shape."""
        new = self._get_checked_instance(Joint, _instance)
        new.parts = {name: _unchecked(part.expand(batch_shape)) for name, part in self.parts.items()}
        super(Joint, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Sum of the log-densities of the parts, (..., P) -> (...)."""
        if self._validate_args and is_validation_enabled():
            self._validate_sample(value)
        return sum(self.parts[name].log_prob(x) for name, x in self.as_dict(value).items())

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 (torch's signature)
        """Draws (*sample_shape, *batch_shape, P)."""
        with torch.no_grad():
            return torch.stack([part.sample(sample_shape) for part in self.parts.values()], dim=-1)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 (torch's signature)
        """Draws (*sample_shape, *batch_shape, P), differentiable in the parameters of the parts."""
        return torch.stack([part.rsample(sample_shape) for part in self.parts.values()], dim=-1)

    @property
    def mean(self) -> Tensor:
        """Means of the parts, (*batch_shape, P)."""
        return torch.stack([part.mean for part in self.parts.values()], dim=-1)

    @property
    def variance(self) -> Tensor:
        """Variances of the parts, (*batch_shape, P)."""
        return torch.stack([part.variance for part in self.parts.values()], dim=-1)

    def __repr__(self) -> str:
        return f"Joint({', '.join(f'{name}: {part}' for name, part in self.parts.items())})"


class ProductConstraint(constraints.Constraint):
    """Vectors whose i-th entry satisfies the i-th of P scalar constraints.

    ``torch.distributions.constraints.stack`` counts the entries as a batch and its transform does not add up their
    log-Jacobians, which a density of vectors needs.

    Args:
        parts: P constraints of event dimension 0.
    """

    is_discrete = False
    event_dim = 1

    def __init__(self, parts: list[constraints.Constraint]) -> None:
        self.parts = tuple(parts)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether all entries of vectors (..., P) are inside: (...)."""
        if value.shape[-1:] != (len(self.parts),):
            return torch.zeros(value.shape[:-1], dtype=torch.bool, device=value.device)
        inside = [part.check(x) for part, x in zip(self.parts, value.unbind(-1), strict=True)]
        return torch.stack(inside, dim=-1).all(-1)

    def __repr__(self) -> str:
        return f"ProductConstraint({', '.join(map(str, self.parts))})"


class ProductTransform(Transform):
    r"""Entry by entry transforms of a vector, as a bijection of :math:`R^P` onto a product of supports.

    .. math:: y_i = t_i(x_i), \quad \log |\det \partial y / \partial x| = \sum_i \log |t_i'(x_i)|

    Args:
        parts: P transforms of scalars.
        codomain: the product of their codomains.
        cache_size: 1 to remember the last value, as in torch.
    """

    domain = constraints.real_vector
    bijective = True

    def __init__(self, parts: list[Transform], codomain: ProductConstraint, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.parts = tuple(parts)
        self.codomain = codomain

    def with_cache(self, cache_size: int = 1) -> ProductTransform:
        """The same transform with another cache."""
        return self if cache_size == self._cache_size else ProductTransform(self.parts, self.codomain, cache_size)

    def _call(self, x: Tensor) -> Tensor:
        return torch.stack([t(v) for t, v in zip(self.parts, x.unbind(-1), strict=True)], dim=-1)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.stack([t.inv(v) for t, v in zip(self.parts, y.unbind(-1), strict=True)], dim=-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum over the P entries, (..., P) -> (...)."""
        pairs = zip(self.parts, x.unbind(-1), y.unbind(-1), strict=True)
        return sum(t.log_abs_det_jacobian(a, b) for t, a, b in pairs)


@biject_to.register(ProductConstraint)
def _biject_to_product(constraint: ProductConstraint) -> ProductTransform:
    return ProductTransform([biject_to(part) for part in constraint.parts], constraint)


@transform_to.register(ProductConstraint)
def _transform_to_product(constraint: ProductConstraint) -> ProductTransform:
    return ProductTransform([transform_to(part) for part in constraint.parts], constraint)


def _check_part(name: str, part: dist.Distribution) -> None:
    if not isinstance(part, torch.distributions.Distribution):
        raise LatentDEError(
            f"Joint: {name!r} is a {type(part).__name__}; expected a distribution. Give a known constant to the "
            "vector field by itself, not as a parameter."
        )
    if len(part.event_shape):
        raise ShapeError(
            f"Joint: {name!r} is a {type(part).__name__} of event shape {tuple(part.event_shape)}; expected scalars. "
            "Name its entries one by one, or sample it at a site of its own."
        )
    if part.support.is_discrete:
        raise LatentDEError(
            f"Joint: {name!r} is discrete ({type(part).__name__}), but the joint density and its guides are of "
            "continuous numbers. Sample it at a site of its own, or sum it out of the likelihood."
        )


def _unchecked(part: dist.Distribution) -> dist.Distribution:
    """A fresh copy (just expanded) without value checks, which read numbers and so stop `vmap`."""
    inner = part
    while inner is not None:
        inner._validate_args = False
        inner = getattr(inner, "base_dist", None)
    return part
