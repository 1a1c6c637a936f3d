# SPDX-License-Identifier: Apache-2.0
"""What the recipes of all videos share: data, schedules, the latent ODE that knows no physics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from pyro_latentde.distributions.likelihoods import Gaussian
from pyro_latentde.guides.heads import FullRankHead
from pyro_latentde.infer import schedules
from pyro_latentde.models import LatentODE
from pyro_latentde.models.systems.simulation import Simulation
from pyro_latentde.nn import RecurrentEncoder, ResidualMLP, Standardized, start_at
from pyro_latentde.train.recipe import Config, Split

__all__ = ["OBSERVED", "latent_ode_of_videos", "narrow_head", "pixels", "video_config", "video_split"]

OBSERVED = 50  # frames, of 100
WIDTH = 100  # of the networks of frames
PIXEL_SD = 0.1  # at the start: how far a drawn pixel may be off; the frames have no noise of their own
LATENT = 16  # of a latent ODE


def video_config(train: int, steps: int, sleep: int = 0, polish: int = 0, dreams: int = 16_000) -> Config:
    """Batches of 64 series. Windows grow: one frame teaches the decoder what a state looks like, long ones physics."""
    window = schedules.progressive(4, OBSERVED, steps // 2)
    rate = schedules.warmup(steps // 20, schedules.cosine(2e-3, 1e-4, steps))
    return Config(train, 45, 50, steps, 64, window, rate, sleep, polish, dreams)


def video_split(draw: Callable[[int, int], Simulation], seed: int) -> Callable[[Config, int], Split]:
    """Videos of a simulator (n, seed) -> Simulation: held-out ones as long as what is observed, test ones whole."""

    def make(config: Config, run: int) -> Split:
        split = Split.of(draw(config.num_series, seed + run), config)
        return replace(split, heldout=split.heldout.window(0, OBSERVED))

    return make


def pixels() -> Gaussian:
    """Pixels that err by a learned sd."""
    return Gaussian(sd="learned", start=PIXEL_SD)


def narrow_head(in_features: int, size: int) -> nn.Module:
    """A head that begins with little noise: to be seen through more of it, angles would grow beyond their prior."""
    return FullRankHead(in_features, size, sd=0.01)


def latent_ode_of_videos(split: Split) -> nn.Module:
    """A latent ODE with about as many weights as the GOKU-nets of the same videos."""
    size = split.train.values.shape[-1]
    frames = Standardized.of(split.train, ResidualMLP(size, 32, WIDTH, output="relu"))
    decoder = start_at(ResidualMLP(LATENT, size, WIDTH, output="sigmoid"), frames.mean)
    return LatentODE(
        values=size,
        latent=LATENT,
        decoder=decoder,
        likelihood=pixels(),
        guide={"frames": frames, "encoder": RecurrentEncoder(32, 64, cell="lstm", layers=2)},
        units=100,
    )
