# SPDX-License-Identifier: Apache-2.0
"""From a guide to NUTS and its diagnostics, on a linear-Gaussian latent ODE with known posterior; a small GOKU-net."""

import math

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_ode import MATRIX, NOISE, OUTPUT, PRIOR_MEAN, PRIOR_SD, exact, linear_series, network_pair, smooth_series
from torch import nn
from torch.testing import assert_close

import pyro_latentde as lde
from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer import Fit
from pyro_latentde.infer.handover import hand_over
from pyro_latentde.infer.pair import Pair
from pyro_latentde.models.goku import GOKU


def field(t, y, a):
    return a @ y


def linear_model(series):
    """The model of ``linear_ode`` at the tolerance of one's everyday."""
    with lde.series_plate(series):
        z0 = pyro.sample("z0", dist.Normal(PRIOR_MEAN, PRIOR_SD).to_event(1))
        start = torch.zeros(len(series), dtype=torch.float64)
        z = lde.ode("z", field, z0, series.times, MATRIX, t0=start, rtol=1e-7, atol=1e-7)
        lde.observe("obs", lambda z: dist.Normal(z @ OUTPUT.T, NOISE), series, z)


def exact_posterior(series):
    """Mean (N, 2) and covariance (N, 2, 2) of z0, all series at once."""
    design = OUTPUT @ torch.matrix_exp(series.times[..., None, None] * MATRIX)
    design = (design * series.mask[..., None]).flatten(1, 2)
    precision = torch.diag(PRIOR_SD**-2) + design.mT @ design / NOISE**2
    values = (series.values * series.mask).flatten(1)
    weighted = PRIOR_MEAN / PRIOR_SD**2 + (design.mT @ values[..., None])[..., 0] / NOISE**2
    covariance = torch.linalg.inv(precision)
    return (covariance @ weighted[..., None])[..., 0], (covariance + covariance.mT) / 2


class ExactGuide(nn.Module):
    """The exact posterior, moved, and with a covariance of another size."""

    def __init__(self, shift=0.0, size=1.0):
        super().__init__()
        self.shift, self.size = shift, size

    def forward(self, series):
        mean, covariance = exact_posterior(series)
        with lde.series_plate(series):
            pyro.sample("z0", dist.MultivariateNormal(mean + self.shift, covariance * self.size))


def fit_of(model, guide, *args):
    return Fit(torch.zeros(0), 0, guide, model, args, {}, 0.0, {})


def assert_moments(draws, mean, covariance):
    """Draws (chain, draw, d): false alarm 7 in a million for each of the 2 d numbers, if ESS is right."""
    for i in range(draws.shape[-1]):
        x = draws[..., i].numpy()
        sd = math.sqrt(covariance[i, i])
        ess = arviz.ess(x)
        assert ess > 500
        assert abs(x.mean() - float(mean[i])) < 4.5 * sd / math.sqrt(ess)
        # sd of a normal's sd is sd / sqrt(2 n), with the ESS of squares
        assert abs(x.std() / sd - 1) < 4.5 / math.sqrt(2 * arviz.ess((x - x.mean()) ** 2))


def test_the_guide_is_exact():
    series = linear_series()
    _, mean, covariance = exact(series)
    found = exact_posterior(series)
    assert_close(found[0], mean)
    assert_close(found[1], covariance)


def test_nuts_from_a_wrong_guide_finds_the_exact_posterior():
    series = linear_series(n=2)
    fit = fit_of(linear_model, ExactGuide(shift=0.3, size=0.3))
    state = torch.random.get_rng_state()
    posterior = fit.nuts(series, num_samples=500, num_warmup=150, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert posterior["z0"].shape == (4, 500, 2, 2)
    for mean, covariance, draws in zip(*exact_posterior(series), posterior["z0"].unbind(2), strict=True):
        assert_moments(draws, mean, covariance)
    assert posterior.attrs["start"] == "guide" and posterior.attrs["held"] == {}
    assert not posterior.stats["diverging"].any()


def test_starts_and_metric_are_those_of_the_guide():
    """Draws and covariance of independent draws, whatever the place of the series in a batch."""
    series = linear_series(n=3)
    mean, covariance = exact_posterior(series)
    begin = hand_over(Pair(linear_model, ExactGuide()), series.batch([2, 0]), given={}, plate="series", seed=0)
    expected = torch.block_diag(covariance[2], covariance[0]).numpy()
    sd = np.sqrt(np.diag(expected))
    # 2000 draws: sd of a correlation at most 1 / sqrt(2000), of a variance sqrt(2 / 2000); 4.5 of the larger
    assert (begin.metric - expected) / np.outer(sd, sd) == pytest.approx(np.zeros((4, 4)), abs=0.15)
    starts = begin.sample_start(500, seed=1)["z0"]
    assert len(starts.unique(dim=0)) == 500
    z = (starts.mean(0) - mean[[2, 0]]) / (covariance[[2, 0]].diagonal(dim1=-2, dim2=-1) / 500).sqrt()
    assert float(z.abs().max()) < 4.5


def test_pareto_k_and_the_gap_of_guides_of_other_sizes():
    """In two dimensions the weights of a guide with covariance v C are exactly Pareto, k = 1 - v; KL by formula."""
    series = linear_series(n=40)
    exact_k, exact_gap = (f(series, 400) for f in _diagnostics(ExactGuide()))
    assert float(exact_k.max()) < 0.2 and float(exact_gap.max()) < 1e-3
    k, gap = (f(series, 1000) for f in _diagnostics(ExactGuide(size=0.1)))
    expected = (95 * 0.9 + 5) / 105
    # 4.5 sd of the mean of 40 fits of 95 weights, (1 + k) / sqrt(95) each, and .03 for the bias of the fit
    assert float(k.mean()) == pytest.approx(expected, abs=4.5 * 1.9 / math.sqrt(95 * 40) + 0.03)
    assert float((k > 0.7).double().mean()) > 0.6
    divergence = 0.1 - 1 - math.log(0.1)  # KL of N(0, v I) from N(0, I) in two dimensions
    assert 0.5 * divergence < float(gap.mean()) < divergence  # the bound is loose where k is large
    gap = fit_of(linear_model, ExactGuide(size=0.6)).inference_gap(series, 4000)
    # sd of a mean log-weight of one series: .4 / sqrt(4000)
    assert_close(gap, torch.full_like(gap, 0.6 - 1 - math.log(0.6)), atol=0.05, rtol=0)


def _diagnostics(guide):
    fit = fit_of(linear_model, guide)
    return fit.pareto_k, fit.inference_gap


def test_shared_sites_are_held():
    model, guide = network_pair()
    series = smooth_series(n=4)
    with torch.no_grad():
        guide.center.fill_(0.4)
        guide.spread.fill_(-3.0)
    fit = fit_of(model, guide, series)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    quick = {"num_samples": 20, "num_warmup": 20, "progress": False}
    posterior = fit.nuts(series[1], given={"slope": 0.7}, **quick)
    assert set(posterior.samples) == {"code"} and posterior.attrs["held"] == {"slope": "given"}
    assert posterior.sites["slope"].kind == "deterministic"
    assert "obs" in posterior.log_likelihood() and "slope" not in posterior.log_likelihood()
    # evaluation mode: means without dropout and of single series
    code = posterior["code"][0, -1, 0]
    with torch.no_grad():
        mean = model.eval().network(code[None]) + 0.7 * series.times[1][:, None]
        model.train()
        lp = dist.Normal(mean, 0.5).log_prob(series.values[1]).sum() + dist.Normal(0.0, 1.0).log_prob(code).sum()
    assert float(posterior.stats["lp"][0, -1]) == pytest.approx(float(lp), abs=1e-6)
    other = fit.nuts(series[1], **quick)
    assert other.attrs["held"] == {"slope": "median of the guide"}
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[name]) and p.grad is None and p.requires_grad
    assert model.training and all(module.training for module in model.modules())
    held = fit._log_weights(series, 30)
    given = fit._log_weights(series, 30, given={"slope": torch.tensor(0.4).double()})
    assert_close(held, given, atol=0.3, rtol=0)
    assert fit.pareto_k(series, 100).shape == (4,)


def test_a_small_goku_net():
    """A field with a parameter on an interval and a decoder network: posterior moments against importance weights."""

    def decay(t, z, p):
        return -p["rate"] * z

    torch.manual_seed(0)
    zero = torch.zeros(1, dtype=torch.float64)
    rate = {"rate": dist.Uniform(torch.tensor(0.2).double(), 2.0)}
    decoder = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 3))
    goku = GOKU(decay, dist.Normal(zero, 1.0).to_event(1), rate, values=3, decoder=decoder).double()
    times = torch.linspace(0.0, 1.5, 6, dtype=torch.float64)
    series = lde.Series.from_tensors(times, 0.3 * torch.randn(4, 6, 3, dtype=torch.float64))
    fit = lde.infer.fit_svi(goku.model, goku.guide, series, num_steps=60, learning_rate=0.02, progress=False)
    before = {name: p.detach().clone() for name, p in goku.named_parameters()}
    for p in goku.parameters():
        p.grad = None
    posterior = fit.nuts(series[2], num_samples=400, num_warmup=150, progress=False)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in goku.named_parameters())
    assert posterior["theta"].shape == (4, 400, 1, 1)
    prior = fit.sample(times, 1)  # the fitted model still runs
    assert prior.means.shape == (1, 1, 6, 3)
    # the same posterior by weighting draws of the prior
    with torch.no_grad(), pyro.validation_enabled(False):
        copies = series[[2] * 20_000]
        trace = pyro.poutine.trace(goku.model).get_trace(copies)
        trace.compute_log_prob()
        weights = trace.nodes["obs"]["log_prob"].reshape(20_000, -1).sum(1).softmax(0)
    size = 1 / float((weights**2).sum())
    assert size > 500
    for name in ("z0", "theta"):
        x, draws = trace.nodes[name]["value"][:, 0], posterior[name][..., 0, 0].numpy()
        mean = float((weights * x).sum())
        sd = math.sqrt(float((weights * (x - mean) ** 2).sum()))
        error = sd * math.sqrt(1 / size + 1 / arviz.ess(draws))
        assert abs(draws.mean() - mean) < 4.5 * error  # false alarm 7 in a million
        assert draws.std() == pytest.approx(sd, rel=0.2)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (80, {}, r"80 series of 2 coordinates each make 160.*fit.nuts\(series\[i\]\)"),
        (1, {"given": {"z0": torch.zeros(1, 2)}}, r"given: \['z0'\] are no latent sites outside of plate 'series'"),
        (1, {"plate": "rows"}, "no latent site in a plate 'rows'"),
    ],
)
def test_what_cannot_be(rows, options, message):
    with pytest.raises(LatentDEError, match=message):
        fit_of(linear_model, ExactGuide()).nuts(linear_series(n=rows), **options)


def test_a_site_that_the_guide_leaves_out():
    model, guide = network_pair()
    local = pyro.poutine.block(guide, hide=["slope"])
    with pytest.raises(LatentDEError, match=r"'slope' outside of plate 'series' is not drawn by the guide.*given="):
        fit_of(model, local).nuts(smooth_series(n=1))
