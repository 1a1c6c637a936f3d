# SPDX-License-Identifier: Apache-2.0
"""Pendulum videos: GOKU-nets with known, incomplete and unknown physics."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_latentde.distributions.likelihoods import Gaussian
from pyro_latentde.guides.heads import FullRankHead
from pyro_latentde.infer import schedules
from pyro_latentde.models import GOKU, LatentODE
from pyro_latentde.models.systems import pendulum_pixels as pendulum
from pyro_latentde.nn import MLP, RecurrentEncoder, ResidualMLP, Standardized, start_at
from pyro_latentde.train.recipe import Config, Recipe, Split, Truth

__all__ = ["RECIPES"]

PIXELS, OBSERVED = 784, 50
WIDTH = 100  # of the networks of frames
FRICTION = 0.7  # kg/s, unknown to the models
PIXEL_SD = 0.1  # at the start: how far a drawn pixel may be off; the frames have no noise of their own


def _config(train: int, steps: int, sleep: int, polish: int, dreams: int = 16_000) -> Config:
    # Windows grow: one frame teaches the decoder what a state looks like, long ones the physics.
    window = schedules.progressive(4, OBSERVED, steps // 2)
    rate = schedules.warmup(steps // 20, schedules.cosine(2e-3, 1e-4, steps))
    return Config(train, 45, 50, steps, 64, window, rate, sleep, polish, dreams)


QUICK, FULL = _config(450, 800, 2000, 0), _config(405, 2500, 3000, 1000, 32_000)
_LATENT_QUICK, _LATENT_FULL = _config(450, 800, 0, 0), _config(405, 4000, 0, 0)


def _data(friction: float) -> Callable[[Config, int], Split]:
    def make(config: Config, seed: int) -> Split:
        drawn = pendulum.simulate(config.train + config.heldout + config.test, seed=1000 + seed, friction=friction)
        a, b = config.train, config.train + config.heldout
        parts = (drawn.series[:a], drawn.series[a:b].window(0, OBSERVED), drawn.series[b:])
        return Split(*parts, Truth({"length": drawn.truth["length"][b:]}))

    return make


def _start() -> dist.Distribution:
    """A pendulum at any moment of its swing: its angle (rad) and rate (rad/s)."""
    return dist.Normal(torch.zeros(2), torch.tensor([0.27, 0.7])).to_event(1)


# Wider than what occurs: at the ends of a uniform prior posteriors are cut off, which no normal can be.
_PRIOR = {"length": dist.LogNormal(math.log(1.4), 0.3)}  # m


def _narrow(in_features: int, size: int) -> nn.Module:
    """A head that begins with little noise: to be seen through more of it, angles would grow beyond their prior."""
    return FullRankHead(in_features, size, sd=0.01)


def _goku(unknown: Callable[[], nn.Module] | None = None) -> Callable[[Split], nn.Module]:
    def make(split: Split) -> nn.Module:
        return GOKU(
            pendulum.vector_field,
            _start(),
            _PRIOR,
            values=split.train,
            states=pendulum.STATES,
            visible=pendulum.STATES[:1],
            width=WIDTH,
            likelihood=Gaussian(sd="learned", start=PIXEL_SD),
            unknown=None if unknown is None else unknown(),
            into=None if unknown is None else [1],
            guide={"hidden": 32, "head": _narrow},
        )

    return make


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


def _friction_net() -> nn.Module:
    return MLP(2, 1, hidden=(20, 20), activation="tanh")


def friction_force(z: Tensor) -> Tensor:
    """The missing part of the damped pendulum's equation for omega, (M, 1), rad/s^2."""
    return -FRICTION / pendulum.MASS * z[:, 1:2]


_LENGTH = {"length": pendulum.PARAMETERS["length"]}

RECIPES = {
    "goku-pendulum": Recipe(
        "GOKU-net on pendulum videos: the field is known, the length is not",
        QUICK,
        FULL,
        _data(0.0),
        _goku(),
        OBSERVED,
        "intensity",
        _LENGTH,
    ),
    "latent-ode-pendulum": Recipe(
        "latent ODE on pendulum videos: nothing is known",
        _LATENT_QUICK,
        _LATENT_FULL,
        _data(0.0),
        _latent_ode,
        OBSERVED,
        "intensity",
    ),
    "goku-damped-pendulum": Recipe(
        "GOKU-net with an unknown part on videos of damped pendulums",
        QUICK,
        FULL,
        _data(FRICTION),
        _goku(_friction_net),
        OBSERVED,
        "intensity",
        _LENGTH,
        friction_force,
    ),
    "goku-damped-pendulum-known": Recipe(
        "GOKU-net without the unknown part on videos of damped pendulums",
        QUICK,
        FULL,
        _data(FRICTION),
        _goku(),
        OBSERVED,
        "intensity",
        _LENGTH,
    ),
}
