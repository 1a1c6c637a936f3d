# SPDX-License-Identifier: Apache-2.0
"""Latent ODEs on irregular series: waves with gaps, noisy spirals, a falling robot.

Two recipes of the waves compare guides: an ODE-RNN, and a GRU that reads the gaps between times. Generative model, data
and updates are the same, and so are the numbers of parameters, up to two parts in a hundred. The measure of that
comparison is ``l1_extrapolation``: mean absolute error of the predictive mean at the later 25 of the 50 times of a test
series, of which the guide reads the earlier 25, against values without noise, missing ones included.

The published errors of the hopper are mean squares of the scaled values, ``rmse_extrapolation`` squared.
"""

from __future__ import annotations

from collections.abc import Callable

from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_latentde.data.series import Series
from pyro_latentde.distributions.likelihoods import Gaussian
from pyro_latentde.infer import schedules
from pyro_latentde.models import LatentODE
from pyro_latentde.models.systems import hopper, periodic, spirals
from pyro_latentde.models.systems.simulation import Simulation
from pyro_latentde.nn import MLP, ODERNNEncoder, RecurrentEncoder
from pyro_latentde.train.recipe import Config, Recipe, Split
from pyro_latentde.train.ridge import ridge_forecast

__all__ = ["RECIPES"]

WAVE_TIMES, SPIRAL_TIMES, HOPPER_TIMES = 25, 50, 66  # observed, of 50, 100 and 200
RADIAN = 0.2  # s, in which a wave moves by about one radian: the unit of time of fields and encoders
ROUGH = {"rtol": 1e-3, "atol": 1e-3}  # states are of order one, and a network's field has larger errors


def _config(
    train: int, heldout: int, test: int, steps: int, rate: float, window: Callable[[int], int] | None = None
) -> Config:
    rates = schedules.warmup(50, schedules.cosine(rate, rate / 100, steps))
    return Config(train, heldout, test, steps, 50, window, rates)


def _wave_config(steps: int) -> Config:
    # Through whole series at once, a field that does not turn yet finds nothing better than the mean.
    return _config(800, 100, 100, steps, 1e-2, schedules.progressive(5, 2 * WAVE_TIMES, steps // 2))


def _hopper_config(train: int, heldout: int, test: int, steps: int) -> Config:
    return _config(train, heldout, test, steps, 5e-3, schedules.progressive(20, 200, 3 * steps // 5))


def _split(
    draw: Callable[[int, int], Simulation], observables: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Config, int], Split]:
    """Series of a simulator; with noise, `observables` are the values without it, of the states."""

    def make(config: Config, seed: int) -> Split:
        return Split.of(draw(config.num_series, 5000 + seed), config, observables)

    return make


class _ReadsFirst(PyroModule):
    """A guide that reads the first times of a series only: in training, too, it knows no more than in a forecast."""

    def __init__(self, guide: nn.Module, count: int) -> None:
        super().__init__()
        self.guide, self.count = guide, count

    def forward(self, series: Series) -> dict[str, Tensor]:
        """Draw the sites."""
        if series.times.shape[1] <= self.count:
            return self.guide(series)
        return self.guide(series.window(0, self.count))


def _forecasting(pair: LatentODE, observed: int) -> LatentODE:
    """The pair with a guide that reads what is observed, while the model is scored on what follows, too."""
    pair.guide = _ReadsFirst(pair.guide, observed)
    return pair


def _waves(n: int, seed: int) -> Simulation:
    return periodic.simulate(n, seed, keep=50, num_features=3, missing=0.3)


def _wave_pair(encoder: Callable[[], nn.Module]) -> Callable[[Split], nn.Module]:
    def make(split: Split) -> nn.Module:
        pair = LatentODE(
            values=3,
            latent=10,
            network=MLP(10, 10, hidden=(50,), activation="tanh"),
            time_scale=RADIAN,
            likelihood=Gaussian(sd="learned", start=0.3),
            guide={"encoder": encoder()},
            **ROUGH,
        )
        return _forecasting(pair, WAVE_TIMES)

    return make


def _spiral_pair(split: Split) -> nn.Module:
    pair = LatentODE(
        values=2,
        latent=6,
        decoder=MLP(6, 2, hidden=(20,)),
        likelihood=Gaussian(sd="learned", start=0.5),
        guide={"encoder": RecurrentEncoder(2, 25, cell="gru")},
        units=20,
    )
    return _forecasting(pair, SPIRAL_TIMES)


def _hopper_pair(split: Split) -> nn.Module:
    pair = LatentODE(
        values=14,
        latent=20,
        network=MLP(20, 20, hidden=(100,), activation="tanh"),
        time_scale=0.1,  # s, in which a falling robot changes its pose
        likelihood=Gaussian(sd="learned", start=0.3),
        guide={"encoder": RecurrentEncoder(14, 100, cell="gru", time_scale=0.02)},
        **ROUGH,
    )
    return _forecasting(pair, HOPPER_TIMES)


RECIPES = {
    "latent-ode-periodic": Recipe(
        "latent ODE with an ODE-RNN guide on irregular waves with missing features",
        _wave_config(2000),
        _wave_config(8000),
        _split(_waves, periodic.observables),
        _wave_pair(lambda: ODERNNEncoder(3, 30, method="midpoint", time_scale=RADIAN)),
        WAVE_TIMES,
    ),
    "latent-ode-periodic-rnn": Recipe(
        "latent ODE with a recurrent guide on irregular waves with missing features",
        _wave_config(2000),
        _wave_config(8000),
        _split(_waves, periodic.observables),
        _wave_pair(lambda: RecurrentEncoder(3, 80, cell="gru", time_scale=RADIAN)),
        WAVE_TIMES,
    ),
    "latent-ode-spirals": Recipe(
        "latent ODE on noisy spirals, clockwise and counter-clockwise",
        _config(800, 100, 100, 1500, 5e-3),
        _config(800, 100, 100, 6000, 5e-3),
        _split(spirals.simulate, lambda z: z),
        _spiral_pair,
        SPIRAL_TIMES,
    ),
    "latent-ode-hopper": Recipe(
        "latent ODE on a hopping robot, against ridge regression (needs mujoco)",
        _hopper_config(720, 80, 200, 4500),
        _hopper_config(7200, 800, 2000, 20_000),
        _split(hopper.simulate),
        _hopper_pair,
        HOPPER_TIMES,
        floors={"ridge": ridge_forecast},
    ),
}
