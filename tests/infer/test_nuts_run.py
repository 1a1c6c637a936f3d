# SPDX-License-Identifier: Apache-2.0
"""``infer.nuts`` from end to end: the posterior, its statistics, seeds, failures, interrupts, progress."""

import logging
import math
import re
import signal

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_latentde.errors import LatentDEError, ShapeError
from pyro_latentde.infer import nuts
from pyro_latentde.infer.nuts_kernel import STAT_NAMES
from pyro_latentde.infer.nuts_run import split_rhat
from pyro_latentde.infer.progress import Progress
from pyro_latentde.infer.stop_signal import StopSignal

Y = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
ZERO = torch.zeros((), dtype=torch.float64)


def normal_mean(y, prior_sd=2.0):
    """Conjugate: precision 1 / prior_sd^2 + n, mean sum(y) / precision."""
    mean = pyro.sample("mean", dist.Normal(ZERO, prior_sd))
    with pyro.plate("n", len(y)):
        pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)


def solve_fails_above(limit):
    """Standard normal ``x`` whose 'solve' fails above ``limit``: the posterior is the normal cut there."""

    def model():
        x = pyro.sample("x", dist.Normal(ZERO, 1.0))
        failed = x > limit
        z = torch.where(failed, torch.full_like(x, math.nan), x).reshape(1, 1)
        record = {"status": failed.long(), "n_steps": torch.full((), 4)}
        infer = {"_deterministic": True, "lde_ode": record}
        pyro.sample("z", dist.Delta(z, event_dim=2).mask(False), obs=z, infer=infer)

    return model


def test_conjugate_posterior_statistics_and_facts():
    posterior = nuts(normal_mean, Y, prior_sd=2.0, num_samples=1000, num_warmup=300, progress=False)
    x = posterior.samples["mean"].numpy()
    precision = 1 / 4 + 4
    assert x.shape == (4, 1000) and posterior.kwargs == {"prior_sd": 2.0}
    error = (x.mean() - 12 / precision) / (x.std() / np.sqrt(az.ess(x)))
    assert abs(error) < 4.5  # false alarm: 7 in a million
    assert x.std() == pytest.approx(precision**-0.5, rel=0.08)
    assert set(posterior.stats) == set(STAT_NAMES)
    by_hand = -0.5 * x**2 / 4 - 0.5 * ((Y.numpy() - x[..., None]) ** 2).sum(-1)
    lp = posterior.stats["lp"].numpy()
    assert np.allclose(lp - by_hand, (lp - by_hand)[0, 0])
    assert posterior.attrs["inference"] == "nuts" and posterior.attrs["log_joint_engine"] == "traced"
    assert posterior.attrs["num_gradients"] > posterior.stats["n_steps"].sum() > 4000
    assert "ode_failed" in posterior.stats and not posterior.stats["ode_failed"].any()


def test_the_same_seed_gives_the_same_bits():
    a, b, c = (nuts(normal_mean, Y, num_samples=50, num_warmup=50, seed=s, progress=False) for s in (1, 1, 2))
    assert torch.equal(a.samples["mean"], b.samples["mean"])
    assert all(torch.equal(a.stats[name], b.stats[name]) for name in STAT_NAMES)
    assert not torch.equal(a.samples["mean"], c.samples["mean"])


def test_a_chain_is_the_same_whatever_the_number_of_chains():
    # to rounding: vector instructions treat the rows of a batch alike up to the last bit, so few iterations
    settings = {"num_samples": 20, "num_warmup": 10, "progress": False}
    few, many = nuts(normal_mean, Y, num_chains=2, **settings), nuts(normal_mean, Y, num_chains=5, **settings)
    assert torch.allclose(few.samples["mean"], many.samples["mean"][:2], rtol=1e-6)
    assert len(torch.unique(many.samples["mean"][:, -1])) == 5


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    nuts(normal_mean, Y, num_samples=5, num_warmup=5, progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_engines_and_metrics_sample_the_same_posterior():
    precision = 1 / 4 + 4
    for settings in ({"log_joint_engine": "eager"}, {"log_joint_engine": "loop"}, {"dense_mass": False}):
        posterior = nuts(normal_mean, Y, num_samples=150, num_warmup=100, progress=False, **settings)
        x = posterior.samples["mean"].numpy()
        assert abs(x.mean() - 12 / precision) < 4.5 * x.std() / np.sqrt(az.ess(x))


def test_a_known_metric_spares_the_search_for_one():
    """Scales of 1e-3 and 1e3: with their variances given, the first iterations take few leapfrog steps."""
    scales = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)

    def model():
        pyro.sample("x", dist.Normal(torch.zeros_like(scales), scales).to_event(1))

    start, settings = {"x": scales}, {"num_samples": 200, "num_warmup": 15, "progress": False}  # no window fits
    known = nuts(model, start=start, metric=scales**2, **settings)
    assert known.stats["n_steps"].max() <= 31 and not known.attrs["dense_mass"]
    assert torch.allclose(known["x"].std((0, 1)), scales, rtol=0.3)
    unknown = nuts(model, start=start, max_tree_depth=6, **settings)
    assert unknown.stats["n_steps"].median() >= 63
    with pytest.raises(ShapeError, match="metric: expected variances"):
        nuts(model, metric=scales[:2], **settings)


def test_failed_solves_are_divergences_and_are_counted(caplog):
    with caplog.at_level(logging.INFO, "pyro_latentde"):
        posterior = nuts(solve_fails_above(1.0), num_samples=500, num_warmup=200, progress=False)
    failed, diverging = posterior.stats["ode_failed"], posterior.stats["diverging"]
    assert failed.sum() > 50 and torch.equal(failed > 0, diverging)
    assert torch.equal(posterior.stats["ode_steps"], 4 * posterior.stats["n_steps"])
    assert posterior.samples["x"].max() <= 1.0
    assert f"{int(diverging.sum())} divergences, {int(failed.sum())} failed solves" in caplog.text
    assert "target_accept=0.95" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_returns_the_draws_made_so_far(number, caplog):
    calls = 0

    def model(y):
        nonlocal calls
        calls += 1
        if calls == 4000:
            signal.raise_signal(number)
        normal_mean(y)

    before = signal.getsignal(number)
    settings = {"num_samples": 10_000, "num_warmup": 100, "log_joint_engine": "eager", "progress": False}
    posterior = nuts(model, Y, **settings)
    assert 0 < posterior.num_draws < 10_000 and posterior.num_chains == 4
    assert all(value.shape == (4, posterior.num_draws) for value in posterior.stats.values())
    assert posterior.attrs["interrupted"] and posterior.attrs["num_samples"] == posterior.num_draws
    assert (posterior.stats["n_steps"] > 0).all()
    assert "Interrupted" in caplog.text
    assert signal.getsignal(number) is before


def test_an_interrupt_during_warm_up_is_told():
    calls = 0

    def model(y):
        nonlocal calls
        calls += 1
        if calls == 1000:
            signal.raise_signal(signal.SIGINT)
        normal_mean(y)

    with pytest.raises(LatentDEError, match=r"interrupted during warm-up: .* of 10000"):
        nuts(model, Y, num_warmup=10_000, log_joint_engine="eager", progress=False)


def test_a_second_interrupt_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.wanted
        signal.raise_signal(signal.SIGINT)


def test_divergent_chains_warn_and_agreeing_chains_do_not(caplog):
    def two_modes():
        x = pyro.sample("x", dist.Normal(ZERO, 100.0))
        pyro.factor("modes", torch.logaddexp(-0.5 * (x - 30) ** 2, -0.5 * (x + 30) ** 2))

    start = {"x": torch.tensor([-30.0, 30.0])}
    nuts(two_modes, num_chains=2, start=start, num_samples=50, num_warmup=50, progress=False)
    assert "chains do not agree" in caplog.text
    caplog.clear()
    nuts(normal_mean, Y, num_samples=200, num_warmup=100, progress=False)
    assert not caplog.text


def test_split_rhat_against_arviz():
    draws = np.random.default_rng(0).standard_normal((4, 200, 2)) + np.array([0, 0, 0, 0.5])[:, None, None]
    theirs = [float(az.rhat(draws[..., i], method="rank")) for i in range(2)]
    assert np.allclose(split_rhat(draws), theirs, rtol=1e-6)
    assert np.isnan(split_rhat(draws[:, :3])).all()


def test_a_start_is_used():
    posterior = nuts(normal_mean, Y, start={"mean": 2.5}, num_samples=2, num_warmup=0, progress=False)
    again = nuts(normal_mean, Y, start=posterior, num_samples=2, num_warmup=0, progress=False)
    assert posterior.samples["mean"].shape == again.samples["mean"].shape == (4, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples must be an integer of at least 1, got 0"),
        ({"num_warmup": -1}, "num_warmup"),
        ({"num_chains": 2.0}, "num_chains"),
        ({"target_accept": 1.0}, "target_accept must lie between 0 and 1"),
        ({"max_tree_depth": 0}, "max_tree_depth"),
    ],
)
def test_bad_settings_are_told(settings, message):
    with pytest.raises(LatentDEError, match=message):
        nuts(normal_mean, Y, **settings)


def test_progress_prints_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("pyro_latentde.infer.progress._SECONDS_BETWEEN_LINES", 0.0)
    nuts(normal_mean, Y, num_samples=100, num_warmup=100)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2 and all(
        re.search(r"% after .* divergences \d+ \(0 of the solver\), .*step", x) for x in lines
    )
    assert lines[-1].startswith("nuts: 100 % after") and "phase sampling" in lines[-1]


def test_progress_is_a_bar_on_a_terminal_and_silent_in_ci(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("CI", "true")
    with Progress(10, "work") as progress:
        progress.update(10, {})
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("CI")
    with Progress(10, "work") as progress:
        progress.update(10, {"divergences": 3})
    assert "divergences=3" in capsys.readouterr().err
