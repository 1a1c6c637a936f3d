# SPDX-License-Identifier: Apache-2.0
"""Populations of series: one posterior in every parameterisation, one solve, rows of their own."""

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_latentde as lde
from pyro_latentde.errors import DataError, LatentDEError
from pyro_latentde.infer.batched_log_joint import BatchedLogJoint
from pyro_latentde.infer.log_joint import LogJoint
from pyro_latentde.models import Population, Varying
from pyro_latentde.models.systems import pk_population

LOCAL = ("ka", "CL", "V", "sigma")
SPREAD, ERROR, PRIOR_SD = 0.7, 0.5, 2.0


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def pk_values(n, seed=0):
    """Hyper-parameters, and the local parameters on the scale of the link."""
    generator = torch.Generator().manual_seed(seed)
    truth = pk_population.PARAMETERS
    values = {name: double(value) for name, value in truth.items()}
    for name in LOCAL:
        noise = torch.randn(n, generator=generator, dtype=torch.float64)
        values[f"log_{name}"] = values[f"{name}_typical"].log() + values[f"{name}_spread"] * noise
    return values


def moved(values, centered):
    """The same point in the coordinates of a parameterisation, and the logarithm of what a volume grew by."""
    values, growth = dict(values), 0.0
    for name in LOCAL:
        x, mu, sd = values.pop(f"log_{name}"), values[f"{name}_typical"].log(), values[f"{name}_spread"]
        c = centered.get(name, 0.0)
        if c == 1:
            values[f"log_{name}"] = x
        else:
            values[f"log_{name}_decentered"] = (x - mu) * sd ** (c - 1) + c * mu
        growth = growth + (c - 1) * len(x) * sd.log()
    return values, growth


def test_densities_differ_by_the_change_of_variables():
    series = pk_population.simulate(num_series=7, missing=0.2, seed=3).series
    values = pk_values(7)
    densities = []
    for centered in (dict.fromkeys(LOCAL, 1), {}, {"CL": 1}, {"ka": 0.3, "CL": 1, "V": 0.8}):
        joint = LogJoint(pk_population.population(centered=centered), (series,))
        point, growth = moved(values, centered)
        lp, _, (failed, _) = joint.value_and_grad(joint.unconstrain(point)[None])
        assert not failed.any()
        densities.append(lp[0] + growth)
    torch.testing.assert_close(torch.stack(densities), densities[0].expand(4), atol=0, rtol=1e-10)


def test_reparameterised_by_pyro_it_is_the_same():
    series = pk_population.simulate(num_series=5, seed=4).series
    for centered in (0.0, 0.4):
        config = {f"log_{name}": LocScaleReparam(centered) for name in LOCAL}
        ours = LogJoint(pk_population.population(centered=centered), (series,))
        pyros = LogJoint(poutine.reparam(pk_population.population(centered=True), config=config), (series,))
        assert [site.name for site in ours.sites] == [site.name for site in pyros.sites]
        point, _ = moved(pk_values(5), dict.fromkeys(LOCAL, centered))
        u = ours.unconstrain(point) + 0.1 * torch.randn(3, ours.dim, dtype=torch.float64)
        for mine, theirs in zip(ours.value_and_grad(u)[:2], pyros.value_and_grad(u)[:2], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-10)
    assert BatchedLogJoint(pyros, u.numpy(), "traced").engine == "traced"


def traced(joint, u):
    with pyro.validation_enabled(False):
        return make_fx(lambda u: joint.value_and_grad(u)[:2])(u).graph.nodes


@pytest.mark.parametrize("options", [{"centered": {"ka": 0.5, "V": 1}}, {"centered": False, "correlation": 2.0}])
def test_it_is_traced_with_one_batched_solve(options):
    counts = []
    for n in (3, 2000):
        joint = LogJoint(pk_population.population(**options), (pk_population.simulate(num_series=n).series,))
        torch.manual_seed(0)
        u = 0.01 * torch.randn(2, joint.dim, dtype=torch.float64)
        nodes = traced(joint, u)
        counts.append(len(nodes))
        solves = [node for node in nodes if "pyro_latentde.rows" in str(node.target)]
        assert len(solves) == 2  # the solve and its adjoint, for all series and chains
    assert counts[0] == counts[1]
    if "correlation" in options:
        assert BatchedLogJoint(joint, u.numpy(), "traced").engine == "traced"


def gaussian_series(n, seed=5):
    """z' = x_n from 0: what is observed at t is x_n t with an error of .5; x_n ~ N(mu, .7), mu ~ N(0, 2)."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    x = 1.0 + SPREAD * torch.randn(n, 1, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, 3, 1, generator=generator, dtype=torch.float64)
    return lde.Series.from_tensors(times, x * times[:, None] + ERROR * noise)


def gaussian_model(series, centered):
    mu = pyro.sample("mu", dist.Normal(double(0.0), PRIOR_SD))
    with lde.series_plate(series):
        x = lde.population("x", mu, double(SPREAD), link="identity", centered=centered)
        start = torch.zeros(len(series), 1, dtype=torch.float64)
        t0 = torch.zeros(len(series), dtype=torch.float64)
        z = lde.ode("z", lambda t, y, p: p["x"] * torch.ones_like(y), start, series.times, {"x": x}, t0=t0)
        lde.observe("obs", lambda z: dist.Normal(z, ERROR), series, z)


def gaussian_posterior(series):
    """Mean and covariance of (mu, x) in closed form."""
    n, times = len(series), series.times[0].numpy()
    precision = np.zeros((n + 1, n + 1))
    precision[0, 0] = PRIOR_SD**-2 + n * SPREAD**-2
    precision[0, 1:] = precision[1:, 0] = -(SPREAD**-2)
    precision[range(1, n + 1), range(1, n + 1)] = SPREAD**-2 + (times**2).sum() / ERROR**2
    linear = np.append(0.0, series.values[..., 0].numpy() @ times / ERROR**2)
    covariance = np.linalg.inv(precision)
    return covariance @ linear, covariance


@pytest.mark.parametrize("centered", [False, True])
def test_posterior_of_a_gaussian_hierarchy_is_the_exact_one(centered):
    series = gaussian_series(4)
    mean, covariance = gaussian_posterior(series)
    start = {"mu": double(0.0), "x" if centered else "x_decentered": torch.zeros(4).double()}
    options = {"num_samples": 250, "num_warmup": 100, "seed": 1, "start": start, "progress": False}
    posterior = lde.infer.nuts(gaussian_model, series, centered, **options)
    mu = posterior["mu"][..., None]
    x = posterior["x"] if centered else mu + SPREAD * posterior["x_decentered"]
    draws = torch.cat([mu, x], dim=-1).numpy()
    sd = np.sqrt(covariance.diagonal())
    effective = np.array([az.ess(draws[..., i]) for i in range(5)])
    assert effective.min() > 200
    # 5 means and 5 standard deviations by parameterisation, each within 5 standard errors: a false alarm in 85,000
    assert (np.abs(draws.mean((0, 1)) - mean) < 5 * sd / np.sqrt(effective)).all()
    # the standard error of a sd, from the effective number of squares, which may be smaller
    squares = np.array([az.ess((draws[..., i] - mean[i]) ** 2) for i in range(5)])
    assert (np.abs(draws.std((0, 1)) / sd - 1) < 5 / np.sqrt(2 * squares)).all()


def test_ragged_series_with_gaps_are_scored_one_by_one():
    lengths, nan = (4, 2, 3), float("nan")
    times = [torch.arange(1.0, length + 1).double() for length in lengths]
    values = [torch.rand(length, 1).double() + 0.5 for length in lengths]
    values[0][2] = nan
    series = lde.Series.from_tensors(times, values, covariates=double([[50.0], [100.0], [200.0]]))
    trace = poutine.trace(poutine.condition(pk_population.population(), pk_values(3))).get_trace(series)
    trace.compute_log_prob()
    p = {name: trace.nodes[name]["value"] for name in LOCAL}
    for n in range(3):
        one = {name: value[n : n + 1] for name, value in p.items()}
        blood = pk_population.exact_solution(times[n][None], series.covariates[n], one)[0, :, 1]
        seen = ~values[n][:, 0].isnan()
        law = dist.LogNormal((blood / one["V"]).log()[seen], one["sigma"])
        expected = law.log_prob(values[n][seen, 0]).sum()
        torch.testing.assert_close(trace.nodes["obs"]["log_prob"][n], expected, atol=1e-3, rtol=1e-4)


def test_rows_are_independent():
    series = pk_population.simulate(num_series=4, seed=6).series
    joint = LogJoint(pk_population.population(), (series,))
    values = pk_values(4)
    other = {name: value.clone() for name, value in values.items()}
    for name in LOCAL:
        other[f"log_{name}"][0] += 0.2
    gradients = []
    for point in (values, other):
        _, gradient, _ = joint.value_and_grad(joint.unconstrain(point)[None])
        gradients.append(gradient[0, -16:].reshape(4, 4))  # local parameter, series
    assert torch.equal(gradients[0][:, 1:], gradients[1][:, 1:])
    assert (gradients[0][:, 0] != gradients[1][:, 0]).all()


def test_covariates_reach_start_field_and_likelihood():
    seen = {}

    def likelihood(z, p):
        seen.update(p)
        return dist.Normal(z, p["error"])

    model = Population(
        lambda t, z, p: -p["k"] * p["slow"] * z,
        lambda p: (p["dose"],),
        {"k": (dist.LogNormal(0.0, 0.5), dist.HalfNormal(0.5))},
        likelihood,
        shared={"error": dist.HalfNormal(torch.ones(1)).to_event(1)},
        covariates=("dose", "slow"),
    )
    covariates = double([[1.0, 1.0], [2.0, 1.0], [1.0, 0.0]])
    series = lde.Series.from_tensors(torch.linspace(0, 1, 4).double(), torch.zeros(3, 4, 1), covariates=covariates)
    data = {"k_typical": double(1.0), "k_spread": double(0.5), "log_k_decentered": torch.zeros(3).double()}
    trace = poutine.trace(poutine.condition(model, data)).get_trace(series)
    z, decay = trace.nodes["z"]["value"][..., 0], torch.exp(-series.times[0])
    torch.testing.assert_close(z, torch.stack([decay, 2 * decay, torch.ones(4).double()]), atol=1e-6, rtol=0)
    assert seen["k"].shape == seen["dose"].shape == (3, 1, 1) and seen["error"].shape == (1, 1)
    with pytest.raises(DataError, match=r"covariates \('dose', 'slow'\), the series 0 columns"):
        model(lde.Series.from_tensors(torch.arange(3.0), torch.zeros(2, 3, 1)))


def test_new_times_and_minibatches():
    series = pk_population.simulate(num_series=6).series
    model = pk_population.population(centered={"CL": True})
    assert model(series, times=torch.linspace(1, 40, 9)).shape == (6, 9, 1)
    trace = poutine.trace(model).get_trace(series.batch([1, 4]))
    assert (
        trace.nodes["log_CL"]["scale"] == trace.nodes["obs"]["scale"] == 3 and trace.nodes["CL_typical"]["scale"] == 1
    )
    latent = [name for name in trace.stochastic_nodes if name.startswith("log_")]
    assert latent == ["log_ka_decentered", "log_CL", "log_V_decentered", "log_sigma_decentered"]


def test_particles_are_solved_together():
    series = pk_population.simulate(num_series=5).series
    model = pk_population.population(correlation=1.0)
    draws = pyro.infer.Predictive(model, num_samples=3, parallel=True)(series)
    assert draws["CL"].shape == (3, 5) and draws["z"].shape == (3, 5, 20, 2)


def test_links_follow_the_support_of_the_prior():
    narrow = dist.HalfNormal(0.1)
    local = {
        "share": (dist.Beta(2.0, 2.0), narrow),
        "drift": Varying(dist.Normal(-1.0, 0.1), narrow),
        "lag": (dist.Uniform(0.0, 5.0), narrow),
    }
    model = Population(lambda t, z, p: p["drift"] + 0 * z, (0.0,), local, lambda z, p: dist.Normal(z, 1.0))
    series = lde.Series.from_tensors(torch.linspace(0, 1, 3), torch.zeros(50, 3, 1))
    trace = poutine.trace(model).get_trace(series)
    value = {name: trace.nodes[name]["value"] for name in local}
    assert {"logit_share_decentered", "drift_decentered", "link_lag_decentered"} <= set(trace.stochastic_nodes)
    assert 0 < value["share"].min() and value["share"].max() < 1 and value["drift"].max() < 0
    assert 0 < value["lag"].min() and value["lag"].max() < 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local": {}}, "no local parameter"),
        ({"shared": {"k": dist.HalfNormal(1.0)}}, r"\['k'\] are named twice"),
        ({"centered": {"kk": True}}, r"centered names \['kk'\]; the local parameters are \['k'\]"),
        ({"local": {"k": (dist.Normal(torch.zeros(2), 1.0), dist.HalfNormal(1.0))}}, "'k' are not scalar"),
    ],
)
def test_errors(change, message):
    arguments = {
        "local": {"k": (dist.LogNormal(0.0, 1.0), dist.HalfNormal(1.0))},
        "likelihood": lambda z, p: dist.Normal(z, 1.0),
    }
    with pytest.raises(LatentDEError, match=message):
        Population(lambda t, z, p: -p["k"] * z, (1.0,), **{**arguments, **change})
