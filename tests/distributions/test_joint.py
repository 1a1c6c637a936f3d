# SPDX-License-Identifier: Apache-2.0
"""Joint against the product of its parts, and as a site of guides, NUTS, plates and handlers."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam
from torch.distributions import biject_to, constraints, transform_to
from torch.testing import assert_close

import pyro_latentde as lde
from pyro_latentde.distributions import Joint, TruncatedNormal
from pyro_latentde.errors import LatentDEError, ShapeError

DOUBLE = torch.float64


def numbers(*values):
    return torch.tensor(values, dtype=DOUBLE)


def scalar(value):
    return torch.tensor(value, dtype=DOUBLE)


def parts():
    return {
        "length": dist.Uniform(scalar(1.0), scalar(2.0)),
        "rate": dist.LogNormal(scalar(0.3), scalar(0.5)),
        "shift": dist.Normal(scalar(-1.0), scalar(2.0)),
        "share": dist.Beta(scalar(2.0), scalar(3.0)),
        "mass": TruncatedNormal(scalar(1.0), scalar(0.5)),
        "width": dist.HalfNormal(scalar(0.7)),
    }


def test_density_and_moments_are_those_of_the_parts():
    joint = Joint(parts())
    x = joint.sample((50,))
    assert x.shape == (50, 6) and joint.batch_shape == () and joint.event_shape == (6,)
    expected = sum(part.log_prob(x[:, i]) for i, part in enumerate(parts().values()))
    assert_close(joint.log_prob(x), expected, rtol=1e-13, atol=1e-13)
    for what in ("mean", "variance"):
        assert_close(getattr(joint, what), torch.stack([getattr(p, what) for p in parts().values()]))
    assert joint.names == tuple(parts()) and list(joint.as_dict(x)) == list(parts())
    assert torch.equal(joint.as_dict(x)["share"], x[:, 3])


def test_draws_have_the_means_of_the_parts():
    """Six means within 5 standard errors: false alarm 4e-6."""
    joint = Joint(parts())
    x = joint.sample((20_000,))
    assert ((x.mean(0) - joint.mean).abs() < 5 * joint.stddev / math.sqrt(20_000)).all()


@pytest.mark.parametrize("to", [biject_to, transform_to])
def test_transform_sums_its_log_jacobian(to):
    joint = Joint(parts())
    transform = to(joint.support)
    u = torch.randn(7, 6, dtype=DOUBLE)
    x = transform(u)
    assert joint.support.check(x).all() and joint.support.event_dim == 1
    assert_close(transform.inv(x), u, rtol=1e-8, atol=1e-8)
    jacobian = torch.func.vmap(torch.func.jacrev(transform))(u)
    assert_close(transform.log_abs_det_jacobian(u, x), torch.linalg.slogdet(jacobian)[1], rtol=1e-10, atol=1e-10)
    assert_close(transform.inv.log_abs_det_jacobian(x, u), -torch.linalg.slogdet(jacobian)[1], rtol=1e-10, atol=1e-10)
    assert_close(transform.with_cache()(u), x)


def test_support_is_of_whole_vectors():
    joint = Joint({"a": dist.Uniform(0.0, 1.0), "b": dist.Normal(0.0, 1.0)}, validate_args=True)
    assert joint.support.check(torch.tensor([[0.5, 9.0], [1.5, 0.0]])).tolist() == [True, False]
    assert not joint.support.check(torch.tensor([0.5]))
    with pytest.raises(ValueError, match="support"):
        joint.log_prob(torch.tensor([1.5, 0.0]))
    with pyro.validation_enabled(False):
        assert joint.log_prob(torch.tensor([1.5, 0.0])) == -math.inf


def test_batches_broadcast_and_expand():
    """A population prior: the bounds and the location differ from row to row."""
    high = numbers(2.0, 3.0, 4.0)
    joint = Joint({"a": dist.Uniform(torch.ones_like(high), high), "b": dist.Normal(scalar(0.0), scalar(1.0))})
    assert joint.batch_shape == (3,) and joint.event_shape == (2,)
    wide = joint.expand((5, 3))
    x = wide.sample()
    assert x.shape == (5, 3, 2) and wide.names == ("a", "b")
    expected = -(high - 1).log() + dist.Normal(scalar(0.0), scalar(1.0)).log_prob(x[..., 1])
    assert_close(wide.log_prob(x), expected)
    transform = biject_to(wide.support)
    assert_close(transform(transform.inv(x)), x)
    assert transform.log_abs_det_jacobian(transform.inv(x), x).shape == (5, 3)


def test_gradients_reach_the_parameters_of_the_parts():
    loc = numbers(0.1, 0.2).requires_grad_()
    joint = Joint({"a": dist.Normal(loc, numbers(1.0, 1.0)), "b": dist.LogNormal(loc, numbers(1.0, 1.0))})
    assert joint.has_rsample
    joint.rsample().sum().backward()
    assert loc.grad.isfinite().all() and (loc.grad != 0).all()
    assert not joint.sample().requires_grad


def test_what_cannot_be_a_part_is_refused():
    with pytest.raises(LatentDEError, match="'n' is discrete .Poisson"):
        Joint({"a": dist.Normal(0.0, 1.0), "n": dist.Poisson(2.0)})
    with pytest.raises(ShapeError, match=r"event shape \(3,\); expected scalars"):
        Joint({"v": dist.Normal(torch.zeros(3), 1.0).to_event(1)})
    with pytest.raises(LatentDEError, match="'c' is a float"):
        Joint({"c": 9.81})
    with pytest.raises(LatentDEError, match="no parts"):
        Joint({})
    with pytest.raises(ShapeError, match=r"expected values \(..., 1\), got \(2,\)"):
        Joint({"a": dist.Normal(0.0, 1.0)}).as_dict(torch.zeros(2))


def test_its_own_parts_are_copies():
    """Value checks of the user's distributions stay on."""
    rate = dist.LogNormal(scalar(0.0), scalar(1.0), validate_args=True)
    Joint({"rate": rate})
    with pytest.raises(ValueError, match="support"):
        rate.log_prob(scalar(-1.0))


Y = torch.linspace(-1, 1, 12, dtype=DOUBLE) + 0.4
PRIOR = Joint({"mu": dist.Normal(scalar(0.0), scalar(2.0)), "free": dist.LogNormal(scalar(0.2), scalar(0.3))})


def conjugate_model():
    """Normal mean with known sd .5: posterior of `mu` known; `free` keeps its prior."""
    theta = pyro.sample("theta", PRIOR)
    with pyro.plate("data", len(Y)):
        pyro.sample("y", dist.Normal(theta[..., :1], 0.5), obs=Y)


def exact():
    precision = 1 / 4 + len(Y) / 0.25
    return Y.sum().item() / 0.25 / precision, precision**-0.5


def test_nuts_finds_the_conjugate_posterior():
    """Four means and sds at five Monte Carlo errors or more (at least 700 effective draws): false alarm 1e-5."""
    posterior = lde.infer.nuts(conjugate_model, num_samples=500, num_warmup=200, num_chains=2, seed=1)
    theta = posterior.samples["theta"].reshape(-1, 2)
    mean, sd = exact()
    assert theta[:, 0].mean().item() == pytest.approx(mean, abs=5 * sd / 700**0.5)
    assert theta[:, 0].std().item() == pytest.approx(sd, rel=5 / 1400**0.5)
    logs = theta[:, 1].log()
    assert logs.mean().item() == pytest.approx(0.2, abs=5 * 0.3 / 700**0.5)
    assert logs.std().item() == pytest.approx(0.3, rel=5 / 1400**0.5)


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoMultivariateNormal])
def test_guides_with_the_exact_posterior_give_the_evidence(guide_class):
    """In the unconstrained space this posterior is two independent normals, so the exact guide has a constant ELBO."""
    guide = guide_class(conjugate_model)
    guide()
    mean, sd = exact()
    if guide_class is AutoNormal:
        guide.locs.theta, guide.scales.theta = numbers(mean, 0.2), numbers(sd, 0.3)
    else:
        guide.loc.data, guide.scale, guide.scale_tril = numbers(mean, 0.2), numbers(sd, 0.3), torch.eye(2, dtype=DOUBLE)
    evidence = dist.MultivariateNormal(torch.zeros_like(Y), 0.25 * torch.eye(12, dtype=DOUBLE) + 4.0).log_prob(Y)
    for _ in range(3):
        assert -Trace_ELBO().loss(conjugate_model, guide) == pytest.approx(evidence.item(), abs=1e-9)


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoDelta])
@pytest.mark.parametrize("particles", [1, 4])
def test_guides_train(guide_class, particles):
    guide = guide_class(conjugate_model)
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
    svi = SVI(conjugate_model, guide, Adam({"lr": 0.02}), elbo)
    losses = [svi.step() for _ in range(100)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert PRIOR.support.check(guide()["theta"]).all()


def test_in_a_plate_with_handlers():
    joint = Joint({"a": dist.Uniform(scalar(1.0), scalar(2.0)), "b": dist.LogNormal(scalar(0.0), scalar(1.0))})

    def model():
        with pyro.plate("series", 4):
            return pyro.sample("theta", joint)

    trace = pyro.poutine.trace(model).get_trace()
    value = trace.nodes["theta"]["value"]
    assert value.shape == (4, 2)
    full = trace.log_prob_sum()
    assert_close(full, joint.log_prob(value).sum())
    for handler, share in (
        (pyro.poutine.mask(model, mask=torch.tensor([True, False, False, False])), joint.log_prob(value)[0]),
        (pyro.poutine.scale(model, 3.0), 3 * full),
        (pyro.poutine.condition(model, {"theta": value}), full),
    ):
        replayed = pyro.poutine.trace(pyro.poutine.replay(handler, trace=trace)).get_trace()
        assert_close(replayed.log_prob_sum(), share)
    assert torch.equal(pyro.poutine.do(model, {"theta": value})(), value)
    fixed = pyro.poutine.trace(pyro.poutine.block(model, hide=["theta"])).get_trace()
    assert "theta" not in fixed.nodes
    assert Predictive(model, num_samples=3, parallel=True)()["theta"].shape == (3, 4, 2)
    assert Predictive(model, num_samples=3)()["theta"].shape == (3, 4, 2)


def test_mean_field_elbo_and_population_prior():
    """A hierarchical prior: the locations of the parts are latent themselves."""

    def model():
        top = pyro.sample("top", Joint({"m": dist.Normal(scalar(0.0), 1.0), "s": dist.HalfNormal(scalar(1.0))}))
        with pyro.plate("series", 3):
            rows = {"a": dist.LogNormal(top[..., 0], top[..., 1]), "b": dist.Beta(scalar(2.0), 2)}
            pyro.sample("theta", Joint(rows))

    guide = AutoNormal(model)
    loss = TraceMeanField_ELBO().loss(model, guide)
    assert math.isfinite(loss) and guide()["theta"].shape == (3, 2)
    assert constraints.is_dependent(Joint.support)
