# SPDX-License-Identifier: Apache-2.0
"""One training run: fit, metrics, figures, all in one folder; the same command resumes it."""

from __future__ import annotations

import copy
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

from pyro_latentde.infer import Fit, Sleep, fit_svi
from pyro_latentde.infer.schedules import cosine
from pyro_latentde.train.evaluation import draw_parameters, evaluate, forecast_test
from pyro_latentde.train.figures import draw_figures
from pyro_latentde.train.recipe import Config, Recipe, Split

__all__ = ["make_pair", "run_recipe"]


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
        The metrics, None for what is not defined; ``steps`` are those of the ELBO, ``skipped`` and ``seconds`` of both
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
        "batch_size": config.batch_size,
        "accelerator": _accelerator(accelerator),
        "devices": devices,
        "precision": precision,
        "checkpoint_every": checkpoint_every,
        "progress": progress,
        **config.options,
    }
    fit = fit_svi(
        pair.model,
        pair.guide,
        split.train,
        num_steps=config.steps,
        window=config.window,
        heldout=split.heldout,
        learning_rate=config.learning_rate,
        seed=seed,
        checkpoint=out / "checkpoint",
        log=out / "log.csv",
        **common,
    )
    if config.sleep and "interrupted" not in fit.attrs:
        fit = _sleep(fit, recipe, config, split, out, seed, common)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return {}
    if "interrupted" in fit.attrs:
        asleep = "sleep_steps" in fit.attrs
        of = f"{config.sleep} steps of the sleep loss" if asleep else f"{config.steps} steps"
        say(f"interrupted after {fit.attrs['interrupted']} of {of}; the same command goes on from there")
        return {}
    fit.save(out / "weights.pt")
    metrics = _measure_and_draw(fit, recipe, split, out) | {"seed": seed}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    for name, value in metrics.items():
        say(f"  {name:24} {'not defined' if value is None else f'{value:.6g}'}")
    say(f"{out}: on {platform.machine()}, {torch.get_num_threads()} threads")
    return metrics


def _sleep(fit: Fit, recipe: Recipe, config: Config, split: Split, out: Path, seed: int, common: dict[str, Any]) -> Fit:
    """The second stage: the guide learns how wrong it is, from dreams that begin at what it found in the data."""
    slept = fit_svi(
        fit.model,
        fit.guide,
        split.train,
        **common
        | {
            "elbo": Sleep(proposal=copy.deepcopy(fit.guide)),
            "num_steps": config.sleep,
            "window": recipe.observed,
            "learning_rate": cosine(5e-4, 5e-6, config.sleep),
            "kl_weight": 1.0,
            "seed": seed + 1,
            "checkpoint": out / "checkpoint_sleep",
            "log": out / "log_sleep.csv",
        },
    )
    skipped, elapsed = fit.n_skipped + slept.n_skipped, fit.elapsed + slept.elapsed
    attrs = {**fit.attrs, "sleep_steps": len(slept.losses), "n_skipped": skipped, "sampling_time": elapsed}
    attrs |= {key: value for key, value in slept.attrs.items() if key == "interrupted"}
    return replace(slept, losses=fit.losses, n_skipped=skipped, elapsed=elapsed, attrs=attrs)


def make_pair(recipe: Recipe, split: Split, seed: int) -> nn.Module:
    """The module of model and guide, with networks from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return recipe.pair(split)


def _measure_and_draw(fit: Fit, recipe: Recipe, split: Split, out: Path) -> dict[str, float | None]:
    start = time.perf_counter()
    forecast, draws = forecast_test(fit, recipe, split), draw_parameters(fit, recipe, split)
    metrics = evaluate(fit, recipe, split, forecast, draws) | {
        # The sleep loss changes the guide, and this number is older.
        "heldout_elbo_before_sleep" if "sleep_steps" in fit.attrs else "heldout_elbo": _heldout_elbo(fit),
        "steps": len(fit.losses),
        "skipped": fit.n_skipped,
        "seconds": fit.elapsed,
        "seconds_evaluation": time.perf_counter() - start,
        "parameters": sum(p.numel() for p in (*fit.model.parameters(), *fit.guide.parameters())),
    }
    draw_figures(fit, recipe, split, forecast, draws, out)
    # JSON has no NaN
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _accelerator(asked: str) -> str | None:
    """None on a CPU: data and networks are there already."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    return None if asked == "cpu" else asked


def _heldout_elbo(fit: Fit) -> float:
    """Of the parameters that were kept, in nats per training set."""
    steps, elbos = fit.attrs["heldout_steps"], fit.attrs["heldout_elbo"]
    return elbos[steps.index(fit.attrs.get("best_step", steps[-1]))]
