# SPDX-License-Identifier: Apache-2.0
"""``lde.population``: one value for each series, drawn from a population whose centre and spread are sites, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.transforms import ExpTransform, SigmoidTransform, Transform, identity_transform

from pyro_latentde.errors import LatentDEError, ShapeError

__all__ = ["LINKS", "Link", "inverse_link", "population"]

Link = str | Transform

# Name of a link g -> its inverse, from the real line to the values.
LINKS: dict[str, Transform] = {
    "identity": identity_transform,
    "log": ExpTransform(),
    "logit": SigmoidTransform(),
}


def population(
    name: str,
    centre: Tensor,
    spread: Tensor,
    *,
    link: Link | Sequence[Link] = "log",
    centered: bool | float | Tensor = False,
    correlation: Tensor | None = None,
) -> Tensor:
    r"""Values of all series in the enclosing plate, normal around a common centre on the scale of a link g:

    .. math:: g(x_n) = \mu + \sigma^{1 - c} (u_n - c \mu), \qquad u_n \sim N(c \mu, \sigma^c)

    whatever c is, :math:`g(x_n) \sim N(\mu, \sigma)`. What is sampled, u, differs: it is :math:`g(x_n)` itself if
    centred (c = 1), and an offset in units of the spread if not (c = 0). Series that say much of their own x want the
    first, series that say little the second, in which the funnel of x and its spread is gone.

    The sites are those of :class:`pyro.infer.reparam.LocScaleReparam` on a centred model: with ``link="log"`` a
    centred "CL" is sampled as "log_CL", any other as "log_CL_decentered", and "CL" itself is deterministic.

    Args:
        name: of the values, a deterministic site; with the identity as link and centred, the sampled site itself.
        centre: mu on the scale of the link, (); the logarithm of the median for ``link="log"``. Of P correlated values
            (P,).
        spread: sigma > 0 on the scale of the link, of the same shape; 0.3 is some 30 % for ``link="log"``.
        link: ``"log"`` for positive values, ``"logit"`` for those in (0, 1), ``"identity"``; or a transform from the
            real line to the values. Of P correlated values P of them, or one for all.
        centered: c, a bool, or between: a number in [0, 1], for each series (N,) if it differs.
        correlation: Cholesky factor (P, P) of the correlation of P values, as from ``LKJCholesky``; c is then 0 or 1.

    Returns:
        (N,) values, or (N, P).

    Raises:
        LatentDEError: an unknown link, or `centered` outside [0, 1].
        ShapeError: centre, spread, links and correlation are not of the same P values.

    References:
        Papaspiliopoulos, Roberts and Skoeld (2007), A general framework for the parametrization of hierarchical
        models, Statistical Science 22.
        Gorinova, Moore and Hoffman (2020), Automatic reparameterisation of probabilistic programs, ICML.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_latentde as lde
        >>> series = lde.Series.at_times(torch.linspace(0, 1, 5).expand(100, -1))
        >>> def model(series):
        ...     median = pyro.sample("median", dist.LogNormal(torch.zeros(()), 1.0))
        ...     spread = pyro.sample("spread", dist.HalfNormal(torch.ones(())))
        ...     with lde.series_plate(series):
        ...         return lde.population("rate", median.log(), spread)
        >>> trace = pyro.poutine.trace(model).get_trace(series)
        >>> trace.nodes["log_rate_decentered"]["value"].shape
        torch.Size([100])
    """
    centre, spread = torch.as_tensor(centre), torch.as_tensor(spread)
    if correlation is not None:
        return _correlated(name, centre, spread, link, centered, correlation)
    prefix, inverse = _prefix(link), inverse_link(name, link)
    c = _centering(name, centered)
    site = f"{prefix}{name}"
    if c is True:
        x = pyro.sample(site, dist.Normal(centre, spread))
        return x if site == name else pyro.deterministic(name, inverse(x), event_dim=0)
    if c is False:
        u = pyro.sample(f"{site}_decentered", dist.Normal(torch.zeros_like(centre), 1.0))
        x = centre + spread * u
    else:
        u = pyro.sample(f"{site}_decentered", dist.Normal(c * centre, spread**c))
        x = centre + spread ** (1 - c) * (u - c * centre)
    return pyro.deterministic(name, inverse(x), event_dim=0)


def inverse_link(name: str, link: Link) -> Transform:
    """The transform from the real line to the values, of a link by name or of itself.

    Args:
        name: of the site, for the error.
        link: name or transform.

    Raises:
        LatentDEError: no such link.
    """
    if isinstance(link, Transform):
        return link
    if link not in LINKS:
        raise LatentDEError(
            f"population({name!r}): link = {link!r}; expected one of {', '.join(LINKS)}, or a transform from the real "
            "line to the values, such as torch.distributions.biject_to(constraints.interval(0, 5))."
        )
    return LINKS[link]


def _correlated(
    name: str,
    centre: Tensor,
    spread: Tensor,
    link: Link | Sequence[Link],
    centered: Any,
    correlation: Tensor,
) -> Tensor:
    links = [link] * centre.shape[-1] if isinstance(link, str | Transform) else list(link)
    size = len(links)
    shapes = [tuple(part.shape) for part in (centre, spread, correlation)]
    if any(shape[-1:] != (size,) for shape in shapes) or shapes[2][-2:] != (size, size):
        raise ShapeError(
            f"population({name!r}): {size} links, centre {shapes[0]}, spread {shapes[1]}, correlation {shapes[2]}; "
            "expected P links, (P,), (P,) and (P, P), one entry for each of the correlated values."
        )
    c = _centering(name, centered)
    if not isinstance(c, bool):
        raise LatentDEError(f"population({name!r}): correlated values are centred or not; got centered={centered!r}.")
    factor = spread.unsqueeze(-1) * correlation
    if c:
        x = pyro.sample(f"link_{name}", dist.MultivariateNormal(centre, scale_tril=factor))
    else:
        u = pyro.sample(f"link_{name}_decentered", dist.Normal(torch.zeros_like(centre), 1.0).to_event(1))
        x = centre + (factor @ u.unsqueeze(-1)).squeeze(-1)
    inverses = [inverse_link(name, one) for one in links]
    entries = [inverse(one) for inverse, one in zip(inverses, x.unbind(-1), strict=True)]
    return pyro.deterministic(name, torch.stack(entries, dim=-1), event_dim=1)


def _prefix(link: Link) -> str:
    if isinstance(link, Transform):
        return "link_"
    return "" if link == "identity" else f"{link}_"


def _centering(name: str, centered: Any) -> bool | float | Tensor:
    """True, False, or what lies between."""
    if isinstance(centered, Tensor):
        return centered
    if not 0 <= centered <= 1:
        raise LatentDEError(f"population({name!r}): centered = {centered!r}; expected a bool or a number in [0, 1].")
    return bool(centered) if centered in (0, 1) else float(centered)
