# SPDX-License-Identifier: Apache-2.0
"""From a table to a posterior on the command line: what is written, what is refused and in which words."""

import json
import re
import subprocess
import sys

import arviz
import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from pyro_latentde.cli import app
from pyro_latentde.fitting import METHODS
from pyro_latentde.models.systems import linear
from pyro_latentde.posterior import Posterior

TINY = ("--num-samples", 20, "--num-warmup", 30, "--num-chains", 2)

# y ~ Normal(mu, 1) with mu ~ Normal(0, 10): its posterior is known.
MEAN = '''"""A constant.

More of it."""
import pyro
import pyro.distributions as dist
import torch

OBSERVED = ("y",)
helper = lambda: 0

def model(series):
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 10.0))
    fn = dist.Normal(mu, 1.0).expand(series.values.shape).mask(series.mask).to_event(3)
    pyro.sample("obs", fn, obs=series.values)
'''

POSITIVE = """
import pyro
import pyro.distributions as dist
import torch
import pyro_latentde as lde
from pyro_latentde.sites.observe_site import observe
from pyro_latentde.sites.ode_site import ode

STATES = ("c",)

def model(series):
    k = pyro.sample("k", dist.LogNormal(torch.tensor(-1.0, dtype=torch.float64), 0.5))
    with pyro.plate("patients", len(series), dim=-1):
        c0 = pyro.sample("c0", dist.LogNormal(torch.zeros(len(series), dtype=torch.float64), 1.0))
        z = ode("z", lambda t, y, p: -p * y, c0.unsqueeze(-1), series.times, k, t0=series.times.min(), states=STATES)
        observe("obs", lambda z: dist.LogNormal(z.log(), 0.1), series, z, positive=True)
"""


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "CI": "1"})


def words_of(result):
    """The message without the box around it."""
    return re.sub(r"[\s│]+", " ", result.output)


@pytest.fixture
def constant(tmp_path):
    (tmp_path / "constant.py").write_text(MEAN)
    values = np.random.default_rng(1).normal(3.0, 1.0, 12).round(3)
    table = pd.DataFrame({"time": np.arange(12.0), "y": values})
    table.loc[[2, 7], "y"] = np.nan
    table.to_csv(tmp_path / "y.csv", index=False)
    return tmp_path


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    """Three patients with gaps and times of their own, fitted by a user's file."""
    folder = tmp_path_factory.mktemp("patients")
    (folder / "decay.py").write_text(POSITIVE)
    rng, rows = np.random.default_rng(3), []
    for label, start, times in (("<b>Ann</b>", 2.0, [0, 1, 2, 4]), ("Bo & co", 1.0, [0, 2, 3]), ("Cy", 3.0, [1, 3])):
        for time in times:
            rows.append((label, time, start * np.exp(-0.4 * time + 0.1 * rng.standard_normal())))
    table = pd.DataFrame([*rows, ("Cy", 5, np.nan)], columns=["who", "day", "c"]).sample(frac=1.0, random_state=0)
    table.to_csv(folder / "blood.csv", index=False)
    out = folder / "made" / "here"
    arguments = ("--data", folder / "blood.csv", "--series", "who", "--time", "day", "--out", out, *TINY)
    result = invoke("fit", folder / "decay.py", *arguments)
    assert result.exit_code == 0, result.output
    return out, result.output, arguments, folder


def test_files_of_a_fit(patients):
    out, output, _, folder = patients
    files = {path.name for path in out.iterdir()}
    promised = {"posterior.nc", "draws.nc", "summary.csv", "metrics.json", "report.html", "run.json", "trace.png"}
    assert promised | {"pair.png", "prior_posterior.png"} <= files
    assert {f"trajectories-{i}.png" for i in (1, 2, 3)} <= files
    assert (out / "data.csv").read_bytes() == (folder / "blood.csv").read_bytes()
    summary = pd.read_csv(out / "summary.csv", index_col="name")
    labels = pd.unique(pd.read_csv(folder / "blood.csv")["who"])
    assert list(summary.index) == ["k", *(f"c0[{label}]" for label in labels)]
    assert "3 series of c over day, 9 values" in output and "R-hat" in output
    last = output.strip().splitlines()[-5:]
    begins = (
        "R-hat at most",
        "prior: all 200 draws",
        "chains: all 2 chains",
        "solver: its error does not matter",
        f"{out}/",
    )
    assert all(line.startswith(begin) for line, begin in zip(last, begins, strict=True)), last
    draws = Posterior.load(out / "draws.nc")
    assert draws["c0"].shape == (2, 20, 3)
    assert summary.loc["k", "mean"] == pytest.approx(float(draws["k"].mean()), rel=1e-12)
    metrics = json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["mean"]["k"] == pytest.approx(summary.loc["k", "mean"], rel=1e-12)
    assert metrics["rhat_max"] == pytest.approx(summary["r_hat"].max(), rel=1e-12)
    assert (metrics["method"], metrics["seed"], metrics["num_chains"], metrics["num_samples"]) == ("nuts", 0, 2, 20)


def test_arviz_file_names_the_series(patients):
    idata = arviz.from_netcdf(str(patients[0] / "posterior.nc"))
    assert {"posterior", "prior", "posterior_predictive"} <= {group.strip("/") for group in idata.groups()}
    assert "Bo & co" in idata["posterior"]["c0"].coords["patients"].values.tolist()
    idata.close()


def test_the_same_run_is_refused_then_resumed_and_another_is_named(patients):
    out, _, arguments, folder = patients
    before = (out / "draws.nc").read_bytes()
    again = invoke("fit", folder / "decay.py", *arguments)
    assert again.exit_code == 2 and "holds this run already" in words_of(again)
    resumed = invoke("fit", folder / "decay.py", *arguments, "--resume")
    assert resumed.exit_code == 0 and "report is made again" in resumed.output
    other = invoke("fit", folder / "decay.py", *arguments, "--seed", 5, "--resume")
    assert other.exit_code == 2 and "another run" in words_of(other) and "seed 0 (now 5)" in words_of(other)
    both = invoke("fit", folder / "decay.py", *arguments, "--overwrite", "--resume")
    assert both.exit_code == 2 and "one of them" in words_of(both)
    assert (out / "draws.nc").read_bytes() == before


def test_fit_of_a_known_posterior_with_gaps(constant):
    """mu is Normal(n ybar / (n + 1/100), 1 / (n + 1/100)): 800 nearly independent draws, five standard errors."""
    out = constant / "out"
    sizes = ("--num-samples", 200, "--num-warmup", 200)
    result = invoke("fit", constant / "constant.py", "--data", constant / "y.csv", "--out", out, *sizes)
    assert result.exit_code == 0, result.output
    y = pd.read_csv(constant / "y.csv")["y"].dropna()
    precision = len(y) + 0.01
    summary = pd.read_csv(out / "summary.csv", index_col="name").loc["mu"]
    error = summary["sd"] / np.sqrt(summary["ess_bulk"])
    assert summary["ess_bulk"] > 100 and abs(summary["mean"] - y.sum() / precision) < 5 * error
    assert summary["sd"] == pytest.approx(precision**-0.5, rel=0.25)


@pytest.mark.parametrize(
    ("method", "sizes"),
    [("svi", ("--num-samples", 50, "--num-steps", 30)), ("ensemble-hmc", (*TINY[:4], "--num-chains", 8))],
)
def test_other_methods(constant, method, sizes):
    out = constant / method
    result = invoke(
        "fit", constant / "constant.py", "--data", constant / "y.csv", "--out", out, "--method", method, *sizes
    )
    assert result.exit_code == 0, result.output
    metrics = json.loads((out / "metrics.json").read_text())
    draws = Posterior.load(out / "draws.nc")["mu"]
    assert draws.shape == ((1, 50, *draws.shape[2:]) if method == "svi" else (8, 20))
    assert metrics["mean"]["mu"] == pytest.approx(float(draws.mean()), rel=1e-12)
    if method == "svi":
        assert (out / "training.png").exists() and metrics["rhat_max"] is None and metrics["num_steps"] == 30


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.resumes and name != "svi"])
def test_a_run_that_was_cut_off_goes_on_from_its_checkpoint(constant, method, monkeypatch):
    """What comes after the draws fails; the same command with --resume makes no draw again."""
    out = constant / "out"
    sizes = ("--method", method, *TINY[:4], "--num-chains", 8)
    command = ("fit", constant / "constant.py", "--data", constant / "y.csv", "--out", out, *sizes)
    with monkeypatch.context() as broken:
        broken.setattr(Posterior, "summary", lambda self: 1 / 0)
        assert isinstance(invoke(*command).exception, ZeroDivisionError)
    before = Posterior.load(out / "draws.nc")
    assert (out / METHODS[method].checkpoint).exists() and not (out / "report.html").exists()
    assert invoke(*command).exit_code == 2
    assert invoke(*command, "--resume").exit_code == 0
    after = Posterior.load(out / "draws.nc")
    assert torch.equal(before["mu"], after["mu"]) and (out / "report.html").exists()


def test_a_check_that_fails_loses_nothing(constant, monkeypatch):
    """A model without a differential equation has no solver to check; and a check may have a fault."""
    monkeypatch.setattr("pyro_latentde.fitting.verdicts.chain_report", lambda posterior: 1 / 0)
    out = constant / "out"
    command = ("fit", constant / "constant.py", "--data", constant / "y.csv", "--out", out, *TINY)
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    assert "prior: all 200 draws of the prior can be solved" in result.output
    assert "chains: not checked. ZeroDivisionError" in result.output
    assert "solver: not checked. solver_check: the model has no lde.ode site" in result.output
    page = (out / "report.html").read_text()
    assert "ZeroDivisionError" in page and "no lde.ode site" in page and (out / "draws.nc").exists()
    assert "prior: all" in invoke("report", out).output
    for again in (invoke("report", out, "--no-checks"), invoke(*command, "--overwrite", "--no-checks")):
        assert again.exit_code == 0 and "prior: " not in again.output
        assert "<details>" not in (out / "report.html").read_text()


def test_overwrite_deletes_only_what_a_fit_writes(constant):
    out = constant / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    command = ("fit", constant / "constant.py", "--data", constant / "y.csv", "--out", out, *TINY)
    assert invoke(*command).exit_code == 0
    assert invoke(*command, "--seed", 1, "--overwrite").exit_code == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert json.loads((out / "run.json").read_text())["seed"] == 1


def test_files_of_something_else_are_left_alone(constant):
    out = constant / "out"
    out.mkdir()
    (out / "posterior.nc").write_text("mine")
    result = invoke("fit", constant / "constant.py", "--data", constant / "y.csv", "--out", out, *TINY)
    assert result.exit_code == 2 and "something else (posterior.nc)" in words_of(result)
    assert [path.name for path in out.iterdir()] == ["posterior.nc"]


def test_a_user_file_may_import_its_neighbour_and_hides_no_module(constant):
    (constant / "json.py").write_text(MEAN.replace("import torch", "import torch\nfrom neighbour import WIDTH"))
    (constant / "neighbour.py").write_text("WIDTH = 10.0\n")
    path = list(sys.path)
    result = invoke("fit", constant / "json.py", "--data", constant / "y.csv", "--out", constant / "out", *TINY)
    assert result.exit_code == 0, result.output
    assert sys.path == path and sys.modules["json"] is json
    (constant / "json.py").unlink()  # the copy in the folder is enough
    assert invoke("report", constant / "out").exit_code == 0


def test_round_trip_as_a_program(tmp_path):
    """`simulate`, then `fit` without a word about the table: the truth lies within five sd of the mean."""
    code = (
        "from pyro_latentde.cli import app\n"
        "app('simulate linear --out x.csv --seed 2'.split(), standalone_mode=False)\n"
        "app('fit linear --data x.csv --num-samples 40 --num-warmup 80 --num-chains 2'.split())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "fit_output" / "linear-nuts-0"
    assert "report.html" in done.stdout and (out / "report.html").exists()
    summary = pd.read_csv(out / "summary.csv", index_col="name")
    for name, truth in linear.PARAMETERS.items():
        assert abs(summary.loc[name, "mean"] - truth) < 5 * summary.loc[name, "sd"]


TABLES = {
    "fine": "time,y\n0,1\n1,2\n",
    "empty": "",
    "header": "time,y\n",
    "semicolons": "time;y\n0;1\n",
    "twice": "time,y,y\n0,1,2\n",
    "ragged": "time,y\n0,1\n1,2,3,4\n",
    "negative": "time,y\n0,1\n-2,2\n-3,1\n",
    "no_time": "time,y\n0,1\n,2\n",
    "unparsable_time": "time,y\n0,1\nnoon,2\n",
    "text": "time,y\n0,1\n1,high\n2,low\n",
    "comma": 'time,y\n0,1\n1,"2,5"\n',
    "repeated": "time,y\n0,1\n1,2\n1,2\n",
    "conflict": "series,time,y\na,0,1\na,1,2\nb,0,1\na,1,3\n",
    "spelling": "series,time,y\nBay,0,1\nbay ,1,2\n",
    "no_label": "series,time,y\na,0,1\n,1,2\n",
    "case": "Time,Y\n0,1\n1,2\n",
    "nothing": "series,time,y\na,0,1\nb,0,\n",
}


@pytest.mark.parametrize(
    ("table", "options", "words"),
    [
        ("absent", (), ("there is no such file",)),
        ("empty", (), ("is empty",)),
        ("header", (), ("no rows", "time")),
        ("semicolons", (), ("no column", "time;y", "by --time")),
        ("twice", (), ("'y'", "more than once")),
        ("ragged", (), ("cannot be read as CSV", "line 3")),
        ("negative", (), ("2 negative times", "row 2: -2", "row 3: -3")),
        ("no_time", (), ("'time'", "no time", "row 2")),
        ("unparsable_time", (), ("'time'", "row 2 'noon'")),
        ("text", (), ("'y'", "row 2 'high'", "row 3 'low'")),
        ("comma", (), ("row 2 '2,5'",)),
        ("repeated", (), ("time 1", "row 2", "the same row again", "row 3", "--series", "--replicates")),
        ("conflict", (), ("time 1 of series 'a'", "row 2", "other values", "row 4", "--replicates")),
        ("spelling", (), ("'Bay'", "'bay '", "spaces or capitals")),
        ("no_label", (), ("'series'", "no series", "row 2")),
        ("case", (), ("no column 'time'", "did you mean 'Time'", "--time")),
        ("case", ("--time", "Time"), ("no column 'y'", "did you mean 'Y'", "--values")),
        ("fine", ("--series", "tme"), ("no column 'tme'", "did you mean 'time'", "--series")),
        ("fine", ("--values", "time"), ("different values",)),
        ("nothing", (), ("b", "no observation at all")),
        ("fine", ("--method", "svi", "--num-chains", 3), ("svi does not take --num-chains", "--num-steps")),
        ("fine", ("--method", "mcmc"), ("no method 'mcmc'", "nuts", "svi")),
    ],
)
def test_bad_tables_are_explained(tmp_path, table, options, words):
    (tmp_path / "constant.py").write_text(MEAN)
    if table in TABLES:
        (tmp_path / f"{table}.csv").write_text(TABLES[table])
    out = tmp_path / "out"
    result = invoke("fit", tmp_path / "constant.py", "--data", tmp_path / f"{table}.csv", "--out", out, *options)
    assert result.exit_code == 2, result.output
    assert all(word in words_of(result) for word in words), words_of(result)
    assert "Traceback" not in result.output and not out.exists()


def test_replicates_are_allowed_when_said(constant):
    (constant / "y.csv").write_text(TABLES["repeated"])
    command = ("fit", constant / "constant.py", "--data", constant / "y.csv", "--out", constant / "out", *TINY)
    assert invoke(*command, "--replicates").exit_code == 0


DOSED = """
import pyro
import pyro.distributions as dist
import torch

def model(series):
    slope = pyro.sample("slope", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 10.0))
    mean = (slope[..., None] * series.covariates[:, 0])[..., None, None].expand(*slope.shape, *series.values.shape)
    pyro.sample("obs", dist.Normal(mean, 1.0).to_event(3), obs=series.values)
"""


@pytest.mark.parametrize("named_by", ["option", "file"])
def test_covariates_of_each_series(tmp_path, named_by):
    """y ~ Normal(slope dose, 1) with slope ~ Normal(0, 10): its posterior is known."""
    text, option = (
        (DOSED, ("--covariates", "dose")) if named_by == "option" else (f'COVARIATES = ("dose",)\n{DOSED}', ())
    )
    (tmp_path / "dosed.py").write_text(text)
    dose, noise = np.repeat([1.0, 2.0, 4.0], 4), np.random.default_rng(2).standard_normal(12)
    table = pd.DataFrame({"series": np.repeat(["a", "b", "c"], 4), "time": np.tile(np.arange(4.0), 3), "dose": dose})
    table.assign(y=3.0 * dose + noise).to_csv(tmp_path / "y.csv", index=False)
    out = tmp_path / "out"
    command = ("fit", tmp_path / "dosed.py", "--data", tmp_path / "y.csv", "--out", out, *TINY, *option)
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    precision = 0.01 + (dose**2).sum()
    mean, draws = (dose * (3.0 * dose + noise)).sum() / precision, Posterior.load(out / "draws.nc")["slope"]
    # 40 draws with an effective number of at least 10: five standard errors, a false alarm in a million
    assert abs(float(draws.mean()) - mean) < 5 / np.sqrt(10 * precision)
    assert json.loads((out / "run.json").read_text())["columns"]["covariates"] == ["dose"]
    assert invoke("report", out).exit_code == 0
    table.assign(y=1.0, dose=np.arange(12.0)).to_csv(tmp_path / "y.csv", index=False)
    assert "covariate 'dose' changes within series" in words_of(invoke(*command[:4], *option))
    table.drop(columns="dose").assign(y=1.0, does=1.0).to_csv(tmp_path / "y.csv", index=False)
    lost = words_of(invoke(*command[:4], *option))
    assert "no column 'dose'; did you mean 'does'" in lost and "by --covariates" in lost


def test_values_outside_the_support_are_named(tmp_path):
    (tmp_path / "x.csv").write_text("series,time,hare,lynx\nsouth,0,30,4\nnorth,0,30,4\nnorth,1,,5\nnorth,2,40,0\n")
    result = invoke("fit", "lotka_volterra", "--data", tmp_path / "x.csv", "--out", tmp_path / "out")
    expected = ("'obs'", "LogNormal", "above 0", "1 of the data", "lynx = 0 at time 2 of series 'north', row 4")
    assert result.exit_code == 2 and all(word in words_of(result) for word in expected), words_of(result)


@pytest.mark.parametrize(
    ("system", "text", "words"),
    [
        ("lotka_voltera", None, ("no system 'lotka_voltera'", "did you mean 'lotka_volterra'", "Python file")),
        ("hopper", None, ("no Pyro model", "lotka_volterra", "pyro-latentde train")),
        ("absent.py", None, ("there is no file",)),
        ("syntax.py", "x = 1\ndef model(series:\n", ("cannot be imported", "SyntaxError", "line 2")),
        ("imports.py", "\nimport not_there_at_all\n", ("cannot be imported", "not_there_at_all", "line 2")),
        ("none.py", "def modell(series): pass\n", ("no function `model(series)`", "modell")),
        ("two.py", "def model(series, k): pass\n", ("called with the data alone", "k", "default")),
        ("covariates.py", 'COVARIATES = "dose"\ndef model(series): pass\n', ("COVARIATES", "'dose'")),
        ("states.py", 'STATES = "y"\ndef model(series): pass\n', ("STATES", "'y'")),
        ("stops.py", 'STATES = ("y",)\ndef model(series):\n    return series.speed\n', ("speed", "stops.py, line 3")),
        ("nothing.py", 'STATES = ("y",)\ndef model(series): pass\n', ("no latent site",)),
        ("prior.py", MEAN.split("    fn =")[0], ("observes nothing",)),
    ],
)
def test_systems_that_cannot_be_fitted_are_explained(tmp_path, system, text, words):
    (tmp_path / "fine.csv").write_text(TABLES["fine"])
    if system.endswith(".py"):
        if text is not None:
            (tmp_path / system).write_text(text)
        system = tmp_path / system
    result = invoke("fit", system, "--data", tmp_path / "fine.csv", "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert all(word in words_of(result) for word in words), words_of(result)
    assert "Traceback" not in result.output and not (tmp_path / "out").exists()


def test_report_of_no_run_and_of_half_a_run(constant):
    nothing = invoke("report", constant)
    assert nothing.exit_code == 2 and "holds no run" in words_of(nothing)
    out = constant / "out"
    assert invoke("fit", constant / "constant.py", "--data", constant / "y.csv", "--out", out, *TINY).exit_code == 0
    (out / "draws.nc").write_bytes((out / "draws.nc").read_bytes()[:3000])
    cut = invoke("report", out)
    assert cut.exit_code == 2 and "not a complete file" in words_of(cut)
    (out / "draws.nc").unlink()
    half = invoke("report", out)
    assert half.exit_code == 2 and "no draws.nc" in words_of(half) and "--resume" in words_of(half)


def test_the_global_random_state_is_left_alone(constant):
    state = torch.get_rng_state()
    invoke("fit", constant / "constant.py", "--data", constant / "y.csv", "--out", constant / "out", *TINY)
    assert torch.equal(torch.get_rng_state(), state)
