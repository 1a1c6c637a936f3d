# SPDX-License-Identifier: Apache-2.0
"""A lengthening horizon: weights by hand, exact posteriors and evidences, modes that come and go, what is refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_latentde as lde
from pyro_latentde.errors import DataError, InitError, LatentDEError
from pyro_latentde.infer import lengthen
from pyro_latentde.infer.ensemble_chains import EnsembleSettings
from pyro_latentde.infer.horizon import default_horizons, until
from pyro_latentde.infer.particles import White, bridge, effective_size, next_temperature, resample

ZERO = torch.zeros((), dtype=torch.float64)
QUICK = {"num_particles": 64, "num_moves": 3, "num_chains": 16, "num_samples": 20, "num_warmup": 20, "progress": False}
NOISE = 0.3


def line(series):
    """Level and slope, with normal priors."""
    level = pyro.sample("level", dist.Normal(ZERO, 2.0))
    slope = pyro.sample("slope", dist.Normal(ZERO, 3.0))
    mean = level + slope * series.times[..., None]
    lde.observe("obs", lambda z: dist.Normal(z, NOISE), series, mean)


def line_series(seed=0):
    times = torch.tensor([0.0, 0.5, 0.6, 1.5, 2.0], dtype=torch.float64)
    noise = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lde.Series.from_tensors(times, 1.0 - 2.0 * times + NOISE * noise)


def exact_line(series):
    """Mean, covariance and log-evidence, by the formulas of a normal vector."""
    design = torch.stack([torch.ones(5, dtype=torch.float64), series.times[0]], 1)
    y, prior = series.values[0, :, 0], torch.diag(torch.tensor([4.0, 9.0], dtype=torch.float64))
    marginal = design @ prior @ design.T + NOISE**2 * torch.eye(5, dtype=torch.float64)
    gain = prior @ design.T @ torch.linalg.inv(marginal)
    evidence = dist.MultivariateNormal(torch.zeros(5, dtype=torch.float64), marginal).log_prob(y)
    return gain @ y, prior - gain @ design @ prior, float(evidence)


def normal(mean, sd):
    def density(u):
        grad = -(u - mean) / sd**2
        lp = -0.5 * ((u - mean) / sd).square().sum(-1)
        return lp, grad, torch.zeros(len(u), dtype=torch.bool), torch.ones(len(u)).long()

    return density


def test_posterior_and_evidence_of_a_line_are_exact():
    # 64 x 150 draws of at least 1500 effective: six standard errors of 5 moments, false alarm 1e-8. The
    # log-evidence has a sd of .2 over seeds: six of those
    series = line_series()
    posterior = lengthen(line, series, horizons=[0.5], num_warmup=100, num_samples=150, seed=3, progress=False)
    mean, covariance, evidence = exact_line(series)
    draws = torch.stack([posterior.draws()[name] for name in ("level", "slope")], 1)
    sd = covariance.diagonal().sqrt()
    assert ((draws.mean(0) - mean).abs() < 6 * sd / 1500**0.5).all()
    assert ((draws.T.cov() - covariance).abs() < 6 * torch.outer(sd, sd) * (2 / 1500) ** 0.5).all()
    assert abs(posterior.attrs["log_evidence"] - evidence) < 1.2
    assert posterior.summary()["r_hat"].max() < 1.05


def test_the_path_visits_every_horizon_in_parts_that_half_of_the_particles_bear():
    posterior = lengthen(line, line_series(), horizons=[0.0, 0.6], **QUICK)
    steps = posterior.attrs["steps"]
    assert sorted({step["horizon"] for step in steps}) == [0.0, 0.6, 2.0]
    for horizon in (0.0, 0.6, 2.0):
        path = [step["temperature"] for step in steps if step["horizon"] == horizon]
        assert path == sorted(set(path))
        assert path[-1] == 1.0
    assert all(step["effective"] >= 31.9 for step in steps)
    assert posterior.attrs["inference"] == "lengthen"
    assert posterior.attrs["log_evidence"] == pytest.approx(sum(step["log_ratio"] for step in steps))


def test_modes_have_the_mass_that_prior_and_data_give_them():
    """Observed is |x|, so that the prior alone decides between 2 and -2; then, roughly, x."""

    def model(series):
        x = pyro.sample("x", dist.Normal(ZERO + 0.3, 1.5))
        rough = series.times[..., None] > 1.0
        seen, error = torch.where(rough, x, x.abs()), torch.where(rough, 2.0, 0.1).double()
        lde.observe("obs", lambda z: dist.Normal(z, error), series, seen)

    series = lde.Series.from_tensors([0.0, 1.0, 2.0], torch.tensor([2.0, 2.0, -2.0], dtype=torch.float64))
    options = {"num_particles": 1024, "num_chains": 256, "num_warmup": 30, "num_samples": 10, "progress": False}
    # log-odds of 2: of the prior 4 * .3 / 1.5^2, of the last observation -4^2 / 8. No trajectory leads from one mode
    # to the other: of 1024 particles, then 256 chains, the share has a sd of .04; four of those
    for part, odds in ((until(series, 1.0), 1.2 / 2.25), (series, 1.2 / 2.25 - 2.0)):
        share = float((lengthen(model, part, **options)["x"] > 0).double().mean())
        assert abs(share - 1 / (1 + math.exp(-odds))) < 0.16


def test_weights_by_hand():
    # log-weights 0, 0, -inf: two of three in effect; 1 : 3 in weight: 16 / 10
    assert effective_size(torch.tensor([0.0, 0.0, -math.inf])) == pytest.approx(2.0)
    assert effective_size(torch.tensor([0.0, math.log(3.0)])) == pytest.approx(1.6)
    assert effective_size(torch.full((3,), -math.inf)) == 0.0
    # two particles, change 0 and c: (1 + w)^2 / (1 + w^2) = 1.6 at w = 3, so lambda = log 3 / c
    assert next_temperature(torch.tensor([0.0, 10.0]).double(), 0.0, 1.6) == pytest.approx(math.log(3.0) / 10.0)
    assert next_temperature(torch.tensor([0.0, 10.0]).double(), 0.3, 1.6) == pytest.approx(0.3 + math.log(3.0) / 10.0)
    assert next_temperature(torch.tensor([0.0, 1e-3]).double(), 0.3, 1.6) == 1.0
    # one that is possible goes on alone
    assert next_temperature(torch.tensor([0.0, -math.inf]).double(), 0.0, 1.0) == 1.0


def test_systematic_resampling_rounds_up_or_down():
    weights = torch.tensor([0.053, 0.502, 0.0, 0.297, 0.148], dtype=torch.float64)
    for uniform in (0.0, 0.3, 0.999):
        counts = torch.bincount(resample(weights.log(), 100, uniform), minlength=5)
        assert ((counts - 100 * weights).abs() < 1).all()
        assert counts[2] == 0


def test_a_bridge_between_normals():
    # from N(0, 1) to N(3, .1^2): one step would leave two particles; log-ratio of the integrals: 2 log .1
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(1024, 2, generator=generator, dtype=torch.float64)
    settings = EnsembleSettings(0, 0)
    u, steps = bridge(normal(0.0, 1.0), normal(3.0, 0.1), u, 5, settings, generator)
    assert len(steps) > 3
    assert ((u.mean(0) - 3.0).abs() < 5 * 0.1 / 500**0.5).all()  # false alarm 1e-6 at 500 effective
    assert ((u.std(0) / 0.1 - 1).abs() < 5 / 1000**0.5).all()
    assert abs(sum(step.log_ratio for step in steps) - 2 * math.log(0.1)) < 0.5  # six sds over seeds


def test_white_coordinates_stay_white_in_a_sheet_that_no_covariance_can_hold():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    u = x * torch.tensor([1.0, 0.1, 1e-10], dtype=torch.float64) @ turn
    white = White(u, dense=True)
    assert torch.allclose(white.whiten(u).T.cov(correction=0), torch.eye(3, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(white.back(white.whiten(u)), u, atol=1e-14)
    assert torch.equal(White(u, dense=False).root, White(u, dense=False).root.diagonal().diag())


def test_until_cuts_and_hides():
    series = lde.Series.from_tensors([[0.0, 1.0, 2.0], [0.0, 3.0, 4.0]], torch.ones(2, 3))
    assert default_horizons(series) == [0.0, 1.0, 2.0, 3.0, 4.0]
    cut = until(series, 1.5)
    assert cut.times.tolist() == [[0.0, 1.0], [0.0, 3.0]]
    assert cut.mask[..., 0].tolist() == [[True, True], [True, False]]
    assert until(series, 4.0).mask.all()


def test_same_seed_same_draws():
    one, same, other = (
        lengthen(line, line_series(), horizons=[1.0], seed=seed, **QUICK)["slope"] for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("horizons", "told"),
    [([1.0, 0.5], "increasing"), ([1.0, 1.0], "increasing"), ([], "at least one"), ([0.5, math.nan], "finite"),
     ([-1.0, 2.0], "from 0 to 2"), ([1.0, 2.5], "from 0 to 2")],
)  # fmt: skip
def test_horizons_that_are_refused(horizons, told):
    with pytest.raises(DataError, match=told):
        lengthen(line, line_series(), horizons=horizons, **QUICK)


def test_series_that_are_refused():
    with pytest.raises(DataError, match="with observations"):
        lengthen(line, lde.Series.at_times([0.0, 1.0]), **QUICK)
    with pytest.raises(DataError, match="expected a Series"):
        lengthen(line, torch.ones(3), **QUICK)


@pytest.mark.parametrize("option", [{"num_particles": 3}, {"num_moves": 0}, {"num_chains": 2}, {"target_accept": 1.0}])
def test_options_that_are_refused(option):
    with pytest.raises(LatentDEError, match=next(iter(option))):
        lengthen(line, line_series(), **{**QUICK, **option})


def test_a_prior_that_can_never_be_solved_is_told():
    def model(series):
        z0 = pyro.sample("z0", dist.Normal(ZERO + 2.0, 0.1).expand([1]).to_event(1))
        z = lde.ode("z", lambda t, y: y**2, z0, series.times[0], t0=ZERO)  # infinite at .5
        lde.observe("obs", lambda z: dist.Normal(z, 1.0), series, z)

    with pytest.raises(InitError, match="ODE"):
        lengthen(model, lde.Series.from_tensors([2.0, 3.0], torch.ones(2).double()), **QUICK)
