# SPDX-License-Identifier: Apache-2.0
"""The free part of an amortized guide: posteriors of what all series share."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal, init_to_median, init_to_sample
from torch import Tensor

from pyro_latentde.models.series_model import SeriesModel
from pyro_latentde.models.unknown import draw_weights

__all__ = ["shared_guide"]


def shared_guide(model: SeriesModel) -> AutoGuideList | None:
    """A full-rank normal for the shared parameters and a mean-field one for sampled weights; None without either.

    Both are normals of unconstrained numbers. Weights begin at a draw of their prior: equal ones would stay equal.
    """
    with torch.no_grad(), poutine.block():
        weights = draw_weights(model)
    if not model.shared and not weights:
        return None
    guide = AutoGuideList(_only(model, [*model.shared, *weights]))
    if model.shared:
        guide.append(AutoMultivariateNormal(_only(model, list(model.shared)), init_loc_fn=init_to_median))
    if weights:
        guide.append(AutoNormal(_only(model, weights), init_loc_fn=_start, init_scale=0.05))
    return guide


def _only(model: SeriesModel, names: list[str]) -> Any:
    return poutine.block(model, expose=names)


def _start(site: dict[str, Any]) -> Tensor:
    value = init_to_sample(site)
    # a wide prior of a scale begins small: an unknown part that starts large hides the known one
    positive = site["fn"].support is torch.distributions.constraints.positive
    return value.clamp(max=0.1) if positive else value
