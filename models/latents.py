# SPDX-License-Identifier: Apache-2.0
"""A latent vector of each series: drawn from a physical prior, or made by a network from a standard normal code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_latentde.distributions.joint import Joint
from pyro_latentde.distributions.moments import moments
from pyro_latentde.distributions.placement import placed
from pyro_latentde.errors import ShapeError

__all__ = ["Latent", "Prior"]

Prior = dist.Distribution | Mapping[str, dist.Distribution] | Callable[[dict[str, Tensor]], dist.Distribution]


class Latent(PyroModule):
    r"""One latent vector x per series:

    .. math:: x \sim p(x) \quad\text{or}\quad c \sim p(c),\ x = h(c)

    The first is what a physical prior is for: the posterior of x is then in its own units. The second is how GOKU-nets
    were published, c standard normal and h a small network; its site is called ``<name>_code``.

    Args:
        prior: a distribution of event shape (P,); or a dictionary of scalar ones by name, (see :class:`.Joint`); or a
            function of the model's shared sites that returns either, for a population of series (a hierarchy).
        head: the network h, (..., C) -> (..., P), or None.
        names: names of the P entries; by default those of a prior that has them.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> theta = Latent({"length": dist.Uniform(1.0, 2.0), "drag": dist.LogNormal(0.0, 1.0)})
        >>> theta.names({}), theta("theta", {}).shape
        (('length', 'drag'), torch.Size([2]))
    """

    def __init__(self, prior: Prior, head: nn.Module | None = None, names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.head, self._names = head, None if names is None else tuple(names)
        if isinstance(prior, Mapping):
            prior = Joint(dict(prior))
        self._prior = prior

    def prior(self, shared: dict[str, Tensor]) -> dist.Distribution:
        """The prior, given the values of the shared sites.

        Raises:
            ShapeError: it is no distribution of vectors.
        """
        fn = self._prior if isinstance(self._prior, dist.Distribution) else self._prior(shared)
        fn = Joint(dict(fn)) if isinstance(fn, Mapping) else fn
        if len(fn.event_shape) != 1:
            raise ShapeError(
                f"the prior of a latent vector has event shape {tuple(fn.event_shape)}, expected (P,): end it with "
                ".to_event(1), or give a dictionary of scalar distributions by name."
            )
        return fn

    def names(self, shared: dict[str, Tensor]) -> tuple[str, ...] | None:
        """Names of the entries, where they have some."""
        return self._names or getattr(self.prior(shared), "names", None)

    def moments(self) -> tuple[Tensor, Tensor] | None:
        """Mean and sd of the vector's prior, each (P,); None where they are not known before shared sites are drawn."""
        if self.head is not None or not isinstance(self._prior, dist.Distribution):
            return None
        return moments(self._prior)

    def site(self, name: str) -> str:
        """Name of the sampled site."""
        return name if self.head is None else f"{name}_code"

    def forward(self, name: str, shared: dict[str, Tensor], like: Tensor | None = None) -> Tensor:
        """Draw the vector, (*batch, P), on the device and in the dtype of a tensor; by default those of the prior."""
        prior = self.prior(shared) if like is None else placed(self.prior(shared), like)
        drawn = pyro.sample(self.site(name), prior)
        return drawn if self.head is None else pyro.deterministic(name, self.head(drawn), event_dim=1)
