# SPDX-License-Identifier: Apache-2.0
"""The amortized guide of a batch of series: each series through encoders into a posterior of its latent sites."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.distributions.constraints import real

from pyro_latentde.data.series import Series
from pyro_latentde.distributions.placement import placed
from pyro_latentde.errors import ShapeError
from pyro_latentde.guides.heads import make_head
from pyro_latentde.guides.stations import have_data
from pyro_latentde.sites.series_plate import series_plate

__all__ = ["SeriesGuide"]


class SeriesGuide(PyroModule):
    r"""An amortized posterior of the latent sites that belong to one series each

    .. math:: q(x_1, x_2, \dots \mid y) = \prod_i q(x_i \mid e_i(y), x_1, \dots, x_{i-1})

    with one encoder e and one head for each site. A head gives a distribution of unconstrained numbers, which the
    bijection of the prior's support carries to the site. Later sites see the draws of earlier ones, so that the
    posterior has correlations between sites as well as within them.

    Args:
        priors: prior of each local site of the model, by name, in the order in which they are drawn; only its support
            and its event shape matter.
        encoders: one series encoder for all sites, or one per site name (see :mod:`pyro_latentde.nn`).
        frames: network of one time's values, (..., D) -> (..., F), before the encoders; None gives them the values.
        head: ``"normal"``, ``"full_rank"``, ``"flow"`` (needs zuko), or a function (in_features, size) -> module.
        structured: whether later sites see the draws of earlier ones.
        shared: guide of the sites outside the plate of series, such as one of Pyro's AutoGuides.
        stations: for sites with one value at several times (multiple shooting), site name -> function from the number
            of times to their positions; its context is what the encoder knows at those times. Stations in the padding
            of shorter series do not count.
        covariates: number C of the series' constant covariates, which every head reads too.

    Raises:
        ValueError: encoders and priors name different sites.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyro_latentde import Series
        >>> from pyro_latentde.nn import RecurrentEncoder
        >>> start, rate = dist.Normal(torch.zeros(2), 1.0), dist.LogNormal(torch.zeros(1), 1.0)
        >>> priors = {"z0": start.to_event(1), "k": rate.to_event(1)}
        >>> guide = SeriesGuide(priors, RecurrentEncoder(3, 8))
        >>> draws = guide(Series.from_tensors(torch.arange(5.0), torch.randn(4, 5, 3)))
        >>> draws["z0"].shape, draws["k"].shape, bool((draws["k"] > 0).all())
        (torch.Size([4, 2]), torch.Size([4, 1]), True)
    """

    def __init__(
        self,
        priors: Mapping[str, dist.Distribution],
        encoders: nn.Module | Mapping[str, nn.Module],
        *,
        frames: nn.Module | None = None,
        head: str | type[nn.Module] = "full_rank",
        structured: bool = True,
        shared: nn.Module | None = None,
        stations: Mapping[str, object] | None = None,
        covariates: int = 0,
    ) -> None:
        super().__init__()
        one = isinstance(encoders, nn.Module)
        if not one and set(encoders) != set(priors):
            raise ValueError(f"encoders for {sorted(encoders)}, but the local sites are {sorted(priors)}")
        self.names = tuple(priors)
        self.transforms = {name: _transform(prior) for name, prior in priors.items()}
        self.sizes = {name: _unconstrained_size(prior) for name, prior in priors.items()}
        self.stations = dict(stations or {})
        self.structured = structured
        self.frames = frames
        self.encoders = nn.ModuleDict({"all": encoders} if one else dict(encoders))
        self.shared = shared
        self.heads = nn.ModuleDict()
        seen = covariates
        for name in self.names:
            width = _encoder(self.encoders, name).out_features
            self.heads[name] = make_head(head, width + seen, self.sizes[name])
            if structured and name not in self.stations:
                seen += self.sizes[name]

    def forward(self, series: Series, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Draw every site; further arguments are those of the model, which a guide shares."""
        drawn = {} if self.shared is None else dict(self.shared(series, *args, **kwargs) or {})
        inputs = self._inputs(series)
        length = series.times.shape[1]
        # Pyro registers all parameters of a submodule each time it is looked at
        encoders, heads = self.encoders, self.heads
        contexts: dict[nn.Module, Tensor] = {}
        known = [] if series.covariates is None else [series.covariates]
        with series_plate(series):
            for name in self.names:
                if name in self.stations and not self.stations[name](length):
                    continue  # too short a window for a second segment
                context = self._context(name, _encoder(encoders, name), contexts, inputs, known)
                base = heads[name](context)
                transform = self.transforms[name]
                if transform is not None:
                    # the inverse of a draw is the draw's own unconstrained numbers: remembered, for this call only
                    transform = placed(transform, series.times).with_cache(1)
                fn = base if transform is None else dist.TransformedDistribution(base, [transform])
                if name in self.stations:
                    fn = fn.mask(have_data(series.times, self.stations[name](length))).to_event(1)
                drawn[name] = pyro.sample(name, fn)
                if self.structured and name not in self.stations:
                    free = drawn[name] if transform is None else transform.inv(drawn[name])
                    known.append(free.flatten(1) if free.dim() == 2 else free)
        return drawn

    def _inputs(self, series: Series) -> tuple[Tensor, Tensor, Tensor]:
        """Times from the start of each series, and what the encoders read: values, or features of whole frames."""
        if series.values is None:
            raise ShapeError("the guide was given a series without values; it needs observations to read")
        times = series.times - series.times[:, :1]
        if self.frames is None:
            return times, series.values, series.mask
        if series.complete:
            features = self.frames(series.values)
            return times, features, torch.ones_like(features, dtype=torch.bool)
        features = self.frames(series.values * series.mask)
        return times, features, series.mask.any(-1, keepdim=True).expand_as(features)

    def _context(
        self,
        name: str,
        encoder: nn.Module,
        contexts: dict[nn.Module, Tensor],
        inputs: tuple[Tensor, Tensor, Tensor],
        known: list[Tensor],
    ) -> Tensor:
        """What is known about a site: the summary of the series, its covariates, the draws before."""
        if name in self.stations:
            at = self.stations[name](inputs[0].shape[1])
            context = encoder.states(*inputs)[:, at]
            extra = [x.unsqueeze(-2).expand(*x.shape[:-1], len(at), x.shape[-1]) for x in known]
        else:
            if encoder not in contexts:
                contexts[encoder] = encoder(*inputs)
            context, extra = contexts[encoder], known
        if not extra:
            return context
        lead = torch.broadcast_shapes(context.shape[:-1], *(x.shape[:-1] for x in extra))
        return torch.cat([x.expand(*lead, x.shape[-1]) for x in (context, *extra)], dim=-1)


def _encoder(encoders: nn.ModuleDict, name: str) -> nn.Module:
    return encoders[name if name in encoders else "all"]


def _transform(prior: dist.Distribution) -> torch.distributions.Transform | None:
    """From unconstrained numbers to the prior's support; None where there is nothing to do."""
    support = prior.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return None if support is real else biject_to(prior.support)


def _unconstrained_size(prior: dist.Distribution) -> int:
    shape = biject_to(prior.support).inverse_shape(prior.event_shape)
    return int(torch.Size(shape).numel())
