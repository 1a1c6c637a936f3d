# SPDX-License-Identifier: Apache-2.0
"""Runs by the name of their recipe: what is needed to make one again is in its folder, and it can be read back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyro_latentde.errors import DataError, LatentDEError
from pyro_latentde.infer import Fit
from pyro_latentde.train.recipe import Config, Recipe, Split
from pyro_latentde.train.registry import find_recipe
from pyro_latentde.train.run import make_pair, run_recipe

__all__ = ["default_folder", "load_run", "train"]

_FILE = "run.json"
_CONFIGS = ("quick", "full")


def default_folder(name: str, config: str = "quick", seed: int = 0) -> Path:
    """``train_output/<name>-<config>-<seed>``."""
    return Path("train_output") / f"{name}-{config}-{seed}"


def train(
    name: str,
    config: str = "quick",
    out: str | Path | None = None,
    *,
    seed: int = 0,
    overrides: Mapping[str, int] | None = None,
    **options: Any,
) -> dict[str, float | None]:
    """Train a pair of the zoo: what ``pyro-latentde train`` does.

    Args:
        name: of a recipe, see ``RECIPES``.
        config: ``"quick"`` or ``"full"``.
        out: folder of the results, by default :func:`default_folder`; one with a checkpoint of this run is continued.
        seed: of the data, the networks and the training.
        overrides: numbers of the configuration to be others, such as ``{"steps": 500}``; schedules are stretched to
            the steps.
        **options: of :func:`.run_recipe`: ``accelerator``, ``devices``, ``precision``, ``progress``, ...

    Returns:
        The metrics; none if the run was interrupted.

    Raises:
        LatentDEError: no such recipe or configuration, or the folder holds another run.
    """
    recipe, numbers = find_recipe(name), dict(overrides or {})
    chosen = _choose(recipe, config, numbers)
    out = default_folder(name, config, seed) if out is None else Path(out)
    facts = {"name": name, "config": config, "overrides": numbers, "seed": seed}
    if (out / _FILE).exists() and (found := _read(out)) != facts:
        other = ", ".join(f"{key} {found.get(key)}" for key in facts if found.get(key) != facts[key])
        raise LatentDEError(f"{out} holds another run ({other}): give another folder, --out, or delete that one")
    out.mkdir(parents=True, exist_ok=True)
    if not (out / _FILE).exists():
        # Each process of a run writes the same, and none may read half a file.
        partial = out / f".{_FILE}.{os.getpid()}.partial"
        partial.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, out / _FILE)
    return run_recipe(recipe, chosen, out, seed=seed, **options)


def load_run(folder: str | Path) -> tuple[Fit, Split, Recipe]:
    """Read a finished run back: its data are simulated again, its weights are read.

    Args:
        folder: of :func:`train`.

    Returns:
        The fit, on the CPU and without losses; the series; the recipe. ``fit.forecast(split.test[:1].window(0, 50),
        50)`` forecasts a test series.

    Raises:
        DataError: the folder holds no run, or one that has not ended.
    """
    folder = Path(folder)
    facts = _read(folder)
    recipe = find_recipe(facts["name"])
    if not (folder / "weights.pt").exists():
        raise DataError(f"{folder} has no weights yet: the run has not ended; resume it by the command that began it")
    config = _choose(recipe, facts["config"], facts["overrides"])
    split = recipe.data(config, facts["seed"])
    pair = make_pair(recipe, split, facts["seed"])
    return Fit.load(folder / "weights.pt", pair.model, pair.guide, split.train), split, recipe


def _choose(recipe: Recipe, config: str, overrides: Mapping[str, int]) -> Config:
    if config not in _CONFIGS:
        raise LatentDEError(f"there is no configuration {config!r}; there are: {', '.join(_CONFIGS)}")
    return getattr(recipe, config).changed(**overrides)


def _read(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / _FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{folder} holds no run of `pyro-latentde train`: {_FILE} cannot be read ({error})") from None
