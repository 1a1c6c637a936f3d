# SPDX-License-Identifier: Apache-2.0
"""``infer.nuts`` and Pyro's own NUTS sample the same distributions.

Draws are thinned to nearly independent ones; two-sample Kolmogorov-Smirnov tests at level 1e-4 each. There
are 8 of them, so two right samplers fail here at another seed less than once in 1,000 times.
"""

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from scipy import stats

from pyro_latentde.infer import nuts

LEVEL = 1e-4


def correlated_gaussian():
    covariance = torch.tensor([[1.0, 1.8, 0.0], [1.8, 4.0, 0.3], [0.0, 0.3, 0.25]], dtype=torch.float64)
    pyro.sample("x", dist.MultivariateNormal(torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64), covariance))


def funnel():
    v = pyro.sample("v", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    pyro.sample("x", dist.Normal(torch.zeros(2, dtype=torch.float64), (v / 2).exp()).to_event(1))


def regression_with_constrained_scale():
    t = torch.linspace(0, 1, 8, dtype=torch.float64)
    slope = pyro.sample("slope", dist.Normal(torch.zeros((), dtype=torch.float64), 2.0))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))
    with pyro.plate("n", 8):
        pyro.sample("obs", dist.Normal(slope * t, scale), obs=2 * t + 0.3 * torch.sin(20 * t))


def thinned(x):
    """Columns of draws ``(chain, draw, k)`` thinned to about one draw for each effective one."""
    columns = []
    for i in range(x.shape[-1]):
        every = int(np.ceil(x[..., i].size / min(az.ess(x[..., i]), az.ess(x[..., i] ** 2))))
        columns.append(x[:, ::every, i].ravel())
    return columns


@pytest.mark.parametrize("model", [correlated_gaussian, funnel, regression_with_constrained_scale])
def test_two_samples_of_one_distribution(model):
    pyro.set_rng_seed(1)
    mcmc = MCMC(NUTS(model, target_accept_prob=0.9), 900, 300, disable_progbar=True)
    mcmc.run()
    theirs = mcmc.get_samples(group_by_chain=True)
    ours = nuts(model, num_samples=1000, num_warmup=500, target_accept=0.9, progress=False).samples
    assert set(ours) == set(theirs)
    for name in ours:
        a = thinned(ours[name].reshape(*ours[name].shape[:2], -1).numpy())
        b = thinned(theirs[name].reshape(*theirs[name].shape[:2], -1).numpy())
        for ours_i, theirs_i in zip(a, b, strict=True):
            assert min(len(ours_i), len(theirs_i)) > 100
            assert stats.ks_2samp(ours_i, theirs_i).pvalue > LEVEL
