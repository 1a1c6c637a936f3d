# SPDX-License-Identifier: Apache-2.0
"""Refinement: an amortized guide goes on learning from the very series that are to be analysed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from pyro_latentde.data.series import Series
from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer.fit import Fit
from pyro_latentde.infer.schedules import cosine, warmup
from pyro_latentde.infer.svi import fit_svi

__all__ = ["refine"]


def refine(
    fit: Fit,
    series: Series,
    *,
    num_steps: int = 500,
    batch_size: int = 64,
    learning_rate: float | Callable[[int], float] | None = None,
    seed: int = 0,
    **options: Any,
) -> Fit:
    r"""Close the amortization gap for the series at hand: improve the guide on them, and leave the model as it is,

    .. math:: \max_\phi \sum_n E_{q_\phi(x \mid y_n)} [\log p(y_n, x) - \log q_\phi(x \mid y_n)].

    One network for all series is a compromise between them, and reads new ones worse than those it was trained on.
    Where forecasts matter more than seconds, let it go on learning from what is observed of the series to be forecast.
    That is inference and no training: the model does not see them, nor the guide what comes after them. Intervals
    remain those of the ELBO, as narrow or wide as before.

    Args:
        fit: a fit of modules that take a :class:`.Series` first; neither they nor the fit are changed.
        series: N series, what is observed of them.
        num_steps: number of updates.
        batch_size: series in an update; all N where there are fewer.
        learning_rate: number or schedule; by default a warm-up to 1e-3 and a cosine to 1e-5.
        seed: seed of the updates.
        options: further keywords of :func:`.fit_svi`: ``progress=``, ``checkpoint=``, ``num_particles=``, ...

    Returns:
        A fit of copies of model and guide, to be used for these series; ``losses`` are those of the refinement. What
        all series share (a missing force, a population) keeps the posterior of the training.

    Raises:
        LatentDEError: model or guide is no module.

    References:
        Kim, Wiseman, Miller, Sontag and Rush, "Semi-amortized variational autoencoders", ICML 2018. Cremer, Li and
        Duvenaud, "Inference suboptimality in variational autoencoders", ICML 2018.

    Example:
        >>> import torch, pyro_latentde as lde
        >>> from pyro_latentde.models import LatentODE
        >>> pair = LatentODE(values=2, latent=4, units=10)
        >>> series = lde.Series.from_tensors(torch.linspace(0, 1, 5), torch.randn(8, 5, 2))
        >>> fit = lde.infer.fit_svi(pair.model, pair.guide, series[:6], num_steps=2, progress=False)
        >>> refined = lde.infer.refine(fit, series[6:], num_steps=3, progress=False)
        >>> refined.forecast(series[6:], horizon=2).means.shape
        torch.Size([20, 2, 2, 2])
    """
    for what, module in (("model", fit.model), ("guide", fit.guide)):
        if not isinstance(module, nn.Module):
            raise LatentDEError(
                f"refine: the {what} is {type(module).__name__}, expected a module, whose copy can be changed alone"
            )
    # together, since a guide may read its states off the model's decoder
    model, guide = copy.deepcopy((fit.model, fit.guide))
    for fixed in (model, getattr(guide, "shared", None)):
        if fixed is not None:
            _freeze(fixed)
    if learning_rate is None:
        learning_rate = warmup(max(1, num_steps // 10), cosine(1e-3, 1e-5, num_steps))
    refined = fit_svi(
        model,
        guide,
        series,
        *fit.args[1:],
        num_steps=num_steps,
        batch_size=min(batch_size, len(series)),
        learning_rate=learning_rate,
        seed=seed,
        **options,
        **fit.kwargs,
    )
    return replace(refined, attrs={**refined.attrs, "refined": num_steps})


def _freeze(module: nn.Module) -> None:
    """Constants in place of parameters: of a parameter Pyro's store wants a gradient, whatever its own flag says."""
    module.eval()
    for part in module.modules():
        for name, param in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, param.detach())
