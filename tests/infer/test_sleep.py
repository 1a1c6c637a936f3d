# SPDX-License-Identifier: Apache-2.0
"""The sleep loss against a conjugate model, whose posterior and its entropy are known."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

import pyro_latentde as lde
from pyro_latentde.distributions.likelihoods import Gaussian
from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer import Sleep, fit_svi
from pyro_latentde.models.latents import Latent
from pyro_latentde.models.series_model import SeriesModel
from pyro_latentde.models.shooting import Shooting

T, NOISE = 4, 0.5
EXACT_SD = 1 / math.sqrt(1 + T / NOISE**2)  # of z0 ~ N(0, 1) after T values z0 + N(0, NOISE^2)
ENTROPY = 0.5 * math.log(2 * math.pi * math.e * EXACT_SD**2)


def model(series: lde.Series) -> None:
    with lde.series_plate(series):
        z0 = pyro.sample("z0", dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1))
        lde.observe("obs", dist.Normal(z0.unsqueeze(-2).expand(-1, T, 1), NOISE), series)


class Linear(PyroModule):
    """q(z0 | y) = N(weight * mean(y), sd^2)."""

    def __init__(self, weight: float, sd: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.log_sd = nn.Parameter(torch.tensor(math.log(sd), dtype=torch.float64))

    def forward(self, series: lde.Series) -> None:
        with lde.series_plate(series):
            loc = self.weight * series.values.mean(-2)
            pyro.sample("z0", dist.Normal(loc, self.log_sd.exp()).to_event(1))


def series(n: int) -> lde.Series:
    return lde.Series.from_tensors(torch.arange(float(T)).double(), torch.full((n, T, 1), 7.0).double())


EXACT_WEIGHT = EXACT_SD**2 * T / NOISE**2


def test_exact_guide_has_the_entropy_of_the_posterior() -> None:
    """Mean over n dreams of -log q has sd 1 / sqrt(2 n); 5 of them: false alarm 6e-7."""
    n = 4000
    pyro.set_rng_seed(0)
    loss = Sleep().loss(model, Linear(EXACT_WEIGHT, EXACT_SD), series(n)) / n
    assert loss == pytest.approx(ENTROPY, abs=5 / math.sqrt(2 * n))


def test_narrow_guide_pays_the_forward_divergence() -> None:
    """KL(N(m, s^2) || N(m, (s/2)^2)) = log(1/2) + 2 - 1/2."""
    n = 4000
    pyro.set_rng_seed(1)
    loss = Sleep().loss(model, Linear(EXACT_WEIGHT, EXACT_SD / 2), series(n)) / n
    expected = ENTROPY + math.log(0.5) + 2 - 0.5
    assert loss == pytest.approx(expected, abs=5 * 4 / math.sqrt(2 * n))  # the variance of 4 x^2 / 2


def test_training_finds_mean_and_width_whatever_the_data() -> None:
    guide = Linear(0.0, 1.0)
    fit = fit_svi(model, guide, series(200), elbo=Sleep(), num_steps=400, learning_rate=0.05, seed=2, progress=False)
    assert fit.n_skipped == 0
    assert float(guide.weight.detach()) == pytest.approx(EXACT_WEIGHT, rel=0.03)
    assert float(guide.log_sd.detach().exp()) == pytest.approx(EXACT_SD, rel=0.05)


def test_minibatches_have_the_scale_of_the_data_set() -> None:
    n = 4000
    pyro.set_rng_seed(3)
    loss = Sleep().loss(model, Linear(EXACT_WEIGHT, EXACT_SD), series(n).batch(torch.arange(2000)))
    assert loss / n == pytest.approx(ENTROPY, abs=5 / math.sqrt(n))


def test_the_model_is_left_alone_and_failed_dreams_are_left_out() -> None:
    class Failing(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

        def forward(self, series: lde.Series) -> None:
            with lde.series_plate(series):
                z0 = pyro.sample("z0", dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1))
                z = torch.where(z0 > 0, z0 * self.scale, torch.nan)  # as after a failed solve
                lde.observe("obs", dist.Normal(z.unsqueeze(-2).expand(-1, T, 1), NOISE), series)

    failing, guide = Failing(), Linear(0.5, 1.0)
    pyro.set_rng_seed(4)
    with pyro.validation_enabled(False):
        Sleep().loss_and_grads(failing, guide, series(100))
    assert failing.scale.grad is None
    assert guide.weight.grad.isfinite()
    assert guide.weight.grad != 0


def test_shared_sites_are_drawn_from_the_guide_and_not_taught() -> None:
    seen = []

    def shared_model(series: lde.Series) -> None:
        level = pyro.sample("level", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        seen.append(float(level))
        with lde.series_plate(series):
            z0 = pyro.sample("z0", dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1))
            lde.observe("obs", dist.Normal(level + z0.unsqueeze(-2).expand(-1, T, 1), NOISE), series)

    class Shared(Linear):
        def forward(self, series: lde.Series) -> None:
            self.center.requires_grad_()
            pyro.sample("level", dist.Normal(self.center, 1e-6))
            super().forward(series)

    guide = Shared(0.5, 1.0)
    guide.center = nn.Parameter(torch.tensor(5.0, dtype=torch.float64))
    loss = Sleep().differentiable_loss(shared_model, guide, series(10))
    loss.backward()
    assert seen == [pytest.approx(5.0, abs=1e-4)]
    assert guide.center.grad is None
    assert guide.weight.grad.abs() > 0


def test_what_cannot_be_dreamt_is_told() -> None:
    with pytest.raises(LatentDEError, match="must be a Series"):
        Sleep().loss(model, Linear(0.5, 1.0), torch.zeros(3))

    def blind(series: lde.Series) -> None:
        with lde.series_plate(series):
            pyro.sample("z0", dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1))

    with pytest.raises(LatentDEError, match=r"no site in a plate 'animals'.*plates are \['series'\]"):
        Sleep(plate="animals").loss(model, Linear(0.5, 1.0), series(3))
    with pytest.raises(LatentDEError, match=r"one lde\.observe site"):
        Sleep().loss(blind, Linear(0.5, 1.0), series(3))


def test_windows_without_any_observation_are_dreamt_too() -> None:
    gap = torch.zeros(1, 2 * T, 1).double()
    gap[:, T:] = torch.nan
    empty = lde.Series.from_tensors(torch.arange(2.0 * T).double(), gap).window(T, T)
    assert empty.n_observed == 0
    assert math.isfinite(Sleep().loss(model, Linear(0.5, 1.0), empty))


class OfSegments(PyroModule):
    """z0 from N(0, width^2), the starts of segments from N(y, NOISE^2) at their first times, or N(0, width^2) too."""

    def __init__(self, stations: list[int], width: float, reads: bool) -> None:
        super().__init__()
        self.stations, self.reads = stations, reads
        self.width = nn.Parameter(torch.tensor(width, dtype=torch.float64))

    def forward(self, series: lde.Series) -> None:
        center = series.values[:, self.stations] if self.reads else torch.zeros(len(series), 2, 1).double()
        with lde.series_plate(series):
            pyro.sample("z0", dist.Normal(torch.zeros(1).double(), self.width).to_event(1))
            pyro.sample("shots", dist.Normal(center, NOISE if self.reads else self.width).to_event(2))


def shooting_model(field: Callable) -> SeriesModel:
    start = Latent(dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
    return SeriesModel(field, start, nn.Identity(), Gaussian(sd=NOISE), shooting=Shooting(2, 0.5))


@pytest.mark.parametrize("reads", [True, False])
def test_dreams_of_multiple_shooting_are_draws_of_its_prior(reads: bool) -> None:
    """A state that rests, but for jumps of sd .5 at two stations: starts of variance 1.25 and 1.5, seen with noise."""
    n, width, times = 4000, 1.5, torch.arange(6.0).double()
    rests = shooting_model(lambda t, z, p: 0.0 * z)
    data = lde.Series.from_tensors(times, torch.zeros(n, 6, 1).double())
    pyro.set_rng_seed(7)
    with pyro.validation_enabled(False):
        loss = Sleep().loss(rests, OfSegments([2, 4], width, reads), data) / n

    def expected(variance: float, sd: float) -> float:
        return 0.5 * math.log(2 * math.pi * sd**2) + 0.5 * variance / sd**2

    starts = 2 * expected(NOISE**2, NOISE) if reads else expected(1.25, width) + expected(1.5, width)
    # the sd of the mean is below 1.5 / sqrt(n): half the sum of three squares, at most; five of them
    assert loss == pytest.approx(expected(1.0, width) + starts, abs=5 * 1.5 / math.sqrt(n))


def test_failed_dreams_of_multiple_shooting_leave_the_gradient_finite() -> None:
    blows_up = shooting_model(lambda t, z, p: z**3)
    guide = OfSegments([2, 4], 1.5, reads=False)
    data = lde.Series.from_tensors(torch.arange(6.0).double() / 4, torch.zeros(50, 6, 1).double())
    pyro.set_rng_seed(8)
    with pyro.validation_enabled(False):
        loss = Sleep().loss_and_grads(blows_up, guide, data)
    assert math.isfinite(loss) and guide.width.grad.isfinite() and guide.width.grad != 0
