# SPDX-License-Identifier: Apache-2.0
"""Blood pressure with hidden causes: a GOKU-net and a latent ODE on the cardiovascular system."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_latentde.distributions.likelihoods import Gaussian
from pyro_latentde.infer import schedules
from pyro_latentde.models import GOKU, LatentODE
from pyro_latentde.models.systems import cardiovascular
from pyro_latentde.nn import MLP, Standardized
from pyro_latentde.train.recipe import Config, Recipe, Split, Truth

__all__ = ["RECIPES"]

OBSERVED, FORECAST = 100, 200  # s
TIME_SCALE = 20.0  # s, of the baroreflex


def _config(steps: int, sleep: int) -> Config:
    rate = schedules.warmup(100, schedules.cosine(3e-3, 3e-5, steps))
    return Config(810, 90, 100, steps, 64, schedules.progressive(20, OBSERVED, steps // 2), rate, sleep)


QUICK, FULL = _config(2000, 2000), _config(6000, 6000)
_LATENT_QUICK, _LATENT_FULL = _config(2000, 0), _config(6000, 0)


def _data(config: Config, seed: int) -> Split:
    drawn = cardiovascular.simulate(config.train + config.heldout + config.test, seed=3000 + seed)
    a, b = config.train, config.train + config.heldout
    length = OBSERVED + FORECAST
    clean = cardiovascular.observables(drawn.z[b:, :length]).to(drawn.series.values)
    truth = Truth({name: value[b:] for name, value in drawn.truth.items()}, clean)
    test = drawn.series[b:].window(0, length)
    return Split(drawn.series[:a], drawn.series[a:b].window(0, OBSERVED), test, truth)


class _Pressures(nn.Module):
    """The decoder of the published experiment: both pressures are states, the heart rate a network of all states."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = MLP(len(cardiovascular.STATES), 1, hidden=(200,))

    def forward(self, z: Tensor) -> Tensor:
        """(..., 4) -> (..., 3)."""
        return torch.cat([z[..., :2], self.rate(z)], dim=-1)


def _goku(split: Split) -> nn.Module:
    priors = cardiovascular.priors()
    return GOKU(
        cardiovascular.vector_field,
        priors["z0"],
        priors["theta"],
        values=3,
        decoder=_Pressures(),
        likelihood=Gaussian(sd="learned", start=0.1),
        states=cardiovascular.STATES,
        guide={"frames": _frames(split), "hidden": 64, "time_scale": TIME_SCALE},
    )


def _frames(split: Split) -> nn.Module:
    return Standardized.of(split.train, MLP(3, 64, hidden=(64,), output="relu"))


def _latent_ode(split: Split) -> nn.Module:
    return LatentODE(
        values=3,
        latent=8,
        decoder=MLP(8, 3, hidden=(200,)),
        likelihood=Gaussian(sd="learned", start=0.1),
        guide={"frames": _frames(split), "hidden": 64, "time_scale": TIME_SCALE},
        units=64,
        time_scale=TIME_SCALE,
    )


RECIPES = {
    "goku-cvs": Recipe(
        "GOKU-net on blood pressure and heart rate: both hidden causes are to be found",
        QUICK,
        FULL,
        _data,
        _goku,
        OBSERVED,
        "scaled",
        dict(cardiovascular.PARAMETERS),
    ),
    "latent-ode-cvs": Recipe(
        "latent ODE on blood pressure and heart rate",
        _LATENT_QUICK,
        _LATENT_FULL,
        _data,
        _latent_ode,
        OBSERVED,
        "scaled",
    ),
}
