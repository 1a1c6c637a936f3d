# SPDX-License-Identifier: Apache-2.0
"""Figures of trajectories, in plain matplotlib. Every function returns its figure; nothing is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.analysis.drawing import BLUE, GREY, INK, Units, add_legend, new_figure, with_unit
from pyro_latentde.data.series import Series
from pyro_latentde.errors import LatentDEError
from pyro_latentde.posterior import Posterior
from pyro_latentde.posterior.prediction import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_phase", "plot_trajectories"]


def plot_trajectories(
    source: Prediction | Posterior,
    data: Series | None = None,
    *,
    site: str | None = None,
    row: int = 0,
    units: Units = None,
    time_label: str = "time",
) -> Figure:
    """Median and 50 % and 90 % bands over time, one panel for each state, with the data on top.

    Args:
        source: a prediction, or a posterior, which is then predicted at its model's own times.
        data: the observations; of several series the one at ``row`` is drawn. Times after the last of them
            are marked as forecast.
        site: ODE site, whose bands are those of the noise-free states, or observed site, whose bands hold new
            observations. By default the observed site of the same size as the states, if there are new
            observations, else the first ODE site.
        row: which of several series (the first batch dimension of the site).
        units: unit of each state, in order or by name, or one for all.
        time_label: label of the time axis with its unit, such as ``"year"``.

    Returns:
        The figure.

    Raises:
        LatentDEError: no such site.
    """
    prediction = source.predict() if isinstance(source, Posterior) else source
    site = site or _default_site(prediction)
    quantiles = _one_row(prediction.quantile(site), row)  # (5, T, D)
    times, names = _times(prediction, site, row), _state_names(prediction, site, quantiles.shape[-1])
    figure, axes = new_figure(len(names), 1, width=7.0, height=2.3, sharex=True)
    order = np.argsort(times)
    observed = None if data is None else _observed(data, row, names)
    end = None if observed is None else max(float(t[-1]) for t, _ in observed if len(t))
    for i, ax in enumerate(axes[:, 0]):
        low, lower, middle, upper, high = quantiles[:, order, i]
        ax.fill_between(times[order], low, high, color=BLUE, alpha=0.18, lw=0, label="90 %")
        ax.fill_between(times[order], lower, upper, color=BLUE, alpha=0.35, lw=0, label="50 %")
        ax.plot(times[order], middle, color=BLUE, lw=1.6, label="median")
        if observed is not None:
            t, y = observed[i]
            ax.plot(t, y, "o", color=INK, ms=3.5, mew=0, label="data", zorder=3)
            if times.max() > end:
                _mark_forecast(ax, end, times.max(), label=i == 0)
        ax.set_ylabel(with_unit(names[i], units, i))
        ax.margins(x=0.01)
    axes[-1, 0].set_xlabel(time_label)
    axes[-1, 0].locator_params(axis="x", steps=[1, 2, 5, 10])  # whole years, not 1902.5
    add_legend(figure, axes[0, 0])
    _note_failures(axes[-1, 0], prediction)
    return figure


def plot_phase(
    source: Prediction | Posterior,
    data: Series | None = None,
    *,
    site: str | None = None,
    states: tuple[int, int] = (0, 1),
    row: int = 0,
    num_draws: int = 60,
    units: Units = None,
) -> Figure:
    """Phase portrait: one state against another, a thin curve for each of some draws, and the data.

    Args:
        source: a prediction at times close enough for smooth curves, or a posterior, which is then
            predicted at 400 times from the first to the last of the model's.
        data: the observations, drawn as points.
        site: ODE site; the first by default.
        states: which two states, for the horizontal and the vertical axis.
        row: which of several series.
        num_draws: number of curves.
        units: unit of each state, in order or by name, or one for all.

    Returns:
        The figure.

    Raises:
        LatentDEError: no ODE site.
    """
    prediction = _fine(source, site, num_draws) if isinstance(source, Posterior) else source
    site = site or _first_ode(prediction)
    values = prediction.trajectories[site].flatten(0, 1)
    curves = values[torch.linspace(0, len(values) - 1, min(num_draws, len(values))).round().long()]
    curves = np.stack([_one_row(curve[None], row)[0] for curve in curves])
    curves = curves[np.isfinite(curves).all((1, 2))]
    names = _state_names(prediction, site, curves.shape[-1])
    figure, axes = new_figure(1, 1, width=4.8, height=4.2)
    ax, (i, j) = axes[0, 0], states
    alpha = float(np.clip(12 / max(1, len(curves)), 0.12, 0.8))
    for number, curve in enumerate(curves):
        label = f"{len(curves)} posterior draws" if number == 0 else None
        ax.plot(curve[:, i], curve[:, j], color=BLUE, lw=0.9, alpha=alpha, label=label)
    if data is not None:
        observed = _observed(data, row, names)
        if all(len(t) == len(observed[i][0]) for t, _ in (observed[i], observed[j])):
            ax.plot(observed[i][1], observed[j][1], "o", color=INK, ms=3.5, mew=0, label="data", zorder=3)
    ax.set_xlabel(with_unit(names[i], units, i))
    ax.set_ylabel(with_unit(names[j], units, j))
    add_legend(figure, ax, columns=2)
    _note_failures(ax, prediction)
    return figure


def _mark_forecast(ax: Axes, start: float, stop: float, label: bool) -> None:
    ax.axvspan(start, stop, color=GREY, alpha=0.13, lw=0, zorder=0)
    if label:
        ax.text(start, 0.98, " forecast", transform=ax.get_xaxis_transform(), va="top", fontsize=8, color=INK)


def _note_failures(ax: Axes, prediction: Prediction) -> None:
    count = sum(prediction.n_failed.values())
    if count:
        ax.text(
            0.99,
            0.02,
            f"{count} failed solves left out",
            transform=ax.transAxes,
            ha="right",
            fontsize=7,
            color=INK,
        )


def _default_site(prediction: Prediction) -> str:
    odes = list(prediction.trajectories)
    for name, values in prediction.observations.items():
        if not odes or values.shape == prediction.trajectories[odes[0]].shape:
            return name
    return _first_ode(prediction)


def _first_ode(prediction: Prediction) -> str:
    if not prediction.trajectories:
        raise LatentDEError("there is no lde.ode site to draw; name an observed site with site=")
    return next(iter(prediction.trajectories))


def _fine(posterior: Posterior, site: str | None, num_draws: int) -> Prediction:
    name = site or next(iter(posterior.sites.ode if posterior.sites else ()), None)
    if name is None:
        raise LatentDEError("a phase portrait needs a model with an lde.ode site")
    times = posterior.sites[name].times
    fine = torch.linspace(float(times.min()), float(times.max()), 400, dtype=times.dtype)
    return posterior.predict(fine, num_draws=num_draws, observations=False)


def _one_row(values: Tensor, row: int) -> np.ndarray:
    """Values ``(k, *batch, T, D)`` of one series, as ``(k, T, D)``."""
    if values.ndim == 2:
        values = values[..., None]
    flat = values.reshape(len(values), -1, *values.shape[-2:])
    return flat[:, row].detach().cpu().numpy()


def _times(prediction: Prediction, site: str, row: int) -> np.ndarray:
    times = prediction.times
    if times is None:
        known = [
            prediction.sites[site].times,
            *(prediction.sites[name].times for name in prediction.trajectories),
        ]
        times = next((t for t in known if t is not None), None)
    if times is None:
        raise LatentDEError(f"the times of site '{site}' are not known; draw a prediction made with times=")
    return times.reshape(-1, times.shape[-1])[min(row, times.numel() // times.shape[-1] - 1)].cpu().numpy()


def _state_names(prediction: Prediction, site: str, size: int) -> list[str]:
    for name in (site, *prediction.trajectories):
        states = prediction.sites[name].states if name in prediction.sites else None
        if states is not None and len(states) == size:
            return list(states)
    return [site] if size == 1 else [f"{site}[{i}]" for i in range(size)]


def _observed(data: Series, row: int, names: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Times and values of what was observed of each state; by name where the series has names."""
    columns = list(data.names) if data.names is not None and set(data.names) <= set(names) else names
    found = []
    for i, name in enumerate(names):
        d = columns.index(name) if name in columns else i
        if data.values is None or d >= data.values.shape[-1]:
            found.append((np.empty(0), np.empty(0)))
            continue
        mask = data.mask[row, :, d]
        found.append((data.times[row][mask].cpu().numpy(), data.values[row, :, d][mask].cpu().numpy()))
    return found
