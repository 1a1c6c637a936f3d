# SPDX-License-Identifier: Apache-2.0
"""One training run: fit, metrics, figures, all in one folder; the same command resumes it."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from pyro_latentde.analysis.film import animation, film_strip
from pyro_latentde.analysis.latent_plots import forecast_bands, latent_trajectories, recovery
from pyro_latentde.analysis.training_plots import training_curves
from pyro_latentde.infer import Fit, fit_svi
from pyro_latentde.infer.forecast import Forecast
from pyro_latentde.train.evaluation import evaluate, forecast_test, named_draws
from pyro_latentde.train.recipe import Config, Recipe, Split

__all__ = ["run_recipe"]


def run_recipe(
    recipe: Recipe,
    config: Config,
    out: str | Path,
    *,
    seed: int = 0,
    accelerator: str = "auto",
    devices: int | str = 1,
    precision: str = "32-true",
    checkpoint_every: float = 2.0,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train, measure, draw.

    Args:
        recipe: what to train on what.
        config: its numbers, ``recipe.quick`` or ``recipe.full``.
        out: folder of ``metrics.json``, ``weights.pt``, ``log.csv``, the checkpoint and the figures; a folder with a
            checkpoint of the same run is continued.
        seed: of the data, the networks and the training.
        accelerator: ``"auto"``, ``"cpu"``, ``"cuda"``, as for ``infer.fit_svi``.
        devices: how many.
        precision: ``"32-true"`` or ``"bf16-mixed"``.
        checkpoint_every: minutes between checkpoints.
        progress: show a bar.
        say: where lines of text go.

    Returns:
        The metrics.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    say(recipe.title)
    split = recipe.data(config, seed)
    say(f"train {split.train}, held out {len(split.heldout)}, test {len(split.test)} series")
    fit = fit_pair(recipe, config, split, out, seed, accelerator, devices, precision, checkpoint_every, progress)
    fit.save(out / "weights.pt")
    start = time.perf_counter()
    forecast = forecast_test(fit, recipe, split)
    metrics = {
        **evaluate(fit, recipe, split, forecast),
        "heldout_elbo": fit.attrs.get("best_heldout_elbo", float("nan")),
        "steps": len(fit.losses),
        "skipped": fit.n_skipped,
        "seconds": fit.elapsed,
        "seconds_evaluation": time.perf_counter() - start,
        "parameters": sum(p.numel() for p in (*fit.model.parameters(), *fit.guide.parameters())),
        "seed": seed,
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    draw_figures(fit, recipe, split, forecast, out)
    for name, value in metrics.items():
        say(f"  {name:24} {value:.6g}")
    say(f"{out}: on {platform.machine()}, {torch.get_num_threads()} threads")
    return metrics


def fit_pair(
    recipe: Recipe,
    config: Config,
    split: Split,
    out: Path,
    seed: int,
    accelerator: str,
    devices: int | str,
    precision: str,
    checkpoint_every: float,
    progress: bool,
) -> Fit:
    """Networks from the seed, then ``infer.fit_svi``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pair = recipe.pair(split)
    return fit_svi(
        pair.model,
        pair.guide,
        split.train,
        num_steps=config.steps,
        batch_size=config.batch_size,
        window=config.window,
        heldout=split.heldout,
        learning_rate=config.learning_rate,
        seed=seed,
        accelerator=accelerator,
        devices=devices,
        precision=precision,
        checkpoint=out / "checkpoint",
        checkpoint_every=checkpoint_every,
        log=out / "log.csv",
        progress=progress,
        **config.options,
    )


def draw_figures(fit: Fit, recipe: Recipe, split: Split, forecast: Forecast, out: Path) -> None:
    """Training curves, latent trajectories, recovered parameters; films of pictures, bands of other series."""
    mark = float(split.test.times[0, recipe.observed - 1])
    _save(training_curves(out / "log.csv"), out / "training.png")
    _save(latent_trajectories(forecast, series=0, mark=mark, states=fit.model.states), out / "latent.png")
    draws = named_draws(fit, split, recipe.observed)
    for name, truth in split.truth.parameters.items():
        if name in draws:
            _save(recovery(draws[name], truth, name), out / f"recovery_{name}.png")
    if split.test.frame is None:
        _save(forecast_bands(forecast, split.test, series=[0, 1, 2], mark=mark), out / "forecast.png")
        return
    rows = {"observed": split.test.values[0], "predicted": forecast.mean[0]}
    every = max(1, split.test.times.shape[1] // 12)
    _save(film_strip(rows, split.test.frame, split.test.times[0], every=every, mark=mark), out / "film.png")
    animation(rows, split.test.frame, out / "film.gif", mark=recipe.observed)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)
