# SPDX-License-Identifier: Apache-2.0
"""Double-pendulum videos: a GOKU-net and a latent ODE."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import nn

from pyro_latentde.distributions.likelihoods import Gaussian
from pyro_latentde.infer import schedules
from pyro_latentde.models import GOKU, LatentODE
from pyro_latentde.models.systems import double_pendulum_pixels as pendulum
from pyro_latentde.nn import RecurrentEncoder, ResidualMLP
from pyro_latentde.train.recipe import Config, Recipe, Split, Truth

__all__ = ["RECIPES"]

PIXELS, OBSERVED = 1024, 50
PIXEL_SD = 0.1


def _config(train: int, heldout: int, test: int, steps: int) -> Config:
    window = schedules.progressive(4, OBSERVED, steps // 2)
    rate = schedules.warmup(100, schedules.cosine(1e-3, 1e-5, steps))
    return Config(train, heldout, test, steps, 64, window, rate)


QUICK, FULL = _config(450, 45, 50, 2500), _config(405, 45, 50, 12_000)


def _data(config: Config, seed: int) -> Split:
    drawn = pendulum.simulate(config.train + config.heldout + config.test, seed=2000 + seed)
    a, b = config.train, config.train + config.heldout
    parts = (drawn.series[:a], drawn.series[a:b].window(0, OBSERVED), drawn.series[b:])
    return Split(*parts, Truth({"mass2": drawn.truth["mass2"][b:]}))


def _goku(split: Split) -> nn.Module:
    start = dist.Normal(torch.zeros(4), torch.tensor([0.5, 0.5, 1.5, 1.5])).to_event(1)
    return GOKU(
        pendulum.vector_field,
        start,
        pendulum.priors()["theta"],
        values=PIXELS,
        likelihood=Gaussian(sd=PIXEL_SD),
        states=pendulum.STATES,
    )


def _latent_ode(split: Split) -> nn.Module:
    latent = 16
    return LatentODE(
        values=PIXELS,
        latent=latent,
        decoder=ResidualMLP(latent, PIXELS, output="sigmoid"),
        likelihood=Gaussian(sd=PIXEL_SD),
        guide={
            "frames": ResidualMLP(PIXELS, 32, output="relu"),
            "encoder": RecurrentEncoder(32, 32, cell="gru", layers=2),
        },
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
