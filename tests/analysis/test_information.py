# SPDX-License-Identifier: Apache-2.0
"""Fisher information: closed forms, null directions, distributions of every kind, and what more data would add."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_latentde as lde
from pyro_latentde import Posterior, Series
from pyro_latentde.analysis import identifiability
from pyro_latentde.analysis.fisher import fisher_information, laws_at
from pyro_latentde.errors import LatentDEError, SolveError

X = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, 5.0]]).double()
TIMES = torch.linspace(0, 2, 5).double()
ONE = torch.ones(1).double()


def line(x, y):
    """Linear regression: everything is known in closed form."""
    b = pyro.sample("b", dist.Normal(torch.zeros(2).double(), torch.tensor([1.0, 2.0]).double()).to_event(1))
    pyro.sample("y", dist.Normal(x @ b, 0.5).to_event(1), obs=y)


def decay(times, y, law=lambda z: dist.Normal(z, 0.1)):
    k1 = pyro.sample("k1", dist.LogNormal(torch.zeros(()).double(), 0.5))
    k2 = pyro.sample("k2", dist.LogNormal(torch.zeros(()).double(), 0.5))
    z = lde.ode("z", lambda t, y, k: -k * y, 3 * ONE, times, k1 * k2)
    pyro.sample("y", law(z).to_event(2), obs=y)


def one_rate(times, y, law=lambda z: dist.Normal(z, 0.1)):
    k = pyro.sample("k", dist.LogNormal(torch.zeros(()).double(), 0.5))
    z = lde.ode("z", lambda t, y, k: -k * y, 3 * ONE, times, k, t0=0.0)
    pyro.sample("y", law(z).to_event(2), obs=y)


def test_linear_gaussian_model_in_closed_form():
    result = identifiability(line, {"b": torch.tensor([0.3, -1.0])}, X, torch.zeros(4).double(), num_draws=20_000)
    expected = (X.T @ X / 0.25).numpy()
    np.testing.assert_allclose(result.information, expected, rtol=1e-10)
    np.testing.assert_allclose(result.table["data_sd"], np.sqrt(np.diag(np.linalg.inv(expected))), rtol=1e-8)
    prior = np.diag([1.0, 4.0])
    both = np.linalg.inv(expected + np.linalg.inv(prior))
    # the prior's covariance is that of 20,000 draws: relative error of an sd .5 %, less in what data dominate
    np.testing.assert_allclose(result.table["prior_sd"], [1, 2], rtol=0.03)
    np.testing.assert_allclose(result.table["both_sd"], np.sqrt(np.diag(both)), rtol=0.01)
    np.testing.assert_allclose(result.table["contraction"], 1 - np.diag(both) / np.diag(prior), atol=0.01)
    assert list(result.table.index) == ["b[0]", "b[1]"] and len(result.sloppy) == 0


def test_only_a_product_is_known():
    y = torch.ones(5, 1).double()
    result = identifiability(decay, {"k1": 2.0, "k2": 0.3}, TIMES, y)
    assert len(result.sloppy) == 1
    worst = result.directions.iloc[0]
    assert worst["gain"] == 0 and worst["data_sd"] == math.inf
    np.testing.assert_allclose(worst[["log k1", "log k2"]].astype(float).abs(), 1.0, atol=0.1)  # prior sds of draws
    ratio = worst["log k1"] / worst["log k2"]
    assert ratio == pytest.approx(-1, abs=0.01)
    assert (result.table["data_sd"] == math.inf).all()
    # of two equal log-normal rates with a known product, half of the variance is left
    np.testing.assert_allclose(result.table["contraction"], 0.5, atol=0.05)
    assert "log k1 up 1.00 with log k2 down 1.00 does not change the data: sd along it inf" in str(result)
    rate, sd = 0.6, 0.1
    slope = -3 * rate * TIMES * (-rate * TIMES).exp()  # d z / d log k
    np.testing.assert_allclose(result.information, np.full((2, 2), float((slope**2).sum()) / sd**2), rtol=1e-4)


LAWS = {
    # law of z, and the information about z of one observation
    "normal": (lambda z: dist.Normal(z, 0.1), lambda z: 100 + 0 * z),
    "scale": (lambda z: dist.Normal(0.0, z), lambda z: 2 / z**2),
    "lognormal": (lambda z: dist.LogNormal(z, 0.5), lambda z: 4 + 0 * z),
    "poisson": (lambda z: dist.Poisson(z), lambda z: 1 / z),
    "exponential": (lambda z: dist.Exponential(z), lambda z: 1 / z**2),
    "binomial": (lambda z: dist.Binomial(10, z / 4), lambda z: 10 / (z * (4 - z))),
    "bernoulli": (lambda z: dist.Bernoulli(logits=z), lambda z: z.sigmoid() * (-z).sigmoid()),
    "joint": (lambda z: dist.MultivariateNormal(z, 0.2 * torch.eye(1).double()), lambda z: 5 + 0 * z),
    # no divergence is registered for these: 4,000 simulated data sets
    "student": (lambda z: dist.StudentT(3.0, z, 0.5), lambda z: 4 / 6 / 0.25 + 0 * z),
    "negative binomial": (
        lambda z: dist.NegativeBinomial(torch.tensor(5.0).double(), logits=(z / 5).log()),
        lambda z: 1 / (z + z**2 / 5),
    ),
}


@pytest.mark.parametrize("name", LAWS)
def test_information_of_each_kind_of_data(name):
    law, about_z = LAWS[name]
    made = (lambda z: law(z)) if name != "joint" else (lambda z: law(z).to_event(0))

    def model(times, y):
        k = pyro.sample("k", dist.LogNormal(torch.zeros(()).double(), 0.5))
        z = lde.ode("z", lambda t, y, k: -k * y, 3 * ONE, times, k)
        fn = made(z)
        pyro.sample("y", fn.to_event(1 if name == "joint" else 2), obs=y)

    result = identifiability(model, {"k": 0.7}, TIMES, torch.ones(5, 1).double(), num_draws=4000)
    z = 3 * (-0.7 * TIMES).exp()
    expected = float((about_z(z) * (0.7 * TIMES * z) ** 2).sum())
    # 5 observations x 4,000 simulations: four standard errors are below a tenth
    tolerance = 0.1 if name in ("student", "negative binomial") else 1e-4
    assert float(result.information[0, 0]) == pytest.approx(expected, rel=tolerance)


def test_missing_values_plates_and_scales_count_as_they_should():
    values = torch.ones(2, 5, 1).double()
    values[0, 3:] = torch.nan
    series = Series.from_tensors(TIMES, values)

    def model(series):
        k = pyro.sample("k", dist.LogNormal(torch.zeros(()).double(), 0.5))
        with pyro.plate("series", 2), pyro.poutine.scale(scale=3.0):
            z = lde.ode("z", lambda t, y, k: -k * y, (3 * ONE).expand(2, 1), series.times, k)
            lde.observe("y", lambda z: dist.Normal(z, 0.1), series, z)

    result = identifiability(model, {"k": 0.7}, series)
    z = 3 * (-0.7 * TIMES).exp()
    each = (0.7 * TIMES * z / 0.1) ** 2
    assert float(result.information[0, 0]) == pytest.approx(3 * float(each.sum() + each[:3].sum()), rel=1e-4)


def test_contraction_of_a_posterior_and_its_median():
    u = 0.1 + 0.05 * torch.randn(2, 500, generator=torch.Generator().manual_seed(0)).double()
    sites = lde.infer.prior(one_rate, TIMES, torch.ones(5, 1).double(), num_samples=2).sites
    given = Posterior(samples={"k": u.exp()}, sites=sites, model=one_rate, args=(TIMES, torch.ones(5, 1).double()))
    result = identifiability(one_rate, given)
    row = result.table.loc["log k"]
    assert row["value"] == pytest.approx(float(u.flatten().sort().values[499]))
    assert row["posterior_sd"] == pytest.approx(float(u.std()))
    assert row["posterior_contraction"] == pytest.approx(1 - float(u.var()) / row["prior_sd"] ** 2)


def test_the_gain_of_further_measurements():
    """One rate, known noise: d_gain = log(1 + I_e V) / 2, largest at t = 1 / k."""
    candidates = torch.linspace(0.1, 4, 40).double()
    result = identifiability(one_rate, {"k": 0.7}, TIMES, torch.ones(5, 1).double(), extra=(candidates, None))
    variance = float(result.table["both_sd"].iloc[0] ** 2)
    best = result.extra.iloc[0]
    assert best["time"] == pytest.approx(1 / 0.7, abs=0.1)
    slope = 0.7 * best["time"] * 3 * math.exp(-0.7 * best["time"])
    assert best["d_gain"] == pytest.approx(0.5 * math.log1p(slope**2 / 0.01 * variance), rel=1e-4)
    assert best["a_gain"] == pytest.approx(1 - 1 / (1 + slope**2 / 0.01 * variance), rel=1e-4)
    assert len(result.extra) == 40 and "Best further measurements" in str(result)


def test_a_plan_needs_no_values():
    known = identifiability(one_rate, {"k": 0.7}, TIMES, torch.ones(5, 1).double())
    plan = identifiability(one_rate, {"k": 0.7}, TIMES, None, observed=["y"], extra=(TIMES + 1, None))
    np.testing.assert_allclose(plan.information, known.information)
    assert len(plan.extra) == 5
    with pytest.raises(LatentDEError, match=r"\['x'\] are no sites of the model; expected some of \['y'\]"):
        identifiability(one_rate, {"k": 0.7}, TIMES, None, observed=["x"])


def test_candidates_may_be_of_sites_that_the_data_do_not_have():
    """A rate times a size is seen, never the size alone: one look at the size tells both apart."""

    def model(y, size_seen=False):
        rate = pyro.sample("rate", dist.LogNormal(torch.zeros(()).double(), 1.0))
        size = pyro.sample("size", dist.LogNormal(torch.zeros(()).double(), 1.0))
        if size_seen:
            pyro.sample("scale", dist.Normal(size, 0.1))
        else:
            pyro.sample("y", dist.Normal(rate * size, 0.1), obs=y)

    result = identifiability(model, {"rate": 1.0, "size": 1.0}, ONE[0], extra=(None, True))
    assert result.extra["site"].tolist() == ["scale"]
    # variances of log size: prior 1, after y, which knows the sum of two logarithms to .1
    after = 1 - 1 / 2.01
    assert result.extra["d_gain"].iloc[0] == pytest.approx(0.5 * math.log1p(after / 0.01), abs=0.1)


def test_information_of_each_observation_adds_up():
    joint_args = (TIMES, torch.ones(5, 1).double())
    u = torch.tensor([-0.3]).double()
    law = laws_at(one_rate, lambda v: {"k": v[0].exp()}, u, ["y"], joint_args, {})["y"]
    each = fisher_information(law, 1, each=True)
    assert each.shape == (5, 1, 1, 1)
    torch.testing.assert_close(each.sum((0, 1)), fisher_information(law, 1))


def test_figure_shows_spectrum_and_sds():
    result = identifiability(decay, {"k1": 2.0, "k2": 0.3}, TIMES, torch.ones(5, 1).double())
    left, right = result.plot().axes
    assert left.get_yscale() == "log"
    heights = [patch.get_width() for patch in right.patches]
    np.testing.assert_allclose(heights[:2], 1.0)
    np.testing.assert_allclose(heights[2:], result.table["both_sd"] / result.table["prior_sd"])


def test_what_cannot_be_told_says_so():
    with pytest.raises(LatentDEError, match="no observed site"):
        identifiability(lambda: pyro.sample("k", dist.Normal(torch.tensor(0.0), 1.0)), {"k": 0.0})

    def explosion(y):
        k = pyro.sample("k", dist.LogNormal(torch.zeros(()).double(), 0.1))
        z = lde.ode("z", lambda t, y, k: k * y * y, ONE, 0.25 * TIMES, k)
        pyro.sample("y", dist.Normal(z, 0.1).to_event(2), obs=y)

    with pytest.raises(SolveError, match="a solve fails"):
        identifiability(explosion, {"k": 10.0}, torch.ones(5, 1).double())

    def dependent(y):
        a = pyro.sample("a", dist.Uniform(torch.zeros(()).double(), 1.0))
        pyro.sample("y", dist.Normal(pyro.sample("b", dist.Uniform(0.0, a)), 1.0), obs=y)

    with pytest.raises(LatentDEError, match="supports that do not depend"):
        identifiability(dependent, {"a": 0.5, "b": 0.2}, torch.tensor(0.0).double())
