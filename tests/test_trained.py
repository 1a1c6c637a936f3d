# SPDX-License-Identifier: Apache-2.0
"""Weights that come with the tutorials: they load, and are worth what their metrics say."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import pyro_latentde as lde
from pyro_latentde.data.series import Series
from pyro_latentde.errors import CheckpointError, LatentDEError
from pyro_latentde.models import LatentODE
from pyro_latentde.train import evaluation, registry

FOLDER = Path(__file__).resolve().parent.parent / "tutorials" / "trained"
NAMES = (
    "goku-damped-pendulum",
    "goku-damped-pendulum-known",
    "goku-pendulum",
    "latent-ode-pendulum",
    "latent-ode-periodic",
    "latent-ode-periodic-rnn",
)
FILES = ["log.csv", "metrics.json", "run.json", "weights.pt"]
LARGEST = 2_000_000  # bytes of a folder

# Nothing is drawn: a difference means that the data are others.
EXACT = ("l1_last", "l1_mean", "l1_trend", "size_extrapolation")
# Measured again from other random numbers. Between seeds of one network, L1 and CRPS have a relative sd of at most .02,
# the error of lengths one of .03; coverages, correlations and slopes of forces have sds of .012, .003 and .005. The
# bounds are four sds of a difference of two: a false alarm has a chance of 6e-5 for each number, .2 % for all.
RELATIVE = {"l1_reconstruction": 0.12, "l1_extrapolation": 0.12, "crps_extrapolation": 0.12, "length_rmse": 0.17}
ABSOLUTE = {"coverage90": 0.07, "coverage90_extrapolation": 0.02, "force_correlation": 0.02, "force_slope": 0.03}


def stored(name, file):
    return json.loads((FOLDER / name / file).read_text(encoding="utf-8"))


def test_every_folder_is_tested():
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_holds_what_one_command_makes(name):
    """No checkpoints, no pictures, and no numbers but those of a configuration."""
    folder = FOLDER / name
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert sum(path.stat().st_size for path in folder.iterdir()) < LARGEST
    facts = stored(name, "run.json")
    assert facts == {"name": name, "config": facts["config"], "overrides": {}, "seed": 0}


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_worth_what_their_metrics_say(name):
    fit, split, recipe = lde.train.load_run(FOLDER / name)
    forecast = evaluation.forecast_test(fit, recipe, split, seed=1)
    draws = evaluation.draw_parameters(fit, recipe, split, seed=1)
    found, metrics = evaluation.evaluate(fit, recipe, split, forecast, draws), stored(name, "metrics.json")
    assert {key for key in metrics if key.startswith(("l1_", "crps_", "coverage90", "length_", "force_"))} <= set(found)
    assert {key: found[key] for key in EXACT} == pytest.approx({key: metrics[key] for key in EXACT}, rel=1e-4)
    for key in found:
        if key in RELATIVE:
            assert found[key] == pytest.approx(metrics[key], rel=RELATIVE[key]), key
        if key in ABSOLUTE:
            assert found[key] == pytest.approx(metrics[key], abs=ABSOLUTE[key]), key


def test_what_the_tutorials_say_of_the_weights_is_so():
    """Physics extrapolates, a missing part costs accuracy and is found, and waves are better than no model."""
    metrics = {name: stored(name, "metrics.json") for name in NAMES}
    ahead = {name: found["l1_extrapolation"] for name, found in metrics.items()}
    floor = {name: min(found["l1_last"], found["l1_mean"]) for name, found in metrics.items()}
    assert ahead["goku-pendulum"] < min(ahead["latent-ode-pendulum"], floor["goku-pendulum"])
    assert ahead["goku-damped-pendulum"] < min(ahead["goku-damped-pendulum-known"], floor["goku-damped-pendulum"])
    assert metrics["goku-damped-pendulum"]["force_correlation"] > 0.9
    assert all(ahead[name] < floor[name] for name in ("latent-ode-periodic", "latent-ode-periodic-rnn"))


@pytest.fixture
def small_waves(monkeypatch, tmp_path):
    """A copy of a folder, whose recipe simulates a few series only: the networks do not depend on them."""
    name = "latent-ode-periodic"
    recipe = registry.RECIPES[name]
    small = dataclasses.replace(
        recipe, data=lambda config, seed: recipe.data(config.changed(train=4, heldout=2, test=2), seed)
    )
    monkeypatch.setattr(registry, "RECIPES", {name: small})
    shutil.copytree(FOLDER / name, tmp_path / name)
    return tmp_path / name, small


def test_weights_of_another_recipe_are_refused(small_waves, monkeypatch):
    folder, recipe = small_waves
    fit, split, _ = lde.train.load_run(folder)
    assert isinstance(split.train, Series) and len(split.train) == 4
    assert fit.encode(split.test.window(0, recipe.observed), 3)["z0"].shape == (3, 2, 10)
    other = dataclasses.replace(recipe, pair=lambda split: LatentODE(values=3, latent=11))
    monkeypatch.setattr(registry, "RECIPES", {"latent-ode-periodic": other})
    with pytest.raises(CheckpointError, match=r"weight model\.decoder\.weight \(3, 10\)"):
        lde.train.load_run(folder)


def test_a_recipe_that_is_gone_is_named(small_waves, monkeypatch):
    folder, _ = small_waves
    monkeypatch.setattr(registry, "RECIPES", {"another": None})
    with pytest.raises(LatentDEError, match="there is no recipe 'latent-ode-periodic'"):
        lde.train.load_run(folder)
