# SPDX-License-Identifier: Apache-2.0
"""What a solve can do, inside an inference: doses, events, delays, positive states, symplectic steps.

Posteriors are compared with those on a grid, from closed forms of the solutions. ``LIMIT`` standard errors of a mean or
of an sd are exceeded by chance once in 1.7 million; seeds are fixed.
"""

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pyro_latentde as lde

LIMIT = 5.0


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


ONE = torch.ones(1, dtype=torch.float64)
NAN = float("nan")
NUTS = {"num_chains": 2, "num_warmup": 150, "num_samples": 250, "seed": 0, "progress": False}
ENSEMBLE = {"num_chains": 16, "num_warmup": 80, "num_samples": 60, "seed": 0, "progress": False}


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@dataclass
class Case:
    """A model of one positive parameter: its prior, what is read off its solution, the same in closed form."""

    prior: dist.LogNormal
    read: Any  # of the parameter, in the model
    closed: Any  # of a grid (G, 1) of it
    error: float
    truth: float

    def __post_init__(self):
        self.mean = self.closed(tensor([self.truth]))[0]
        self.data = self.mean + self.error * noise(len(self.mean))

    def model(self, data=None):
        x = pyro.sample("x", self.prior)
        return pyro.sample("data", dist.Normal(self.read(x), self.error).to_event(1), obs=data)

    def exact(self, log=False):
        """Mean and sd of the posterior on a grid, also of the logarithm."""
        x = torch.linspace(0.2 * self.truth, 2.5 * self.truth, 8001, dtype=torch.float64)
        density = dist.Normal(self.closed(x[:, None]), self.error).log_prob(self.data).sum(-1) + self.prior.log_prob(x)
        return moments(x.log() if log else x, density)


def moments(x, log_density):
    weight = torch.softmax(log_density.reshape(-1), 0)
    mean = (weight * x.reshape(-1)).sum()
    return float(mean), float((weight * (x.reshape(-1) - mean).square()).sum().sqrt())


def assert_same(posterior, exact):
    """The draws of each site have this mean and sd, as well as their effective number can tell."""
    summary = posterior.summary()
    for name, (mean, sd) in exact.items():
        draws, told = posterior.samples[name].flatten(), summary.loc[name]
        few = float(told.ess_bulk), float(told.ess_tail)
        assert min(few) > 50.0
        assert abs(float(draws.mean()) - mean) < LIMIT * sd / few[0] ** 0.5, (name, draws.mean(), mean)
        assert abs(float(draws.std()) / sd - 1.0) < LIMIT / (2.0 * min(few)) ** 0.5, (name, draws.std(), sd)
    assert int(posterior.stats["ode_failed"].sum()) == 0


# ---- one parameter, by NUTS ------------------------------------------------------------------------------------

SWING = torch.linspace(0.5, 6.0, 12, dtype=torch.float64)
FLIGHT = torch.linspace(0.25, 2.5, 10, dtype=torch.float64)
GROWTH = torch.linspace(0.5, 6.0, 12, dtype=torch.float64)


def oscillator(method):
    def read(frequency):
        def field(t, y, w):
            return torch.stack([y[1], -w * w * y[0]])

        settings = {"t0": 0.0, "method": method, "step_size": 0.02}
        return lde.ode("z", field, tensor(1.0, 0.0), SWING, frequency, **settings)[..., 0]

    return Case(dist.LogNormal(tensor(0.2)[0], 0.1), read, lambda w: torch.cos(w * SWING), 0.2, 1.3)


def fuse(rate):
    """Five fuses of a known length glow down at one rate; seen is when they go out."""
    out = lde.Event(lambda t, y, p: y[0] - 0.3, terminal=True, direction=-1)
    _, found = lde.ode("z", lambda t, y, p: -p * y, ONE, tensor(0.0, 20.0), rate, events=out)
    return found.times[..., :1].expand(*found.times.shape[:-1], 5)


def echo(lag):
    return lde.dde("z", lambda t, y, lagged: -lagged[0], ONE, lag, FLIGHT, t0=0.0)[..., 0]


def echo_in_steps(lag):
    """y' = -y(t - lag), y = 1 before 0: a polynomial more in each lag."""
    y, factorial = 1.0 - FLIGHT, 1.0
    for n in range(1, 10):
        factorial *= n + 1.0
        y = y - (-1.0) ** n * (FLIGHT - n * lag).clamp(min=0.0) ** (n + 1) / factorial
    return y


def spread(rate):
    """An infection grows from one in a hundred; its logarithm is read, so that it must never be 0."""
    settings = {"t0": 0.0, "positive": True}
    return lde.ode("z", lambda t, y, r: r * y * (1 - y), 0.01 * ONE, GROWTH, rate, **settings)[..., 0].log()


def logistic(rate):
    return -torch.log1p(99.0 * torch.exp(-rate * GROWTH))


CASES = {
    "leapfrog": oscillator("leapfrog"),
    "blanes_moan4": oscillator("blanes_moan4"),
    "event": Case(
        dist.LogNormal(tensor(0.0)[0], 0.3), fuse, lambda k: (-tensor(0.3).log() / k).expand(len(k), 5), 0.1, 1.3
    ),
    "delay": Case(dist.LogNormal(tensor(0.0)[0], 0.15), echo, echo_in_steps, 0.1, 1.1),
    "positive": Case(dist.LogNormal(tensor(0.0)[0], 0.3), spread, logistic, 0.3, 1.2),
}


@pytest.mark.parametrize("name", CASES)
def test_nuts_finds_the_posterior_of_the_grid(name):
    case = CASES[name]
    posterior = lde.infer.nuts(case.model, case.data, **NUTS)
    assert_same(posterior, {"x": case.exact()})


def test_an_ensemble_finds_it_through_events_and_delays():
    """All chains in one recorded batch."""
    for name in ("event", "delay"):
        case = CASES[name]
        posterior = lde.infer.ensemble_hmc(case.model, case.data, **ENSEMBLE)
        assert_same(posterior, {"x": case.exact()})


def test_svi_with_positive_states():
    case = CASES["positive"]
    guide = AutoNormal(case.model)
    lde.infer.fit_svi(case.model, guide, case.data, num_steps=500, num_particles=4, seed=0, progress=False)
    mean, sd = case.exact(log=True)
    found = guide.median()["x"].log()
    assert abs(float(found) - mean) < 0.2 * sd
    low, high = (guide.quantiles([0.1587, 0.8413])["x"]).log()
    assert 0.5 * float(high - low) == pytest.approx(sd, rel=0.15)


# ---- doses of several people, at times of their own --------------------------------------------------------------

WHEN = tensor([0.0, 4.0, NAN], [1.0, 3.0, 5.0], [2.0, NAN, NAN])
GIVEN = tensor([1.0, 2.0, 0.0], [1.0, 1.0, 1.0], [3.0, 0.0, 0.0])
READ = torch.linspace(1.5, 8.0, 8, dtype=torch.float64)
PRIORS = {"k": dist.LogNormal(tensor(-0.5)[0], 0.4), "share": dist.LogNormal(tensor(-0.3)[0], 0.3)}


def levels_of(k, share):
    """Elimination at rate k of the share of each dose that arrives, (..., person, time)."""
    k, share = k[..., None, None], share[..., None, None]
    since = READ[:, None] - WHEN[:, None]
    parts = GIVEN[:, None] * torch.exp(-k[..., None] * since.clamp(min=0.0)) * (since >= 0)
    return share * parts.nan_to_num().sum(-1)


LEVELS = levels_of(tensor(0.6)[0], tensor(0.8)[0]) + 0.1 * noise(3, 8)


def people(levels=None):
    k, share = (pyro.sample(name, prior) for name, prior in PRIORS.items())
    with pyro.plate("people", 3):
        doses = lde.Dose(WHEN, share * GIVEN, 0)
        z = lde.ode("z", lambda t, y, k: -k * y, torch.zeros(3, 1).double(), READ, k, t0=0.0, doses=doses)
        return pyro.sample("levels", dist.Normal(z[..., 0], 0.1).to_event(1), obs=levels)


def on_the_grid(log=False):
    axes = (torch.linspace(0.3, 1.2, 401, dtype=torch.float64), torch.linspace(0.4, 1.4, 401, dtype=torch.float64))
    k, share = torch.meshgrid(*axes, indexing="ij")
    density = dist.Normal(levels_of(k, share), 0.1).log_prob(LEVELS).sum((-1, -2))
    density = density + PRIORS["k"].log_prob(k) + PRIORS["share"].log_prob(share)
    return {name: moments(x.log() if log else x, density) for name, x in (("k", k), ("share", share))}


def test_nuts_with_doses():
    assert_same(lde.infer.nuts(people, LEVELS, **NUTS), on_the_grid())


def test_an_ensemble_with_doses():
    assert_same(lde.infer.ensemble_hmc(people, LEVELS, **ENSEMBLE), on_the_grid())


def test_svi_with_doses():
    """Amounts are learned: the share that arrives."""
    guide = AutoMultivariateNormal(people)
    lde.infer.fit_svi(people, guide, LEVELS, num_steps=500, num_particles=4, seed=0, progress=False)
    low, high = (guide.quantiles([q]) for q in (0.1587, 0.8413))
    for name, (mean, sd) in on_the_grid(log=True).items():
        ends = low[name].log().squeeze(), high[name].log().squeeze()
        assert abs(float(sum(ends)) / 2 - mean) < 0.2 * sd, name
        assert float(ends[1] - ends[0]) / 2 == pytest.approx(sd, rel=0.15), name
