# SPDX-License-Identifier: Apache-2.0
"""Predictions from draws: trajectories at any times, new observations, pointwise log-likelihoods."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_latentde.errors import LatentDEError
from pyro_latentde.posterior.model_sites import ModelSites
from pyro_latentde.posterior.new_times import Observations, observations_at, trajectories_at
from pyro_latentde.posterior.runner import Draw, per_chain, trace_model
from pyro_latentde.sites.observe_site import pointwise_log_prob

if TYPE_CHECKING:
    from pyro_latentde.posterior.posterior import Posterior

__all__ = ["Observations", "Prediction", "log_likelihood", "predict"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """Trajectories and observations for every draw.

    Args:
        times: the times asked for, ``(T',)`` in the model's unit; None when they are the model's own.
        trajectories: ODE site -> ``(chain, draw, *batch, T', D)``; a row whose solve failed is all NaN.
        observations: observed site -> ``(chain, draw, *site shape)``, drawn anew from the model.
        n_failed: ODE site -> number of rows (draws times batch) whose solve failed.
        sites: what the model contains.
    """

    times: Tensor | None
    trajectories: dict[str, Tensor]
    observations: Observations
    n_failed: dict[str, int]
    sites: ModelSites = field(default_factory=ModelSites, repr=False)

    def times_of(self, site: str) -> Tensor:
        """Times of the last dimension but one of ``trajectories[site]``."""
        times = self.sites[site].times if self.times is None else self.times
        if times is None:
            raise LatentDEError(f"the times of site '{site}' are not known")
        return times

    def quantile(self, site: str, probs: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> Tensor:
        """Quantiles over the draws of one trajectory or observed site, failed rows left out.

        Args:
            site: name in ``trajectories`` or ``observations``.
            probs: probabilities.

        Returns:
            ``(len(probs), *site shape)``.
        """
        values = self.trajectories[site] if site in self.trajectories else self.observations[site]
        values = values.flatten(0, 1)
        probs_ = torch.as_tensor(probs, dtype=values.dtype, device=values.device)
        return torch.nanquantile(values, probs_, dim=0)


def predict(
    posterior: Posterior,
    times: Tensor | Sequence[float] | None = None,
    *,
    num_draws: int | None = None,
    observations: bool | None = None,
    seed: int = 0,
    memory: str | int = "1GB",
    times_argument: str = "times",
) -> Prediction:
    r"""Trajectories of every ODE site for the draws, and new observations.

    .. math:: \tilde y \sim p(\tilde y \mid \theta), \qquad \theta \sim p(\theta \mid y)

    At the model's own times new observations come from running the model without its data. At other times
    the model must take its times as an argument, or in a `Series`: it is then run at its own times and the new ones
    together, so that initial conditions stay where they were, and the new ones are kept. Series with times of their
    own, padded or not, are each run at their own times and the new ones.

    Args:
        posterior: draws with a model.
        times: ``(T',)`` in the model's unit of time, the same for every row; the model's own by default.
        num_draws: use about this many draws, evenly spaced; all by default.
        observations: False leaves them out; True makes it an error at once when they cannot be drawn; by
            default asking the result for them is the error.
        seed: seed of the observation noise.
        memory: budget for the tensors of one chunk of draws.
        times_argument: name of the model's argument that holds its times.

    Returns:
        The prediction. Rows whose solve failed are NaN, are counted, and warned about once.

    Raises:
        LatentDEError: no model, nothing to predict, or observations that cannot be drawn.
    """
    _need_model(posterior, "predict")
    if num_draws is not None:
        posterior = posterior.thin(num_draws)
    options = {"memory": memory, "seed": seed}
    if times is None:
        trajectories, drawn = _at_own_times(posterior, observations is not False, options)
    else:
        times = torch.as_tensor(times)
        times = times if times.is_floating_point() else times.to(torch.get_default_dtype())
        if times.ndim != 1 or len(times) == 0 or not bool(torch.isfinite(times).all()):
            raise LatentDEError(f"times: expected finite numbers of shape (T',), got shape {tuple(times.shape)}")
        trajectories = trajectories_at(posterior, times, options)
        drawn = Observations()
        if observations is not False:
            drawn = observations_at(posterior, times, trajectories, options, times_argument)
    if observations and drawn.reasons:
        raise LatentDEError(next(iter(drawn.reasons.values())))
    n_failed = {name: _drop_failed(value) for name, value in trajectories.items()}
    _warn_failed(n_failed, trajectories)
    return Prediction(times, trajectories, drawn, n_failed, posterior.sites)


def log_likelihood(posterior: Posterior, *, memory: str | int = "1GB") -> dict[str, Tensor]:
    r"""Pointwise log-likelihood :math:`\log p(y_i \mid \theta)` of every observed site.

    Args:
        posterior: draws with a model.
        memory: budget for the tensors of one chunk of draws.

    Returns:
        Observed site -> ``(chain, draw, *batch)``; event dimensions are summed, except for sites of
        ``lde.observe``, which keep one number for each time and value. Masked observations are 0, and the
        scale of a subsampled plate is left out.

    Raises:
        LatentDEError: no model, or latent sites without draws (a likelihood given them is not defined).
    """
    _need_model(posterior, "log_likelihood")
    names = posterior.sites.observed
    missing = [name for name in posterior.sites.latent if name not in posterior.samples]
    if missing:
        raise LatentDEError(
            f"the pointwise log-likelihood needs draws of every latent site; there are none of {missing}. "
            "Sites that were summed out by enumeration can be drawn with pyro.infer.infer_discrete."
        )

    def one(draw: Draw) -> dict[str, Tensor]:
        nodes = trace_model(posterior.model, draw, posterior.args, posterior.kwargs).nodes
        return {name: _log_prob(nodes[name], posterior.sites[name].pointwise) for name in names}

    return per_chain(posterior, one, memory=memory) if names else {}


def _log_prob(node: Mapping[str, Any], pointwise: bool) -> Tensor:
    fn, value, mask = node["fn"], node["value"], node["mask"]
    if not pointwise:
        return scale_and_mask(fn.log_prob(value), mask=mask)
    values = pointwise_log_prob(fn, value)
    if isinstance(mask, Tensor):
        mask = mask.reshape(mask.shape + (1,) * (values.ndim - len(fn.batch_shape)))
    return scale_and_mask(values, mask=mask)


def _need_model(posterior: Posterior, what: str) -> None:
    if posterior.model is None or posterior.sites is None:
        raise LatentDEError(
            f"{what} needs the model, which is not stored with the draws. "
            "Try: Posterior.load(path, model=model, args=(...)), or posterior.with_model(model, ...)."
        )


def _at_own_times(
    posterior: Posterior, with_data: bool, options: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Observations]:
    sites = posterior.sites
    names = (*sites.ode, *(sites.observed if with_data else ()))
    if not names:
        raise LatentDEError("the model has neither an lde.ode site nor an observed site: there is nothing to predict")

    def one(draw: Draw, new_data: bool, names: Sequence[str]) -> dict[str, Tensor]:
        trace = trace_model(posterior.model, draw, posterior.args, posterior.kwargs, new_data)
        return {name: trace.nodes[name]["value"] for name in names}

    try:
        out = per_chain(posterior, functools.partial(one, new_data=with_data, names=names), skip_errors=True, **options)
        drawn = Observations({name: out[name] for name in names if name not in sites.ode})
    except Exception as error:
        if not with_data or not sites.ode:
            raise
        reason = f"the model cannot be run without its data ({type(error).__name__}: {error})"
        drawn = Observations(reasons={name: f"site '{name}': {reason}" for name in sites.observed})
        out = per_chain(posterior, functools.partial(one, new_data=False, names=sites.ode), **options)
    return {name: out[name] for name in sites.ode}, drawn


def _drop_failed(trajectory: Tensor) -> int:
    """Make every row that has a NaN all NaN, in place; the number of such rows."""
    failed = ~torch.isfinite(trajectory).flatten(-2).all(-1)
    trajectory[failed] = torch.nan
    return int(failed.sum())


def _warn_failed(n_failed: Mapping[str, int], trajectories: Mapping[str, Tensor]) -> None:
    parts = [
        f"{count} of {trajectories[name].flatten(0, -3).shape[0]} rows of site '{name}'"
        for name, count in n_failed.items()
        if count
    ]
    if parts:
        warnings.warn(
            f"the solve failed for {', '.join(parts)}; they are NaN, left out of quantiles and figures",
            stacklevel=3,
        )
