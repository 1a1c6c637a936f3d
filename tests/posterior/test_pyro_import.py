# SPDX-License-Identifier: Apache-2.0
"""Posteriors from Pyro's MCMC and guides."""

import conjugate_model as conjugate
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_latentde import Posterior
from pyro_latentde.errors import LatentDEError


def hierarchical(y):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    shift = pyro.sample("shift", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("group", 1, dim=-2), pyro.plate("unit", 3, dim=-1):
        x = pyro.sample("x", dist.Normal(0.0, scale))
    pyro.sample("obs", dist.Normal(x.sum() + shift.sum(), 1.0), obs=y)


def test_mcmc_keeps_chains_divergences_and_acceptance():
    mcmc = MCMC(NUTS(hierarchical), num_samples=20, warmup_steps=20, num_chains=1, disable_progbar=True)
    mcmc.run(torch.tensor(1.0))
    mcmc._diagnostics[0]["divergences"] = [3, 7]  # a known pattern: real ones come by chance
    p = Posterior.from_pyro(mcmc, hierarchical, torch.tensor(1.0))
    assert list(p.samples) == ["scale", "shift", "x"] and p["x"].shape == (1, 20, 1, 3)
    assert torch.equal(p["x"][0], mcmc.get_samples()["x"])
    assert p.stats["diverging"].nonzero()[:, 1].tolist() == [3, 7]
    assert 0 < p.attrs["acceptance_rate_by_chain"][0] <= 1


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal])
def test_autoguide_draws_have_the_sites_shapes(make):
    guide = make(hierarchical)
    guide(torch.tensor(1.0))
    p = Posterior.from_pyro(guide, hierarchical, torch.tensor(1.0), num_samples=30)
    assert {name: tuple(value.shape) for name, value in p.samples.items()} == {
        "scale": (1, 30),
        "shift": (1, 30, 2),
        "x": (1, 30, 1, 3),
    }
    assert p.attrs["inference"] == "svi" and (p["scale"] > 0).all()


def test_plain_guide_draws_its_law_and_is_reproducible():
    def guide(y):
        pyro.sample("mu", dist.Normal(torch.tensor(3.0), 0.5))

    y = conjugate.data()
    p = Posterior.from_pyro(guide, conjugate.model, y, num_samples=4000, seed=2)
    # four standard errors of 4000 draws
    assert abs(p["mu"].mean() - 3.0) < 4 * 0.5 / 4000**0.5 and abs(p["mu"].std() - 0.5) < 4 * 0.5 / 8000**0.5
    again = Posterior.from_pyro(guide, conjugate.model, y, num_samples=4000, seed=2)
    assert torch.equal(p["mu"], again["mu"])


def test_model_and_guide_swapped():
    def guide(y):
        pyro.sample("other", dist.Normal(0.0, 1.0))

    with pytest.raises(LatentDEError, match="none of the model's latent sites"):
        Posterior.from_pyro(guide, conjugate.model, conjugate.data())
