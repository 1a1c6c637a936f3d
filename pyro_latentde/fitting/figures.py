# SPDX-License-Identifier: Apache-2.0
"""The figures of a run, and why one of them could not be drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_latentde.analysis import plot_pair, plot_prior_posterior, plot_trace, plot_trajectories, training_curves
from pyro_latentde.data import Series
from pyro_latentde.errors import LatentDEError
from pyro_latentde.posterior import Posterior
from pyro_latentde.posterior.prediction import Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Picture", "draw_figures", "draw_picture", "main_names"]

MAX_SCALARS = 12  # what pairs can show
MAX_SERIES = 12
_NUM_TIMES = 100
_NUM_DRAWS = 4000  # fewer make the ends of bands rough
_MAX_NUMBERS = 5_000_000
_DPI = 110


@dataclass(frozen=True)
class Picture:
    """One figure of a report.

    Args:
        file: its name in the folder; None when it could not be drawn.
        title: one line.
        text: what is to be seen, or why there is nothing.
    """

    file: str | None
    title: str
    text: str


def draw_figures(
    posterior: Posterior, prior: Posterior, series: Series, out: Path, *, seed: int, time: str
) -> list[Picture]:
    """Write the figures of a run as PNG files.

    Args:
        posterior: with its model.
        prior: draws from the prior.
        series: the data.
        out: the folder; ``training.csv`` in it is drawn as well.
        seed: of the observation noise.
        time: label of the time axis.

    Returns:
        What was drawn, in the order of a report.
    """
    pictures = _trajectories(posterior, series, out, seed, time)
    names, left_out = main_names(posterior)
    more = f" Not shown: {', '.join(left_out)}." if left_out else ""

    def add(file: str, title: str, text: str, make: Callable[[], Figure]) -> None:
        pictures.append(draw_picture(file, title, text, make, out))

    add(
        "prior_posterior.png",
        "Before and after the data",
        f"Grey: the prior. Blue: the posterior. Where both are alike, the data said nothing.{more}",
        lambda: plot_prior_posterior(prior, posterior, names),
    )
    add(
        "pair.png",
        "Pairs",
        f"Each unknown against each other. A thin diagonal: only their combination is known.{more}",
        lambda: plot_pair(posterior, names),
    )
    if (out / "training.csv").exists():
        text = "The ELBO should have become level before the end; else take more --num-steps."
        add("training.png", "Training", text, lambda: training_curves(out / "training.csv"))
    else:
        text = f"Draw after draw. All chains should cover the same band, without steps or slow waves.{more}"
        add("trace.png", "Chains", text, lambda: plot_trace(posterior, names))
    return pictures


def main_names(posterior: Posterior) -> tuple[list[str], list[str]]:
    """Sites that fit into a figure of twelve scalars, those outside of plates first, and the others."""
    sites = posterior.sites or {}
    plated = {name: bool(sites[name].plates) if name in sites else False for name in posterior.samples}
    chosen, room = [], MAX_SCALARS
    for name in sorted(posterior.samples, key=plated.get):
        size = posterior.samples[name][0, 0].numel()
        if size <= room:
            chosen.append(name)
            room -= size
    return [n for n in posterior.samples if n in chosen], [n for n in posterior.samples if n not in chosen]


def draw_picture(file: str, title: str, text: str, make: Callable[[], Figure], out: Path) -> Picture:
    """Write one figure; one that cannot be drawn says why, and takes nothing else with it.

    Args:
        file: its name in the folder.
        title: one line.
        text: what is to be seen.
        make: draws it.
        out: the folder.

    Returns:
        Picture.
    """
    try:
        make().savefig(out / file, dpi=_DPI)
    except Exception as error:  # of any kind: a page with one figure less is better than none
        (out / file).unlink(missing_ok=True)
        reason = str(error) if isinstance(error, LatentDEError) else f"{type(error).__name__}: {error}"
        return Picture(None, title, f"Not drawn: {reason}")
    return Picture(file, title, text)


def _trajectories(posterior: Posterior, series: Series, out: Path, seed: int, time: str) -> list[Picture]:
    """One figure for each series."""
    title = "Model and data"
    try:
        prediction = _predict(posterior, series, seed)
    except LatentDEError as error:
        return [Picture(None, title, f"Not drawn: {error}")]
    site = _measured(prediction, series)
    states = {name for ode in prediction.trajectories for name in prediction.sites[ode].states or ()}
    data = series if site or set(series.names or ()) <= states else None  # else which is which is not known
    text = "Points: data. " if data is not None else ""
    text += f"Line and bands: median, 50 % and 90 % of {'new measurements' if site else 'the noise-free states'}."
    pictures = []

    def draw_row(row: int) -> Figure:
        return plot_trajectories(prediction, data, site=site, row=row, time_label=time)

    for row in range(min(len(series), MAX_SERIES)):
        label = str(row if series.ids is None else series.ids[row])
        name = title if len(series) == 1 else f"{title}: {label}"
        file = f"trajectories-{row + 1}.png"
        pictures.append(draw_picture(file, name, text, lambda row=row: draw_row(row), out))
    if len(series) > MAX_SERIES:
        pictures.append(Picture(None, title, f"The first {MAX_SERIES} of {len(series)} series are drawn."))
    return pictures


def _predict(posterior: Posterior, series: Series, seed: int) -> Prediction:
    """New measurements between the times of each series too, where the model can be run there."""
    row = series.values[..., 0].numel() + len(series) * _NUM_TIMES
    draws = min(_NUM_DRAWS, max(100, _MAX_NUMBERS // (row * series.num_values)))
    options = {"num_draws": draws, "seed": seed}
    # few draws are taken several times, each with noise of its own
    repeats = draws // (posterior.num_chains * posterior.num_draws)
    if repeats > 1:
        posterior = posterior.select(draws=[*range(posterior.num_draws)] * repeats)
    try:
        prediction = posterior.with_model(posterior.model, _denser(series)).predict(**options)
    except Exception:  # such as unknowns for each time: the model's own business, and it did run at its own times
        prediction = posterior.predict(**options)
    return _spread(prediction, len(series))


def _measured(prediction: Prediction, series: Series) -> str | None:
    """The observed site that is the data, drawn anew; states may be others, or more of them."""
    for name, values in prediction.observations.items():
        if values.ndim >= 4 and values.shape[-1] == series.num_values:
            return name
    return None


def _denser(series: Series) -> Series:
    """The same series with more times, at which nothing was observed; the first and last times stay."""
    if series.inputs is not None:
        raise LatentDEError("inputs are known at the times of the series only")
    steps = torch.linspace(0.0, 1.0, _NUM_TIMES, dtype=series.times.dtype)
    first, last = series.times[:, :1], series.times[:, -1:]
    times, order = torch.cat([series.times, first + (last - first) * steps], 1).sort(dim=1, stable=True)
    filler = series.values[:, -1:].expand(-1, _NUM_TIMES, -1)
    values = torch.cat([series.values, filler], 1)
    mask = torch.cat([series.mask, torch.zeros_like(filler, dtype=torch.bool)], 1)
    rows = torch.arange(len(series))[:, None]
    return replace(series, times=times, values=values[rows, order], mask=mask[rows, order])


def _spread(prediction: Prediction, n: int) -> Prediction:
    """Repeats of one experiment share one trajectory: each of the ``n`` series gets it as its row."""

    def rows(value: Tensor) -> Tensor:
        value = value.unsqueeze(2) if value.ndim == 4 else value
        return value.expand(-1, -1, n, -1, -1) if n > 1 and value.ndim == 5 and value.shape[2] == 1 else value

    trajectories = {name: rows(value) for name, value in prediction.trajectories.items()}
    observations = type(prediction.observations)({name: rows(value) for name, value in prediction.observations.items()})
    return replace(prediction, trajectories=trajectories, observations=observations)
