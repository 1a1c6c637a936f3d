# SPDX-License-Identifier: Apache-2.0
"""The sleep loss: a guide learns from series that the model dreams, and so learns how wrong it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.errors import LatentDEError
from pyro_latentde.posterior.model_sites import kind_of

__all__ = ["Sleep"]


class Sleep(ELBO):
    r"""Loss of the guide alone, over latent values and series drawn from the model,

    .. math:: -E_{p(x)\,p(y \mid x)} \log q_\phi(x \mid y) = E_{p(y)}\,\mathrm{KL}(p(x \mid y) \,\|\, q_\phi(x \mid y))
              + \mathrm{const.}

    The ELBO measures a posterior from its own side: it makes a guide narrower than its own errors, above all when
    frames say much about few parameters. This loss is least where intervals cover as often as they claim, an encoder's
    errors included. Use it after the ELBO has trained the model: ``fit_svi(..., elbo=Sleep())`` leaves the model as it
    is. What all series share keeps the posterior it has, and is drawn from it.

    Model and guide take the :class:`.Series` as their first argument; its times and gaps are those of the dreams. A
    dream whose solve failed is left out.

    Args:
        plate: name of the plate of series.
        proposal: a guide, usually a copy of the trained one. Latent values of the dreams are then its draws at the real
            series instead of draws of the prior: dreams are like the data, and the prior in the formula is the
            distribution of what is found in them. An error that model and guide share then stays hidden.

    References:
        Hinton, Dayan, Frey and Neal, "The wake-sleep algorithm for unsupervised neural networks", Science 268, 1995.
        Papamakarios and Murray, "Fast epsilon-free inference of simulation models", NeurIPS 2016.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_latentde as lde
        >>> from pyro_latentde.guides.series_guide import SeriesGuide
        >>> from pyro_latentde.nn import RecurrentEncoder
        >>> def model(series):
        ...     with lde.series_plate(series):
        ...         z0 = pyro.sample("z0", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        ...         lde.observe("obs", dist.Normal(z0.unsqueeze(-2).expand(-1, 4, 1), 0.5), series)
        >>> guide = SeriesGuide({"z0": dist.Normal(torch.zeros(1), 1.0).to_event(1)}, RecurrentEncoder(1, 8))
        >>> series = lde.Series.from_tensors(torch.arange(4.0), torch.randn(10, 4, 1))
        >>> fit = lde.infer.fit_svi(model, guide, series, elbo=Sleep(), num_steps=2, progress=False)
        >>> len(fit.losses)
        2
    """

    def __init__(self, plate: str = "series", proposal: Callable | None = None) -> None:
        super().__init__()
        self.plate, self.proposal = plate, proposal

    def _get_trace(
        self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[poutine.Trace, poutine.Trace]:
        """The model's dream, and the guide at the dream's latent values."""
        if not (args and isinstance(args[0], Series)):
            raise LatentDEError("Sleep: the first argument of model and guide must be a Series, to be dreamt anew")
        with torch.no_grad():
            asleep = poutine.trace(guide).get_trace(*args, **kwargs)
            self._check_local(asleep)
            shared = {n: v["value"] for n, v in asleep.nodes.items() if _is_latent(v) and not self._is_local(v)}
            given = shared | ({} if self.proposal is None else self._proposed(*args, **kwargs))
            dreaming = poutine.condition(poutine.uncondition(model), data=given)
            dream = poutine.trace(dreaming).get_trace(*args, **kwargs)
        if any((node.get("infer") or {}).get("prior") for node in dream.nodes.values()):
            raise LatentDEError(
                "Sleep: a model with multiple shooting cannot dream whole series, since its segments have starts of "
                "their own; set model.shooting = None, and make a guide for that model."
            )
        latents = {n: dream.nodes[n]["value"] for n, v in asleep.nodes.items() if _is_latent(v) and n in dream.nodes}
        values = _observations(dream)
        series = args[0]._with(values=values.nan_to_num(0.0, 0.0, 0.0))
        trace = poutine.trace(poutine.condition(guide, data=latents)).get_trace(series, *args[1:], **kwargs)
        trace.compute_log_prob()
        dream.nodes["_finite"] = {"type": "args", "value": values.isfinite().flatten(1).all(1)}
        return dream, trace

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of one batch of dreams, in nats of the whole data set."""
        total: Tensor | float = 0.0
        for dream, trace in self._get_traces(model, guide, args, kwargs):
            finite = dream.nodes["_finite"]["value"]
            local = [node["log_prob"] for node in trace.nodes.values() if _was_drawn(node) and self._is_local(node)]
            total = total - sum(torch.where(finite, density, 0.0).sum() for density in local)
        return total / self.num_particles

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The loss without gradients."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The loss; adds its gradient to the guide's parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return float(loss.detach())

    def _proposed(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        with poutine.block():
            trace = poutine.trace(self.proposal).get_trace(*args, **kwargs)
        return {n: v["value"] for n, v in trace.nodes.items() if _is_latent(v) and self._is_local(v)}

    def _check_local(self, asleep: poutine.Trace) -> None:
        latent = [node for node in asleep.nodes.values() if _is_latent(node)]
        if not any(map(self._is_local, latent)):
            plates = sorted({frame.name for node in latent for frame in node["cond_indep_stack"]})
            raise LatentDEError(
                f"Sleep: the guide draws no site in a plate '{self.plate}', and so has nothing to learn from dreams; "
                f"its plates are {plates}. See lde.series_plate, or give plate=."
            )

    def _is_local(self, node: dict[str, Any]) -> bool:
        return any(frame.name == self.plate for frame in node["cond_indep_stack"])


def _is_latent(node: dict[str, Any]) -> bool:
    return kind_of(node) == "latent"


def _was_drawn(node: dict[str, Any]) -> bool:
    """A site of the guide: conditioning on the dream has marked it as observed."""
    return kind_of(node) in ("latent", "observed") and "log_prob" in node


def _observations(dream: poutine.Trace) -> Tensor:
    sites = [node for node in dream.nodes.values() if "lde_observe" in (node.get("infer") or {})]
    if len(sites) != 1:
        raise LatentDEError(f"Sleep: needs one lde.observe site in the model, found {len(sites)}")
    return sites[0]["value"]
