# SPDX-License-Identifier: Apache-2.0
"""Pendulum videos: GOKU-nets with known, incomplete and unknown physics."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_latentde.models import GOKU
from pyro_latentde.models.systems import pendulum_pixels as pendulum
from pyro_latentde.nn import MLP
from pyro_latentde.train.recipe import Config, Recipe, Split
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

FRICTION = 0.7  # kg/s, unknown to the models

QUICK, FULL = video_config(450, 800, 2000), video_config(405, 2500, 3000, 1000, 32_000)
_LATENT_QUICK, _LATENT_FULL = video_config(450, 800), video_config(405, 4000)


def _data(friction: float) -> Callable[[Config, int], Split]:
    return video_split(lambda n, seed: pendulum.simulate(n, seed, friction=friction), 1000)


def _start() -> dist.Distribution:
    """A pendulum at any moment of its swing: its angle (rad) and rate (rad/s)."""
    return dist.Normal(torch.zeros(2), torch.tensor([0.27, 0.7])).to_event(1)


# Wider than what occurs: at the ends of a uniform prior posteriors are cut off, which no normal can be.
_PRIOR = {"length": dist.LogNormal(math.log(1.4), 0.3)}  # m


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
            likelihood=pixels(),
            unknown=None if unknown is None else unknown(),
            into=None if unknown is None else [1],
            guide={"hidden": 32, "head": narrow_head},
        )

    return make


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
        latent_ode_of_videos,
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
