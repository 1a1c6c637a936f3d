# SPDX-License-Identifier: Apache-2.0
"""Every recipe from simulation to figures, at sizes that take seconds; what is measured, against numbers by hand."""

import dataclasses
import importlib.util
import json
import math

import matplotlib.image
import pandas as pd
import pyro
import pytest
import torch
from torch.testing import assert_close

import pyro_latentde as lde
from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer.forecast import Forecast
from pyro_latentde.models.systems import periodic
from pyro_latentde.train import RECIPES, Recipe, Split, Truth, evaluation, figures, run_recipe
from pyro_latentde.train.run import make_pair

NUMBERS = {"train": 6, "heldout": 3, "test": 3, "steps": 3, "batch_size": 2, "dreams": 8}
NIGHTS = {"sleep": 3, "polish": 2, "refine": 2}  # of recipes that have such stages
HAS_HOPPER = all(importlib.util.find_spec(name) for name in ("mujoco", "dm_control"))
# those with metrics of their own have tests of their own
PAIRS = [n for n, recipe in RECIPES.items() if recipe.measure is None and (HAS_HOPPER or "hopper" not in n)]


def _few(recipe):
    return NUMBERS | {stage: few for stage, few in NIGHTS.items() if getattr(recipe.quick, stage)}


@pytest.fixture
def few_draws(monkeypatch):
    monkeypatch.setattr(evaluation, "DRAWS", 8)
    monkeypatch.setattr(evaluation, "PATHS", (3, 3))
    monkeypatch.setattr(figures, "_MOST_FRAMES", 4)


@pytest.mark.parametrize("name", PAIRS)
def test_every_recipe_runs_from_end_to_end(name, few_draws, tmp_path):
    recipe = RECIPES[name]
    said = []
    metrics = run_recipe(
        recipe, recipe.quick.changed(**_few(recipe)), tmp_path, accelerator="cpu", progress=False, say=said.append
    )
    assert metrics == json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert (metrics["steps"], metrics["skipped"], metrics["failed"], metrics["seed"]) == (3, 0, 0, 0)
    assert all(isinstance(value, int | float) for value in metrics.values())
    wanted = {"l1_reconstruction", "l1_extrapolation", "l1_last", "l1_mean", "seconds"}
    wanted.add("heldout_elbo_before_sleep" if recipe.quick.sleep else "heldout_elbo")
    if recipe.quick.refine:
        wanted |= {"refined_l1_extrapolation", "refined_crps_extrapolation", "refined_coverage90"}
        assert not any(name.startswith("refined_l1_last") for name in metrics)  # a floor stays what it is
    if name.startswith("goku"):
        wanted |= {"coverage90"} | {
            f"{p}_{score}" for p in recipe.range for score in ("correlation", "rmse", "coverage90")
        }
    assert wanted <= set(metrics) and all(name in " ".join(said) for name in wanted)
    assert len(pd.read_csv(tmp_path / "log.csv")) == 3
    assert (tmp_path / "weights.pt").exists() and list((tmp_path / "checkpoint").iterdir())
    drawn = {path.name for path in tmp_path.glob("*.png")} | {path.name for path in tmp_path.glob("*.gif")}
    films = {"film.png", "film.gif"} if "pendulum" in name else {"forecast.png"}
    assert drawn == {"training.png", "latent.png"} | films | {name for name in drawn if name.startswith("recovery_")}
    assert {f"recovery_{p}.png" for p in recipe.range} <= drawn
    for picture in tmp_path.glob("*.png"):
        assert matplotlib.image.imread(picture).std() > 0.02, f"{picture.name} is blank"


@pytest.mark.skipif(HAS_HOPPER, reason="MuJoCo is installed, and the test above runs it")
def test_the_hopper_says_what_it_needs(tmp_path):
    recipe = RECIPES["latent-ode-hopper"]
    with pytest.raises(ImportError, match="pip install"):
        run_recipe(recipe, recipe.quick.changed(**NUMBERS), tmp_path, progress=False, say=lambda line: None)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_begin_with_solves_that_succeed(name):
    """Untrained draws for 16 series over the longest training window: a failed solve would skip the step."""
    recipe = RECIPES[name]
    split = recipe.data(recipe.quick.changed(train=16, heldout=1, test=1, steps=10), 1)
    pair = make_pair(recipe, split, 1)
    window = recipe.quick.window(recipe.quick.steps) if callable(recipe.quick.window) else split.train.times.shape[1]
    series = split.train.window(0, window)
    untrained = lde.infer.Fit(torch.zeros(0), 0, pair.guide, pair.model, (series,), {}, 0.0, {})
    assert untrained.reconstruct(series, 1, noise=False).means.isfinite().all()


def test_a_configuration_stretches_its_schedules():
    quick = RECIPES["goku-pendulum"].quick
    short = quick.changed(steps=quick.steps // 10, train=9)
    assert (short.steps, short.train, short.test) == (quick.steps // 10, 9, quick.test)
    for step in (0, 20, 100, 249):
        assert short.learning_rate(step) == quick.learning_rate(10 * step)
        assert short.window(step) == quick.window(10 * step)
    assert quick.changed(train=9).window is quick.window
    assert quick.changed(sleep=0).sleep == 0
    for wrong in ({"step": 3}, {"steps": 0}, {"sleep": -1}):
        with pytest.raises(LatentDEError, match="train, heldout, test, steps, batch_size"):
            quick.changed(**wrong)


def test_floors_use_what_is_observed():
    nan = float("nan")
    values = torch.tensor([[[1.0, 5.0], [3.0, nan], [nan, 9.0], [7.0, 7.0], [0.0, 0.0]]])
    series = lde.Series.from_tensors(torch.tensor([0.0, 1.0, 2.0, 3.0, 5.0]), values)
    series = dataclasses.replace(series, values=torch.where(series.mask, series.values, 99.0))  # whatever fills gaps
    found = evaluation.floors(series, 4)
    assert found["last"].tolist() == [[[7.0, 7.0]]]
    assert_close(found["mean"], torch.tensor([[[11 / 3, 7.0]]]))
    # lines through (0, 1), (1, 3), (3, 7) and (0, 5), (2, 9), (3, 7), at 5
    assert_close(found["trend"], torch.tensor([[[11.0, 7 + (5 - 5 / 3) * 4 / (14 / 3)]]]))
    assert_close(evaluation.floors(series, 3)["last"], torch.tensor([[[3.0, 9.0], [3.0, 9.0]]]))


def test_metrics_by_hand():
    """Two draws of two series with three times, of which the last is forecast; a third draw failed."""
    values = torch.zeros(2, 3, 1)
    clean = torch.tensor([[[0.0], [0.0], [1.0]], [[0.0], [0.0], [3.0]]])
    series = lde.Series.from_tensors(torch.arange(3.0), values, dtype=torch.float32)
    means = torch.stack([torch.full((2, 3, 1), 1.0), torch.full((2, 3, 1), 2.0), torch.full((2, 3, 1), float("nan"))])
    forecast = Forecast(series.times, {}, None, means, None)
    zero = {"zero": lambda split, k: torch.zeros_like(split.test.values[:, k:])}
    recipe = Recipe("", None, None, None, None, observed=2, range={"length": (1.0, 2.0)}, floors=zero)
    split = Split(series, series, series, Truth({"length": torch.tensor([1.0, 2.0]), "other": torch.zeros(2)}, clean))
    draws = {"length": torch.tensor([[1.1, 1.9], [1.3, 1.7], [1.2, 1.8]])}
    found = evaluation.evaluate(None, recipe, split, forecast, draws)
    assert found["l1_reconstruction"] == 1.5 and found["failed"] == pytest.approx(1 / 3)
    assert found["l1_extrapolation"] == pytest.approx((0.5 + 1.5) / 2)
    assert found["rmse_extrapolation"] == pytest.approx(math.sqrt((0.25 + 2.25) / 2))
    assert found["l1_last"] == found["l1_mean"] == found["l1_trend"] == found["size_extrapolation"] == 2.0
    assert found["l1_zero"] == 2.0 and found["rmse_zero"] == pytest.approx(math.sqrt(5.0))
    assert found["length_correlation"] == pytest.approx(1.0)
    assert found["length_rmse"] == found["length_rmse_of_range"] == pytest.approx(0.2)
    assert found["length_coverage90"] == found["coverage90"] == 0.0 and "other_rmse" not in found


def test_noise_is_no_part_of_what_is_to_be_forecast():
    recipe = RECIPES["latent-ode-periodic"]
    config = dataclasses.replace(recipe.quick, train=2, heldout=2, test=3)
    split = recipe.data(config, 4)
    drawn = periodic.simulate(7, 5004, keep=50, num_features=3, missing=0.3)
    assert torch.equal(split.test.values, drawn.series.values[4:])
    assert_close(split.truth.clean, periodic.observables(drawn.z)[4:].float())
    residual = (split.test.values - split.truth.clean)[split.test.mask]
    assert residual.std() == pytest.approx(0.01, rel=0.3) and not split.test.complete


def test_guides_of_the_waves_are_compared_on_equal_terms():
    one, other = RECIPES["latent-ode-periodic"], RECIPES["latent-ode-periodic-rnn"]
    assert (one.quick, one.full, one.observed) == (other.quick, other.full, other.observed)
    splits = [recipe.data(recipe.quick.changed(train=2, heldout=1, test=2), 3) for recipe in (one, other)]
    assert torch.equal(splits[0].test.values, splits[1].test.values)
    pairs = [make_pair(recipe, split, 3) for recipe, split in zip((one, other), splits, strict=True)]
    models = [sum(p.numel() for p in pair.model.parameters()) for pair in pairs]
    guides = [sum(p.numel() for p in pair.guide.parameters()) for pair in pairs]
    assert models[0] == models[1] and guides[0] == pytest.approx(guides[1], rel=0.02)


def test_the_guide_of_an_extrapolation_reads_the_first_times_only():
    """What comes later changes nothing in its draws, and its sites keep the weight of the whole series."""
    recipe = RECIPES["latent-ode-spirals"]
    split = recipe.data(recipe.quick.changed(train=8, heldout=1, test=1), 0)
    pair = make_pair(recipe, split, 0)
    batch = split.train.batch([1, 5])
    later = torch.arange(100) >= recipe.observed
    other = dataclasses.replace(batch, values=batch.values + later[:, None] * 10.0)
    traces = []
    for series in (batch, other, batch.window(0, recipe.observed)):
        pyro.set_rng_seed(3)
        traces.append(pyro.poutine.trace(pair.guide).get_trace(series))
    assert torch.equal(traces[0].nodes["z0"]["value"], traces[1].nodes["z0"]["value"])
    assert torch.equal(traces[0].nodes["z0"]["value"], traces[2].nodes["z0"]["value"])
    assert traces[0].nodes["z0"]["scale"] == pytest.approx(8 / 2)
