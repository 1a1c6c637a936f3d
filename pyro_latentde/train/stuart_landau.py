# SPDX-License-Identifier: Apache-2.0
"""A network of three noisy oscillators behind 784 observables: single and multiple shooting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from pyro_latentde.distributions.likelihoods import Gaussian
from pyro_latentde.guides.heads import FullRankHead
from pyro_latentde.infer import schedules
from pyro_latentde.models import GOKU
from pyro_latentde.models.shooting import Shooting
from pyro_latentde.models.systems import stuart_landau
from pyro_latentde.nn import LeastSquares, RecurrentEncoder, StatisticsPooling, linear_decoder
from pyro_latentde.train.recipe import Config, Recipe, Split

__all__ = ["RECIPES"]

OBSERVED = 46


def _config(test: int, steps: int, sleep: int) -> Config:
    rate = schedules.warmup(100, schedules.cosine(2e-3, 2e-5, steps))
    return Config(600, 60, test, steps, 64, schedules.progressive(6, OBSERVED, steps // 2), rate, sleep)


QUICK, FULL = _config(100, 1500, 1500), _config(200, 5000, 4000)


def _data(config: Config, seed: int) -> Split:
    split = Split.of(stuart_landau.simulate(config.num_series, 4000 + seed), config)
    return replace(split, train=split.train.window(0, OBSERVED), heldout=split.heldout.window(0, OBSERVED))


def _head(in_features: int, size: int) -> nn.Module:
    return FullRankHead(in_features, size, sd=0.3, normalize=True)


def _goku(shooting: Shooting | None) -> Callable[[Split], nn.Module]:
    def make(split: Split) -> nn.Module:
        priors = stuart_landau.priors()
        encoder = StatisticsPooling(RecurrentEncoder(len(stuart_landau.STATES), 48, cell="lstm", bidirectional=True))
        decoder = linear_decoder(split.train, len(stuart_landau.STATES), stuart_landau.START_SD)
        return GOKU(
            stuart_landau.vector_field,
            priors["z0"],
            priors["theta"],
            values=stuart_landau.OBSERVABLES,
            decoder=decoder,
            likelihood=Gaussian(sd="learned", start=0.3),
            states=stuart_landau.STATES,
            shooting=shooting,
            guide={"frames": LeastSquares(decoder, stuart_landau.START_SD), "encoders": encoder, "head": _head},
        )

    return make


RECIPES = {
    "goku-stuart-landau": Recipe(
        "GOKU-net on coupled noisy oscillators, one solve through each series",
        QUICK,
        FULL,
        _data,
        _goku(None),
        OBSERVED,
    ),
    "goku-stuart-landau-shooting": Recipe(
        "GOKU-net on coupled noisy oscillators, multiple shooting in segments of ten times",
        QUICK,
        FULL,
        _data,
        _goku(Shooting(10, 0.02)),
        OBSERVED,
    ),
}
