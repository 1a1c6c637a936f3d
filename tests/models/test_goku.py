# SPDX-License-Identifier: Apache-2.0
"""Defaults of GOKU-nets: networks that begin at the data, decoders of visible states, heads in the prior's units."""

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.testing import assert_close

import pyro_latentde as lde
from pyro_latentde.distributions.moments import moments
from pyro_latentde.errors import LatentDEError
from pyro_latentde.guides.series_guide import SeriesGuide
from pyro_latentde.models import GOKU
from pyro_latentde.models.latents import Latent
from pyro_latentde.nn import RecurrentEncoder

STATES = ("angle", "rate")


def _field(t, z, p):
    return torch.stack([z[1], -p["stiffness"] * z[0]])


def _videos() -> lde.Series:
    torch.manual_seed(0)
    return lde.Series.from_tensors(torch.linspace(0, 1, 5), 0.2 + 0.1 * torch.rand(8, 5, 9))


def _goku(**options) -> GOKU:
    start = dist.Normal(torch.tensor([1e3, 0.0]), torch.tensor([50.0, 2.0])).to_event(1)
    return GOKU(_field, start, {"stiffness": dist.Uniform(1.0, 2.0)}, states=STATES, width=20, **options)


def test_decoders_of_visible_states_begin_at_the_mean_and_read_the_priors_units():
    videos = _videos()
    goku = _goku(values=videos, visible=["angle"])
    z = torch.tensor([[1e3, 0.0], [1e3, 7.0], [1.05e3, 0.0]])
    frames = goku.model.decoder(z)
    assert_close(frames[0], frames[1])  # the rate is not to be seen
    assert (frames[2] - frames[0]).abs().max() > 1e-3
    assert_close(frames[0], videos.mean_values(), atol=0.2, rtol=0)  # 0.5 without
    assert (frames[2] - frames[0]).abs().max() < 0.3  # one sd of the prior, whatever the units


def test_networks_of_frames_are_standardized_by_the_series():
    videos = _videos()
    frames = _goku(values=videos).guide.frames
    assert_close(frames.mean, videos.values.mean((0, 1)))
    assert _goku(values=9).guide.frames.in_features == 9


def test_visible_states_must_exist():
    with pytest.raises(LatentDEError, match=r"visible = \('rat',\); expected some of states = \('angle', 'rate'\)"):
        _goku(values=9, visible=["rat"])
    with pytest.raises(LatentDEError, match="default decoder"):
        _goku(values=9, visible=["rate"], decoder=torch.nn.Linear(2, 9))


def test_untrained_posteriors_are_around_the_prior():
    """In units of the prior's sd: a head begins around 0 with sd .1, whatever the states are measured in."""
    videos = _videos()
    goku = _goku(values=videos)
    draws = torch.stack([goku.guide(videos)["z0"] for _ in range(50)]).detach()
    away = (draws - torch.tensor([1e3, 0.0])) / torch.tensor([50.0, 2.0])
    assert away.abs().mean() < 0.5 and 0.05 < away.std(0).mean() < 0.2


def test_densities_of_scaled_sites_are_those_of_the_scaled_head():
    prior = dist.Normal(torch.tensor([3.0, -1.0]), torch.tensor([2.0, 0.5])).to_event(1)
    guide = SeriesGuide({"z0": prior}, RecurrentEncoder(9, 4), head="normal")
    torch.manual_seed(3)
    trace = poutine.trace(guide).get_trace(_videos())
    z0, fn = trace.nodes["z0"]["value"], trace.nodes["z0"]["fn"]
    base = guide.heads["z0"](guide.encoders["all"](*guide._inputs(_videos())))
    free = (z0 - torch.tensor([3.0, -1.0])) / torch.tensor([2.0, 0.5])
    assert_close(fn.log_prob(z0), base.log_prob(free) - torch.tensor([2.0, 0.5]).log().sum())


def test_moments_are_those_that_are_known():
    mean, sd = moments(dist.Uniform(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1))
    assert_close(mean, torch.tensor([0.5, 1.0]))
    assert_close(sd, torch.tensor([1.0, 2.0]) / 12**0.5)
    assert moments(dist.StudentT(torch.tensor([1.0]), 0.0, 1.0).to_event(1)) is None
    assert Latent(lambda shared: dist.Normal(torch.zeros(1), 1.0).to_event(1)).moments() is None
    assert Latent(dist.Normal(torch.zeros(1), 1.0).to_event(1), torch.nn.Identity()).moments() is None
