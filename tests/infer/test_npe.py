# SPDX-License-Identifier: Apache-2.0
"""Neural posterior estimation against a linear Gaussian model, whose posterior is known."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

import pyro_latentde as lde
from pyro_latentde.errors import LatentDEError
from pyro_latentde.guides.series_guide import SeriesGuide
from pyro_latentde.infer import fit_svi, npe
from pyro_latentde.infer.dreams import remember
from pyro_latentde.nn import MLP, RecurrentEncoder

T, NOISE = 4, 0.5
EXACT_SD = 1 / math.sqrt(1 + T / NOISE**2)  # of z0 ~ N(0, 1) after T values z0 + N(0, NOISE^2)
ENTROPY = 0.5 * math.log(2 * math.pi * math.e * EXACT_SD**2)
START = dist.Normal(torch.zeros(1), 1.0).to_event(1)


class Level(PyroModule):
    """A constant level behind noise, seen through a gain that is trained."""

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__()
        self.gain, self.limit = nn.Parameter(torch.tensor(1.0)), limit

    def forward(self, series: lde.Series, times: torch.Tensor | None = None) -> None:
        with lde.series_plate(series):
            z0 = pyro.sample("z0", START)
            z = torch.where(z0 > self.limit, torch.nan, self.gain * z0)  # NaN as after a failed solve
            lde.observe("obs", dist.Normal(z.unsqueeze(-2).expand(-1, T, 1), NOISE), series)


class Mean(PyroModule):
    """q(z0 | y) = N(weight * mean(y), sd^2)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.log_sd = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(-0.5))

    def forward(self, series: lde.Series) -> None:
        with lde.series_plate(series):
            pyro.sample("z0", dist.Normal(self.weight * series.values.mean(-2), self.log_sd.exp()).to_event(1))


def _series(n: int = 30) -> lde.Series:
    return lde.Series.from_tensors(torch.arange(float(T)), torch.full((n, T, 1), 7.0))


def _fit(model: nn.Module, guide: nn.Module) -> lde.infer.Fit:
    return fit_svi(model, guide, _series(), num_steps=1, learning_rate=1e-9, progress=False)


def test_the_guide_finds_the_posterior_and_the_model_stays():
    """From data far from the prior, which the dreams do not know. 20,000 dreams: sd of the weight's estimate .2 %."""
    fit = _fit(Level(), Mean())
    gain = fit.model.gain.detach().clone()
    taught = npe(fit, num_dreams=20_000, num_steps=600, learning_rate=0.02, batch_size=500, seed=3, progress=False)
    assert taught.guide.weight.item() == pytest.approx(EXACT_SD**2 * T / NOISE**2, rel=0.03)
    assert taught.guide.log_sd.exp().item() == pytest.approx(EXACT_SD, rel=0.03)
    torch.testing.assert_close(taught.model.gain.detach(), gain)
    assert len(taught.losses) == 1 and len(taught.attrs["npe_losses"]) == 600
    assert sum(taught.attrs["npe_losses"][-100:]) / 100 == pytest.approx(ENTROPY, abs=0.05)
    draws = taught.encode(lde.Series.from_tensors(torch.arange(float(T)), torch.ones(1, T, 1)), num_samples=4000)
    assert draws["z0"].mean().item() == pytest.approx(EXACT_SD**2 * T / NOISE**2, rel=0.03)


def test_networks_of_frames_are_read_once_and_stay():
    """The same loss from features as from frames, and a frame network that is not touched."""
    torch.manual_seed(0)
    frames = MLP(1, 6, hidden=(5,), activation="tanh")
    guide = SeriesGuide({"z0": START}, RecurrentEncoder(6, 8), frames=frames)
    fit = _fit(Level(), guide)
    from_features = npe(fit, num_dreams=64, num_steps=1, learning_rate=1e-9, seed=5, progress=False)
    dreams = remember(fit.model, guide, _series(), 64, seed=5)
    assert dreams.series.values.shape == (64, T, 6)
    guide.features = None  # a guide that cannot say what its encoders read
    raw = remember(fit.model, guide, _series(), 64, seed=5)
    assert raw.series.values.shape == (64, T, 1) and raw.reading is None
    from_frames = npe(fit, num_dreams=64, num_steps=1, learning_rate=1e-9, seed=5, progress=False)
    assert from_features.attrs["npe_losses"] == pytest.approx(from_frames.attrs["npe_losses"])
    del guide.features
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    npe(fit, num_dreams=64, num_steps=20, seed=5, progress=False)
    moved = {name for name, value in guide.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and not any(name.startswith("frames") for name in moved)


def test_dreams_have_the_times_and_gaps_of_the_series_in_turn():
    times = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 0.5, 2.0, 2.5]])
    values = torch.zeros(2, T, 1)
    values[1, 2] = torch.nan
    series = lde.Series.from_tensors(times, values)
    dreams = remember(Level(), SeriesGuide({"z0": START}, RecurrentEncoder(1, 4)), series, 5)
    torch.testing.assert_close(dreams.series.times, times[[0, 1, 0, 1, 0]])
    assert torch.equal(dreams.series.mask, series.mask[[0, 1, 0, 1, 0]])
    assert len(set(dreams.latents["z0"].flatten().tolist())) == 5


def test_failed_dreams_are_left_out_and_told():
    guide = Mean()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dreams = remember(Level(limit=-0.5), guide, _series(), 400)  # three in ten can be solved
    assert (dreams.latents["z0"] <= -0.5).all() and 60 < len(dreams) < 190
    assert dreams.series.values.isfinite().all()
    assert f"{400 - len(dreams)} of 400 draws from the model failed" in str(caught[0].message)
    with pytest.raises(LatentDEError, match="none of 20 draws"):
        remember(Level(limit=-math.inf), guide, _series(), 20)


def test_what_all_series_share_is_drawn_and_not_taught():
    class Shared(PyroModule):
        def forward(self, series: lde.Series, times: torch.Tensor | None = None) -> None:
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            with lde.series_plate(series):
                z0 = pyro.sample("z0", START)
                lde.observe("obs", dist.Normal((level + z0).unsqueeze(-2).expand(-1, T, 1), NOISE), series)

    guide = SeriesGuide({"z0": START}, RecurrentEncoder(1, 4), shared=AutoNormal(poutine.block(Shared(), hide=["z0"])))
    fit = _fit(Shared(), guide)
    dreams = remember(fit.model, guide, _series(), 50)
    assert set(dreams.latents) == {"z0"} and dreams[torch.tensor([3, 1])].latents["z0"].shape == (2, 1)
    loc = guide.shared.locs.level.detach().clone()
    npe(fit, num_dreams=50, num_steps=3, progress=False)
    assert torch.equal(guide.shared.locs.level, loc)
