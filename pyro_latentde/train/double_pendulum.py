# SPDX-License-Identifier: Apache-2.0
"""Double-pendulum videos: a GOKU-net and a latent ODE."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import nn

from pyro_latentde.distributions.likelihoods import Gaussian
from pyro_latentde.guides.heads import FullRankHead
from pyro_latentde.infer import schedules
from pyro_latentde.models import GOKU, LatentODE
from pyro_latentde.models.systems import double_pendulum_pixels as pendulum
from pyro_latentde.nn import RecurrentEncoder, ResidualMLP, Standardized, start_at
from pyro_latentde.train.recipe import Config, Recipe, Split, Truth

__all__ = ["RECIPES"]

PIXELS, OBSERVED = 1024, 50
WIDTH = 100  # of the networks of frames
PIXEL_SD = 0.1


def _config(train: int, steps: int) -> Config:
    # No sleep stage: most starts from the prior swing more wildly than those of the videos, and a guide that has to
    # read all of them loses those that matter. Intervals are as narrow as the ELBO makes them.
    window = schedules.progressive(4, OBSERVED, steps // 2)
    rate = schedules.warmup(steps // 20, schedules.cosine(2e-3, 1e-4, steps))
    return Config(train, 45, 50, steps, 64, window, rate)


QUICK, FULL = _config(450, 1200), _config(405, 4500)


def _data(config: Config, seed: int) -> Split:
    drawn = pendulum.simulate(config.train + config.heldout + config.test, seed=2000 + seed)
    a, b = config.train, config.train + config.heldout
    parts = (drawn.series[:a], drawn.series[a:b].window(0, OBSERVED), drawn.series[b:])
    return Split(*parts, Truth({"mass2": drawn.truth["mass2"][b:]}))


def _goku(split: Split) -> nn.Module:
    # angles (rad) and rates (rad/s) at any moment of the swing
    start = dist.Normal(torch.zeros(4), torch.tensor([0.3, 0.5, 0.6, 1.1])).to_event(1)
    return GOKU(
        pendulum.vector_field,
        start,
        # kg; wider than what occurs, for posteriors that no end cuts off
        {"mass2": dist.LogNormal(math.log(1.4), 0.3)},
        values=split.train,
        states=pendulum.STATES,
        visible=pendulum.STATES[:2],
        width=WIDTH,
        likelihood=Gaussian(sd="learned", start=PIXEL_SD),
        guide={"hidden": 32, "head": lambda features, size: FullRankHead(features, size, sd=0.01)},
    )


def _latent_ode(split: Split) -> nn.Module:
    latent = 16
    frames = Standardized.of(split.train, ResidualMLP(PIXELS, 32, WIDTH, output="relu"))
    decoder = start_at(ResidualMLP(latent, PIXELS, WIDTH, output="sigmoid"), frames.mean)
    return LatentODE(
        values=PIXELS,
        latent=latent,
        decoder=decoder,
        likelihood=Gaussian(sd="learned", start=PIXEL_SD),
        guide={"frames": frames, "encoder": RecurrentEncoder(32, 64, cell="lstm", layers=2)},
        units=100,
    )


RECIPES = {
    "goku-double-pendulum": Recipe(
        "GOKU-net on double-pendulum videos: the field is known, the outer mass is not",
        QUICK,
        FULL,
        _data,
        _goku,
        OBSERVED,
        "intensity",
        {"mass2": pendulum.PARAMETERS["mass2"]},
    ),
    "latent-ode-double-pendulum": Recipe(
        "latent ODE on double-pendulum videos: nothing is known",
        QUICK,
        FULL,
        _data,
        _latent_ode,
        OBSERVED,
        "intensity",
    ),
}
