# SPDX-License-Identifier: Apache-2.0
"""Log-evidence of single series by importance weighting, with an amortized guide as proposal."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pyro import poutine
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer.failed_draws import tell_failed
from pyro_latentde.infer.pair import Pair
from pyro_latentde.posterior.model_sites import kind_of

__all__ = ["log_mean_exp", "log_weights"]


def log_weights(
    pair: Pair,
    series: Series,
    *,
    num_particles: int,
    given: Mapping[str, Tensor],
    plate: str,
    rows_at_once: int,
) -> Tensor:
    r"""Importance weights of independent draws of the guide for each series,

    .. math:: \log w_{kn} = \log p(y_n, z_{kn}) - \log q(z_{kn} \mid y_n).

    The particles are more series: each of them is put into the batch several times. A draw whose solve failed has
    weight zero, as in NUTS; where all draws of a series did, they are NaN.

    Args:
        pair: model and guide.
        series: N series, as whole data set.
        num_particles: K.
        given: values of sites outside the plate, on which everything is conditioned.
        plate: name of the plate of the series.
        rows_at_once: series in one run of the model, at least N.

    Returns:
        (K, N).

    Raises:
        LatentDEError: a site outside the plate whose value is not given.
    """
    n = len(series)
    whole = series._with(index=None, population=None, time_weight=1.0)
    model, guide = (poutine.condition(fn, data=dict(given)) for fn in (pair.model, pair.guide))
    found, left = [], num_particles
    while left:
        copies = min(left, max(1, rows_at_once // n))
        batch = whole[torch.arange(n).repeat(copies)]
        guide_trace = poutine.trace(guide).get_trace(batch, *pair.args, **pair.kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(
            batch, *pair.args, **pair.kwargs
        )
        total = _per_series(model_trace, plate, given) - _per_series(guide_trace, plate, given)
        found.append(total.reshape(copies, n))
        left -= copies
    weights = torch.cat(found)
    failed = weights.isnan()
    tell_failed(failed, "their weight is zero")
    return weights.masked_fill(failed & ~failed.all(0), -math.inf)


def _per_series(trace: poutine.Trace, plate: str, given: Mapping[str, Tensor]) -> Tensor:
    """Log-density (rows,) of all sites in the plate."""
    trace.compute_log_prob(lambda name, site: kind_of(site) in ("latent", "observed", "factor"))
    total: Tensor | None = None
    for name, site in trace.nodes.items():
        if kind_of(site) not in ("latent", "observed", "factor") or name in given:
            continue
        frame = next((frame for frame in site["cond_indep_stack"] if frame.name == plate), None)
        if frame is None and site["infer"].get("is_auxiliary"):
            continue  # the numbers behind sites that are given; those that are not complain themselves
        if frame is None:
            raise LatentDEError(
                f"site '{name}' is outside of plate '{plate}': it belongs to all series together, so that a single one "
                f"has no evidence of its own. Give its value, given={{'{name}': ...}}, such as a posterior mean; or "
                "say how the plate of the series is called, plate=."
            )
        value = site["log_prob"]
        value = value.expand(torch.broadcast_shapes(value.shape, (frame.size,) + (1,) * (-frame.dim - 1)))
        rows = value.movedim(frame.dim, 0).flatten(1).sum(1) if value.dim() > 1 else value
        total = rows if total is None else total + rows
    if total is None:
        raise LatentDEError(f"no site in a plate '{plate}': see lde.series_plate, or give plate=")
    return total


def log_mean_exp(weights: Tensor) -> Tensor:
    """Logarithm of the mean of the weights over the first dimension."""
    return weights.logsumexp(0) - math.log(len(weights))
