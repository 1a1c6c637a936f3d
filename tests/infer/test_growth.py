# SPDX-License-Identifier: Apache-2.0
"""Latent sites that grow with the horizon: a random walk whose posterior and evidence are known."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_latentde as lde
from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer import lengthen
from pyro_latentde.infer.growth import grow, is_part
from pyro_latentde.infer.horizon import until
from pyro_latentde.infer.log_joint import LogJoint
from pyro_latentde.models import Shooting

ZERO = torch.zeros((), dtype=torch.float64)
STEP, NOISE, SIZE = 0.5, 0.3, 5


def walk(series):
    """x_0 ~ N(0, 1), x_t = x_{t-1} + STEP e_t, each seen with NOISE."""
    length = series.times.shape[1]
    x = pyro.sample("x0", dist.Normal(ZERO, 1.0)).reshape(1)
    if length > 1:
        steps = pyro.sample("steps", dist.Normal(ZERO, 1.0).expand([length - 1]).to_event(1))
        x = torch.cat([x, x + STEP * steps.cumsum(0)])
    lde.observe("obs", lambda z: dist.Normal(z, NOISE), series, x[:, None])


def series_of_walk():
    values = torch.tensor([0.4, 1.1, 0.7, -0.2, -0.9], dtype=torch.float64)
    return lde.Series.from_tensors(torch.arange(SIZE).double(), values)


def exact(size=SIZE):
    """Mean and covariance of (x0, steps), and the log-evidence, by the formulas of a normal vector."""
    design = torch.cat([torch.ones(size, 1), STEP * torch.ones(size, size).tril(-1)[:, :-1]], 1).double()
    design[:, 1:] = STEP * torch.ones(size, size - 1).double().tril(-1)
    y = series_of_walk().values[0, :size, 0]
    marginal = design @ design.T + NOISE**2 * torch.eye(size).double()
    gain = design.T @ torch.linalg.inv(marginal)
    evidence = dist.MultivariateNormal(torch.zeros(size).double(), marginal).log_prob(y)
    return gain @ y, torch.eye(size).double() - gain @ design, float(evidence)


def of(posterior):
    draws = posterior.draws()
    return torch.cat([draws["x0"][:, None], draws["steps"]], 1)


def check_moments(posterior):
    # 64 x 100 draws of at least 1500 effective: six standard errors of 20 moments, false alarm 1e-7
    mean, covariance, _ = exact()
    draws, sd = of(posterior), exact()[1].diagonal().sqrt()
    assert ((draws.mean(0) - mean).abs() < 6 * sd / 1500**0.5).all()
    assert ((draws.T.cov() - covariance).abs() < 6 * torch.outer(sd, sd) * (2 / 1500) ** 0.5).all()


def test_posterior_and_evidence_of_a_site_that_grows():
    posterior = lengthen(walk, series_of_walk(), num_warmup=100, num_samples=100, seed=1, progress=False)
    check_moments(posterior)
    # a sd of .15 over seeds: six of those
    assert posterior.attrs["log_evidence"] == pytest.approx(exact()[2], abs=0.9)


def test_a_start_of_the_first_horizon_is_carried_on():
    mean, covariance, _ = exact(2)
    torch.manual_seed(0)
    draws = dist.MultivariateNormal(mean, covariance).sample((400,))
    start = {"x0": draws[:, 0], "steps": draws[:, 1:]}
    options = {"num_warmup": 100, "num_samples": 100, "seed": 2, "progress": False}
    posterior = lengthen(walk, series_of_walk(), horizons=[1.0, 2.0, 3.0], start=start, **options)
    check_moments(posterior)
    assert sorted({step["horizon"] for step in posterior.attrs["steps"]}) == [2.0, 3.0, 4.0]
    with pytest.raises(LatentDEError, match=r"start has no draws of the latent sites \['steps'\], got \['x0'\]"):
        lengthen(walk, series_of_walk(), horizons=[1.0, 2.0], start={"x0": draws[:, 0]}, progress=False)
    with pytest.raises(LatentDEError, match=r"'steps': '\(400, 1\) for \(N, 2\)'"):
        lengthen(walk, series_of_walk(), horizons=[2.0, 3.0], start=start, progress=False)


def test_what_is_there_stays_and_the_rest_is_of_the_prior():
    series = series_of_walk()
    short, long = (LogJoint(walk, (until(series, horizon),)) for horizon in (2.0, 4.0))
    torch.manual_seed(0)
    u = torch.randn(4000, 3).double()
    grown = grow(short, long, u, seed=0)
    assert torch.equal(grown[:, :3], u)
    # standard normal: five standard errors of 4 moments, false alarm 3e-6
    new = grown[:, 3:]
    assert (new.mean(0).abs() < 5 / 4000**0.5).all()
    assert (new.var(0) - 1).abs().max() < 5 * (2 / 4000) ** 0.5


def test_starts_of_segments_go_on_from_the_last_one():
    """Decay at rate 1 with jumps of .01: the new starts follow from the old ones, and jump by as much."""

    def model(series):
        y0 = pyro.sample("y0", dist.Normal(ZERO + 1.0, 0.1).expand([1]).to_event(1))
        lde.ode("z", lambda t, y: -y, y0, series.times[0], shooting=Shooting(1, 0.01))

    series = lde.Series.at_times(torch.arange(5).double())
    short, long = (LogJoint(model, (series.window(0, length),)) for length in (3, 5))
    u = torch.tensor([[1.0, 5.0, 7.0]]).double().expand(2000, -1)
    grown = grow(short, long, u, seed=0)
    assert torch.equal(grown[:, :3], u)
    decay = torch.tensor(-1.0).exp().double()
    jumps = torch.stack([grown[:, 3] - 7.0 * decay, grown[:, 4] - grown[:, 3] * decay], 1) / 0.01
    assert (jumps.mean(0).abs() < 5 / 2000**0.5).all()
    assert (jumps.var(0) - 1).abs().max() < 5 * (2 / 2000) ** 0.5


def test_a_site_that_changes_otherwise_is_refused():
    def model(series):
        length = series.times.shape[1]
        pyro.sample("x", dist.Normal(ZERO, 1.0).expand([length, length]).to_event(2))

    with pytest.raises(LatentDEError, match="grow in one dimension"):
        lengthen(model, series_of_walk(), progress=False)
    assert is_part((2, 3), (2, 4)) and not is_part((2, 3), (1, 3)) and not is_part((2,), (2, 1))
