# SPDX-License-Identifier: Apache-2.0
"""A latent ODE of event times: the rate of a Poisson process, recovered from the events alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pyro_latentde.analysis.drawing import INK
from pyro_latentde.analysis.latent_plots import forecast_bands
from pyro_latentde.analysis.training_plots import training_curves
from pyro_latentde.infer import Fit, schedules
from pyro_latentde.infer.forecast import Forecast
from pyro_latentde.models.event_series import as_events
from pyro_latentde.models.latent_events import EventSums, LatentEvents
from pyro_latentde.models.systems import bursts
from pyro_latentde.posterior import scores
from pyro_latentde.train.recipe import Config, Recipe, Split, Truth

__all__ = ["RECIPES"]

END = 2.0  # s
GRID = torch.linspace(0.0, END, 101)  # where intensities are compared
DRAWS = 100
RADIAN = 0.3  # s, in which the oscillator turns by about one radian: the unit of time of the networks


def _config(train: int, heldout: int, test: int, steps: int) -> Config:
    rate = schedules.warmup(30, schedules.cosine(1e-2, 1e-4, steps))
    return Config(train, heldout, test, steps, 50, learning_rate=rate)


def _data(config: Config, seed: int) -> Split:
    """Series of events; what is true of the test series are their intensities at the times of the grid, (N, 101, 1)."""
    drawn = bursts.simulate(config.num_series, 6000 + seed, end=END)
    split = Split.of(drawn, config)
    true = bursts.intensity(bursts.states_at(drawn.z[-config.test :, 0], GRID.double()))
    return replace(split, truth=Truth(clean=true[..., None]))


def _pair(split: Split) -> nn.Module:
    count = float(as_events(split.train).counts.float().mean())
    encoder = EventSums(40, time_scale=RADIAN, count=count)
    # a rough solve is far more exact than any inference from some hundred events
    rough = {"rtol": 1e-3, "atol": 1e-3}
    return LatentEvents(latent=4, time_scale=RADIAN, rate=count / END, guide={"encoder": encoder}, **rough)


def _measure(fit: Fit, split: Split, out: Path) -> dict[str, float]:
    """Integrated squared error of the posterior mean of the intensity, as a part of the intensity's variance over time.

    Both are summed over the test series. Beside it that of each series' mean rate, and the coverage of 90 % intervals.
    """
    draws = fit.encode(split.test, num_samples=DRAWS)["z0"]
    with torch.no_grad():
        found = fit.model.intensity(draws, GRID.to(draws), 0.0).cpu()
    true = split.truth.clean[..., 0]
    mean_rate = as_events(split.test).counts[:, None] / END
    _draw(found, true, as_events(split.test[:1]).times[0], out)
    return {
        "intensity_error": _error(found.mean(0), true),
        "intensity_error_mean_rate": _error(mean_rate.expand_as(true), true),
        "intensity_coverage90": scores.coverage(found, true),
    }


def _error(found: Tensor, true: Tensor) -> float:
    return float((found - true).square().sum() / (true - true.mean(1, keepdim=True)).square().sum())


def _draw(found: Tensor, true: Tensor, events: Tensor, out: Path) -> None:
    training_curves(out / "log.csv").savefig(out / "training.png", dpi=150)
    forecast = Forecast(GRID.expand(len(true), -1), {}, None, found[..., None], None)
    figure = forecast_bands(forecast, row=0, time_label="time (s)")
    ax = figure.axes[0]
    events = events[events.isfinite()]
    ax.plot(GRID, true[0], "--", color=INK, lw=1.3)
    ax.plot(events, torch.zeros_like(events), "|", color=INK, ms=6, alpha=0.5)
    ax.set_ylabel("intensity (1/s)")
    ax.set_title("dashed: the truth; ticks: the events of this series", fontsize=9)
    figure.savefig(out / "intensity.png", dpi=150)


RECIPES = {
    "latent-ode-events": Recipe(
        "latent ODE on events of a Poisson process whose rate follows a hidden oscillator",
        _config(500, 50, 100, 900),
        _config(1000, 100, 200, 4000),
        _data,
        _pair,
        observed=1,
        measure=_measure,
    ),
}
