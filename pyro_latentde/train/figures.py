# SPDX-License-Identifier: Apache-2.0
"""Figures of a training run: its course, latent trajectories, recovered parameters, and forecasts of a test series."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_latentde.analysis.film import animation, film_strip
from pyro_latentde.analysis.latent_plots import forecast_bands, latent_trajectories, recovery
from pyro_latentde.analysis.training_plots import training_curves
from pyro_latentde.infer import Fit
from pyro_latentde.infer.forecast import Forecast
from pyro_latentde.train.recipe import Recipe, Split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_figures"]

_MOST_PANELS = 6
_MOST_FRAMES = 50  # of an animation: each is drawn and coded anew
_FRAMES_PER_SECOND = 20.0  # of the data


def draw_figures(
    fit: Fit, recipe: Recipe, split: Split, forecast: Forecast, draws: Mapping[str, Tensor], out: Path
) -> None:
    """``training.png``, ``latent.png``, ``recovery_*.png``; ``film.png`` and ``film.gif``, or ``forecast.png``.

    Args:
        fit: the trained pair.
        recipe: what was trained.
        split: its series.
        forecast: of the test series.
        draws: of their parameters, name -> (S, N).
        out: folder.
    """
    test = split.test
    mark = float(test.times[0, recipe.observed - 1])
    _save(training_curves(out / "log.csv"), out / "training.png")
    names = getattr(fit.model, "states", None) or list(range(min(_MOST_PANELS, forecast.z.shape[-1])))
    _save(latent_trajectories(forecast, series=0, mark=mark, states=names), out / "latent.png")
    known = [name for name in split.truth.parameters if name in draws]
    for name in known[:_MOST_PANELS]:
        _save(recovery(draws[name], split.truth.parameters[name], name), out / f"recovery_{name}.png")
    if test.frame is None:
        features = list(range(min(_MOST_PANELS, test.values.shape[-1])))
        units = recipe.unit or None
        _save(forecast_bands(forecast, test, row=0, mark=mark, features=features, units=units), out / "forecast.png")
    else:
        _draw_films(test.values[0], forecast.mean[0], test.times[0], test.frame, recipe.observed, out)


def _draw_films(
    observed: Tensor, predicted: Tensor, times: Tensor, frame: tuple[int, ...], count: int, out: Path
) -> None:
    rows = {"observed": observed, "predicted": predicted, "difference": predicted - observed}
    strip = film_strip(rows, frame, times, every=math.ceil(len(times) / 12), mark=float(times[count - 1]))
    _save(strip, out / "film.png")
    every = math.ceil(len(times) / _MOST_FRAMES)
    shown = torch.arange(0, len(times), every)
    rows = {name: rows[name][shown] for name in ("observed", "predicted")}
    animation(rows, frame, out / "film.gif", shown, fps=_FRAMES_PER_SECOND / every, mark=count - 1, time_label="frame")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
