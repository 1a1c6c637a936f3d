# SPDX-License-Identifier: Apache-2.0
"""Figures of amortized fits: bands are quantiles of the draws, dots the observations, titles the scores."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from pyro_latentde import Series
from pyro_latentde.analysis import forecast_bands, latent_trajectories, recovery
from pyro_latentde.errors import DataError, LatentDEError, ShapeError
from pyro_latentde.infer.forecast import Forecast

TIMES = torch.tensor([0.0, 0.5, 1.5, 2.0, 4.0, 7.0]).double()


@pytest.fixture
def forecast():
    g = torch.Generator().manual_seed(2)
    z = torch.randn(101, 3, 6, 2, generator=g).double()
    means = torch.randn(101, 3, 6, 3, generator=g).double()
    return Forecast(TIMES.expand(3, -1), {}, z, means, means + torch.randn(101, 3, 6, 3, generator=g).double())


@pytest.fixture
def series():
    values = torch.arange(45.0).double().reshape(3, 5, 3)
    values[1, 2, 0] = torch.nan
    values[1, 4] = torch.nan
    return Series.from_tensors(
        [0.1, 0.2, 0.9, 3.0, 5.0], values, names=("pulse", "pressure", "a quantity of long name")
    )


def labelled(ax, label):
    return next(line for line in ax.get_lines() if line.get_label() == label)


def band(ax, number, time):
    corners = ax.collections[number].get_paths()[0].vertices
    at = corners[np.isclose(corners[:, 0], time), 1]
    return at.min(), at.max()


def test_latent_bands_median_and_truth(forecast):
    truth = torch.randn(3, 6, 2).double()
    figure = latent_trajectories(
        forecast, truth, series=1, mark=2.0, states=("theta", "omega"), units={"theta": "rad"}, time_label="time (s)"
    )
    top, bottom = figure.axes
    assert (top.get_ylabel(), bottom.get_ylabel(), bottom.get_xlabel()) == ("theta (rad)", "omega", "time (s)")
    draws = forecast.z[:, 1].numpy()
    assert np.allclose(labelled(bottom, "median").get_ydata(), np.median(draws[..., 1], 0))
    assert np.array_equal(labelled(bottom, "truth").get_ydata(), truth[1, :, 1])
    assert band(top, 0, 4.0) == pytest.approx(tuple(np.quantile(draws[:, 4, 0], [0.05, 0.95])))
    assert band(top, 1, 4.0) == pytest.approx(tuple(np.quantile(draws[:, 4, 0], [0.25, 0.75])))
    (shade,) = top.patches
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == (2.0, 7.0)
    assert [text.get_text().strip() for text in top.texts] == ["forecast"] and not bottom.texts
    assert not plt.get_fignums(), "pyplot keeps the figure"
    alone = latent_trajectories(forecast, truth[1], series=1)
    assert np.array_equal(labelled(alone.axes[0], "truth").get_ydata(), truth[1, :, 0]) and not alone.axes[0].patches


def test_latent_states_by_number(forecast):
    (ax,) = latent_trajectories(forecast, states=[1]).axes
    assert ax.get_ylabel() == "z[1]"
    assert np.allclose(labelled(ax, "median").get_ydata(), forecast.z[:, 0, :, 1].median(0).values)


def test_failed_draws_are_left_out_and_counted(forecast):
    forecast.z[3, 0, 4:] = torch.nan
    figure = latent_trajectories(forecast)
    good = np.delete(forecast.z[:, 0].numpy(), 3, 0)
    assert np.allclose(labelled(figure.axes[0], "median").get_ydata(), np.median(good[..., 0], 0))
    assert figure.axes[-1].texts[0].get_text() == "1 failed draws left out"
    forecast.z[:, 0] = torch.nan
    with pytest.raises(LatentDEError, match="none of 101 draws"):
        latent_trajectories(forecast)


def test_forecast_bands_show_noise_and_only_what_was_observed(forecast, series):
    figure = forecast_bands(forecast, series, row=1, mark=1.0, units={"pressure": "mmHg", "pulse": "1/s"})
    pulse, pressure, last = figure.axes
    labels = [ax.get_ylabel() for ax in figure.axes]
    assert labels == ["pulse (1/s)", "pressure (mmHg)", "a quantity of long name"]
    expected = tuple(np.quantile(forecast.values[:, 1, 2, 0], [0.05, 0.95]))
    assert band(pulse, 0, 1.5) == pytest.approx(expected)
    assert labelled(pulse, "observed").get_xdata() == pytest.approx([0.1, 0.2])  # the third is missing
    assert labelled(pulse, "held out").get_xdata().tolist() == [3.0]
    assert labelled(pressure, "observed").get_ydata().tolist() == [16.0, 19.0, 22.0]
    assert labelled(last, "held out").get_markerfacecolor() == "white"


def test_forecast_begins_after_the_last_observation(forecast, series):
    (ax,) = forecast_bands(forecast, series, row=1, features=["pressure"]).axes
    assert ax.get_ylabel() == "pressure" and ax.patches[0].get_x() == 3.0  # nothing is observed at 5
    assert "held out" not in [line.get_label() for line in ax.get_lines()]
    clean = Forecast(forecast.times, {}, None, forecast.means, None)
    (ax,) = forecast_bands(clean, features=[2]).axes
    assert band(ax, 0, 1.5) == pytest.approx(tuple(np.quantile(forecast.means[:, 0, 2, 2], [0.05, 0.95])))
    assert ax.get_ylabel() == "value[2]" and not ax.patches


def test_long_labels_put_the_unit_on_a_line_of_its_own(forecast, series):
    (ax,) = forecast_bands(forecast, series, features=[2], units="kg").axes
    assert ax.get_ylabel() == "a quantity of long name\n(kg)"


def test_recovery_title_intervals_and_misses():
    g = torch.Generator().manual_seed(3)
    truth = 1 + torch.rand(40, generator=g)
    draws = truth + 0.1 * torch.randn(40, generator=g) + 0.1 * torch.randn(500, 40, generator=g)
    figure = recovery(draws, truth, "length", "m")
    (ax,) = figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("true length (m)", "inferred length (m)")
    low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    inside = (truth.numpy() >= low) & (truth.numpy() <= high)
    assert 0 < inside.sum() < 40
    kept, missed = ax.collections
    assert (len(kept.get_segments()), len(missed.get_segments())) == (inside.sum(), (~inside).sum())
    assert np.allclose(np.array(kept.get_segments())[:, :, 1], np.stack([low, high], 1)[inside], atol=1e-6)
    dots = np.concatenate([line.get_xydata() for line in ax.get_lines() if line.get_marker() == "o"])
    assert np.allclose(np.sort(dots[:, 1]), np.sort(draws.mean(0)), atol=1e-6)
    identity = ax.get_lines()[-1]
    assert np.array_equal(identity.get_xdata(), identity.get_ydata()) and ax.get_xlim() == ax.get_ylim()
    mean = draws.mean(0).numpy()
    correlation = np.corrcoef(mean, truth)[0, 1]
    rmse = np.sqrt(((mean - truth.numpy()) ** 2).mean())
    expected = (
        f"correlation {correlation:.3f}, RMSE {rmse:.3g} m\n90 % intervals cover {100 * inside.mean():.0f} % of 40"
    )
    assert ax.get_title() == expected


def test_one_value_of_the_truth_has_no_correlation():
    figure = recovery(torch.randn(50, 4), torch.zeros(4), "offset")
    assert figure.axes[0].get_title().startswith("correlation not defined, RMSE 0.")
    recovery(torch.ones(5, 1), torch.ones(1), "offset")


def test_bad_input_is_refused(forecast, series):
    with pytest.raises(LatentDEError, match="no z"):
        latent_trajectories(Forecast(TIMES[None], {}, None, forecast.means, None))
    with pytest.raises(ShapeError, match=r"\(6, 3\); expected \(3, 6, 2\)"):
        latent_trajectories(forecast, torch.zeros(6, 3))
    with pytest.raises(ShapeError, match="series 3 of a forecast of 3"):
        latent_trajectories(forecast, series=3)
    with pytest.raises(LatentDEError, match="1 names for 2"):
        latent_trajectories(forecast, states=["theta"])
    with pytest.raises(LatentDEError, match="features = .'heat'.; expected some of .'pulse'"):
        forecast_bands(forecast, series, features=["heat"])
    with pytest.raises(LatentDEError, match="1 to 12 panels, got 784.*features="):
        forecast_bands(Forecast(TIMES[None], {}, None, torch.zeros(2, 1, 6, 784), None))
    with pytest.raises(ShapeError, match="3 values at each time"):
        forecast_bands(forecast, Series.from_tensors(TIMES, torch.zeros(6, 2).double()))
    with pytest.raises(ShapeError, match=r"\(5, 4, 1\).*draws\[\.\.\., 0\]"):
        recovery(torch.zeros(5, 4, 1), torch.zeros(4), "length")
    with pytest.raises(DataError, match="not finite"):
        recovery(torch.full((5, 4), torch.nan), torch.zeros(4), "length")
