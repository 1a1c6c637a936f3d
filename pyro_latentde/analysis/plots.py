# SPDX-License-Identifier: Apache-2.0
"""Figures of posteriors and predictions, in plain matplotlib. Every function returns its figure; nothing is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.errors import LatentDEError
from pyro_latentde.posterior import Posterior
from pyro_latentde.posterior.arviz_export import element_names, make_groups
from pyro_latentde.posterior.prediction import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_pair", "plot_phase", "plot_prior_posterior", "plot_trajectories"]

# Okabe and Ito's colours, told apart by colour-blind readers too; grey for what came before the data.
BLUE, VERMILION, GREY, INK = "#0072B2", "#D55E00", "#9A9A9A", "#222222"
_MAX_SCALARS = 12

Units = Mapping[str, str] | Sequence[str] | str | None


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
    figure, axes = _figure(len(names), 1, width=7.0, height=2.3, sharex=True)
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
        ax.set_ylabel(_with_unit(names[i], units, i))
        ax.margins(x=0.01)
    axes[-1, 0].set_xlabel(time_label)
    _legend(figure, axes[0, 0])
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
        source: a prediction at times close enough for smooth curves, or a posterior, which is then predicted at
            400 times from the first to the last of the model's.
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
    figure, axes = _figure(1, 1, width=4.8, height=4.2)
    ax, (i, j) = axes[0, 0], states
    alpha = float(np.clip(12 / max(1, len(curves)), 0.12, 0.8))
    for number, curve in enumerate(curves):
        label = f"{len(curves)} posterior draws" if number == 0 else None
        ax.plot(curve[:, i], curve[:, j], color=BLUE, lw=0.9, alpha=alpha, label=label)
    if data is not None:
        observed = _observed(data, row, names)
        if all(len(t) == len(observed[i][0]) for t, _ in (observed[i], observed[j])):
            ax.plot(observed[i][1], observed[j][1], "o", color=INK, ms=3.5, mew=0, label="data", zorder=3)
    ax.set_xlabel(_with_unit(names[i], units, i))
    ax.set_ylabel(_with_unit(names[j], units, j))
    _legend(figure, ax, columns=2)
    _note_failures(ax, prediction)
    return figure


def plot_prior_posterior(
    prior: Posterior, posterior: Posterior, names: Sequence[str] | None = None, *, units: Units = None
) -> Figure:
    """Histograms of each scalar parameter before (grey) and after (blue) the data.

    Args:
        prior: result of ``infer.prior``.
        posterior: the posterior.
        names: latent sites; by default all that both have.
        units: unit of each site, by name, or one for all.

    Returns:
        The figure.

    Raises:
        LatentDEError: more than twelve scalars, or none in common.
    """
    shared = [name for name in names or posterior.samples if name in prior.samples]
    after = _scalars(posterior, shared)
    before = _scalars(prior, shared)
    columns = min(3, len(after))
    figure, axes = _figure(math.ceil(len(after) / columns), columns, width=2.5 * columns, height=2.0)
    for ax in axes.ravel()[len(after) :]:
        ax.remove()
    for ax, (name, values) in zip(axes.ravel(), after.items(), strict=False):
        low, high = np.quantile(before[name], [0.01, 0.99])
        low, high = min(low, values.min()), max(high, values.max())
        inside = before[name][(before[name] >= low) & (before[name] <= high)]
        weight = np.full(len(inside), 1 / (len(before[name]) * (high - low) / 40))
        ax.hist(inside, np.linspace(low, high, 41), weights=weight, color=GREY, alpha=0.55, label="prior")
        ax.hist(values, _bins(values), density=True, color=BLUE, alpha=0.75, label="posterior")
        ax.set_xlabel(_with_unit(name, units, 0, key=name.split("[")[0]))
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
    _legend(figure, axes.ravel()[0])
    return figure


def plot_pair(posterior: Posterior, names: Sequence[str] | None = None, *, units: Units = None) -> Figure:
    """Every scalar against every other, histograms on the diagonal, divergent draws as orange crosses.

    Args:
        posterior: the draws; at most 2000 of them are drawn as points, and all divergent ones.
        names: latent sites; all by default.
        units: unit of each site, by name, or one for all.

    Returns:
        The figure.

    Raises:
        LatentDEError: more than twelve scalars.
    """
    scalars = _scalars(posterior, list(names or posterior.samples))
    size, labels = len(scalars), list(scalars)
    values = np.stack(list(scalars.values()))
    diverging = posterior.stats.get("diverging")
    bad = np.zeros(values.shape[1], bool) if diverging is None else diverging.flatten().cpu().bool().numpy()
    shown = np.flatnonzero(~bad)
    shown = shown[:: max(1, len(shown) // 2000)]
    figure, axes = _figure(size, size, width=1.3 * size + 0.6, height=1.3)
    for i in range(size):
        for j in range(size):
            ax = axes[i, j]
            if j > i:
                ax.remove()
                continue
            if i == j:
                ax.hist(values[i], _bins(values[i]), color=BLUE, alpha=0.75)
                ax.set_yticks([])
            else:
                ax.plot(values[j, shown], values[i, shown], ".", color=BLUE, ms=2, alpha=0.25, mew=0, rasterized=True)
                ax.plot(values[j, bad], values[i, bad], "x", color=VERMILION, ms=4, mew=1.1, zorder=3)
            _sparse_ticks(ax, bottom=i == size - 1, left=j == 0 and i > 0)
            if i == size - 1:
                ax.set_xlabel(_with_unit(labels[j], units, 0, key=labels[j].split("[")[0]))
            if j == 0 and i > 0:
                ax.set_ylabel(_with_unit(labels[i], units, 0, key=labels[i].split("[")[0]))
    figure.align_labels()
    if bad.any():
        figure.text(0.99, 0.99, f"× {int(bad.sum())} divergent draws", color=VERMILION, ha="right", va="top")
    return figure


def _figure(
    rows: int, columns: int, *, width: float, height: float, sharex: bool = False
) -> tuple[Figure, np.ndarray]:
    import matplotlib.pyplot as plt  # slow to import, and not needed by a fit

    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width, height * rows + 0.5),
        squeeze=False,
        sharex=sharex,
        layout="constrained",
    )
    # The figure belongs to the caller: pyplot forgets it, so that notebooks show it once and no memory is kept.
    plt.close(figure)
    for ax in axes.ravel():
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, axes


def _legend(figure: Figure, ax: Axes, columns: int = 4) -> None:
    handles, labels = ax.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    for line in legend.get_lines():
        line.set_alpha(1.0)


def _mark_forecast(ax: Axes, start: float, stop: float, label: bool) -> None:
    ax.axvspan(start, stop, color=GREY, alpha=0.13, lw=0, zorder=0)
    if label:
        ax.text(start, 0.98, " forecast", transform=ax.get_xaxis_transform(), va="top", fontsize=8, color=INK)


def _note_failures(ax: Axes, prediction: Prediction) -> None:
    count = sum(prediction.n_failed.values())
    if count:
        ax.text(
            0.99, 0.02, f"{count} failed solves left out", transform=ax.transAxes, ha="right", fontsize=7, color=INK
        )


def _sparse_ticks(ax: Axes, bottom: bool, left: bool) -> None:
    ax.locator_params(axis="x", nbins=3)
    if ax.get_yticks().size:
        ax.locator_params(axis="y", nbins=3)
    ax.tick_params(labelbottom=bottom, labelleft=left, labelsize=7)


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
        known = [prediction.sites[site].times, *(prediction.sites[name].times for name in prediction.trajectories)]
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


def _scalars(posterior: Posterior, names: Sequence[str]) -> dict[str, np.ndarray]:
    groups = make_groups(posterior.select(names), ["posterior"]) if names else None
    scalars: dict[str, np.ndarray] = {}
    for name, array in groups.data["posterior"].items() if groups else ():
        flat = array.reshape(array.shape[0] * array.shape[1], -1)
        scalars |= dict(zip(element_names(name, array.shape[2:], groups), flat.T, strict=True))
    if not 1 <= len(scalars) <= _MAX_SCALARS:
        raise LatentDEError(
            f"can draw 1 to {_MAX_SCALARS} scalars, got {len(scalars)}; choose with names= out of {list(names)}"
        )
    return scalars


def _bins(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return np.linspace(low, high if high > low else low + 1.0, 31)


def _with_unit(name: str, units: Units, index: int, key: str | None = None) -> str:
    if isinstance(units, Mapping):
        unit = units.get(key or name, "")
    elif isinstance(units, str) or units is None:
        unit = units or ""
    else:
        unit = units[index]
    return f"{name} ({unit})" if unit else name
