# SPDX-License-Identifier: Apache-2.0
"""The README's examples run as they are printed, with fewer draws or steps; what it points to exists."""

import re
from pathlib import Path

import arviz
import matplotlib.image
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_latentde as lde

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE, TRUST, VIDEOS, *SHORT = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MOST_LINES = 25


@pytest.mark.parametrize("example", [EXAMPLE, TRUST, VIDEOS])
def test_example_is_short(example):
    assert sum(bool(line.strip()) for line in example.splitlines()) <= MOST_LINES


def test_example_runs(monkeypatch, tmp_path):
    """Only the numbers of iterations are changed, 1000 to 40."""
    code, changed = re.subn(r"\b(num_samples|num_warmup)=1000\b", r"\1=40", EXAMPLE)
    assert changed == 2
    monkeypatch.chdir(tmp_path)
    data = "pyro_latentde/data/hudson_lynx_hare.csv"
    assert data in code
    code = code.replace(data, (ROOT / data).as_posix())  # the example is run from the repository
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["posterior"].num_draws == 40
    # Loose on purpose: the period of ten years, which any chain near the posterior has.
    product = (names["posterior"]["alpha"] * names["posterior"]["gamma"]).mean().item()
    assert product == pytest.approx(0.43, abs=0.05)
    idata = arviz.from_netcdf(str(tmp_path / "posterior.nc"))
    assert {"posterior", "posterior_predictive", "log_likelihood"} <= {g.strip("/") for g in idata.groups()}
    idata.close()
    assert matplotlib.image.imread(tmp_path / "forecast.png").std() > 0.05


def test_example_of_trust_runs(monkeypatch, tmp_path, capsys):
    """Only the numbers of chains and draws are changed."""
    code = TRUST
    for printed, few in (
        ("num_chains=64", "num_chains=16, num_warmup=100, num_samples=30, progress=False"),
        ("stress_test(sir.model, school)", "stress_test(sir.model, school, num_draws=50)"),
    ):
        assert code.count(printed) == 1
        code = code.replace(printed, few)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    # published: beta 1.73 (.05); 480 draws, of which a tenth effective would be .007 off
    assert names["posterior"]["beta"].mean().item() == pytest.approx(1.73, abs=0.05)
    assert (tmp_path / "school.pt").exists()
    printed = capsys.readouterr().out
    assert "Pareto" in printed and "beta" in printed


def test_example_of_videos_runs(capsys):
    """Only the numbers of videos and steps are changed."""
    code = VIDEOS
    for printed, few in (
        ("simulate(450)", "simulate(6)"),
        ("simulate(50,", "simulate(3,"),
        ("batch_size=64", "batch_size=4"),
        ("num_steps=1000", "num_steps=3"),
        ("videos.window(0, 50))", "videos.window(0, 50), num_dreams=20, num_steps=3)"),
    ):
        assert code.count(printed) == 1
        code = code.replace(printed, few)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["length"].shape == (100, 3)
    assert ((names["length"] > 1) & (names["length"] < 2)).all()
    assert names["forecast"].means.shape == (20, 3, 50, 784)
    assert not torch.equal(names["forecast"].z, names["longer"].z)
    assert {"l1", "rmse", "crps", "coverage"} <= set(eval(capsys.readouterr().out.splitlines()[-1]))


def test_what_it_points_to_exists():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [target for target in targets if "://" not in target]
    assert "tutorials/01_first_posterior.ipynb" in local and "docs/decisions.md" in local
    assert [target for target in local if not (ROOT / target).exists()] == []
    picture = next(ROOT / target for target in local if target.endswith(".png"))
    assert picture.stat().st_size < 150_000


def test_delays_example_runs():
    """The lines that solve a delay equation, with what a model has around them."""
    (code,) = [block for block in SHORT if "lde.dde(" in block]
    names = {"torch": torch, "pyro": pyro, "dist": dist, "lde": lde, "times": torch.linspace(0, 5, 6)}
    exec(compile(code, "README.md", "exec"), {**names, "growth_rate": torch.tensor(1.0)}, names)
    assert names["z"].shape == (6, 1) and names["z"].isfinite().all()
