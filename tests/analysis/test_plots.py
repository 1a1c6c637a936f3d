# SPDX-License-Identifier: Apache-2.0
"""Figures: what is drawn is what was computed, and axes say what they show."""

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_latentde as lde
from pyro_latentde import Posterior, Series
from pyro_latentde.analysis import plot_pair, plot_phase, plot_prior_posterior, plot_trace, plot_trajectories
from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer import prior
from pyro_latentde.posterior import inspect_model

TIMES = torch.linspace(0, 6, 7).double()


def oscillator(times, data=None):
    w = pyro.sample("w", dist.LogNormal(torch.zeros(()).double(), 0.1))
    sigma = pyro.sample("sigma", dist.LogNormal(torch.full((2,), -3.0).double(), 0.1).to_event(1))
    start = torch.tensor([1.0, 0.0]).double()
    z = lde.ode("z", lambda t, y, w: torch.stack([w * y[1], -w * y[0]]), start, times, w, states=("q", "p"))
    pyro.sample("obs", dist.Normal(z, sigma).to_event(2), obs=data)


@pytest.fixture(scope="module")
def series():
    values = torch.stack([TIMES.cos(), -TIMES.sin()], -1)
    values[2, 0] = torch.nan
    return Series.from_tensors(TIMES, values, names=("q", "p"))


@pytest.fixture(scope="module")
def posterior(series):
    w = torch.linspace(0.95, 1.05, 40).reshape(2, 20).double()
    args = (TIMES, series.values[0])
    return Posterior(
        samples={"w": w, "sigma": torch.rand(2, 20, 2, generator=torch.Generator().manual_seed(0)).double()},
        stats={"diverging": torch.arange(40).reshape(2, 20) % 10 == 0},
        sites=inspect_model(oscillator, *args),
        model=oscillator,
        args=args,
    )


def lines(ax, marker="None"):
    return [line for line in ax.get_lines() if line.get_marker() == marker]


def test_trajectories_bands_data_and_forecast(posterior, series):
    prediction = posterior.predict(torch.linspace(0, 9, 19).double())
    figure = plot_trajectories(prediction, series, site="z", units={"q": "m", "p": "N s"}, time_label="time (s)")
    top, bottom = figure.axes
    assert (top.get_ylabel(), bottom.get_ylabel(), bottom.get_xlabel()) == ("q (m)", "p (N s)", "time (s)")
    expected = np.median(prediction.trajectories["z"].flatten(0, 1)[..., 0].numpy(), 0)
    assert np.allclose(lines(top)[0].get_ydata(), expected, atol=1e-9)
    band = top.collections[0].get_paths()[0].vertices  # 90 %
    values = prediction.trajectories["z"].flatten(0, 1)[:, 4, 0].numpy()
    at = band[np.isclose(band[:, 0], 2.0), 1]
    assert at.min() == pytest.approx(np.quantile(values, 0.05)) and at.max() == pytest.approx(np.quantile(values, 0.95))
    assert [len(lines(ax, "o")[0].get_xdata()) for ax in (top, bottom)] == [6, 7], "a missing value was drawn"
    assert any("forecast" in text.get_text() for text in top.texts)
    assert not plt.get_fignums(), "pyplot keeps the figure"


def test_new_observations_are_shown_by_default_and_wider(posterior):
    prediction = posterior.predict()
    noisy, clean = plot_trajectories(prediction), plot_trajectories(prediction, site="z")
    spread = [np.ptp(figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]) for figure in (noisy, clean)]
    assert spread[0] > spread[1]
    assert not any("forecast" in text.get_text() for text in noisy.axes[0].texts)


def test_phase_portrait_draws_closed_orbits(posterior, series):
    figure = plot_phase(posterior, series, num_draws=10, units="m")
    (ax,) = figure.axes
    curves = lines(ax)
    assert len(curves) == 10 and (ax.get_xlabel(), ax.get_ylabel()) == ("q (m)", "p (m)")
    for curve in curves:
        radius = np.hypot(curve.get_xdata(), curve.get_ydata())
        assert len(radius) == 400 and np.allclose(radius, 1, atol=1e-3)


def test_failed_rows_are_left_out_and_said(posterior):
    prediction = posterior.predict()
    prediction.trajectories["z"][0, 3] = torch.nan
    prediction.n_failed["z"] = 1
    for figure in (plot_trajectories(prediction, site="z"), plot_phase(prediction, num_draws=40)):
        assert any("1 failed solves left out" in text.get_text() for ax in figure.axes for text in ax.texts)
    assert len(lines(figure.axes[0])) == 39


def test_prior_against_posterior_areas(posterior):
    before = prior(oscillator, TIMES, num_samples=500)
    figure = plot_prior_posterior(before, posterior, ["w", "sigma"], units={"w": "1/s"})
    assert [ax.get_xlabel() for ax in figure.axes] == ["w (1/s)", "sigma[q]", "sigma[p]"]
    ax = figure.axes[0]
    areas = [sum(bar.get_width() * bar.get_height() for bar in bars) for bars in ax.containers]
    assert areas[1] == pytest.approx(1.0) and 0.9 < areas[0] <= 1.0 + 1e-9


def test_pairs_mark_divergent_draws(posterior):
    figure = plot_pair(posterior)
    assert len(figure.axes) == 6  # lower triangle of three scalars
    assert sum(len(line.get_xdata()) for ax in figure.axes for line in lines(ax, "x")) == 3 * 4
    assert "4 divergent draws" in figure.texts[0].get_text()


def people(series):
    with lde.series_plate(series):
        pyro.sample("level", dist.Normal(torch.zeros(()).double(), 1.0))


def test_panels_of_a_plated_site_are_named_by_the_ids_of_the_series():
    series = Series.from_tensors([0.0, 1.0], torch.zeros(2, 2, 1), ids=["Ann", "Bo"])
    before = prior(people, series, num_samples=40)
    after = Posterior(samples=before.samples, attrs={"inference": "nuts"})  # read from a file, without its series
    for figure in (plot_prior_posterior(before, before), plot_prior_posterior(after, before)):
        assert [ax.get_xlabel() for ax in figure.axes] == ["level[Ann]", "level[Bo]"]
    assert [ax.get_ylabel() for ax in plot_trace(before).axes] == ["level[Ann]", "level[Bo]"]
    assert {ax.get_xlabel() for ax in plot_pair(before).axes} == {"", "level[Ann]", "level[Bo]"}


def test_too_many_scalars_and_unknown_sites(posterior):
    many = Posterior(samples={"x": torch.randn(2, 5, 13)})
    with pytest.raises(LatentDEError, match="1 to 12 scalars, got 13"):
        plot_pair(many)
    with pytest.raises(KeyError, match="'nothing'"):
        plot_trajectories(posterior, site="nothing")
