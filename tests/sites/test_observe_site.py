# SPDX-License-Identifier: Apache-2.0
"""observe: densities against sums written by hand, gaps, plates, Pyro's handlers, and errors that teach."""

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.testing import assert_close

from pyro_latentde.data import Series
from pyro_latentde.errors import DataError, ShapeError
from pyro_latentde.sites.observe_site import observe, pointwise_log_prob

NAN = float("nan")
TIMES = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)


def normal(z):
    return dist.Normal(z, 0.5)


def series_of(n, gaps=False, seed=0):
    values = torch.randn(n, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if gaps:
        values[0, 1, 0] = values[-1, 2] = NAN
    return Series.from_tensors(TIMES, values, names=("u", "v"))


def reference(series, z, sigma=0.5):
    """Elementwise log-density by SciPy, zero where missing, (N, T, D)."""
    density = torch.as_tensor(scipy.stats.norm.logpdf(series.values, z.detach(), sigma))
    return density.where(series.mask, torch.zeros_like(density))


def traced(*args, **kwargs):
    trace = poutine.trace(observe).get_trace("obs", *args, **kwargs)
    trace.compute_log_prob()
    return trace, trace.nodes["obs"]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("direct", [False, True])
def test_density_is_the_sum_over_what_was_observed(n, gaps, direct):
    series = series_of(n, gaps)
    z = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)
    args = (normal(z), series) if direct else (normal, series, z)
    trace, site = traced(*args)
    expected = reference(series, z)
    assert_close(trace.log_prob_sum(), expected.sum())
    pointwise = pointwise_log_prob(site["fn"], site["value"])
    assert_close(pointwise, expected if n > 1 else expected[0])
    assert site["fn"].event_shape == (3, 2) and site["is_observed"]
    record = site["infer"]["lde_observe"]
    assert record["states"] == ("u", "v") and record["mask"].shape == site["value"].shape


def test_batched_trajectories_of_several_series():
    series, z = series_of(4, gaps=True), torch.randn(4, 3, 2, dtype=torch.float64)
    trace, site = traced(normal, series, z)
    assert_close(trace.log_prob_sum(), reference(series, z).sum())
    assert [frame.name for frame in site["cond_indep_stack"]] == ["obs_series"]


def test_gaps_give_zero_gradient_whatever_the_density():
    """A filler outside the support, or NaN, would make these gradients NaN."""
    values = torch.tensor([[0.2, NAN], [NAN, 0.9], [0.5, NAN]], dtype=torch.float64)
    series = Series.from_tensors(TIMES, values)
    z = torch.full((3, 2), 2.3, dtype=torch.float64, requires_grad=True)
    for make in (lambda z: dist.LogNormal(z.log(), 0.1), lambda z: dist.Beta(z, z), dist.Exponential):
        trace, _ = traced(make, series, z)
        (grad,) = torch.autograd.grad(trace.log_prob_sum(), z)
        assert grad.isfinite().all() and torch.equal(grad == 0, ~series.mask[0])


def test_ragged_rows_are_scored_to_their_own_end():
    series = Series.from_tensors([[0.0, 1.0, 2.0], [0.0, 3.0]], [[1.0, 2.0, 3.0], [4.0, 5.0]])
    z = torch.zeros(2, 3, 1, dtype=torch.float64)
    trace, _ = traced(normal, series, z)
    expected = scipy.stats.norm.logpdf([1, 2, 3, 4, 5], 0, 0.5).sum()
    assert trace.log_prob_sum().item() == pytest.approx(expected)


def test_joint_distribution_of_a_row():
    values = torch.tensor([[0.1, 0.2], [NAN, NAN], [0.3, 0.4]], dtype=torch.float64)
    z = torch.zeros(3, 2, dtype=torch.float64)
    covariance = torch.tensor([[1.0, 0.5], [0.5, 2.0]], dtype=torch.float64)

    def joint(z):
        return dist.MultivariateNormal(z, covariance)

    trace, site = traced(joint, Series.from_tensors(TIMES, values), z)
    expected = scipy.stats.multivariate_normal([0, 0], covariance).logpdf(values[[0, 2]]).sum()
    assert trace.log_prob_sum().item() == pytest.approx(expected)
    assert pointwise_log_prob(site["fn"], site["value"]).shape == (3,)
    values[1, 0] = 0.0
    with pytest.raises(DataError, match="'obs': 1 rows are observed in part"):
        traced(joint, Series.from_tensors(TIMES, values), z)


def test_states_are_floored_at_the_noise_of_the_solver():
    series = Series.from_tensors(TIMES, torch.ones(3, 1))
    z = torch.tensor([[2.0], [-1e-9], [0.0]], dtype=torch.float64, requires_grad=True)
    seen = []

    def log_normal(z):
        seen.append(z)
        return dist.LogNormal(z.log(), 1.0)

    trace, _ = traced(log_normal, series, z, positive=True)
    assert seen[0].flatten().tolist() == [2.0, 1e-7, 1e-7]
    (grad,) = torch.autograd.grad(trace.log_prob_sum(), z)
    assert grad.flatten().tolist()[1:] == [0.0, 0.0] and grad[0].isfinite()
    traced(log_normal, series, z, floor=0.5)
    assert seen[1].flatten().tolist() == [2.0, 0.5, 0.5]
    traced(log_normal, series, z.detach().float(), positive=True)
    assert seen[2].min().item() == pytest.approx(1e-5)


def test_failed_solve_is_a_density_not_a_crash():
    series = series_of(1, gaps=True)
    z = torch.full((3, 2), NAN, dtype=torch.float64)
    with pyro.validation_enabled(False):
        for kwargs in ({}, {"positive": True}):
            trace, _ = traced(lambda z: dist.LogNormal(z.exp().log(), 1.0), series, z, **kwargs)
            assert trace.log_prob_sum().isnan()


@pytest.mark.parametrize("series", [None, Series.at_times(TIMES), Series.at_times(TIMES, names=("u", "v"))])
def test_draws_without_values(series):
    z = torch.zeros(3, 2, dtype=torch.float64)
    _, site = traced(normal, series, z)
    assert site["value"].shape == (3, 2) and not site["is_observed"]
    draws = torch.stack([traced(normal, series, z)[1]["value"] for _ in range(500)])
    # 3000 normals: five standard errors on the standard deviation, a false alarm in about 1e-6
    assert draws.std().item() == pytest.approx(0.5, abs=5 * 0.5 / 6000**0.5)


def test_draws_for_several_series():
    _, site = traced(normal, Series.at_times(TIMES.expand(4, 3)), torch.zeros(4, 3, 2))
    assert site["value"].shape == (4, 3, 2)


def shift_model(series, n=None):
    shift = pyro.sample("shift", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    z = shift[..., None, None] + torch.zeros(3, 2, dtype=torch.float64)
    if series is not None and len(series) > 1:
        z = z.unsqueeze(-3) if z.dim() < 3 else z
    return observe("obs", normal, series, z)


@pytest.mark.parametrize("n", [1, 3])
def test_handlers(n):
    series = series_of(n, gaps=True)
    conditioned = poutine.condition(shift_model, {"shift": torch.tensor(0.3, dtype=torch.float64)})
    expected = reference(series, torch.full((3, 2), 0.3, dtype=torch.float64)).sum()
    prior = scipy.stats.norm.logpdf(0.3)
    assert_close(poutine.trace(conditioned).get_trace(series).log_prob_sum(), prior + expected)
    with poutine.scale(scale=torch.tensor(2.0)):
        trace = poutine.trace(conditioned).get_trace(series)
    assert_close(trace.log_prob_sum(lambda name, site: name == "obs"), 2 * expected)
    with poutine.mask(mask=False):
        trace = poutine.trace(conditioned).get_trace(series)
    assert trace.log_prob_sum().item() == 0
    trace = poutine.trace(poutine.uncondition(shift_model)).get_trace(series)
    drawn = trace.nodes["obs"]["value"]
    assert not trace.nodes["obs"]["is_observed"] and (drawn - series.values).abs().min() > 0
    replayed = poutine.trace(poutine.replay(shift_model, trace=trace)).get_trace(series)
    assert torch.equal(replayed.nodes["shift"]["value"], trace.nodes["shift"]["value"])
    assert "obs" not in poutine.trace(poutine.block(shift_model, hide=["obs"])).get_trace(series).nodes


@pytest.mark.parametrize("n", [1, 3])
def test_vmap_over_parameters(n):
    series = series_of(n, gaps=True)
    shifts = torch.linspace(-1, 1, 5, dtype=torch.float64)

    def log_joint(shift):
        model = poutine.condition(shift_model, {"shift": shift})
        return poutine.trace(model).get_trace(series).log_prob_sum(lambda name, _: name == "obs")

    with pyro.validation_enabled(False):
        values = torch.func.vmap(log_joint)(shifts)
        grads = torch.func.vmap(torch.func.grad(log_joint))(shifts)
    for shift, value, grad in zip(shifts, values, grads, strict=True):
        assert_close(value, reference(series, shift.expand(3, 2)).sum())
        slope = ((series.values - shift) / 0.25)[series.mask].sum()
        assert_close(grad, slope)


@pytest.mark.parametrize("n", [1, 3])
def test_vectorized_particles_score_each_particle(n):
    series = series_of(n, gaps=True)

    def guide(series):
        pyro.sample("shift", dist.Delta(torch.tensor(0.3, dtype=torch.float64)))

    def model(series):
        shift = pyro.sample("shift", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        z = shift[..., None, None] + torch.zeros(3, 2, dtype=torch.float64)
        observe("obs", normal, series, z)

    one = Trace_ELBO().loss(model, guide, series)
    nesting = 0 if n == 1 else 1
    elbo = Trace_ELBO(num_particles=6, vectorize_particles=True, max_plate_nesting=nesting)
    assert elbo.loss(model, guide, series) == pytest.approx(one)


def test_svi_and_predictive_in_parallel():
    """One normal mean with a normal prior: the posterior mean is known."""
    series = series_of(3)
    guide = AutoNormal(shift_model)
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)
    svi = SVI(shift_model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    for _ in range(300):
        svi.step(series)
    precision = 1 + 18 / 0.25
    exact = series.values.sum().item() / 0.25 / precision
    assert guide.median()["shift"].item() == pytest.approx(exact, abs=0.05)
    drawn = Predictive(shift_model, guide=guide, num_samples=7, parallel=True)(None)
    assert drawn["obs"].shape == (7, 3, 2)


def hierarchy(series, size=None):
    n = len(series)
    with pyro.plate("series", n, subsample_size=size) as index:
        level = pyro.sample("level", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        z = level[..., None, None].expand(*level.shape, 3, 2)
        return observe("obs", normal, series[index], z)


@pytest.mark.parametrize("size", [None, 2])
def test_own_plate_of_the_user_and_subsampling(size):
    series = series_of(4, gaps=True)
    trace = poutine.trace(hierarchy).get_trace(series, size)
    trace.compute_log_prob()
    site = trace.nodes["obs"]
    assert [frame.name for frame in site["cond_indep_stack"]] == ["series"]
    rows = trace.nodes["series"]["value"]
    level = trace.nodes["level"]["value"]
    expected = reference(series[rows], level[:, None, None]).sum(dim=(1, 2))
    assert_close(site["unscaled_log_prob"], expected)
    assert_close(site["log_prob_sum"], expected.sum() * 4 / len(rows))


def test_hierarchy_with_particles():
    series = series_of(4, gaps=True)
    one = poutine.trace(hierarchy).get_trace(series)  # any value would do: the guide is fixed below
    level = one.nodes["level"]["value"]

    def fixed(series):
        with pyro.plate("series", 4):
            pyro.sample("level", dist.Delta(level))

    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    assert elbo.loss(hierarchy, fixed, series) == pytest.approx(-one.log_prob_sum().item())


def test_one_series_keeps_the_batch_dimension_of_its_trajectory():
    series = series_of(1)
    assert traced(normal, series, torch.zeros(1, 3, 2))[1]["value"].shape == (1, 3, 2)
    assert traced(normal, series, torch.zeros(3, 2))[1]["value"].shape == (3, 2)


def test_already_independent_distributions_are_the_same():
    series, z = series_of(1, gaps=True), torch.zeros(3, 2, dtype=torch.float64)
    plain = traced(normal, series, z)[0].log_prob_sum()
    for event_dim in (1, 2):
        assert_close(traced(lambda z, d=event_dim: normal(z).to_event(d), series, z)[0].log_prob_sum(), plain)


Z = torch.zeros(3, 2, dtype=torch.float64)
ERRORS = [
    ((normal, series_of(1).values, Z), {}, TypeError, "series is a Tensor, expected a Series"),
    ((normal, series_of(1)), {}, TypeError, "pass the trajectory as the fourth argument"),
    ((normal(Z), series_of(1)), {"positive": True}, TypeError, "need a function of the states"),
    ((lambda z: z, series_of(1), Z), {}, TypeError, "distribution_of gave a Tensor"),
    ((normal, series_of(1), Z.T), {}, ShapeError, "looks like .D, T.: transpose"),
    ((normal, series_of(1), Z[:, 0]), {}, ShapeError, r"keep it, z\[..., :2\] instead"),
    ((normal, series_of(1), torch.zeros(3, 4)), {}, ShapeError, r"the 2 observed states \(u, v\), .* z\[..., :2\]"),
    ((normal, series_of(1), Z[:, :1]), {}, ShapeError, r"have 2 values \(u, v\) at each time: give a distribution"),
    ((normal, series_of(1), torch.zeros(5, 2)), {}, ShapeError, r"Check that the states were solved at"),
    ((normal, series_of(2), torch.zeros(4, 3, 2)), {}, ShapeError, "The states are of 4 series"),
    ((dist.LKJCholesky(2).expand([3]), series_of(1)), {}, ShapeError, "one LKJCholesky for several times"),
]


@pytest.mark.parametrize("args, kwargs, error, message", ERRORS, ids=[e[3] for e in ERRORS])
def test_errors_teach(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        observe("obs", *args, **kwargs)


def test_wrong_plate_is_named():
    with pyro.plate("people", 5), pytest.raises(ShapeError, match="2 series in plate 'people' of size 5"):
        observe("obs", normal, series_of(2), torch.zeros(5, 3, 2))


@pytest.mark.parametrize("series", [None, series_of(1)], ids=["drawn", "scored"])
def test_wrong_plate_around_a_batch_is_explained(series):
    message = r"site 'obs': the batch shape is \(4,\), but plate 'people' around the site has size 5 at dim -1"
    with pyro.plate("people", 5), pytest.raises(ShapeError, match=message):
        observe("obs", normal, series, torch.zeros(4, 3, 2))
