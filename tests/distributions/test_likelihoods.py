# SPDX-License-Identifier: Apache-2.0
"""Every likelihood x every mask pattern against SciPy; far outputs; priors on a scale."""

import math

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch.testing import assert_close

import pyro_latentde as lde
from pyro_latentde.distributions import likelihoods as lk
from pyro_latentde.distributions.observation_laws import (
    BernoulliLaw,
    CategoricalLaw,
    ContinuousBernoulliLaw,
    PoissonLaw,
)
from pyro_latentde.errors import DataError, LatentDEError, ShapeError
from pyro_latentde.sites.observe_site import pointwise_log_prob

N, T, D, CLASSES = 4, 6, 3, 5


def continuous_bernoulli(v, x):
    return x * v + math.log(abs(x / math.expm1(x)))


def categorical(v, x):
    logits = x - x.max()
    return float(logits[int(v)] - math.log(sum(math.exp(c) for c in logits)))


class Case:
    """A likelihood with SciPy's log-density of one value, values that can occur, and fillers that cannot."""

    def __init__(self, make, reference, values, filler, support=None):
        self.make, self.reference, self.filler = make, reference, filler
        self.values = values


def uniform(g):
    return torch.rand(N, T, D, generator=g, dtype=torch.float64)


CASES = {
    "gaussian": Case(
        lambda: lk.Gaussian(sd=0.3), lambda v, x: scipy.stats.norm.logpdf(v, x, 0.3), lambda g: 4 * uniform(g) - 2, 1e30
    ),
    "gaussian learned": Case(
        lambda: lk.Gaussian(sd="learned", start=0.2, values=D).double(),
        lambda v, x: scipy.stats.norm.logpdf(v, x, 0.2),
        lambda g: 4 * uniform(g) - 2,
        -7.0,
    ),
    "laplace": Case(
        lambda: lk.Laplace(sd="learned", start=0.5).double(),
        lambda v, x: scipy.stats.laplace.logpdf(v, x, 0.5 / math.sqrt(2)),
        lambda g: 4 * uniform(g) - 2,
        1e30,
    ),
    "bernoulli": Case(
        lk.Bernoulli,
        lambda v, x: scipy.stats.bernoulli.logpmf(v, 1 / (1 + math.exp(-x))),
        lambda g: (uniform(g) > 0.5).double(),
        0.37,
    ),
    "continuous bernoulli": Case(lk.ContinuousBernoulli, continuous_bernoulli, uniform, -3.0),
    "poisson": Case(
        lk.Poisson, lambda v, x: scipy.stats.poisson.logpmf(v, math.exp(x)), lambda g: (6 * uniform(g)).floor(), -1.5
    ),
    "categorical": Case(
        lambda: lk.Categorical(CLASSES), categorical, lambda g: (CLASSES * uniform(g)).floor(), 12345.6
    ),
}


def full(mask):
    return mask


def gaps(mask):
    mask[torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.4] = False
    mask[:, 0, 0] = True
    return mask


def ragged(mask):
    for row, length in enumerate((6, 1, 3, 5)):
        mask[row, length:] = False
    return mask


def whole_times(mask):
    mask[:, 1::2] = False
    return mask


def one_feature(mask):
    mask[..., 1:] = False
    return mask


MASKS = [full, gaps, ragged, whole_times, one_feature]
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def setting(case, pattern):
    g = torch.Generator().manual_seed(5)
    likelihood = case.make()
    outputs = torch.randn(N, T, D * likelihood.outputs_per_value, generator=g, dtype=torch.float64)
    mask = pattern(torch.ones(N, T, D, dtype=torch.bool))
    values = torch.where(mask, case.values(g), case.filler)
    times = torch.arange(T, dtype=torch.float64).expand(N, T)
    return likelihood, outputs.requires_grad_(), lde.Series(times=times, values=values, mask=mask)


def observed_site(likelihood, outputs, series):
    return pyro.poutine.trace(lde.observe).get_trace("obs", likelihood(outputs), series).nodes["obs"]


@every_case
@pytest.mark.parametrize("pattern", MASKS)
def test_equals_scipy_where_observed_and_zero_elsewhere(case, pattern):
    likelihood, outputs, series = setting(case, pattern)
    node = observed_site(likelihood, outputs, series)
    point = pointwise_log_prob(node["fn"], node["value"])
    per_value = outputs.detach().unflatten(-1, (D, -1)).numpy()
    for n, t, d in series.mask.nonzero().tolist():
        x = per_value[n, t, d] if likelihood.outputs_per_value > 1 else per_value[n, t, d, 0]
        assert point[n, t, d].item() == pytest.approx(
            case.reference(series.values[n, t, d].item(), x), rel=1e-7, abs=1e-7
        )
    assert (point[~series.mask] == 0).all()
    total = node["fn"].log_prob(node["value"])
    assert total.shape == (N,)
    assert_close(total, point.sum((-1, -2)))
    leaves = [outputs, *likelihood.parameters()]
    grads = torch.autograd.grad(total.sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0].unflatten(-1, (D, -1))[~series.mask] == 0).all()
    assert (grads[0].unflatten(-1, (D, -1))[series.mask] != 0).all()


@every_case
def test_fillers_change_nothing(case):
    likelihood, outputs, series = setting(case, gaps)
    honest = torch.where(series.mask, series.values, case.values(torch.Generator().manual_seed(9)))
    other = lde.Series(times=series.times, values=honest, mask=series.mask)
    results = []
    for data in (series, other):
        node = observed_site(likelihood, outputs, data)
        lp = node["fn"].log_prob(node["value"])
        results.append((lp, *torch.autograd.grad(lp.sum(), [outputs, *likelihood.parameters()])))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@every_case
def test_gradients_by_central_differences(case):
    likelihood, outputs, series = setting(case, gaps)

    def total(outputs):
        node = observed_site(likelihood, outputs, series)
        return node["fn"].log_prob(node["value"]).sum()

    assert torch.autograd.gradcheck(total, (outputs,))


@every_case
def test_draws_have_the_mean(case):
    """Each of 6 x 3 means (or class shares) within 6 standard errors: false alarm below 1e-6 for each case."""
    likelihood, outputs, _ = setting(case, full)
    fn = likelihood(outputs[0].detach())
    assert fn.batch_shape == (T, D) and fn.event_shape == ()
    draws = fn.sample((20_000,))
    assert draws.shape == (20_000, T, D) and draws.dtype == torch.float64 and fn.support.check(draws).all()
    expected = likelihood.mean(outputs[0])
    if likelihood.outputs_per_value > 1:
        assert expected.shape == (T, D, CLASSES)
        draws = torch.nn.functional.one_hot(draws.long(), CLASSES).double()
    assert ((draws.mean(0) - expected).abs() < 6 * draws.std(0) / math.sqrt(20_000) + 1e-12).all()


@every_case
def test_draws_where_there_are_no_values(case):
    likelihood, outputs, _ = setting(case, full)
    new = lde.Series.at_times(torch.arange(T).double().expand(N, T))
    assert lde.observe("obs", likelihood(outputs), new).shape == (N, T, D)
    assert lde.observe("obs", likelihood(outputs)).shape == (N, T, D)


@every_case
def test_under_vmap_and_batches(case):
    """As the batched log-joint of `nuts` calls it, and with particles left of the series."""
    likelihood, outputs, series = setting(case, ragged)

    def total(outputs):
        with pyro.validation_enabled(False):
            node = observed_site(likelihood, outputs, series)
            return node["fn"].log_prob(node["value"]).sum()

    stack = torch.stack([outputs.detach(), outputs.detach() + 0.1])
    expected = torch.stack([total(x) for x in stack])
    assert_close(torch.func.vmap(total)(stack), expected)
    with pyro.plate("particles", 2, dim=-2), lde.series_plate(series):
        trace = pyro.poutine.trace(lde.observe).get_trace("obs", likelihood(stack), series)
    assert_close(trace.nodes["obs"]["fn"].log_prob(series.values).sum(-1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [-300.0, -80.0, -1e-3, 0.0, 1e-3, 80.0, 300.0])
def test_far_outputs_stay_exact(dtype, far):
    """Log-densities that a probability, rounded to 0 or 1, has lost; against closed forms."""
    x = torch.full((), far, dtype=dtype, requires_grad=True)
    softplus = far if far > 30 else math.log1p(math.exp(far))
    lse = abs(far) / 2 + (math.log(-math.expm1(-abs(far)) / abs(far)) if far else 0.0)
    laws = {
        lk.BernoulliLaw(x): [(0.0, -softplus), (1.0, far - softplus)],
        lk.ContinuousBernoulliLaw(x): [(v, (v - 0.5) * far - lse) for v in (0.0, 0.25, 1.0)],
        lk.CategoricalLaw(torch.stack([0 * x, x])): [(0.0, -softplus), (1.0, far - softplus)],
    }
    if far < 0:
        laws[lk.PoissonLaw(x)] = [(0.0, -math.exp(far)), (3.0, 3 * far - math.exp(far) - math.log(6))]
    for law, pairs in laws.items():
        for value, expected in pairs:
            lp = law.log_prob(torch.tensor(value, dtype=dtype))
            assert lp.item() == pytest.approx(expected, rel=1e-5, abs=1e-6), type(law)
            (grad,) = torch.autograd.grad(lp, x, retain_graph=True)
            assert grad.isfinite()


def test_continuous_bernoulli_against_its_integrals():
    """Normalisation, mean and draws by quadrature, through the two branches of each function."""
    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    for x in (-40.0, -3.0, -0.11, -0.09, -1e-4, 0.0, 5e-4, 2e-3, 0.0999, 0.1001, 7.0, 40.0):
        law = lk.ContinuousBernoulliLaw(torch.tensor(x, dtype=torch.float64))
        density = law.log_prob(grid).exp()
        assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=1e-5)
        assert law.mean.item() == pytest.approx(torch.trapezoid(density * grid, grid).item(), abs=1e-5)
        draws = law.sample((4000,))
        cdf = torch.cumulative_trapezoid(density, grid)
        # Kolmogorov-Smirnov at level 1e-5 for each of twelve laws
        test = scipy.stats.kstest(draws.numpy(), lambda v, cdf=cdf: cdf[(v * 19_999).astype(int)].numpy())
        assert test.pvalue > 1e-5
    x = torch.tensor([-2.0, 1e-4, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: lk.ContinuousBernoulliLaw(x).mean, (x,))
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(
        lambda x: (torch.manual_seed(0), lk.ContinuousBernoulliLaw(x).rsample())[1], (x,), atol=1e-5
    )


def test_scales_are_learned():
    """Maximum likelihood of the scale: the standard deviation, and root two times the mean deviation."""
    g = torch.Generator().manual_seed(2)
    values = torch.randn(500, 2, generator=g) * torch.tensor([0.3, 2.0])
    gauss, laplace = lk.Gaussian(sd="learned", start=1.0, values=2), lk.Laplace(sd="learned", start=3.0)
    for likelihood in (gauss, laplace):
        optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.1)
        for _ in range(500):
            optimizer.zero_grad()
            (-likelihood(torch.zeros(500, 2)).log_prob(values).mean()).backward()
            optimizer.step()
    assert_close(gauss.scale()[0], values.square().mean(0).sqrt(), rtol=1e-3, atol=1e-3)
    assert_close(laplace.scale().squeeze(), math.sqrt(2) * values.abs().mean(), rtol=1e-3, atol=1e-3)
    assert laplace(torch.zeros(1, 1)).stddev.item() == pytest.approx(laplace.scale().item())


class Noisy(PyroModule):
    def __init__(self, prior, outside):
        super().__init__()
        self.likelihood, self.outside = lk.Gaussian(sd=prior), outside

    def forward(self, series):
        if self.outside:
            _ = self.likelihood.sd  # one draw for all series
        with lde.series_plate(series):
            z0 = pyro.sample("z0", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            states = z0.unsqueeze(-2) * torch.ones_like(series.times)[..., None]
            lde.observe("obs", self.likelihood(states), series if series.values is not None else None)


LOG_NORMAL = dist.LogNormal(torch.tensor(-1.0).double(), 0.5)
PRIORS = {"one": LOG_NORMAL, "each value": dist.LogNormal(torch.tensor([-1.0, 1.0]).double(), 0.5).to_event(1)}


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
@pytest.mark.parametrize("outside", [True, False])
def test_a_prior_on_the_scale(prior, outside):
    series = lde.Series.from_tensors(torch.arange(3.0).double(), torch.randn(4, 3, 2).double())
    model = Noisy(prior, outside)
    trace = pyro.poutine.trace(model).get_trace(series)
    sd, z0 = trace.nodes["likelihood.sd"]["value"], trace.nodes["z0"]["value"]
    assert sd.shape == (() if outside else (4,)) + prior.event_shape
    scale = sd.reshape(-1, 1, sd.shape[-1] if prior.event_shape else 1)
    expected = dist.Normal(z0[:, None], scale).log_prob(series.values).sum((-1, -2))
    assert_close(trace.nodes["obs"]["fn"].log_prob(series.values), expected)
    guide = AutoNormal(model)
    for vectorize in (False, True):
        elbo = Trace_ELBO(num_particles=3, vectorize_particles=vectorize, max_plate_nesting=1)
        assert math.isfinite(elbo.loss(model, guide, series))
    new = lde.Series.at_times(torch.arange(3.0).double().expand(4, 3))
    samples = Predictive(model, guide=guide, num_samples=5, parallel=True)(new)
    assert samples["obs"].shape == (5, 4, 3, 2)


def test_a_prior_on_the_logarithm_of_a_learned_scale():
    likelihood = lk.Gaussian(sd="learned")
    likelihood.slow_log_sd = PyroSample(dist.Normal(-0.1, 0.01))
    trace = pyro.poutine.trace(likelihood).get_trace(torch.zeros(3, 2))
    assert_close(trace.nodes["_RETURN"]["value"].scale, (10 * trace.nodes["slow_log_sd"]["value"]).exp().expand(3, 2))


def test_nuts_with_a_prior_on_the_scale():
    """Posterior of an sd with known mean: against the density on a grid, within 5 Monte Carlo errors (1e-6)."""
    values = 0.5 * torch.randn(20, 1, generator=torch.Generator().manual_seed(4)).double()
    series = lde.Series.from_tensors(torch.arange(20.0).double(), values)
    likelihood = lk.Gaussian(sd=LOG_NORMAL)
    posterior = lde.infer.nuts(
        lambda: lde.observe("obs", likelihood(torch.zeros(20, 1).double()), series),
        num_samples=400, num_warmup=200, num_chains=2, seed=0,
    )  # fmt: skip
    grid = torch.linspace(0.1, 2.0, 4000, dtype=torch.float64)
    log_p = LOG_NORMAL.log_prob(grid) + dist.Normal(0.0, grid[:, None]).log_prob(values.T).sum(-1)
    weights = log_p.softmax(0)
    mean = (weights * grid).sum()
    sd = ((weights * (grid - mean).square()).sum()).sqrt()
    draws = posterior.samples["sd"]
    assert draws.mean().item() == pytest.approx(mean.item(), abs=5 * sd.item() / math.sqrt(150))


def test_autocast_and_dtypes():
    for case in CASES.values():
        likelihood = case.make().float()
        fn = likelihood(torch.zeros(3, D * likelihood.outputs_per_value, dtype=torch.bfloat16))
        assert fn.sample().dtype == torch.float32


def test_what_is_refused():
    with pytest.raises(LatentDEError, match="sd = 0"):
        lk.Gaussian(sd=0.0)
    with pytest.raises(LatentDEError, match="start = -1"):
        lk.Laplace(sd="learned", start=-1.0)
    with pytest.raises(LatentDEError, match="'learnt'; expected a number, 'learned', or a prior"):
        lk.Gaussian(sd="learnt")
    with pytest.raises(ShapeError, match=r"batch shape \(3,\)"):
        lk.Gaussian(sd=dist.LogNormal(torch.zeros(3), 1.0))
    with pytest.raises(LatentDEError, match="at least 2"):
        lk.Categorical(1)
    with pytest.raises(ShapeError, match="out_features = D"):
        lk.Categorical(4)(torch.zeros(3, 5))
    series = lde.Series.from_tensors([0.0, 1.0], [[0.5], [1.0]])
    with pytest.raises(ValueError, match="support"):
        observed_site(lk.Bernoulli(), torch.zeros(2, 1), series)["fn"].log_prob(series.values)


def test_observed_values_are_judged_and_fillers_are_not():
    """The check before inference: 0.37 is no pixel of a Bernoulli where observed, and nothing where masked."""

    def model(mask):
        rate = pyro.sample("rate", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
        values = torch.tensor([[[0.0], [0.37], [1.0]]], dtype=torch.float64)
        series = lde.Series(times=torch.arange(3.0).double()[None], values=values, mask=mask)
        lde.observe("obs", lk.Bernoulli()(rate.expand(3, 1)), series)

    mask = torch.tensor([True, False, True])[None, :, None]
    assert (
        lde.infer.nuts(model, mask, num_samples=5, num_warmup=5, num_chains=1, seed=0).samples["rate"].isfinite().all()
    )
    with pytest.raises((DataError, ValueError), match="support"):
        lde.infer.nuts(model, torch.ones_like(mask), num_samples=5, num_warmup=5, num_chains=1, seed=0)


@pytest.mark.parametrize("law", [BernoulliLaw, ContinuousBernoulliLaw, PoissonLaw, CategoricalLaw])
def test_draws_from_failed_outputs_are_nan(law):
    outputs = torch.zeros(2, 3, 4).double()
    outputs[1] = torch.nan
    drawn = law(outputs, validate_args=False).sample((5,))
    assert drawn[:, 0].isfinite().all() and drawn[:, 1].isnan().all()
