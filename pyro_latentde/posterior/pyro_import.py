# SPDX-License-Identifier: Apache-2.0
"""Posteriors from Pyro's own results: an MCMC run or a guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_latentde.errors import LatentDEError
from pyro_latentde.posterior.model_sites import ModelSites, inspect_model, kind_of
from pyro_latentde.posterior.posterior import Posterior
from pyro_latentde.posterior.runner import run_draws

__all__ = ["draw_latents", "from_guide", "from_mcmc"]


def from_mcmc(mcmc: Any, model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Posterior:
    """Posterior from a ``pyro.infer.MCMC`` that has run.

    Args:
        mcmc: the finished run.
        model: the model it was made with.
        args: the model's arguments.
        kwargs: the model's keyword arguments.

    Returns:
        The posterior; ``diverging`` is filled where the kernel reports divergences, and the mean
        acceptance rate of each chain stands in ``attrs``.
    """
    samples = mcmc.get_samples(group_by_chain=True)
    if not samples:
        raise LatentDEError("the MCMC object holds no draws. Call mcmc.run(...) first.")
    lead = next(iter(samples.values())).shape[:2]
    reports = mcmc.diagnostics()
    stats: dict[str, Tensor] = {}
    attrs: dict[str, Any] = {"inference": "mcmc"}
    if "divergences" in reports:
        diverging = torch.zeros(lead, dtype=torch.bool)
        for chain, draws in enumerate(reports["divergences"].values()):
            diverging[chain, torch.as_tensor(draws, dtype=torch.long)] = True
        stats["diverging"] = diverging
    if "acceptance rate" in reports:
        attrs["acceptance_rate_by_chain"] = [float(rate) for rate in reports["acceptance rate"].values()]
    sites = inspect_model(model, *args, **kwargs)
    kept = {name: samples[name].detach() for name in sites.latent if name in samples}
    return Posterior(samples=kept, stats=stats, sites=sites, model=model, args=args, kwargs=kwargs, attrs=attrs)


def from_guide(
    guide: Callable,
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    num_samples: int = 1000,
    seed: int = 0,
    memory: str | int = "1GB",
) -> Posterior:
    """Posterior of one chain of independent draws from a guide.

    Args:
        guide: AutoGuide, PyroModule or function, called with the model's arguments.
        model: the model it approximates.
        args: their arguments.
        kwargs: their keyword arguments.
        num_samples: number of draws.
        seed: seed of the draws.
        memory: memory budget, see :func:`.runner.run_draws`.

    Returns:
        The posterior, with ``attrs["inference"] = "svi"``.

    Raises:
        LatentDEError: the guide draws none of the model's latent sites.
    """
    sites = inspect_model(model, *args, **kwargs)
    draws = draw_latents(guide, sites, args, kwargs, num_samples=num_samples, seed=seed, memory=memory)
    if not draws:
        raise LatentDEError(
            f"the guide draws none of the model's latent sites {list(sites.latent)}. "
            "Were the model and the guide given the right way round?"
        )
    return Posterior(
        samples={name: value[None] for name, value in draws.items()},
        sites=sites,
        model=model,
        args=args,
        kwargs=kwargs,
        attrs={"inference": "svi", "seed": seed},
    )


def draw_latents(
    fn: Callable,
    sites: ModelSites,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    num_samples: int,
    seed: int,
    memory: str | int = "1GB",
) -> dict[str, Tensor]:
    """Independent draws of latent sites from a guide or a model: site -> ``(num_samples, *site shape)``."""

    def one(_: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with pyro.validation_enabled(False):
            try:
                trace = poutine.trace(poutine.uncondition(fn)).get_trace(*args, **kwargs)
            except NotImplementedError:  # a law that scores its data and cannot draw others, as that of given events
                trace = poutine.trace(fn).get_trace(*args, **kwargs)
        return {
            name: node["value"]
            for name, node in trace.nodes.items()
            if name in sites and sites[name].kind == "latent" and kind_of(node) is not None
        }

    draws = run_draws(one, {"": torch.zeros(num_samples)}, memory=memory, seed=seed)
    # Guides may leave out dimensions of size one on the left; the sites have them.
    return {name: draws[name].reshape(num_samples, *sites[name].shape) for name in sites.latent if name in draws}
