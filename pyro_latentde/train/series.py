# SPDX-License-Identifier: Apache-2.0
"""Latent ODEs on irregular series: waves with gaps, noisy spirals, a falling robot."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from pyro_latentde.distributions.likelihoods import Gaussian
from pyro_latentde.infer import schedules
from pyro_latentde.models import LatentODE
from pyro_latentde.models.systems import hopper, periodic, spirals
from pyro_latentde.models.systems.simulation import Simulation
from pyro_latentde.nn import MLP, ODERNNEncoder, RecurrentEncoder
from pyro_latentde.train.recipe import Config, Recipe, Split, Truth

__all__ = ["RECIPES"]


def _config(train: int, heldout: int, test: int, steps: int, rate: float) -> Config:
    return Config(
        train, heldout, test, steps, 50, None, schedules.warmup(50, schedules.cosine(rate, rate / 100, steps))
    )


def _split(draw: Callable[[int, int], Simulation], observed: int | None = None) -> Callable[[Config, int], Split]:
    def make(config: Config, seed: int) -> Split:
        drawn = draw(config.train + config.heldout + config.test, 5000 + seed)
        a, b = config.train, config.train + config.heldout
        return Split(drawn.series[:a], drawn.series[a:b], drawn.series[b:], Truth())

    return make


def _waves(n: int, seed: int) -> Simulation:
    return periodic.simulate(n, seed, keep=50, num_features=3, missing=0.3)


def _wave_pair(encoder: Callable[[], nn.Module]) -> Callable[[Split], nn.Module]:
    def make(split: Split) -> nn.Module:
        return LatentODE(
            values=3,
            latent=8,
            decoder=MLP(8, 3, hidden=(50,)),
            likelihood=Gaussian(sd="learned", start=0.3),
            guide={"encoder": encoder()},
            units=50,
        )

    return make


def _spiral_pair(split: Split) -> nn.Module:
    return LatentODE(
        values=2,
        latent=6,
        decoder=MLP(6, 2, hidden=(20,)),
        likelihood=Gaussian(sd="learned", start=0.5),
        guide={"encoder": RecurrentEncoder(2, 25, cell="gru")},
        units=20,
    )


def _hopper_pair(split: Split) -> nn.Module:
    return LatentODE(
        values=14,
        latent=15,
        decoder=nn.Linear(15, 14),
        likelihood=Gaussian(sd="learned", start=0.3),
        guide={"encoder": ODERNNEncoder(14, 30, units=300, gru_units=100, time_scale=0.1)},
        units=300,
        time_scale=0.1,
    )


RECIPES = {
    "latent-ode-periodic": Recipe(
        "latent ODE with an ODE-RNN guide on irregular waves with missing features",
        _config(800, 100, 100, 1500, 5e-3),
        _config(800, 100, 100, 8000, 5e-3),
        _split(_waves),
        _wave_pair(lambda: ODERNNEncoder(3, 30)),
        25,
    ),
    "latent-ode-periodic-rnn": Recipe(
        "latent ODE with a recurrent guide on irregular waves with missing features",
        _config(800, 100, 100, 1500, 5e-3),
        _config(800, 100, 100, 8000, 5e-3),
        _split(_waves),
        _wave_pair(lambda: RecurrentEncoder(3, 30, cell="gru")),
        25,
    ),
    "latent-ode-spirals": Recipe(
        "latent ODE on noisy spirals, clockwise and counter-clockwise",
        _config(800, 100, 100, 1500, 5e-3),
        _config(800, 100, 100, 6000, 5e-3),
        _split(lambda n, seed: spirals.simulate(n, seed)),
        _spiral_pair,
        70,
    ),
    "latent-ode-hopper": Recipe(
        "latent ODE with an ODE-RNN guide on a hopping robot (needs mujoco)",
        _config(800, 100, 100, 1000, 5e-3),
        _config(7200, 800, 2000, 20_000, 5e-3),
        _split(lambda n, seed: hopper.simulate(n, seed)),
        _hopper_pair,
        66,
    ),
}
