# SPDX-License-Identifier: Apache-2.0
"""Minibatches: unbiased by enumeration, recorded as they are by hand, and the variance that their noise adds."""

import itertools
import logging

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_latentde as lde
from pyro_latentde.errors import DataError, LatentDEError
from pyro_latentde.infer import sghmc, sgld
from pyro_latentde.infer.log_joint import LogJoint
from pyro_latentde.infer.sgmcmc_minibatch import MinibatchLogJoint

ZERO = torch.zeros((), dtype=torch.float64)
N, T, B = 12, 3, 3
QUIET = {"progress": False}


def decay(series, noise_scale=1.0):
    """Exponential decay from the first value, by the solver, each series at its own times."""
    rate = pyro.sample("rate", dist.LogNormal(ZERO, 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(ZERO + noise_scale))
    with lde.series_plate(series):
        z = lde.ode("z", lambda t, y, k: -k * y, series.values[:, 0], series.times, rate)
        lde.observe("obs", lambda z: dist.Normal(z, noise), series, z)


def decay_series(n=5):
    generator = torch.Generator().manual_seed(0)
    times = torch.rand(n, 6, generator=generator, dtype=torch.float64).sort(1).values * 3
    values = torch.exp(-times) + 0.1 * torch.randn(n, 6, generator=generator, dtype=torch.float64)
    values[n - 1, 3:5] = float("nan")  # gaps in one series only: most minibatches have none
    return lde.Series.from_tensors(times, values[..., None])


def normal_mean(series):
    """Conjugate: the posterior of the mean has precision 1 + N T."""
    mean = pyro.sample("mean", dist.Normal(ZERO, 1.0))
    with lde.series_plate(series):
        lde.observe("obs", dist.Normal(mean.expand(len(series), T, 1), 1.0), series)


def normal_series():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(N, 1, 1, generator=generator, dtype=torch.float64) + torch.zeros(N, T, 1)
    return lde.Series.from_tensors(torch.arange(float(T), dtype=torch.float64), values)


def test_estimates_are_unbiased_by_enumeration(monkeypatch):
    series, u = decay_series(), np.array([[0.1, -1.0], [0.8, -0.3]])
    batched = MinibatchLogJoint(decay, (series,), {"noise_scale": 2.0}, batch_size=2, seed=0)
    batched.prepare(u)
    assert batched.engine == "traced"
    subsets = iter(itertools.combinations(range(5), 2))
    monkeypatch.setattr(batched._batches, "take", lambda step: series.batch(next(subsets)))
    answers = [batched(u) for _ in range(10)]
    lp, grad, _ = LogJoint(decay, (series,), {"noise_scale": 2.0}).value_and_grad(torch.from_numpy(u))
    assert np.allclose(np.mean([a[0] for a in answers], 0), lp, rtol=1e-10)
    assert np.allclose(np.mean([a[1] for a in answers], 0), grad, rtol=1e-8)
    assert np.std([a[0][0] for a in answers]) > 0.1 and all(min(a[3]) > 0 for a in answers)
    assert batched.num_calls == 10


def test_a_model_that_looks_at_its_data_runs_by_itself(caplog):
    def looks(series):
        decay(series, noise_scale=2.0 if float(series.values.sum()) > -1e9 else 1.0)

    series, u = decay_series(), np.array([[0.1, -1.0]])
    recorded, eager = (MinibatchLogJoint(m, (series,), {}, batch_size=2, seed=3) for m in (decay_wide, looks))
    recorded.prepare(u)
    with caplog.at_level(logging.INFO, "pyro_latentde"):
        eager.prepare(u)
    assert (recorded.engine, eager.engine) == ("traced", "eager") and "recording the model failed" in caplog.text
    for _ in range(4):
        ours, theirs = recorded(u), eager(u)
        assert np.allclose(ours[0], theirs[0], rtol=1e-10) and np.allclose(ours[1], theirs[1], rtol=1e-8)


def decay_wide(series):
    decay(series, noise_scale=2.0)


def test_a_model_that_branches_on_a_latent_value_runs_row_by_row():
    def branches(series):
        mean = pyro.sample("mean", dist.Normal(ZERO, 1.0))
        mean = mean if mean.item() > 0 else 2 * mean
        with lde.series_plate(series):
            lde.observe("obs", dist.Normal(mean.expand(len(series), T, 1), 1.0), series)

    posterior = sgld(branches, normal_series(), step_size=1e-3, batch_size=B, num_samples=5, num_warmup=2, **QUIET)
    assert posterior.attrs["log_joint_engine"] == "loop"


def test_the_variance_of_the_gradient():
    series, u = normal_series(), np.zeros((2, 1))
    batched = MinibatchLogJoint(normal_mean, (series,), {}, batch_size=B, seed=0)
    batched.prepare(u)
    sums = series.values.sum((1, 2)).numpy()
    # sampling without replacement; relative sd of a variance from 2000 draws: 3 %
    exact = (N / B) ** 2 * B * sums.var(ddof=1) * (1 - B / N)
    assert batched.gradient_variance(u, num_batches=2000)[0] == pytest.approx(exact, rel=0.15)
    assert batched.num_calls == 0


def epoch_covariance(variance):
    """Of the gradient's noise in an epoch: it sums to zero."""
    batches = N // B
    return variance * (np.eye(batches) * batches - 1) / (batches - 1)


def predicted_variance(step_size, gradient_variance):
    """Exact stationary variance of SGLD on `normal_mean`, the mean over the places in an epoch."""
    batches, a = N // B, 1 - 0.5 * step_size * (1 + N * T)
    noise, found = epoch_covariance(gradient_variance), []
    whole = a ** np.arange(batches - 1, -1, -1.0)
    for done in range(batches):
        part = a ** np.arange(done - 1, -1, -1.0)
        past = a ** (2 * done) * (whole @ noise @ whole) / (1 - a ** (2 * batches))
        found.append(part @ noise[:done, :done] @ part + past)
    return step_size / (1 - a**2) + (0.5 * step_size) ** 2 * np.mean(found)


def test_minibatches_add_the_predicted_variance():
    """The chains share minibatches, so the error is that of 100 blocks of time: |z| < 5, false alarm 3 in a million."""
    series, step_size = normal_series(), 0.02
    sums = series.values.sum((1, 2)).numpy()
    variance = (N / B) ** 2 * B * sums.var(ddof=1) * (1 - B / N)
    settings = {"num_samples": 4000, "num_warmup": 400, "num_chains": 40, "start": {"mean": 0.0}} | QUIET
    posterior = sgld(normal_mean, series, step_size=step_size, batch_size=B, **settings)
    squares = (posterior["mean"].numpy() - sums.sum() / (1 + N * T)) ** 2
    blocks = squares.mean(0).reshape(100, 40).mean(1)

    def z(expected):
        return abs(blocks.mean() - expected) / (blocks.std(ddof=1) / 10)

    predicted = predicted_variance(step_size, variance)
    assert z(predicted) < 5
    assert predicted > 1.2 * predicted_variance(step_size, 0.0) and z(predicted_variance(step_size, 0.0)) > 10
    assert posterior.attrs["minibatch_heat"] == pytest.approx(step_size * variance / 4, rel=0.6)
    assert posterior.attrs["lp_is_estimate"] and posterior.attrs["batch_size"] == B


@pytest.mark.parametrize(("sampler", "step_size"), [(sgld, 4e-4), (sghmc, 2e-4)])
def test_small_steps_find_the_posterior(sampler, step_size, caplog):
    """Noise of minibatches nearly cancels in these short epochs: |z| < 4.8, and 3 % for what is left of it."""
    series = normal_series()
    settings = {"num_samples": 30, "num_warmup": 1000, "num_chains": 200, "thinning": 60, "start": {"mean": 0.0}}
    posterior = sampler(normal_mean, series, step_size=step_size, batch_size=B, **settings, **QUIET)
    x, exact = posterior["mean"].numpy(), 1 / (1 + N * T)
    second = ((x - series.values.sum().item() * exact) ** 2).mean(1)
    assert abs(second.mean() / exact - 1) < 4.8 * second.std() / exact / np.sqrt(200) + 0.03
    assert abs(x.mean() - series.values.sum().item() * exact) < 4.8 * x.mean(1).std() / np.sqrt(200) + 0.1 * exact**0.5


def test_much_noise_of_minibatches_is_told(caplog):
    settings = {"num_samples": 20, "num_warmup": 5, "batch_size": 1, "start": {"mean": 0.0}} | QUIET
    posterior = sghmc(normal_mean, normal_series(), step_size=0.01, **settings)
    assert posterior.attrs["minibatch_heat"] > 1.0
    assert "The noise of the minibatches widens some coordinate" in caplog.text


def test_all_series_in_a_batch_are_the_full_data():
    settings = {"num_samples": 10, "num_warmup": 5, "start": {"mean": 0.0}, "step_size": 0.01} | QUIET
    whole, batch = (sgld(normal_mean, normal_series(), batch_size=size, **settings) for size in (None, N))
    assert torch.allclose(whole["mean"], batch["mean"]) and batch.attrs["minibatch_heat"] == pytest.approx(0, abs=1e-9)


def without_plate(series):
    mean = pyro.sample("mean", dist.Normal(ZERO, 1.0))
    lde.observe("obs", dist.Normal(mean.expand(len(series), T, 1), 1.0), series)


def with_local_sites(series):
    with lde.series_plate(series):
        mean = pyro.sample("mean", dist.Normal(ZERO, 1.0))
        lde.observe("obs", dist.Normal(mean[:, None, None].expand(-1, T, 1), 1.0), series)


@pytest.mark.parametrize(
    ("model", "data", "batch_size", "error", "message"),
    [
        (normal_mean, "series", 13, DataError, "batch_size: 13 of 12 series"),
        (normal_mean, "series", 0, DataError, "batch_size: 0 of 12 series"),
        (normal_mean, "series", 2.0, DataError, "expected a whole number of series or None, got 2.0"),
        (lambda y: None, "tensor", 2, DataError, "a Series, the first argument of the model; got Tensor"),
        (
            without_plate,
            "series",
            3,
            LatentDEError,
            "no observed site .* inside lde.series_plate.*\n?.*3 series count as 12",
        ),
        (with_local_sites, "series", 3, LatentDEError, "latent site 'mean' belongs to single series"),
    ],
)
def test_bad_input_is_told(model, data, batch_size, error, message):
    given = normal_series() if data == "series" else torch.ones(3)
    with pytest.raises(error, match=message):
        MinibatchLogJoint(model, (given,), {}, batch_size, seed=0)
