# SPDX-License-Identifier: Apache-2.0
"""Verdicts on a run: what is known to be wrong is found and said with its numbers, what is fine passes."""

import re
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_latentde as lde
from pyro_latentde.data import Series
from pyro_latentde.fitting import verdicts
from pyro_latentde.fitting.metrics import collect_metrics
from pyro_latentde.fitting.verdicts import CHECK_FILES, judge
from pyro_latentde.posterior import Posterior

TIMES = torch.linspace(0, 1, 5, dtype=torch.float64)
SERIES = Series.from_tensors(TIMES, 1 / (1 - 0.5 * TIMES)[:, None], names=("y",))


def explosion(series):
    """y = 1 / (1 - k t) is infinite before the last time for k > 1: half of the prior."""
    k = pyro.sample("k", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))
    z = lde.ode("z", lambda t, y, k: k * y * y, torch.ones(1).double(), series.times[0], k)
    pyro.sample("obs", dist.Normal(z, 0.1).to_event(2), obs=series.values[0])


def decay(series):
    k = pyro.sample("k", dist.LogNormal(torch.zeros((), dtype=torch.float64), 0.5))
    z = lde.ode("z", lambda t, y, k: -k * y, torch.ones(1).double(), series.times[0], k)
    pyro.sample("obs", dist.Normal(z, 0.1).to_event(2), obs=series.values[0])


def chains(offsets, num=50, model=decay):
    """Chains that differ by offsets in units of their sd."""
    noise = torch.randn(len(offsets), num, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k = (0.1 * (noise + torch.tensor(offsets, dtype=torch.float64)[:, None])).exp()
    posterior = Posterior(samples={"k": k}, attrs={"inference": "nuts", "num_gradients": 3000})
    return posterior.with_model(model, SERIES)


def verdicts_of(posterior, folder):
    metrics = collect_metrics(posterior, posterior.summary())
    found = judge(posterior, SERIES, metrics, folder, seed=0)
    assert [one.about for one in found] == ["prior", "chains", "solver"]
    return dict(zip(("prior", "chains", "solver"), found, strict=True)), metrics


def test_a_good_run_passes(tmp_path):
    found, metrics = verdicts_of(chains([0.0, 0.0, 0.0]), tmp_path)
    assert [one.passed for one in found.values()] == [True, True, True]
    assert "all 500 draws of the prior can be solved" in found["prior"].sentence
    assert f"all 3 chains are in one mode (R-hat at most {metrics['rhat_max']:.3f} for k)" in found["chains"].sentence
    assert "its error does not matter: solved again more finely, 100 draws" in found["solver"].sentence
    assert all(one.printed and one.picture is None for one in found.values()) and not list(tmp_path.iterdir())
    assert str(found["solver"]).startswith("solver: its error")


def test_a_prior_that_cannot_be_solved_is_told_with_its_share_and_place(tmp_path):
    (tmp_path / CHECK_FILES[1]).write_text("of an earlier run")
    found, _ = verdicts_of(chains([-7.0, -7.0], model=explosion), tmp_path)
    verdict = found["prior"]
    failed, total, percent = re.match(
        r"(\d+) of (\d+) draws of the prior fail \(([\d.]+)%\)", verdict.sentence
    ).groups()
    # P(k > 1) = .5; five standard errors of 500 draws, a false alarm in a million
    assert int(total) == 500 and abs(int(failed) / 500 - 0.5) < 5 * 0.5 / 500**0.5
    assert float(percent) == pytest.approx(int(failed) / 5, abs=0.05)
    where = re.search(r"100% of them lie at k > ([\d.]+)", verdict.sentence)
    assert float(where[1]) == pytest.approx(1.0, abs=0.05)
    assert verdict.passed is False and verdict.picture.file == CHECK_FILES[0]
    assert [path.name for path in tmp_path.iterdir()] == [CHECK_FILES[0]]


def test_modes_are_told_and_drawn(tmp_path):
    found, metrics = verdicts_of(chains([0.0, 60.0, 0.0, 0.0]), tmp_path)
    verdict = found["chains"]
    assert f"the 4 chains are in 2 modes (3 + 1; R-hat {metrics['rhat_max']:.3f} for k)" in verdict.sentence
    assert verdict.passed is False and verdict.picture.file == CHECK_FILES[1] and "different modes" in verdict.printed


def test_chains_that_mix_slowly_do_not_pass(tmp_path):
    """Their R-hat is the one of the summary, so that a page has one."""
    found, metrics = verdicts_of(chains([0.0, 1.0, 0.0, 1.0]), tmp_path)
    assert metrics["rhat_max"] > 1.05 and found["chains"].passed is False
    assert f"do not agree yet: R-hat {metrics['rhat_max']:.3f} for k" in found["chains"].sentence


def test_a_coarse_solver_is_told_with_what_to_do(tmp_path):
    """One step of Euler's method in each quarter moves k by a tenth, which is an sd."""
    with lde.solver(method="euler", step_size=0.25):
        posterior = chains([0.0, 0.0])
    found, _ = verdicts_of(posterior, tmp_path)
    text = found["solver"].sentence
    assert found["solver"].passed is False and "move the mean of k by" in text
    assert "Fit again with method='tsit5'" in text and "and no step_size" in text


def test_draws_of_a_guide_have_no_chains(tmp_path):
    posterior = chains([0.0])
    posterior = replace(posterior, attrs={"inference": "svi", "num_steps": 2000})
    found, _ = verdicts_of(posterior, tmp_path)
    assert found["chains"].passed is None and "independent" in found["chains"].sentence
    assert found["prior"].passed and found["solver"].passed


def test_a_check_that_fails_is_told_in_its_place(tmp_path, monkeypatch):
    def broken(*args, **options):
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr(verdicts, "stress_test", broken)
    posterior = chains([0.0, 60.0])
    few = posterior.select(draws=range(10))
    monkeypatch.setattr(verdicts.chain_report(posterior).__class__, "plot", broken)
    found, _ = verdicts_of(few, tmp_path)
    assert found["prior"].sentence == "not checked. ZeroDivisionError: first line" and found["prior"].passed is None
    assert "second line" in found["prior"].printed
    assert "at least 25 draws, got 20" in found["solver"].sentence and found["solver"].passed is None
    assert found["chains"].passed is False and "Not drawn: ZeroDivisionError" in found["chains"].picture.text


@pytest.mark.parametrize(
    ("attrs", "numbers"),
    [
        ({}, (200, 100)),
        ({"num_steps": 600}, (200, 100)),
        ({"num_gradients": 1600}, (400, 100)),
        ({"num_gradients": 4500}, (500, 150)),
        ({"num_gradients": 80_000}, (500, 200)),
    ],
)
def test_numbers_of_draws_follow_the_work_of_the_fit(attrs, numbers):
    assert verdicts._numbers_of_draws(Posterior(samples={"k": torch.zeros(1, 2)}, attrs=attrs)) == numbers
