# SPDX-License-Identifier: Apache-2.0
"""``infer.sgld``, ``psgld`` and ``sghmc`` from end to end: stationary moments, failures, interrupts, settings."""

import math
import signal

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov

from pyro_latentde.errors import LatentDEError, ShapeError
from pyro_latentde.infer import psgld, schedules, sghmc, sgld
from pyro_latentde.infer.sgmcmc_kernels import Langevin
from pyro_latentde.infer.sgmcmc_schedules import Cyclical

ZERO = torch.zeros((), dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.8], [0.8, 2.0]], dtype=torch.float64)
QUIET = {"progress": False}


def correlated_normal():
    pyro.sample("x", dist.MultivariateNormal(torch.zeros(2, dtype=torch.float64), COVARIANCE))


def normal_with_scale(scale=1.0):
    pyro.sample("x", dist.Normal(ZERO, scale))


def solve_fails_above(limit):
    """Standard normal ``x`` whose 'solve' of four steps fails above ``limit``: the posterior is cut there."""

    def model():
        x = pyro.sample("x", dist.Normal(ZERO, 1.0))
        failed = x > limit
        z = torch.where(failed, torch.full_like(x, math.nan), x).reshape(1, 1)
        record = {"status": failed.long(), "n_steps": torch.full((), 4)}
        infer = {"_deterministic": True, "lde_ode": record}
        pyro.sample("z", dist.Delta(z, event_dim=2).mask(False), obs=z, infer=infer)

    return model


def langevin_covariance(step_size, metric, temperature):
    """Of the linear recursion that a Langevin step is on the Gaussian."""
    drift = np.eye(2) - 0.5 * step_size * np.diag(metric) @ np.linalg.inv(COVARIANCE.numpy())
    return solve_discrete_lyapunov(drift, step_size * temperature * np.diag(metric))


def worst_z(posterior, covariance):
    """Largest z-score of the three second moments and two means; chains are independent of each other."""
    x = posterior["x"].numpy()
    moments = np.stack([x[..., 0] ** 2, x[..., 0] * x[..., 1], x[..., 1] ** 2, x[..., 0], x[..., 1]])
    expected = np.array([covariance[0, 0], covariance[0, 1], covariance[1, 1], 0.0, 0.0])
    by_chain = moments.mean(-1)
    return np.abs((by_chain.mean(-1) - expected) / (by_chain.std(-1, ddof=1) / np.sqrt(x.shape[0]))).max()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("sampler", [sgld, psgld, sghmc])
def test_stationary_moments_on_a_correlated_gaussian(sampler, temperature):
    """Against the exact law of each discretisation. |z| < 4.8 of 5 moments: false alarm below one in 100,000."""
    settings = {"num_samples": 60, "num_warmup": 150, "num_chains": 300, "thinning": 10, "start": {"x": torch.zeros(2)}}
    step_size = 0.8 if sampler is psgld else 0.4  # its metric is smaller than 1
    posterior = sampler(correlated_normal, step_size=step_size, temperature=temperature, seed=3, **settings, **QUIET)
    target = temperature * COVARIANCE.numpy()
    if sampler is sghmc:
        assert worst_z(posterior, target) < 4.8
        return
    metric = posterior.attrs["metric"] or [1.0, 1.0]
    exact = langevin_covariance(step_size, metric, temperature)
    assert worst_z(posterior, exact) < 4.8
    assert worst_z(posterior, target) > 6  # the test has the power to see the bias of the step size
    assert worst_z(posterior, 0.5 * exact) > 20  # and more so noise on a wrong scale


def test_psgld_is_sgld_in_the_metric_that_it_learned():
    settings = {"num_samples": 20, "num_warmup": 30, "step_size": 0.1, "start": {"x": torch.zeros(2)}} | QUIET
    learned = psgld(correlated_normal, **settings)
    metric = learned.attrs["metric"]
    assert len(metric) == 2 and metric[1] != metric[0] and all(0.1 < g < 3 for g in metric)
    assert sgld(correlated_normal, metric=metric, **settings).attrs["metric"] == metric


def test_statistics_and_facts(caplog):
    posterior = sghmc(correlated_normal, step_size=0.1, num_samples=30, num_warmup=7, thinning=3, seed=5, **QUIET)
    assert posterior["x"].shape == (4, 30, 2) and posterior.num_chains == 4
    stats = posterior.stats
    assert set(stats) == {"lp", "step_size", "n_steps", "diverging", "ode_failed", "ode_steps"}
    assert all(value.shape == (4, 30) for value in stats.values())
    by_hand = dist.MultivariateNormal(torch.zeros(2).double(), COVARIANCE).log_prob(posterior["x"])
    assert torch.allclose(stats["lp"], by_hand)
    assert (stats["n_steps"] == 3).all() and (stats["step_size"] == 0.1).all() and not stats["diverging"].any()
    facts = posterior.attrs
    assert facts["inference"] == "sghmc" and facts["num_gradients"] == 4 * 97 and not facts["lp_is_estimate"]
    assert facts["log_joint_engine"] == "traced" and facts["minibatch_heat"] == 0.0 and not facts["interrupted"]
    assert "bias this posterior: compare it with infer.nuts" in caplog.text


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    settings = {"step_size": 0.1, "num_samples": 20, "num_warmup": 5, "start": {"x": torch.zeros(2)}} | QUIET
    for sampler in (psgld, sghmc):
        a, b, c = (sampler(correlated_normal, seed=seed, **settings) for seed in (1, 1, 2))
        assert torch.equal(a["x"], b["x"]) and torch.equal(a.stats["lp"], b.stats["lp"])
        assert not torch.equal(a["x"], c["x"])
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("sampler", [sgld, sghmc])
def test_a_chain_is_the_same_whatever_the_number_of_chains(sampler):
    settings = {"step_size": 0.1, "num_samples": 20, "num_warmup": 5} | QUIET
    few, many = (sampler(correlated_normal, num_chains=n, **settings) for n in (2, 5))
    assert torch.allclose(few["x"], many["x"][:2], rtol=1e-6)


@pytest.mark.parametrize("sampler", [sgld, sghmc])
def test_failed_solves_are_undone_and_counted(sampler, caplog):
    """The normal cut at 1 has the mean -phi(1) / Phi(1); the wall adds an error that falls with the step size."""
    settings = {"num_samples": 400, "num_warmup": 100, "num_chains": 64, "start": {"x": 0.0}} | QUIET
    posterior = sampler(solve_fails_above(1.0), step_size=0.02, thinning=5, **settings)
    x, stats = posterior["x"], posterior.stats
    assert x.max() <= 1.0 and stats["ode_failed"].sum() > 100
    assert torch.equal(stats["ode_failed"] > 0, stats["diverging"])
    assert (stats["ode_steps"] == 20).all() and torch.isfinite(stats["lp"]).all()
    cut = dist.Normal(0.0, 1.0)
    mean = -(cut.log_prob(torch.tensor(1.0)).exp() / cut.cdf(torch.tensor(1.0))).item()
    by_chain = x.mean(1)
    assert abs(by_chain.mean() - mean) < 4.8 * by_chain.std() / 8 + 0.03
    assert f"{int(stats['ode_failed'].sum())} failed solves" in caplog.text


def test_a_chain_keeps_its_place_when_its_step_is_undone():
    settings = {"num_samples": 300, "num_warmup": 0, "start": {"x": 0.9}} | QUIET
    posterior = sgld(solve_fails_above(1.0), step_size=0.05, **settings)
    x, undone = posterior["x"], posterior.stats["diverging"]
    assert undone.any() and torch.equal(x[:, 1:] == x[:, :-1], undone[:, 1:])


def test_steps_to_places_that_are_no_numbers_are_undone(caplog):
    def quartic():
        x = pyro.sample("x", dist.Normal(ZERO, 1.0))
        pyro.factor("wall", -(x**4) * 1e3)

    posterior = sgld(quartic, step_size=10.0, num_samples=200, num_warmup=50, start={"x": 0.5}, **QUIET)
    assert torch.isfinite(posterior["x"]).all() and posterior.stats["diverging"].any()
    assert not posterior.stats["ode_failed"].any()
    assert "Many steps led where there is no density: try a smaller step_size" in caplog.text


def test_schedules_reach_the_chains():
    settings = {"num_samples": 40, "num_warmup": 10, "start": {"x": 0.0}} | QUIET
    falling = sgld(normal_with_scale, step_size=0.2, schedule="polynomial", thinning=5, **settings)
    sizes = falling.stats["step_size"][0]
    assert (sizes.diff() <= 0).all() and sizes[0] > 2 * sizes[-1] and falling.stats["n_steps"].sum() <= 4 * 200
    rule = Cyclical(0.2, 50, cycles=2)
    cycles = sghmc(normal_with_scale, schedule=rule, **settings)
    assert cycles.stats["step_size"].max() <= rule(12) and cycles.attrs["schedule"] == repr(rule)
    own = psgld(normal_with_scale, schedule=schedules.exponential(0.2, 0.1, 50), **settings)
    assert own.attrs["schedule"] == "exponential(0.2, 0.1, 50)" and own.stats["step_size"].max() < 0.2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_returns_the_draws_made_so_far(number, caplog, monkeypatch):
    interrupt_after(200, number, monkeypatch)
    before = signal.getsignal(number)
    posterior = sgld(normal_with_scale, step_size=0.1, num_samples=10_000, num_warmup=100, thinning=2, **QUIET)
    assert posterior.num_draws == 50 and posterior.attrs["num_samples"] == 50 and posterior.attrs["interrupted"]
    assert all(value.shape == (4, 50) for value in posterior.stats.values())
    assert "Interrupted" in caplog.text and signal.getsignal(number) is before


def test_an_interrupt_before_the_first_draw_is_told(monkeypatch):
    interrupt_after(20, signal.SIGINT, monkeypatch)
    with pytest.raises(LatentDEError, match="interrupted at step 20 of 200, before the first draw, .* due at 101"):
        sgld(normal_with_scale, step_size=0.1, num_samples=100, num_warmup=100, **QUIET)


def interrupt_after(steps, number, monkeypatch):
    calls, move = [], Langevin.move

    def counted(self, *arguments):
        calls.append(0)
        if len(calls) == steps:
            signal.raise_signal(number)
        return move(self, *arguments)

    monkeypatch.setattr(Langevin, "move", counted)


def test_chains_that_do_not_agree_warn(caplog):
    def two_modes():
        x = pyro.sample("x", dist.Normal(ZERO, 100.0))
        pyro.factor("modes", torch.logaddexp(-0.5 * (x - 30) ** 2, -0.5 * (x + 30) ** 2))

    start = {"x": torch.tensor([-30.0, 30.0])}
    sgld(two_modes, step_size=0.1, num_chains=2, start=start, num_samples=100, num_warmup=50, **QUIET)
    assert "chains do not agree" in caplog.text


def test_constrained_sites_and_posteriors_as_starts():
    def model():
        pyro.sample("rate", dist.Gamma(ZERO + 3.0, 2.0))

    posterior = sghmc(model, step_size=0.05, num_samples=300, num_warmup=100, num_chains=50, thinning=4, **QUIET)
    by_chain = posterior["rate"].mean(1)
    assert posterior["rate"].min() > 0
    assert abs(by_chain.mean() - 1.5) < 4.8 * by_chain.std() / math.sqrt(50) + 0.005
    again = sgld(model, step_size=0.05, num_samples=2, num_warmup=0, start=posterior, **QUIET)
    assert again["rate"].shape == (4, 2) and torch.isin(again["rate"][:, 0], posterior["rate"]).all()


def test_progress_lines(capsys, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("pyro_latentde.infer.progress._SECONDS_BETWEEN_LINES", 0.0)
    sgld(normal_with_scale, step_size=0.1, num_samples=100, num_warmup=100)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1 and lines[-1].startswith("sgld: 100 %") and "steps undone 0, failed solves 0" in lines[-1]


@pytest.mark.parametrize(
    ("sampler", "settings", "message"),
    [
        (sgld, {"num_samples": 0}, "sgld: num_samples must be an integer of at least 1, got 0"),
        (psgld, {"num_warmup": -1}, "psgld: num_warmup"),
        (psgld, {"num_warmup": 0}, "learned in warm-up"),
        (sghmc, {"num_chains": 2.0}, "sghmc: num_chains"),
        (sgld, {"thinning": 0}, "thinning"),
        (sgld, {"temperature": 0.0}, "temperature must be a positive number"),
        (sgld, {"step_size": -1.0}, "step_size must be a positive number, got -1.0"),
        (sgld, {"step_size": None}, "smallest posterior variance"),
        (sgld, {"schedule": "linear"}, "schedule: expected one of"),
        (sgld, {"metric": torch.ones(3)}, r"metric: expected positive variances \(1,\).*got shape \(3,\)"),
        (sgld, {"metric": -torch.ones(1)}, "entries that are not positive"),
        (sghmc, {"friction": 0.0}, "friction is the part"),
        (sghmc, {"gradient_variance": torch.ones(2)}, r"gradient_variance: expected one number or \(1,\)"),
        (sgld, {"batch_size": 2}, "minibatches are taken of a Series.* got no argument"),
    ],
)
def test_bad_settings_are_told(sampler, settings, message):
    with pytest.raises(LatentDEError, match=message):
        sampler(normal_with_scale, **({"step_size": 0.1} | settings | QUIET))
    assert issubclass(ShapeError, LatentDEError)
