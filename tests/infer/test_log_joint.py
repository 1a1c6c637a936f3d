# SPDX-License-Identifier: Apache-2.0
"""The log-joint as a function of a flat vector: values, gradients, supports, failures and taught errors."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.mcmc.util import initialize_model

from pyro_latentde.errors import DataError, LatentDEError, ShapeError
from pyro_latentde.infer.log_joint import LogJoint

Y = torch.tensor([1.2, -0.4, 0.3, 2.0], dtype=torch.float64)


def mixed_model(y):
    """Supports of many kinds, a plate, a mask, a scale and a factor."""
    zero = torch.zeros((), dtype=torch.float64)
    loc = pyro.sample("loc", dist.Normal(zero, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(zero, 1.0))
    part = pyro.sample("part", dist.Beta(zero + 2.0, 3.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3, dtype=torch.float64)))
    corr = pyro.sample("corr", dist.LKJCholesky(3, zero + 2.0))
    pyro.factor("extra", -0.5 * (corr[1, 0] + weights[0]) ** 2)
    with pyro.plate("n", len(y)), pyro.poutine.scale(scale=0.5):
        effect = pyro.sample("effect", dist.Normal(loc, scale))
        with pyro.poutine.mask(mask=torch.tensor([True, True, False, True])):
            pyro.sample("obs", dist.Normal(effect, part), obs=y)


def decay_model(y, rk4_steps=20):
    """A hand-written fixed-step solve, recorded as the package records its own; fails for rates above 8."""
    k = pyro.sample("k", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))
    h, z = 1.0 / rk4_steps, torch.ones((), dtype=torch.float64)
    path = [z]
    for _ in range(rk4_steps):
        k1 = -k * z
        k2 = -k * (z + h / 2 * k1)
        k3 = -k * (z + h / 2 * k2)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 - k * (z + h * k3))
        path.append(z)
    failed = k > 8.0
    z = torch.where(failed, torch.full_like(torch.stack(path), math.nan), torch.stack(path)).unsqueeze(-1)
    record = {
        "status": failed.long().reshape(()),
        "n_steps": torch.full_like(failed, rk4_steps, dtype=torch.int64),
    }
    pyro.sample("z", dist.Delta(z, event_dim=2).mask(False), obs=z, infer={"_deterministic": True, "lde_ode": record})
    pyro.sample("obs", dist.Normal(z[-1, 0], 0.1), obs=y)


def test_agrees_with_the_potential_that_pyro_makes():
    joint = LogJoint(mixed_model, (Y,))
    _, potential, transforms, _ = initialize_model(mixed_model, (Y,))
    u = torch.randn(5, joint.dim, dtype=torch.float64)
    lp, grad, (failed, steps) = joint.value_and_grad(u)
    for i in range(5):
        split = {s.name: u[i, s.start : s.stop].reshape(s.flat_shape).requires_grad_(True) for s in joint.sites}
        theirs = potential(split)
        theirs.backward()
        theirs_grad = torch.cat([-split[s.name].grad.reshape(-1) for s in joint.sites])
        assert lp[i] == pytest.approx(-theirs.item(), rel=1e-12)
        assert torch.allclose(grad[i], theirs_grad, rtol=1e-9, atol=1e-9)
        assert joint.potential(u[i]) == pytest.approx(theirs.item(), rel=1e-12)
    assert not failed.any() and not steps.any()
    assert set(transforms) == {site.name for site in joint.sites}


def test_gradient_against_central_differences():
    joint = LogJoint(mixed_model, (Y,))
    u = torch.randn(joint.dim, dtype=torch.float64)
    step = 1e-5 * torch.eye(joint.dim, dtype=torch.float64)
    above, below = joint.value_and_grad(u + step)[0], joint.value_and_grad(u - step)[0]
    _, grad, _ = joint.value_and_grad(u[None])
    assert torch.allclose(grad[0], (above - below) / 2e-5, rtol=1e-6, atol=1e-6)


def test_jacobians_integrate_to_one():
    # a model without data: exp(log-density) over one unconstrained coordinate is a density
    grid = torch.linspace(-30, 30, 20_001, dtype=torch.float64)[:, None]
    zero = torch.zeros((), dtype=torch.float64)
    for prior in (
        dist.LogNormal(zero, 1.0),
        dist.Beta(zero + 2, 3.0),
        dist.Uniform(zero - 3, 4.0),
        dist.Gamma(zero + 2, 1.0),
    ):
        lp, _, _ = LogJoint(lambda prior=prior: pyro.sample("x", prior)).value_and_grad(grid)
        assert torch.trapezoid(lp.exp(), grid[:, 0]) == pytest.approx(1.0, abs=1e-6)


def test_rows_do_not_depend_on_each_other_and_the_loop_agrees():
    joint = LogJoint(mixed_model, (Y,))
    u = torch.randn(7, joint.dim, dtype=torch.float64)
    lp, grad, _ = joint.value_and_grad(u)
    u_bad = u.clone()
    u_bad[3] = math.nan
    lp_bad, grad_bad, _ = joint.value_and_grad(u_bad)
    others = [i for i in range(7) if i != 3]
    assert torch.equal(lp[others], lp_bad[others]) and torch.equal(grad[others], grad_bad[others])
    assert lp_bad[3] == -math.inf and not grad_bad[3].any()
    lp_loop, grad_loop, _ = joint.value_and_grad_in_a_loop(u)
    assert torch.allclose(lp, lp_loop, rtol=1e-12) and torch.allclose(grad, grad_loop, rtol=1e-10)


def test_failed_solves_are_minus_infinity_with_zero_gradient_and_counted():
    joint = LogJoint(decay_model, (torch.tensor(0.3, dtype=torch.float64),))
    u = torch.tensor([[0.2], [3.0]], dtype=torch.float64)  # k = 1.2 and k = 20
    lp, grad, (failed, steps) = joint.value_and_grad(u)
    assert failed.tolist() == [False, True] and steps.tolist() == [20, 20]
    k = math.exp(0.2)
    by_hand = dist.LogNormal(0.0, 1.0).log_prob(torch.tensor(k)) + 0.2
    by_hand = by_hand + dist.Normal(math.exp(-k), 0.1).log_prob(torch.tensor(0.3))
    assert lp[0].item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert lp[1] == -math.inf and grad[1] == 0
    assert joint.potential(u[1]) == math.inf
    by_site, statuses = joint.site_log_probs(u[1])
    assert statuses == [1] and math.isnan(by_site["obs"])


def test_a_failed_solve_rejects_even_where_the_likelihood_does_not_look_at_it():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        status = torch.stack([x > 5, x > 0]).long()  # two rows, the second fails for positive x
        record = {"status": status, "n_steps": torch.tensor([3, 4])}
        infer = {"_deterministic": True, "lde_ode": record}
        pyro.sample("z", dist.Delta(x.reshape(1, 1), event_dim=2).mask(False), obs=x.reshape(1, 1), infer=infer)

    lp, grad, (failed, steps) = LogJoint(model).value_and_grad(torch.tensor([[-1.0], [1.0]]).double())
    assert lp.isfinite().tolist() == [True, False] and grad.tolist() == [[1.0], [0.0]]
    assert failed.tolist() == [False, True] and steps.tolist() == [7, 7]


def test_constrain_and_unconstrain_are_inverse():
    joint = LogJoint(mixed_model, (Y,))
    u = torch.randn(2, 3, joint.dim, dtype=torch.float64)
    values = joint.constrain(u)
    assert values["corr"].shape == (2, 3, 3, 3) and values["weights"].shape == (2, 3, 3)
    assert torch.allclose(values["weights"].sum(-1), torch.ones(2, 3, dtype=torch.float64))
    assert torch.allclose(joint.unconstrain(values), u, atol=1e-6)


def test_a_support_that_depends_on_another_site():
    def model():
        low = pyro.sample("low", dist.Gamma(torch.tensor(2.0, dtype=torch.float64), 1.0))
        pyro.sample("x", dist.Uniform(low, low + 2.0))

    joint = LogJoint(model)
    assert not joint.has_fixed_supports
    u = torch.tensor([[0.5, 1.0], [-1.0, -2.0]], dtype=torch.float64)
    values = joint.constrain(u)
    low, x = u[:, 0].exp(), u[:, 0].exp() + 2 * torch.sigmoid(u[:, 1])
    assert torch.allclose(values["low"], low) and torch.allclose(values["x"], x)
    assert torch.allclose(joint.unconstrain(values), u, atol=1e-6)
    # density of low in log coordinates times the density of x, which is the logistic one whatever low is
    by_hand = (
        low.log() - low + u[:, 0] + torch.nn.functional.logsigmoid(u[:, 1]) + torch.nn.functional.logsigmoid(-u[:, 1])
    )
    assert torch.allclose(joint.value_and_grad(u)[0], by_hand)


def test_float32_sites_stay_float32():
    joint = LogJoint(lambda: pyro.sample("x", dist.LogNormal(torch.zeros(2), 1.0).to_event(1)))
    lp, grad, _ = joint.value_and_grad(torch.zeros(3, 2))
    assert joint.dtype == lp.dtype == grad.dtype == joint.constrain(torch.zeros(3, 2))["x"].dtype == torch.float32


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    LogJoint(mixed_model, (Y,))
    assert torch.equal(torch.rand(3), expected)


def test_discrete_latents_are_refused_with_advice():
    def model():
        pyro.sample("which", dist.Bernoulli(torch.tensor(0.3)))

    with pytest.raises(LatentDEError, match=r"'which' is discrete \(Bernoulli\)[\s\S]*pyro.infer.MCMC"):
        LogJoint(model)


def test_subsampled_plates_are_refused_with_advice():
    def model():
        x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("rows", 4, subsample_size=2) as index:
            pyro.sample("obs", dist.Normal(x, 1.0), obs=Y.float()[index])

    with pytest.raises(LatentDEError, match=r"'obs' is in plate 'rows', which takes 2 of 4[\s\S]*fit_svi"):
        LogJoint(model)


def test_a_model_without_latent_sites():
    with pytest.raises(LatentDEError, match=r"no latent site[\s\S]*\['obs'\]"):
        LogJoint(lambda: pyro.sample("obs", dist.Normal(torch.tensor(0.0), 1.0), obs=torch.tensor(1.0)))


@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 5, 2)])
def test_a_transposed_observation_names_site_and_shapes(shape):
    data = torch.zeros(shape)

    def model():
        x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("obs", dist.Normal(x * torch.ones(5, 3, 2), 1.0).to_event(1), obs=data)

    with pytest.raises(ShapeError, match=r"'obs': the model predicts \(batch 5, 3 \| event 2\) but the data is"):
        LogJoint(model)


def test_the_likely_transpose_is_named():
    data = torch.zeros(3, 5, 2)

    def model():
        x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("obs", dist.Normal(x * torch.ones(5, 3, 2), 1.0).to_event(1), obs=data)

    with pytest.raises(ShapeError, match=r"Did you mean data.transpose\(0, 1\)\?"):
        LogJoint(model)


def test_an_outer_product_of_prediction_and_data_is_refused():
    def model():
        x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("obs", dist.Normal(x * torch.ones(4, 1), 1.0), obs=Y.float())

    with pytest.raises(ShapeError, match=r"'obs'[\s\S]*broadcast to \(4, 4\) comparisons"):
        LogJoint(model)


def test_data_outside_the_support_are_counted_unless_masked():
    def model(mask):
        x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("obs", dist.LogNormal(x.expand(4), 1.0).mask(mask), obs=Y.float())

    with pytest.raises(DataError, match=r"'obs': 1 of 4 observed values[\s\S]*-0.4"):
        LogJoint(model, (torch.ones(4, dtype=torch.bool),))
    assert LogJoint(model, (Y > 0,)).dim == 1


def test_unconstrain_tells_what_is_missing_or_misshapen():
    joint = LogJoint(mixed_model, (Y,))
    values = joint.constrain(torch.zeros(joint.dim, dtype=torch.float64))
    with pytest.raises(ShapeError, match="'effect'"):
        joint.unconstrain({**values, "effect": torch.zeros(3)})
    values.pop("corr")
    with pytest.raises(LatentDEError, match="no value for latent site 'corr'"):
        joint.unconstrain(values)
    assert np.isfinite(joint.dim)
