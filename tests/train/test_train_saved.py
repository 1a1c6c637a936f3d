# SPDX-License-Identifier: Apache-2.0
"""Runs by name: resumed by the same call, read back from their folder, and what they say of bad input."""

import dataclasses
import json
import signal

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_latentde as lde
from pyro_latentde.errors import CheckpointError, DataError, LatentDEError, SolveError
from pyro_latentde.infer import Sleep, schedules
from pyro_latentde.models import GOKU
from pyro_latentde.nn import MLP
from pyro_latentde.train import Config, Recipe, Split, Truth, evaluation, registry, run, saved

NAME = "decay"
NIGHT = {"sleep": 6, "dreams": 40}
CONFIG = Config(12, 4, 5, 8, 4, schedules.progressive(3, 6, 4), 1e-2, options={"eval_every": 4})


def decay(t, z, p):
    return -p["rate"] * z


def make_data(config, seed):
    generator = torch.Generator().manual_seed(seed)
    n = config.train + config.heldout + config.test
    rates = 0.5 + torch.rand(n, generator=generator)
    times = torch.linspace(0.0, 3.0, 10)
    clean = torch.exp(-rates[:, None, None] * times[None, :, None]) * torch.tensor([1.0, 2.0])
    series = lde.Series.from_tensors(times, clean + 0.05 * torch.randn(n, 10, 2, generator=generator), names=("a", "b"))
    a, b = config.train, config.train + config.heldout
    return Split(series[:a], series[a:b], series[b:], Truth({"rate": rates[b:]}, clean[b:]))


def make_pair(split):
    start = dist.Normal(torch.ones(1), 0.5).to_event(1)
    return GOKU(
        decay,
        start,
        {"rate": dist.Uniform(0.5, 1.5)},
        values=2,
        decoder=nn.Linear(1, 2),
        states=("z",),
        guide={"frames": MLP(2, 4, hidden=(4,)), "hidden": 4},
    )


@pytest.fixture(autouse=True)
def recipe(monkeypatch):
    small = Recipe("two traces of a decay", CONFIG, CONFIG, make_data, make_pair, 5, "V", {"rate": (0.5, 1.5)})
    monkeypatch.setattr(registry, "RECIPES", {NAME: small})
    monkeypatch.setattr(evaluation, "DRAWS", 20)
    return small


def train(out, **options):
    return saved.train(NAME, out=out, progress=False, accelerator="cpu", say=lambda line: None, **options)


def without_times(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("seconds")}


def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch):

    class Rate:
        """A constant rate that presses Ctrl-C at the third step."""

        presses = False

        def __call__(self, step):
            if step == 2 and self.presses:
                self.presses = False
                signal.raise_signal(signal.SIGINT)
            return 1e-2

        def __repr__(self):
            return "constant"

    rate = Rate()
    config = dataclasses.replace(CONFIG, learning_rate=rate)
    monkeypatch.setitem(registry.RECIPES, NAME, dataclasses.replace(registry.RECIPES[NAME], quick=config))
    whole = train(tmp_path / "whole")
    rate.presses = True
    said = []
    first = saved.train(NAME, out=tmp_path / "cut", progress=False, accelerator="cpu", say=said.append)
    assert first == {} and "interrupted after 3 steps of the ELBO" in said[-1]
    assert not (tmp_path / "cut" / "metrics.json").exists()
    with pytest.raises(DataError, match="no weights yet"):
        saved.load_run(tmp_path / "cut")
    resumed = train(tmp_path / "cut")
    assert without_times(resumed) == without_times(whole)
    logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("whole", "cut")]
    assert len(logs[0]) == len(logs[1]) == 1 + 8
    again = train(tmp_path / "cut")  # nothing is left to do
    assert without_times(again) == without_times(whole)
    assert json.loads((tmp_path / "cut" / "metrics.json").read_text()) == again


def test_a_run_with_a_sleep_stage_tells_of_both(tmp_path, monkeypatch):
    """Cut in the second stage: the message has that stage's steps, and the same call ends as if nothing had been."""
    whole = train(tmp_path / "whole", overrides=NIGHT)
    assert whole["steps"] == 8 and "heldout_elbo" not in whole
    rows = [line.split(",") for line in (tmp_path / "whole" / "log.csv").read_text().splitlines()]
    elbos = [float(row[rows[0].index("heldout_elbo")]) for row in rows[1:] if row[rows[0].index("heldout_elbo")]]
    assert whole["heldout_elbo_before_sleep"] == pytest.approx(max(elbos), rel=1e-9)
    assert len((tmp_path / "whole" / "log_sleep.csv").read_text().splitlines()) == 1 + 6
    presses = []

    def cut(*args):
        presses.append(1)
        if len(presses) == 3:
            signal.raise_signal(signal.SIGINT)
        if len(presses) == 2:
            raise SolveError("one dream fails")
        return step(*args)

    step = Sleep.loss_and_grads
    monkeypatch.setattr(Sleep, "loss_and_grads", cut)
    said = []
    options = {"overrides": NIGHT, "progress": False, "accelerator": "cpu"}
    assert saved.train(NAME, out=tmp_path / "cut", say=said.append, **options) == {}
    assert "interrupted after 3 steps of the sleep stage" in said[-1]
    resumed = train(tmp_path / "cut", overrides=NIGHT)
    assert resumed["skipped"] == 1
    assert "heldout_elbo" in train(tmp_path / "awake", overrides={"sleep": 0})


def test_a_run_that_is_polished_has_four_stages(tmp_path):
    numbers = NIGHT | {"polish": 5}
    whole = train(tmp_path / "whole", overrides=numbers)
    assert whole["steps"] == 8 + 5
    lines = {"log": 8, "log_sleep": 6, "log_polish": 5, "log_sleep_again": 6}
    assert {n: len((tmp_path / "whole" / f"{n}.csv").read_text().splitlines()) - 1 for n in lines} == lines
    assert without_times(train(tmp_path / "whole", overrides=numbers)) == without_times(whole)
    other = train(tmp_path / "other", overrides=NIGHT)
    assert other["l1_reconstruction"] != whole["l1_reconstruction"]


def test_run_json_is_never_half_written(tmp_path, monkeypatch):
    """A second process of the same run leaves the file alone, and one that is killed on the way leaves none."""
    train(tmp_path)
    stamp = (tmp_path / "run.json").stat().st_mtime_ns
    train(tmp_path)
    assert (tmp_path / "run.json").stat().st_mtime_ns == stamp

    def killed(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr(saved.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed")
    assert not (tmp_path / "killed" / "run.json").exists()


def test_a_run_read_back_gives_its_metrics(tmp_path):
    metrics = train(tmp_path, seed=3, overrides={"steps": 5, "test": 6})
    fit, split, recipe = lde.train.load_run(tmp_path)
    assert len(split.test) == 6 and recipe.title == "two traces of a decay"
    forecast = evaluation.forecast_test(fit, recipe, split)
    draws = evaluation.draw_parameters(fit, recipe, split)
    found = evaluation.evaluate(fit, recipe, split, forecast, draws)
    assert set(found) >= {"l1_reconstruction", "l1_extrapolation", "rate_rmse", "crps_extrapolation"}
    assert {name: metrics[name] for name in found} == found


def test_networks_come_from_the_seed(recipe):
    split = make_data(CONFIG, 0)
    weights = [run.make_pair(recipe, split, seed).model.decoder.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_metrics_name_the_elbo_of_the_weights_that_were_kept(tmp_path):
    metrics = train(tmp_path)
    rows = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()]
    elbos = [float(row[rows[0].index("heldout_elbo")]) for row in rows[1:] if row[rows[0].index("heldout_elbo")]]
    assert len(elbos) == 2 and metrics["heldout_elbo"] == pytest.approx(max(elbos), rel=1e-9)


def test_the_default_folder_names_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(None, seed=2)
    facts = json.loads((tmp_path / "train_output" / "decay-quick-2" / "run.json").read_text())
    assert facts == {"name": NAME, "config": "quick", "overrides": {}, "seed": 2}


def test_bad_input_is_explained(tmp_path):
    with pytest.raises(LatentDEError, match="no recipe 'nowhere'; there are: decay"):
        saved.train("nowhere")
    with pytest.raises(LatentDEError, match="'medium'; there are: quick, full"):
        saved.train(NAME, "medium")
    with pytest.raises(DataError, match="holds no run of `pyro-latentde train`"):
        saved.load_run(tmp_path)
    train(tmp_path)
    with pytest.raises(LatentDEError, match=r"holds another run \(seed 0\)"):
        train(tmp_path, seed=1)
    (tmp_path / "run.json").unlink()
    with pytest.raises(CheckpointError, match="num_steps 8"):
        train(tmp_path, overrides={"steps": 9})
