# SPDX-License-Identifier: Apache-2.0
"""Figures of amortized fits: latent trajectories, forecasts of irregular series, inferred against true parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pyro_latentde.analysis.drawing import BLUE, GREY, INK, VERMILION, Units, add_legend, new_figure, with_unit
from pyro_latentde.data.series import Series
from pyro_latentde.errors import DataError, LatentDEError, ShapeError
from pyro_latentde.infer.forecast import Forecast
from pyro_latentde.posterior import scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["forecast_bands", "latent_trajectories", "recovery"]

_MAX_PANELS = 12


def latent_trajectories(
    forecast: Forecast,
    truth: Tensor | None = None,
    *,
    series: int = 0,
    mark: float | None = None,
    states: Sequence[int | str] | None = None,
    units: Units = None,
    time_label: str = "time",
) -> Figure:
    """Median and 50 % and 90 % bands of the latent states of one series, one panel for each state.

    Args:
        forecast: draws with z, (S, N, T, states). Draws of this series that are not finite are left out, and counted.
        truth: true states at the same times, (N, T, states) or, of this series alone, (T, states).
        series: which of the N.
        mark: time of the last observation; what is later is marked as forecast.
        states: names of all states, in order; or numbers of those to be drawn. By default all, at most twelve.
        units: unit of each state, in order or by name, or one for all.
        time_label: label of the time axis with its unit, such as ``"time (s)"``.

    Returns:
        The figure.

    Raises:
        LatentDEError: the forecast has no z, no finite draw, or more than twelve states to draw.
        ShapeError: the truth is of another shape.

    Example:
        >>> import torch
        >>> z = torch.randn(50, 2, 10, 2)
        >>> draws = Forecast(torch.arange(10.0).expand(2, -1), {}, z, z, None)
        >>> figure = latent_trajectories(draws, z[0], mark=5.0, states=("theta", "omega"))
        >>> [ax.get_ylabel() for ax in figure.axes]
        ['theta', 'omega']
    """
    if forecast.z is None:
        raise LatentDEError("the forecast has no z: its model has no lde.ode site; draw forecast_bands instead")
    draws, times = _finite(_take(forecast.z, series)), _take_times(forecast, series)
    true = None if truth is None else _truth_of(truth, forecast.z, series)
    names, chosen = _choose(states, draws.shape[-1], None, "states", "z")
    figure, axes = new_figure(len(chosen), 1, width=7.0, height=1.9, sharex=True)
    for place, (ax, i) in enumerate(zip(axes[:, 0], chosen, strict=True)):
        _draw_bands(ax, times, draws[..., i])
        if true is not None:
            ax.plot(times, true[:, i], "--", color=INK, lw=1.3, label="truth", zorder=3)
        ax.set_ylabel(_label(names[i], units, i))
        _mark_forecast(ax, times, mark, label=place == 0)
    _finish(figure, axes, time_label, forecast.z.shape[0] - len(draws))
    return figure


def forecast_bands(
    forecast: Forecast,
    series: Series | None = None,
    *,
    row: int = 0,
    mark: float | None = None,
    features: Sequence[int | str] | None = None,
    units: Units = None,
    time_label: str = "time",
) -> Figure:
    """Predictive median and 50 % and 90 % bands of one series over time, what was observed of it as dots.

    Times need not be even, nor every feature observed at each: a missing value has no dot.

    Args:
        forecast: draws; the bands are those of new observations, noise included, if it has them, else of their means.
        series: what was observed, at the same times or others.
        row: which of the N series.
        mark: time of the last observation that was used; later dots are hollow. By default the last one of all.
        features: numbers or names of those to be drawn. By default all, at most twelve.
        units: unit of each feature, in order or by name, or one for all.
        time_label: label of the time axis with its unit, such as ``"time (h)"``.

    Returns:
        The figure.

    Raises:
        LatentDEError: no finite draw, more than twelve features to draw, or an unknown one.
        ShapeError: the series have other features than the forecast, or fewer rows than `row`.

    Example:
        >>> import torch
        >>> values = torch.randn(50, 1, 10, 2)
        >>> draws = Forecast(torch.arange(10.0)[None], {}, None, values, values)
        >>> series = Series.from_tensors([0.0, 0.5, 3.0], torch.randn(1, 3, 2).double(), names=("pulse", "pressure"))
        >>> figure = forecast_bands(draws, series, units="mmHg", features=["pressure"])
        >>> figure.axes[0].get_ylabel()
        'pressure (mmHg)'
    """
    source = forecast.means if forecast.values is None else forecast.values
    draws, times = _finite(_take(source, row)), _take_times(forecast, row)
    if series is not None and (series.values is None or series.values.shape[-1] != draws.shape[-1]):
        raise ShapeError(f"the forecast has {draws.shape[-1]} values at each time, the series are {series!r}")
    known = None if series is None else series.names
    names, chosen = _choose(features, draws.shape[-1], known, "features", "value")
    last = mark if series is None or mark is not None else _last_observed(series, row)
    figure, axes = new_figure(len(chosen), 1, width=7.0, height=1.9, sharex=True)
    for place, (ax, i) in enumerate(zip(axes[:, 0], chosen, strict=True)):
        _draw_bands(ax, times, draws[..., i])
        if series is not None:
            _draw_dots(ax, series, row, i, mark)
        ax.set_ylabel(_label(names[i], units, i))
        _mark_forecast(ax, times, last, label=place == 0)
    _finish(figure, axes, time_label, source.shape[0] - len(draws))
    return figure


def recovery(draws: Tensor, truth: Tensor, name: str, unit: str = "") -> Figure:
    """Inferred against true values of a parameter: posterior means with 90 % intervals, and the identity.

    Intervals that miss the truth are orange. Correlation and RMSE are those of the means.

    Args:
        draws: (S, N), of the scalar parameter of N series.
        truth: (N,).
        name: of the parameter.
        unit: of the parameter, such as ``"m"``.

    Returns:
        The figure.

    Raises:
        ShapeError: draws and truth do not fit.
        DataError: a value is not finite.

    Example:
        >>> import torch
        >>> truth = torch.linspace(1, 2, 30)
        >>> figure = recovery(truth + 0.05 * torch.randn(200, 30), truth, "length", "m")
        >>> figure.axes[0].get_xlabel()
        'true length (m)'
    """
    if draws.ndim != 2 or truth.shape != draws.shape[1:] or not truth.numel():
        raise ShapeError(
            f"draws of '{name}' have shape {tuple(draws.shape)}, its true values {tuple(truth.shape)}; expected (S, N) "
            "and (N,), one scalar for each series: of a vector take one element, draws[..., 0]"
        )
    draws, truth = draws.detach().cpu().double(), truth.detach().cpu().double()
    if not (draws.isfinite().all() and truth.isfinite().all()):
        raise DataError(f"'{name}' has values that are not finite; leave those series out")
    mean, low, high = draws.mean(0), draws.quantile(0.05, dim=0), draws.quantile(0.95, dim=0)
    missed = ((truth < low) | (truth > high)).numpy()
    figure, axes = new_figure(1, 1, width=4.6, height=4.6)
    ax = axes[0, 0]
    ends = [min(float(truth.min()), float(low.min())), max(float(truth.max()), float(high.max()))]
    margin = 0.03 * (ends[1] - ends[0]) or 1.0
    alpha = float(np.clip(60 / len(truth), 0.15, 0.6))
    for some, colour in ((~missed, BLUE), (missed, VERMILION)):
        ax.vlines(truth[some], low[some], high[some], color=colour, lw=1.2, alpha=alpha)
        ax.plot(truth[some], mean[some], "o", color=colour, ms=3.5, mew=0, alpha=0.85)
    ax.plot(ends, ends, color=INK, lw=1.0, zorder=1)
    ax.set(xlim=(ends[0] - margin, ends[1] + margin), ylim=(ends[0] - margin, ends[1] + margin), aspect="equal")
    ax.set_xlabel(with_unit(f"true {name}", unit, 0))
    ax.set_ylabel(with_unit(f"inferred {name}", unit, 0))
    ax.set_title(_agreement(draws, truth, unit), fontsize=9)
    return figure


def _agreement(draws: Tensor, truth: Tensor, unit: str) -> str:
    mean = draws.mean(0)
    varies = float(truth.std(correction=0)) > 0 and float(mean.std(correction=0)) > 0
    correlation = f"{np.corrcoef(mean, truth)[0, 1]:.3f}" if varies else "not defined"
    rmse = f"{scores.rmse(draws, truth):.3g} {unit}".strip()
    covered = f"{100 * scores.coverage(draws, truth):.0f} % of {len(truth)}"
    return f"correlation {correlation}, RMSE {rmse}\n90 % intervals cover {covered}"


def _label(name: str, units: Units, index: int) -> str:
    """A long name leaves its unit the next line: panels are low, and labels would run into each other."""
    return with_unit(name, units, index, between="\n" if len(name) > 12 else " ")


def _draw_bands(ax: Axes, times: np.ndarray, draws: np.ndarray) -> None:
    low, lower, middle, upper, high = np.quantile(draws, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
    ax.fill_between(times, low, high, color=BLUE, alpha=0.18, lw=0, label="90 %")
    ax.fill_between(times, lower, upper, color=BLUE, alpha=0.35, lw=0, label="50 %")
    ax.plot(times, middle, color=BLUE, lw=1.6, label="median")
    ax.margins(x=0.01)


def _draw_dots(ax: Axes, series: Series, row: int, feature: int, mark: float | None) -> None:
    seen = series.mask[row, :, feature]
    times, values = (x[seen].detach().cpu().numpy() for x in (series.times[row], series.values[row, :, feature]))
    later = np.zeros(len(times), bool) if mark is None else times > mark + 1e-6 * max(1.0, abs(mark))
    ax.plot(times[~later], values[~later], "o", color=INK, ms=3.5, mew=0, label="observed", zorder=3)
    if mark is not None:
        ax.plot(times[later], values[later], "o", color=INK, ms=3.5, mfc="white", mew=0.8, label="held out", zorder=3)


def _mark_forecast(ax: Axes, times: np.ndarray, mark: float | None, label: bool) -> None:
    if mark is None or not times.max() > mark:
        return
    start = max(mark, float(times.min()))
    ax.axvspan(start, times.max(), color=GREY, alpha=0.13, lw=0, zorder=0)
    if label:
        ax.text(start, 1.0, " forecast", transform=ax.get_xaxis_transform(), va="bottom", fontsize=8, color=INK)


def _finish(figure: Figure, axes: np.ndarray, time_label: str, failed: int) -> None:
    axes[-1, 0].set_xlabel(time_label)
    figure.align_ylabels(axes[:, 0])
    add_legend(figure, axes[0, 0], columns=5)
    if failed:
        place = {"transform": axes[-1, 0].transAxes, "ha": "right", "fontsize": 7, "color": INK}
        axes[-1, 0].text(0.99, 0.02, f"{failed} failed draws left out", **place)


def _take(draws: Tensor, row: int) -> np.ndarray:
    """Draws (S, N, T, K) of one series, (S, T, K)."""
    if not -draws.shape[1] <= row < draws.shape[1]:
        raise ShapeError(f"series {row} of a forecast of {draws.shape[1]}; expected 0 to {draws.shape[1] - 1}")
    return draws[:, row].detach().cpu().double().numpy()


def _take_times(forecast: Forecast, row: int) -> np.ndarray:
    return forecast.times[row].detach().cpu().numpy()


def _finite(draws: np.ndarray) -> np.ndarray:
    good = draws[np.isfinite(draws).all((1, 2))]
    if not len(good):
        raise LatentDEError(
            f"none of {len(draws)} draws of this series is finite: nothing to draw; did every solve fail?"
        )
    return good


def _truth_of(truth: Tensor, z: Tensor, series: int) -> np.ndarray:
    if truth.shape == z.shape[1:]:
        truth = truth[series]
    if truth.shape != z.shape[2:]:
        raise ShapeError(
            f"truth has shape {tuple(truth.shape)}; expected {tuple(z.shape[1:])}, at the times of the forecast, or "
            f"{tuple(z.shape[2:])} of one series"
        )
    return truth.detach().cpu().numpy()


def _choose(
    given: Sequence[int | str] | None, size: int, known: Sequence[str] | None, what: str, stem: str
) -> tuple[list[str], list[int]]:
    """Names of all, and numbers of those to draw. Without known names, given names are those of all."""
    names = list(known) if known else [f"{stem}[{i}]" for i in range(size)]
    chosen = list(range(size)) if given is None else list(given)
    if known is None and chosen and all(isinstance(name, str) for name in chosen):
        if len(chosen) != size:
            raise LatentDEError(f"{what} has {len(chosen)} names for {size}; name them all, or choose some by number")
        names, chosen = chosen, list(range(size))
    try:
        numbers = [names.index(one) if isinstance(one, str) else range(size)[one] for one in chosen]
    except (ValueError, IndexError):
        raise LatentDEError(f"{what} = {chosen}; expected some of {names}, or numbers from 0 to {size - 1}") from None
    if not 1 <= len(numbers) <= _MAX_PANELS:
        raise LatentDEError(f"can draw 1 to {_MAX_PANELS} panels, got {len(numbers)}; choose some, {what}=[0, 1, 2]")
    return names, numbers


def _last_observed(series: Series, row: int) -> float | None:
    if not -len(series) <= row < len(series):
        raise ShapeError(f"series {row} of {len(series)}; expected 0 to {len(series) - 1}")
    seen = series.times[row][series.mask[row].any(-1)]
    return float(seen.max()) if len(seen) else None
