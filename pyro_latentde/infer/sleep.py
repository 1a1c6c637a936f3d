# SPDX-License-Identifier: Apache-2.0
"""The sleep loss: a guide learns from series that the model dreams, and so learns how wrong it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from pyro_latentde.infer.dreams import Dreams, dream, is_local, is_teachable

__all__ = ["Sleep"]


class Sleep(ELBO):
    r"""Loss of the guide alone, over latent values and series drawn from the model,

    .. math:: -E_{p(x)\,p(y \mid x)} \log q_\phi(x \mid y) = E_{p(y)}\,\mathrm{KL}(p(x \mid y) \,\|\, q_\phi(x \mid y))
              + \mathrm{const.}

    The ELBO measures a posterior from its own side: it makes a guide narrower than its own errors, above all when
    frames say much about few parameters. This loss is least where intervals cover as often as they claim, an encoder's
    errors included. It leaves the model as it is, which the ELBO must have trained before. What all series share keeps
    the posterior it has, and is drawn from it. :func:`.npe` is the usual way to use it.

    Model and guide take the :class:`.Series` as their first argument; its times and gaps are those of the dreams. A
    dream whose solve failed is left out. With multiple shooting, the starts of the segments are drawn one after the
    other from their prior, jumps included, and taught like all other latent values.

    Args:
        plate: name of the plate of series.
        dreams: dreams made before, of which each step reads some; by default each step makes its own.
        batch_size: how many of them.

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

    def __init__(self, plate: str = "series", dreams: Dreams | None = None, batch_size: int = 128) -> None:
        super().__init__()
        self.plate, self.dreams, self.batch_size = plate, dreams, batch_size

    def _get_trace(
        self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[poutine.Trace, poutine.Trace]:
        """The dreams, and the guide at their latent values."""
        if self.dreams is None:
            dreams, finite = dream(model, guide, self.plate, args, kwargs)
        else:
            dreams = self.dreams[torch.randint(len(self.dreams), (self.batch_size,))]
            finite = torch.ones(len(dreams), dtype=torch.bool, device=dreams.series.times.device)
        reading = contextlib.nullcontext() if dreams.reading is None else dreams.reading()
        with reading:
            told = poutine.condition(guide, data=dreams.latents)
            trace = poutine.trace(told).get_trace(dreams.series, *args[1:], **kwargs)
        trace.compute_log_prob()
        shown = poutine.Trace()
        shown.add_node("_finite", name="_finite", type="args", value=finite)
        return shown, trace

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of one batch of dreams, in nats of the whole data set."""
        total: Tensor | float = 0.0
        for shown, trace in self._get_traces(model, guide, args, kwargs):
            finite = shown.nodes["_finite"]["value"]
            nodes = [node for node in trace.nodes.values() if is_teachable(node) and is_local(node, self.plate)]
            total = total - sum(torch.where(finite, node["log_prob"], 0.0).sum() for node in nodes)
        if self.dreams is not None:
            series = args[0]
            total = total * (series.population or len(series)) / self.batch_size
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
