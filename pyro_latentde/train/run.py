# SPDX-License-Identifier: Apache-2.0
"""One training run: fit, metrics, figures, all in one folder; the same command resumes it."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_latentde.infer import Fit, fit_svi, npe, refine
from pyro_latentde.infer.schedules import cosine, warmup
from pyro_latentde.train.evaluation import draw_parameters, evaluate, floors, forecast_test
from pyro_latentde.train.figures import draw_figures
from pyro_latentde.train.recipe import Config, Recipe, Split

__all__ = ["make_pair", "run_recipe"]

_POLISHING = 1e-3  # learning rate


def run_recipe(
    recipe: Recipe,
    config: Config,
    out: str | Path,
    *,
    seed: int = 0,
    accelerator: str = "auto",
    devices: int = 1,
    precision: str = "32-true",
    checkpoint_every: float = 2.0,
    progress: bool = True,
    say: Callable[[str], Any] = print,
) -> dict[str, float | None]:
    """Train, measure, draw.

    Args:
        recipe: what to train on what.
        config: its numbers, ``recipe.quick`` or ``recipe.full``.
        out: folder of ``metrics.json``, ``weights.pt``, ``log.csv``, the checkpoint and the figures; a folder with a
            checkpoint of the same run is continued.
        seed: of the data, the networks and the training.
        accelerator: ``"cpu"``, ``"cuda"``, or ``"auto"``, a GPU where there is one.
        devices: how many; each is a process that runs the same script.
        precision: ``"32-true"`` or ``"bf16-mixed"``.
        checkpoint_every: minutes between checkpoints.
        progress: show a bar.
        say: where lines of text go.

    Returns:
        The metrics, None for what is not defined; ``steps`` are those of the ELBO, ``skipped`` and ``seconds`` of all
        stages, and after a sleep stage the held-out ELBO is ``heldout_elbo_before_sleep``. None at all if the run was
        interrupted, and in all processes but the first.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    say(recipe.title)
    split = recipe.data(config, seed)
    say(f"train {split.train}, held out {len(split.heldout)}, test {len(split.test)} series")
    pair = make_pair(recipe, split, seed)
    common: dict[str, Any] = {
        "accelerator": _accelerator(accelerator),
        "devices": devices,
        "precision": precision,
        "checkpoint_every": checkpoint_every,
        "progress": progress,
    }
    fit, stage = _train(pair, recipe, config, split, out, seed, common)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return {}
    if "interrupted" in fit.attrs:
        say(f"interrupted after {fit.attrs['interrupted']} steps of {stage}; the same command goes on from there")
        return {}
    fit.save(out / "weights.pt")
    metrics = _measure_and_draw(fit, recipe, config, split, out, common) | {"seed": seed}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    for name, value in metrics.items():
        say(f"  {name:24} {'not defined' if value is None else f'{value:.6g}'}")
    say(f"{out}: on {platform.machine()}, {torch.get_num_threads()} threads")
    return metrics


def _train(
    pair: nn.Module, recipe: Recipe, config: Config, split: Split, out: Path, seed: int, common: dict[str, Any]
) -> tuple[Fit, str]:
    """All stages, each with its own checkpoint; the fit, and the stage in which it was interrupted."""

    def elbo(stage: str, steps: int, rate: Any, window: Any) -> Fit:
        return fit_svi(
            pair.model,
            pair.guide,
            split.train,
            num_steps=steps,
            window=window,
            heldout=split.heldout,
            batch_size=config.batch_size,
            learning_rate=rate,
            seed=seed,
            **_files(out, stage),
            **config.options,
            **common,
        )

    def sleep(fit: Fit, stage: str) -> Fit:
        seen = split.train.window(0, min(recipe.observed, split.train.times.shape[1]))
        numbers = {"num_dreams": config.dreams, "num_steps": config.sleep, "batch_size": config.batch_size}
        return npe(fit, seen, seed=seed + 1, **numbers, **_files(out, stage), **common)

    fit = elbo("", config.steps, config.learning_rate, config.window)
    if not config.sleep or "interrupted" in fit.attrs:
        return fit, "the ELBO"
    fit = sleep(fit, "sleep")
    if not config.polish or "interrupted" in fit.attrs:
        return fit, "the sleep stage"
    rate = warmup(max(1, config.polish // 10), cosine(_POLISHING, _POLISHING / 50, config.polish))
    polished = elbo("polish", config.polish, rate, recipe.observed)
    attrs = {**polished.attrs, "npe_steps": fit.attrs["npe_steps"]}
    skipped, elapsed = fit.n_skipped + polished.n_skipped, fit.elapsed + polished.elapsed
    losses = torch.cat([fit.losses, polished.losses])
    fit = replace(polished, losses=losses, n_skipped=skipped, elapsed=elapsed, attrs=attrs)
    return (fit, "polishing") if "interrupted" in attrs else (sleep(fit, "sleep_again"), "the last sleep stage")


def _files(out: Path, stage: str) -> dict[str, Path]:
    end = f"_{stage}" if stage else ""
    return {"checkpoint": out / f"checkpoint{end}", "log": out / f"log{end}.csv"}


def make_pair(recipe: Recipe, split: Split, seed: int) -> nn.Module:
    """The module of model and guide, with networks from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return recipe.pair(split)


def _measure_and_draw(
    fit: Fit, recipe: Recipe, config: Config, split: Split, out: Path, common: dict[str, Any]
) -> dict[str, float | None]:
    start = time.perf_counter()
    metrics = dict(recipe.measure(fit, split, out) if recipe.measure else _usual(fit, recipe, split, out))
    if config.refine and not recipe.measure:
        metrics |= _refined(fit, recipe, config, split, common)
    metrics |= {
        # The last sleep stage changes the guide, and this number is older.
        "heldout_elbo_before_sleep" if "npe_steps" in fit.attrs else "heldout_elbo": _heldout_elbo(fit),
        "steps": len(fit.losses),
        "skipped": fit.n_skipped,
        "seconds": fit.elapsed,
        "seconds_evaluation": time.perf_counter() - start,
        "parameters": sum(p.numel() for p in (*fit.model.parameters(), *fit.guide.parameters())),
    }
    # JSON has no NaN
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _usual(fit: Fit, recipe: Recipe, split: Split, out: Path) -> dict[str, float]:
    """Forecasts and parameters of the test series."""
    forecast, draws = forecast_test(fit, recipe, split), draw_parameters(fit, recipe, split)
    draw_figures(fit, recipe, split, forecast, draws, out)
    return evaluate(fit, recipe, split, forecast, draws)


def _refined(fit: Fit, recipe: Recipe, config: Config, split: Split, common: dict[str, Any]) -> dict[str, float]:
    """The metrics of the posterior when the guide has gone on learning from what is observed of the test series."""
    seen = split.test.window(0, recipe.observed)
    quiet = {"progress": common["progress"], "accelerator": common["accelerator"], "precision": common["precision"]}
    fit = refine(fit, seen, num_steps=config.refine, batch_size=config.batch_size, **quiet)
    forecast, draws = forecast_test(fit, recipe, split), draw_parameters(fit, recipe, split)
    found = evaluate(fit, recipe, split, forecast, draws)
    same = {*floors(seen, recipe.observed - 1), *recipe.floors}  # what does not read the guide
    return {f"refined_{name}": value for name, value in found.items() if name.partition("_")[2] not in same}


def _accelerator(asked: str) -> str | None:
    """None on a CPU: data and networks are there already."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    return None if asked == "cpu" else asked


def _heldout_elbo(fit: Fit) -> float:
    """Of the parameters that were kept, in nats per training set."""
    steps, elbos = fit.attrs["heldout_steps"], fit.attrs["heldout_elbo"]
    return elbos[steps.index(fit.attrs.get("best_step", steps[-1]))]
