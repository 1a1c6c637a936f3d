# SPDX-License-Identifier: Apache-2.0
"""The command line: each command's files and text, at sizes that take seconds."""

import dataclasses
import json
import math
import re

import arviz
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from pyro_latentde.cli import app
from pyro_latentde.data import Series
from pyro_latentde.demo import FIGURES, REFERENCE, format_table
from pyro_latentde.models import systems
from pyro_latentde.models.systems import lotka_volterra, pendulum_pixels, periodic, pk_population
from pyro_latentde.train import RECIPES, load_run

SIZES = ("--num-samples", "30", "--num-warmup", "40", "--num-chains", "2", "--seed", "3")


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "CI": "1"})


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "made" / "here"
    result = invoke("demo", "--out", out, *SIZES)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_demo_prints_the_table_beside_the_reference(demo):
    rows = {line.split()[0]: line.split()[1:] for line in demo[1].splitlines() if line.split()[:1]}
    for name, (mean, sd) in REFERENCE.items():
        here, _, _, ess, there, spread = map(float, rows[name])
        assert (there, spread) == (pytest.approx(mean, rel=1e-3), pytest.approx(sd, rel=1e-2))
        # 60 draws with an ESS of at least 10: five standard errors, so a false alarm in a million.
        assert ess > 10 and abs(here - mean) < 5 * sd / math.sqrt(10)


def test_demo_metrics_are_plain_numbers(demo):
    metrics = json.loads((demo[0] / "metrics.json").read_text(), parse_constant=pytest.fail)
    for name in ("rhat_max", "ess_min", "ess_tail_min", "divergences", "ode_failed", "seconds", "sampling_seconds"):
        assert isinstance(metrics[name], int | float), name
    for table in (metrics["mean"], metrics["sd"], metrics["rhat"], metrics["ess"], *metrics["reference"].values()):
        assert list(table) == list(REFERENCE)
        assert all(isinstance(value, float) for value in table.values())
    assert metrics["rhat_max"] == max(metrics["rhat"].values())
    assert metrics["ess_min"] == min(metrics["ess"].values())
    assert metrics["seconds"] >= metrics["sampling_seconds"] > 0
    sizes = {name: metrics[name] for name in ("num_samples", "num_warmup", "num_chains", "seed")}
    assert sizes == {"num_samples": 30, "num_warmup": 40, "num_chains": 2, "seed": 3}


def test_demo_file_opens_in_arviz(demo):
    idata = arviz.from_netcdf(str(demo[0] / "posterior.nc"))
    groups = {group.strip("/") for group in idata.groups()}
    promised = {"posterior", "sample_stats", "observed_data", "constant_data", "log_likelihood", "posterior_predictive"}
    assert promised | {"prior", "prior_predictive"} <= groups
    posterior = idata["posterior"]
    assert dict(posterior.sizes) == {"chain": 2, "draw": 30, "z_state": 2}
    metrics = json.loads((demo[0] / "metrics.json").read_text())
    mean = float(posterior["z0"].sel(z_state="hare").mean())
    assert mean == pytest.approx(metrics["mean"]["z0[hare]"], rel=1e-12)
    assert list(idata["observed_data"]["obs"].sel(z_state="lynx").values[:3]) == [4.0, 6.1, 9.8]
    assert idata["posterior_predictive"]["obs"].sizes["z_time"] == 21
    idata.close()


@pytest.mark.parametrize("name", FIGURES)
def test_demo_figures_are_pictures(demo, name):
    picture = matplotlib.image.imread(demo[0] / name)
    assert min(picture.shape[:2]) > 400
    assert picture[..., :3].std() > 0.05  # not a blank page


def test_table_of_a_single_chain_has_no_rhat():
    columns = ("mean", "sd", "r_hat", "ess_bulk", "ess_tail")
    table = pd.DataFrame([(0.5, 0.1, math.nan, 10.0, 10.0)], index=["alpha"], columns=columns)
    assert format_table(table).splitlines()[2].split() == "alpha 0.5 0.1 nan 10 0.5469 0.063".split()


def test_demo_refuses_too_few_draws():
    result = invoke("demo", "--num-samples", 3)
    assert result.exit_code == 2 and "num-samples" in result.output


def test_systems_lists_the_zoo():
    result = invoke("systems")
    assert result.exit_code == 0
    for name in systems.__all__:
        assert f"{name}: " in result.output
    assert "hare, lynx" in result.output and "gamma = 0.8" in result.output
    assert "theta, omega" in result.output and "length in [1, 2]" in result.output


def test_simulate_writes_what_the_simulator_draws(tmp_path):
    path = tmp_path / "counts.csv"
    options = (
        "--stop",
        10,
        "--num-times",
        6,
        "--num-series",
        2,
        "--missing",
        0.3,
        "--seed",
        4,
        "--parameter",
        "alpha=0.6",
    )
    result = invoke("simulate", "lotka_volterra", "--out", path, *options)
    assert result.exit_code == 0, result.output
    times = torch.linspace(0, 10, 6, dtype=torch.float64)
    expected = lotka_volterra.simulate(times, parameters={"alpha": 0.6}, num_series=2, missing=0.3, seed=4).series
    read = Series.from_csv(path, time="time", values=["hare", "lynx"], series="series")
    assert torch.equal(read.times, expected.times) and torch.equal(read.mask, expected.mask)
    assert torch.equal(read.values, expected.values) and not read.complete


def test_simulate_writes_covariates(tmp_path):
    path = tmp_path / "people.csv"
    assert invoke("simulate", "pk_population", "--num-series", 4, "--missing", 0.2, "--out", path).exit_code == 0
    expected = pk_population.simulate(num_series=4, missing=0.2).series
    read = Series.from_csv(path, time="time", values="concentration", series="series", covariates=["dose"])
    assert torch.equal(read.covariates, expected.covariates) and torch.equal(read.values, expected.values)
    assert invoke("simulate", "pk_population", "--out", tmp_path / "people.npz").exit_code == 0
    with np.load(tmp_path / "people.npz") as arrays:
        assert arrays["covariates"].tolist() == [[50.0]]


def test_simulate_prints_without_a_file():
    result = invoke("simulate", "linear")
    assert result.exit_code == 0
    assert result.output.splitlines()[0] == "series,time,x,v"
    assert len(result.output.splitlines()) == 41


def test_simulate_writes_videos_as_arrays(tmp_path):
    path = tmp_path / "frames.npz"
    options = ("--num-series", 5, "--num-times", 4, "--seed", 2, "--parameter", "friction=0.7", "--out", path)
    result = invoke("simulate", "pendulum_pixels", *options)
    assert result.exit_code == 0 and "5 series" in result.output, result.output
    series, z, truth = pendulum_pixels.simulate(5, 2, num_times=4, friction=0.7)
    with np.load(path) as arrays:
        assert set(arrays) == {"times", "values", "mask", "z", "length", "friction"}
        assert arrays["values"].shape == (5, 4, 28, 28)
        np.testing.assert_array_equal(arrays["values"], series.values.reshape(5, 4, 28, 28).numpy())
        np.testing.assert_array_equal(arrays["z"], z.numpy())
        np.testing.assert_array_equal(arrays["length"], truth["length"].numpy())


def test_simulate_writes_a_table_of_many_series(tmp_path):
    path = tmp_path / "waves.csv"
    options = ("--num-series", 3, "--missing", 0.3, "--parameter", "keep=50", "--parameter", "num_features=2")
    result = invoke("simulate", "periodic", *options, "--out", path)
    assert result.exit_code == 0, result.output
    expected = periodic.simulate(3, keep=50, num_features=2, missing=0.3).series
    table = pd.read_csv(path)
    assert list(table) == ["series", "time", "x1", "x2"] and len(table) == 150
    assert int(table[["x1", "x2"]].notna().to_numpy().sum()) == expected.n_observed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("pendulum_pixels", "--num-times", 2), ("784 values", "pendulum_pixels.npz")),
        (("pendulum_pixels", "--stop", 5), ("does not take stop", "friction")),
        (("pendulum_pixels", "--parameter", "friction=-1"), ("friction", "-1")),
        (("pendulum_pixels", "--parameter", "n=3"), ("does not take n",)),
        (("nowhere",), ("nowhere", "lotka_volterra")),
        (("linear", "--parameter", "omega"), ("NAME=NUMBER", "omega")),
        (("linear", "--parameter", "alpha=1"), ("alpha", "kappa")),
        (("linear", "--missing", 1.5), ("missing", "1.5")),
    ],
)
def test_simulate_explains_bad_input(arguments, words):
    result = invoke("simulate", *arguments)
    assert result.exit_code == 2
    assert all(word in result.output for word in words), result.output


@pytest.mark.parametrize("arguments", [(), ("--list",), ("goku-pendulum", "--list")])
def test_train_lists_the_recipes(arguments):
    result = invoke("train", *arguments)
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()] == list(RECIPES)
    assert all(recipe.title in result.output for recipe in RECIPES.values())


def test_train_writes_a_folder_that_can_be_read_back(tmp_path, monkeypatch):
    """The smallest recipe, cut down; the same command again finds nothing left to do."""
    name = "latent-ode-spirals"
    recipe = RECIPES[name]
    tiny = recipe.quick.changed(train=6, heldout=3, test=3, batch_size=2)
    monkeypatch.setitem(RECIPES, name, dataclasses.replace(recipe, full=tiny))
    command = ("train", name, "--config", "full", "--steps", 2, "--seed", 1, "--device", "cpu", "--out", tmp_path)
    first = invoke(*command)
    assert first.exit_code == 0 and "l1_extrapolation" in first.output, first.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["steps"], metrics["seed"]) == (2, 1)
    assert json.loads((tmp_path / "run.json").read_text())["overrides"] == {"steps": 2}
    fit, split, _ = load_run(tmp_path)
    forecast = fit.forecast(split.test.window(0, 50), 5)
    assert forecast.means.shape == (20, 3, 5, 2)
    again = invoke(*command)
    assert again.exit_code == 0
    repeated = json.loads((tmp_path / "metrics.json").read_text())
    assert repeated["l1_extrapolation"] == metrics["l1_extrapolation"]
    refused = invoke(*command[:5], 3, *command[6:])
    assert refused.exit_code == 2 and "holds another run" in re.sub(r"[\s│]+", " ", refused.output)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), ("nowhere", "goku-pendulum")),
        (("goku-pendulum", "--config", "medium"), ("medium", "quick, full")),
        (("goku-pendulum", "--steps", 0), ("--steps",)),
        (("goku-pendulum", "--devices", 0), ("--devices",)),
    ],
)
def test_train_explains_bad_input(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("train", *arguments)
    assert result.exit_code == 2 and not list(tmp_path.iterdir())
    assert all(word in result.output for word in words), result.output
