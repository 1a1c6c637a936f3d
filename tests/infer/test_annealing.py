# SPDX-License-Identifier: Apache-2.0
"""The KL's weight scales what is not data, and nothing else; losses split into reconstruction and KL."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_latentde.infer import fit_svi
from pyro_latentde.infer.annealing import KLWeight, PartsOfELBO
from pyro_latentde.infer.schedules import linear

Y = torch.tensor([0.3, -1.0, 2.0]).double()


def model(y=Y):
    z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("data", 3, subsample_size=2) as rows, poutine.scale(scale=1.5):
        w = pyro.sample("w", dist.Normal(torch.zeros(()).double(), 2.0))
        pyro.sample("y", dist.Normal(z + w, 1.0), obs=y[rows])
    pyro.deterministic("twice", 2 * z)
    pyro.factor("penalty", -z.square())
    pyro.sample("shrinkage", dist.Unit(-w.abs().sum()), obs=torch.zeros(0), infer={"prior": True})
    pyro.sample("join", dist.Normal(w, 0.1).to_event(1), obs=torch.zeros(2).double(), infer={"prior": True})


def guide(y=Y):
    loc = pyro.param("loc", torch.tensor(0.1).double())
    pyro.sample("z", dist.Normal(loc, 0.5))
    with pyro.plate("data", 3, subsample_size=2), poutine.scale(scale=1.5):
        pyro.sample("w", dist.Normal(loc, torch.tensor(0.4).double()))


def test_scale_of_every_site():
    full = poutine.trace(model).get_trace().nodes
    light = poutine.trace(KLWeight(0.25)(model)).get_trace().nodes
    changed = {name for name in light if light[name].get("scale") != full[name].get("scale")}
    assert changed == {"z", "w", "shrinkage", "join"}
    assert light["w"]["scale"] == pytest.approx(0.25 * 1.5 * 1.5) and light["y"]["scale"] == full["y"]["scale"]
    assert light["z"]["scale"] == light["shrinkage"]["scale"] == light["join"]["scale"] == 0.25
    assert poutine.trace(KLWeight(0.25)(guide)).get_trace().nodes["w"]["scale"] == pytest.approx(0.25 * 2.25)
    with pytest.raises(ValueError, match="not negative"):
        KLWeight().weight = -0.1
    with pytest.raises(ValueError, match="not negative"):
        KLWeight().weight = math.nan


@pytest.mark.parametrize("weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("particles", [1, 3])
def test_parts_of_the_loss(weight, particles):
    parts = PartsOfELBO(Trace_ELBO(particles))
    handler = KLWeight(weight)
    pyro.set_rng_seed(1)
    loss = parts.elbo.loss_and_grads(handler(model), handler(guide))
    reconstruction, kl = parts.split(loss, handler.weight)
    pyro.set_rng_seed(1)
    data = prior = 0.0
    for _ in range(particles):
        q = poutine.trace(guide).get_trace()
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace()
        q.compute_log_prob(), p.compute_log_prob()
        likelihood = sum(p.nodes[name]["log_prob_sum"].item() for name in ("y", "penalty")) / particles
        data += likelihood
        prior += (q.log_prob_sum() - p.log_prob_sum()).item() / particles + likelihood
    assert reconstruction == pytest.approx(data, rel=1e-12)
    assert kl == pytest.approx(prior, rel=1e-7)
    assert loss == pytest.approx(handler.weight * prior - data, rel=1e-9)


def test_vectorized_and_analytic_elbos():
    def simple(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def normal(y):
        pyro.sample("z", dist.Normal(torch.tensor(0.5).double(), torch.tensor(0.2).double()))

    kl = torch.distributions.kl_divergence(dist.Normal(0.5, 0.2), dist.Normal(0.0, 1.0)).item()
    likelihood = dist.Normal(0.5, 1.0).log_prob(Y).sum().item() - 3 * 0.5 * 0.2**2  # E[(y - z)^2] adds the variance
    many = Trace_ELBO(20_000, max_plate_nesting=2, vectorize_particles=True)
    for elbo, kl_error in ((many, 0.03), (TraceMeanField_ELBO(20_000), 1e-6)):
        elbo = elbo if elbo is many else TraceMeanField_ELBO(20_000, max_plate_nesting=2, vectorize_particles=True)
        parts, handler = PartsOfELBO(elbo), KLWeight(0.5)
        loss = parts.elbo.loss_and_grads(handler(simple), handler(normal), Y)
        found = parts.split(loss, 0.5)
        # sd of one draw about 0.3 and 0.7, five of them over sqrt(20,000)
        assert found == (pytest.approx(likelihood, abs=0.02), pytest.approx(kl, abs=kl_error))


def conjugate(y):
    z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_a_weighted_fit_finds_the_tempered_posterior():
    """With weight w the best guide is the posterior of likelihood^(1/w): precision 1 + 3 / w, scaled mean."""
    fit = fit_svi(conjugate, AutoNormal, Y, kl_weight=0.25, num_steps=1500, num_particles=4, progress=False)
    draws = fit.posterior(4000)["z"]
    assert draws.mean() == pytest.approx(4 * Y.sum().item() / 13, abs=0.03)
    assert draws.std() == pytest.approx(13**-0.5, rel=0.1)


def test_annealed_fits_report_the_whole_elbo_and_end_at_the_posterior():
    annealed = fit_svi(conjugate, AutoNormal, Y, kl_weight=linear(0.0, 1.0, 500), num_steps=1500, progress=False)
    assert annealed.posterior(4000)["z"].std() == pytest.approx(0.5, rel=0.1)
    plain = fit_svi(conjugate, AutoNormal, Y, num_steps=1, start_at=None, progress=False)
    other = fit_svi(conjugate, AutoNormal, Y, num_steps=1, kl_weight=0.1, start_at=None, progress=False)
    assert other.losses.item() == pytest.approx(plain.losses.item(), rel=1e-9)
