# SPDX-License-Identifier: Apache-2.0
"""Double-pendulum videos: a GOKU-net and a latent ODE."""

from __future__ import annotations

from dataclasses import replace

import pyro.distributions as dist
import torch
from torch import nn

from pyro_latentde.models import GOKU
from pyro_latentde.models.systems import double_pendulum_pixels as pendulum
from pyro_latentde.nn import RecurrentEncoder, StatisticsPooling
from pyro_latentde.train.recipe import Recipe, Split
from pyro_latentde.train.videos import (
    OBSERVED,
    WIDTH,
    latent_ode_of_videos,
    narrow_head,
    pixels,
    video_config,
    video_split,
)

__all__ = ["RECIPES"]

# kg. Wider than what occurs, for posteriors that no end cuts off; and bounded: with a few hundred grams the fast mode
# of the model is as slow as the slow one of the videos, and of three runs with a log-normal prior two ended there.
MASS = (0.6, 3.0)

# No sleep stage: most starts from the prior swing more wildly than those of the videos, and a guide that has to read
# all of them loses those that matter. Intervals are as narrow as the ELBO makes them.
# Whole windows from the first step on: with short ones decoders learned mixtures of the two angles, of which the field
# then made a pendulum of a tenth of the mass, one link mirrored, and no gradient led back from there.
QUICK, FULL = (replace(video_config(*numbers), window=OBSERVED) for numbers in ((450, 1200), (405, 4500)))


def _goku(split: Split) -> nn.Module:
    encoder = StatisticsPooling(RecurrentEncoder(32, 32, cell="lstm", bidirectional=True))
    # angles (rad) and rates (rad/s) at any moment of the swing
    start = dist.Normal(torch.zeros(4), torch.tensor([0.3, 0.5, 0.6, 1.1])).to_event(1)
    return GOKU(
        pendulum.vector_field,
        start,
        {"mass2": dist.Uniform(*MASS)},
        values=split.train,
        states=pendulum.STATES,
        visible=pendulum.STATES[:2],
        learn_unit=True,
        width=WIDTH,
        likelihood=pixels(),
        guide={"encoders": encoder, "head": narrow_head},
    )


RECIPES = {
    "goku-double-pendulum": Recipe(
        "GOKU-net on double-pendulum videos: the field is known, the outer mass is not",
        QUICK,
        FULL,
        video_split(pendulum.simulate, 2000),
        _goku,
        OBSERVED,
        "intensity",
        {"mass2": pendulum.PARAMETERS["mass2"]},
    ),
    "latent-ode-double-pendulum": Recipe(
        "latent ODE on double-pendulum videos: nothing is known",
        QUICK,
        FULL,
        video_split(pendulum.simulate, 2000),
        latent_ode_of_videos,
        OBSERVED,
        "intensity",
    ),
}
