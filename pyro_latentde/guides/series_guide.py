# SPDX-License-Identifier: Apache-2.0
"""The amortized guide of a batch of series: each series through encoders into a posterior of its latent sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import AffineTransform, ComposeTransform, biject_to
from torch.distributions.constraints import real

from pyro_latentde.data.series import Series
from pyro_latentde.distributions.moments import moments
from pyro_latentde.distributions.placement import placed
from pyro_latentde.errors import LatentDEError, ShapeError
from pyro_latentde.guides.heads import make_head
from pyro_latentde.guides.stations import have_data
from pyro_latentde.nn.learned_unit import LearnedUnit
from pyro_latentde.sites.series_plate import series_plate

__all__ = ["SeriesGuide"]


class SeriesGuide(PyroModule):
    r"""An amortized posterior of the latent sites that belong to one series each

    .. math:: q(x_1, x_2, \dots \mid y) = \prod_i q(x_i \mid e_i(y), x_1, \dots, x_{i-1})

    with one encoder e and one head for each site. A head gives a distribution of unconstrained numbers, which the
    bijection of the prior's support carries to the site, or, where every number is allowed, the prior's mean and sd.
    Later sites see the draws of earlier ones, so that the posterior has correlations between sites as well as within
    them.

    Args:
        priors: prior of each local site of the model, by name, in the order in which they are drawn; only its support
            and its event shape matter.
        encoders: one series encoder for all sites, or one per site name (see :mod:`pyro_latentde.nn`).
        frames: network of one time's values, (..., D) -> (..., F), before the encoders; None gives them the values.
            Missing values are 0 in it; one with the attribute ``reads_mask = True`` is given the mask as well.
        head: ``"normal"``, ``"full_rank"``, ``"flow"`` (needs zuko), or a function (in_features, size) -> module.
        structured: whether later sites see the draws of earlier ones.
        shared: guide of the sites outside the plate of series, such as one of Pyro's AutoGuides.
        stations: for sites with one value at several times (multiple shooting), site name -> function from the number
            of times to their positions; its context is what the encoder knows at those times. Stations in the padding
            of shorter series do not count.
        covariates: number C of the series' constant covariates, which every head reads too.
        units: site name -> a decoder's :class:`.LearnedUnit`, in which the guide measures that site, too.

    Raises:
        ValueError: encoders and priors name different sites.
        LatentDEError: a unit for a site that is not there, or that cannot be any number.

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
        units: Mapping[str, LearnedUnit] | None = None,
    ) -> None:
        super().__init__()
        one = isinstance(encoders, nn.Module)
        if not one and set(encoders) != set(priors):
            raise ValueError(f"encoders for {sorted(encoders)}, but the local sites are {sorted(priors)}")
        self.names = tuple(priors)
        self.transforms = {name: _to_support(prior) for name, prior in priors.items()}
        self.laws = {name: _law(prior) for name, prior in priors.items()}
        self.sizes = {name: _unconstrained_size(prior) for name, prior in priors.items()}
        self.stations = dict(stations or {})
        self.units = dict(units or {})  # no submodules: their parameters are the model's
        for name in self.units:
            if name not in priors or not _is_real(priors[name]):
                what = f"has support {priors[name].support}" if name in priors else f"is none of {sorted(priors)}"
                raise LatentDEError(
                    f"a learned unit for the site '{name}', which {what}: it scales states that have a prior "
                    "themselves (no code and head), on all numbers. Leave it out: learn_unit=False, or no unit=."
                )
        self.structured = structured
        self.frames = frames
        self.encoders = nn.ModuleDict({"all": encoders} if one else dict(encoders))
        self.shared = shared
        self._read: tuple[torch.Size, dict[str, Tensor]] | None = None
        self._given_features = False
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
        contexts = self._encoded(series)
        heads = self.heads  # Pyro registers all parameters of a submodule each time it is looked at
        known = [] if series.covariates is None else [series.covariates]
        with series_plate(series):
            for name, context in contexts.items():
                base = heads[name](_joined(context, known, name in self.stations))
                transform = self._transform(name, series.times)
                fn = base if transform is None else dist.TransformedDistribution(base, [transform])
                if name in self.stations:
                    fn = fn.mask(have_data(series.times, self.stations[name](series.times.shape[1]))).to_event(1)
                drawn[name] = pyro.sample(name, fn)
                if self.structured and name not in self.stations:
                    free = drawn[name] if transform is None else transform.inv(drawn[name])
                    known.append(free.flatten(1) if free.dim() == 2 else free)
        return drawn

    def _transform(self, name: str, like: Tensor) -> torch.distributions.Transform | None:
        """From unconstrained numbers to the site, with the units of the prior and the learned one; None if the same."""
        fixed = self.transforms[name]
        parts = [] if fixed is None else [placed(fixed, like)]
        if name in self.units:
            unit = self.units[name].unit().expand(self.sizes[name])
            parts.insert(0, AffineTransform(torch.zeros_like(unit), unit, event_dim=1))
        if not parts:
            return None
        # the inverse of a draw is the draw's own unconstrained numbers: remembered, for this call only
        return (parts[0] if len(parts) == 1 else ComposeTransform(parts)).with_cache(1)

    @contextmanager
    def reading(self, series: Series) -> Iterator[None]:
        """Encode series once for all calls inside, which only draw from the heads: for many draws without gradients.

        Args:
            series: N series. Calls inside are about them, or about K copies one behind the other,
                ``series[torch.arange(N).repeat(K)]``.
        """
        before, self._read = self._read, (series.times.shape, self._encode(series))
        try:
            yield
        finally:
            self._read = before

    def features(self, series: Series) -> Series:
        """What the encoders read: for a guide with a network of frames, series (N, T, F) of that network's outputs."""
        times, values, mask = self._inputs(series)
        return series._with(times=times, values=values, mask=mask, frame=None, names=None)

    @contextmanager
    def given_features(self) -> Iterator[None]:
        """Calls inside are given `features` instead of series, and leave the network of frames alone."""
        before, self._given_features = self._given_features, True
        try:
            yield
        finally:
            self._given_features = before

    def _encoded(self, series: Series) -> dict[str, Tensor]:
        """What the encoders know of each site, (N, H), or (N, J, H) at its J stations; nothing in it is random."""
        if self._read is None:
            return self._encode(series)
        (n, length), contexts = self._read
        copies, rest = divmod(len(series), n)
        if rest or series.times.shape[1] != length:
            raise ShapeError(
                f"the guide is reading {n} series of {length} times, and was called with {len(series)} of "
                f"{series.times.shape[1]}: inside of reading(series) give these series, or whole copies of them."
            )
        if copies == 1:
            return contexts
        return {name: context.repeat(copies, *[1] * (context.dim() - 1)) for name, context in contexts.items()}

    def _encode(self, series: Series) -> dict[str, Tensor]:
        inputs, encoders = self._inputs(series), self.encoders
        summaries: dict[nn.Module, Tensor] = {}
        contexts = {}
        for name in self.names:
            encoder = _encoder(encoders, name)
            if name in self.stations:
                at = self.stations[name](series.times.shape[1])
                if at:  # none in a window too short for a second segment
                    contexts[name] = encoder.states(*inputs)[:, at]
                continue
            if encoder not in summaries:
                summaries[encoder] = encoder(*inputs)
            contexts[name] = summaries[encoder]
        return contexts

    def _inputs(self, series: Series) -> tuple[Tensor, Tensor, Tensor]:
        """Times from the start of each series, and what the encoders read: values, or features of whole frames."""
        if series.values is None:
            raise ShapeError("the guide was given a series without values; it needs observations to read")
        times = series.times - series.times[:, :1]
        frames = None if self._given_features else self.frames  # each look registers all its parameters with Pyro
        if frames is None:
            return times, series.values, series.mask
        if series.complete:
            features = frames(series.values)
            return times, features, torch.ones_like(features, dtype=torch.bool)
        values = series.values * series.mask
        features = frames(values, series.mask) if getattr(frames, "reads_mask", False) else frames(values)
        return times, features, series.mask.any(-1, keepdim=True).expand_as(features)


def _joined(context: Tensor, known: Sequence[Tensor], at_stations: bool) -> Tensor:
    """What is known about a site: the summary of the series, its covariates, the draws before."""
    if not known:
        return context
    parts = (context, *(x.unsqueeze(-2) if at_stations else x for x in known))
    lead = torch.broadcast_shapes(*(x.shape[:-1] for x in parts))
    return torch.cat([x.expand(*lead, x.shape[-1]) for x in parts], dim=-1)


def _encoder(encoders: nn.ModuleDict, name: str) -> nn.Module:
    return encoders[name if name in encoders else "all"]


def _to_support(prior: dist.Distribution) -> torch.distributions.Transform | None:
    """From unconstrained numbers to the prior's support; None where there is nothing to do.

    Where the support is all numbers, to the prior's units: a head that starts around 0 knows nothing of pascals.
    """
    if not _is_real(prior):
        return biject_to(prior.support)
    units = moments(prior)
    if units is None or (bool((units[0] == 0).all()) and bool((units[1] == 1).all())):
        return None
    return AffineTransform(*units, event_dim=len(prior.event_shape))


def _is_real(prior: dist.Distribution) -> bool:
    support = prior.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is real


def _law(prior: dist.Distribution) -> str:
    """What the weights of a head mean depends on: saved with them, and compared."""
    units = moments(prior)
    numbers = "" if units is None else f", mean {_short(units[0])}, sd {_short(units[1])}"
    return f"{prior.support}{numbers}"


def _short(numbers: Tensor) -> list[float]:
    return [float(f"{x:.5g}") for x in numbers.flatten().tolist()]


def _unconstrained_size(prior: dist.Distribution) -> int:
    shape = biject_to(prior.support).inverse_shape(prior.event_shape)
    return int(torch.Size(shape).numel())
