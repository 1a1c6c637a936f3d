# SPDX-License-Identifier: Apache-2.0
"""Draws from the prior of a model, in the same form as a posterior."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pyro_latentde.errors import LatentDEError
from pyro_latentde.posterior import Posterior, inspect_model
from pyro_latentde.posterior.pyro_import import draw_latents

__all__ = ["prior"]


def prior(
    model: Callable,
    *args: Any,
    num_samples: int = 1000,
    seed: int = 0,
    memory: str | int = "1GB",
    **kwargs: Any,
) -> Posterior:
    r"""Draw from the prior :math:`\theta \sim p(\theta)`; the data are not looked at.

    Args:
        model: Pyro model.
        *args: its arguments; the data may be given, they only set the shapes.
        num_samples: number of draws.
        seed: seed of the draws.
        memory: budget of one batch of model runs, such as ``"1GB"``.
        **kwargs: keyword arguments of the model.

    Returns:
        Independent draws as a :class:`.Posterior` of one chain; its :meth:`.Posterior.predict` gives prior
        trajectories and prior predictive observations.

    Raises:
        LatentDEError: the model has no latent site.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     k = pyro.sample("k", dist.LogNormal(0.0, 0.5))
        >>> round(prior(model, num_samples=2000)["k"].median().item(), 1)
        1.0
    """
    start = time.perf_counter()
    sites = inspect_model(model, *args, **kwargs)
    if not sites.latent:
        raise LatentDEError(f"the model has no latent site; its sites are {list(sites)}. Is every site observed?")
    draws = draw_latents(model, sites, args, kwargs, num_samples=num_samples, seed=seed, memory=memory)
    return Posterior(
        samples={name: value[None] for name, value in draws.items()},
        sites=sites,
        model=model,
        args=args,
        kwargs=kwargs,
        attrs={"inference": "prior", "seed": seed, "sampling_time": time.perf_counter() - start},
    )
