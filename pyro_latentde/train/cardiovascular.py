# SPDX-License-Identifier: Apache-2.0
"""Blood pressure with hidden causes: a GOKU-net and a latent ODE on the cardiovascular system."""

from __future__ import annotations

from dataclasses import replace

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_latentde.distributions.likelihoods import Gaussian
from pyro_latentde.infer import schedules
from pyro_latentde.models import GOKU, LatentODE
from pyro_latentde.models.systems import cardiovascular
from pyro_latentde.nn import MLP, RecurrentEncoder, Standardized, StatisticsPooling
from pyro_latentde.train.recipe import Config, Recipe, Split

__all__ = ["RECIPES"]

OBSERVED, FORECAST = 100, 200  # s
TIME_SCALE = 20.0  # s, of the baroreflex


def _config(steps: int, sleep: int) -> Config:
    # Whole windows from the start: within a few time constants of the baroreflex any activity, and with it any
    # resistance, explains a series, and a guide that has taken ill for healthy does not find back.
    rate = schedules.warmup(steps // 20, schedules.cosine(3e-3, 3e-5, steps))
    return Config(810, 90, 100, steps, 64, OBSERVED, rate, sleep)


QUICK, FULL = _config(1500, 3000), _config(4000, 8000)
_LATENT_QUICK, _LATENT_FULL = _config(1500, 0), _config(4000, 0)


def _data(config: Config, seed: int) -> Split:
    drawn = cardiovascular.simulate(config.num_series, 3000 + seed)
    split, length = Split.of(drawn, config, cardiovascular.observables), OBSERVED + FORECAST
    truth = replace(split.truth, clean=split.truth.clean[:, :length])
    return replace(split, heldout=split.heldout.window(0, OBSERVED), test=split.test.window(0, length), truth=truth)


class _Pressures(nn.Module):
    """The decoder of the published experiment: both pressures are states, the heart rate a network of all states."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = MLP(len(cardiovascular.STATES), 1, hidden=(200,))

    def forward(self, z: Tensor) -> Tensor:
        """(..., 4) -> (..., 3)."""
        return torch.cat([z[..., :2], self.rate(z)], dim=-1)


def _start() -> dist.Distribution:
    """A patient at any moment: windows begin anywhere."""
    return dist.Normal(torch.tensor([0.77, 0.3, 0.24, 0.93]), torch.tensor([0.03, 0.3, 0.08, 0.045])).to_event(1)


def _goku(split: Split) -> nn.Module:
    recurrent = RecurrentEncoder(16, 32, cell="lstm", bidirectional=True, time_scale=TIME_SCALE)
    encoder = StatisticsPooling(recurrent)  # what is hidden acts at all times
    return GOKU(
        cardiovascular.vector_field,
        _start(),
        cardiovascular.priors()["theta"],
        values=3,
        decoder=_Pressures(),
        likelihood=Gaussian(sd="learned", start=0.1),
        states=cardiovascular.STATES,
        guide={"frames": _frames(split), "encoders": encoder},
    )


def _frames(split: Split) -> nn.Module:
    return Standardized.of(split.train, MLP(3, 16, hidden=(32,), output="relu"))


def _latent_ode(split: Split) -> nn.Module:
    return LatentODE(
        values=3,
        latent=8,
        decoder=MLP(8, 3, hidden=(200,)),
        likelihood=Gaussian(sd="learned", start=0.1),
        guide={"frames": _frames(split), "hidden": 32, "time_scale": TIME_SCALE},
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
