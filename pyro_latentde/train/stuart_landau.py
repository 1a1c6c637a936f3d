# SPDX-License-Identifier: Apache-2.0
"""A network of three noisy oscillators behind 784 observables: single and multiple shooting."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from pyro_latentde.data.series import Series
from pyro_latentde.distributions.likelihoods import Gaussian
from pyro_latentde.infer import schedules
from pyro_latentde.models import GOKU
from pyro_latentde.models.shooting import Shooting
from pyro_latentde.models.systems import stuart_landau
from pyro_latentde.nn import LeastSquares, PrincipalDecoder, RecurrentEncoder, StatisticsPooling
from pyro_latentde.train.recipe import Config, Recipe, Split

__all__ = ["RECIPES"]

OBSERVED = 46


def _config(test: int, steps: int) -> Config:
    # No sleep stage: what the model draws moves without noise, and a guide that learns from it misreads what has some.
    rate = schedules.warmup(100, schedules.cosine(2e-3, 2e-5, steps))
    return Config(600, 60, test, steps, 64, OBSERVED, rate, refine=1000)


QUICK, FULL = _config(100, 4000), _config(200, 12_000)


def _data(config: Config, seed: int) -> Split:
    split = Split.of(stuart_landau.simulate(config.num_series, 4000 + seed), config)
    return replace(split, heldout=split.heldout.window(0, OBSERVED))


def _turning(decoder: PrincipalDecoder, series: Series) -> PrincipalDecoder:
    """Begin at planes in which the values turn as the oscillators do, x towards y.

    No decoder can be turned into its mirror image but through one that loses a state: begun with the wrong one,
    training ended there. The planes are those of the skew-symmetric part of the linear map from states to their
    differences (jPCA: Churchland, M. et al. (2012). Neural population dynamics during reaching. Nature 487).
    """
    z = LeastSquares(decoder)(series.values).detach().double()
    now, change = z[:, :-1].flatten(0, 1), z.diff(dim=1).flatten(0, 1)
    slope = torch.linalg.lstsq(now, change).solution.T  # change = slope now
    turn, planes = torch.linalg.eigh(-0.5j * (slope - slope.T))
    planes = planes[:, turn > 0] * math.sqrt(2.0)
    decoder.start(torch.cat([planes.imag, planes.real], dim=1))
    return decoder


def _goku(shooting: Shooting | None) -> Callable[[Split], nn.Module]:
    def make(split: Split) -> nn.Module:
        priors = stuart_landau.priors()
        encoder = StatisticsPooling(RecurrentEncoder(len(stuart_landau.STATES), 48, cell="lstm", bidirectional=True))
        decoder = _turning(
            PrincipalDecoder.of(split.train, len(stuart_landau.STATES), stuart_landau.START_SD), split.train
        )
        return GOKU(
            stuart_landau.vector_field,
            priors["z0"],
            priors["theta"],
            values=stuart_landau.OBSERVABLES,
            decoder=decoder,
            likelihood=Gaussian(sd="learned", start=0.3),
            states=stuart_landau.STATES,
            shooting=shooting,
            guide={"frames": LeastSquares(decoder, stuart_landau.START_SD), "encoders": encoder},
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
