# SPDX-License-Identifier: Apache-2.0
"""A first metric from the curvature, and that NUTS begins with it where there are many coordinates."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from pyro_latentde.infer import nuts
from pyro_latentde.infer.curvature import probe_metric


def test_diagonal_of_a_hessian():
    rng = np.random.default_rng(0)
    a = 0.1 * rng.standard_normal((20, 20))
    hessian = np.diag(np.linspace(2.0, 400.0, 20)) + a + a.T
    metric = probe_metric(lambda u: (None, -u @ hessian), np.zeros((4, 20)), rng)
    # exact up to the off-diagonal entries: each adds its square over 120 probes
    noise = np.sqrt((hessian - np.diag(hessian.diagonal())).__pow__(2).sum(1) / 120)
    assert (np.abs(1 / metric.inverse - hessian.diagonal()) < 5 * noise + 1e-6).all()


def test_flat_and_wrong_curvature_and_failures_keep_the_unit():
    def call(u):
        grad = np.stack([0.0 * u[:, 0], u[:, 1], np.nan * u[:, 2], -9.0 * u[:, 3]], axis=1)
        return None, grad

    metric = probe_metric(call, np.zeros((2, 4)), np.random.default_rng(0))
    assert np.allclose(metric.inverse, [1.0, 1.0, 1.0, 1 / 9])


def test_many_coordinates_of_unlike_scale_need_few_steps():
    scale = torch.logspace(-3, 0, 100, dtype=torch.float64)

    def model():
        pyro.sample("x", dist.Normal(torch.zeros(100, dtype=torch.float64), scale).to_event(1))

    posterior = nuts(model, num_chains=2, num_warmup=30, num_samples=10, progress=False)
    # the unit metric needs a thousand leapfrog steps of the smallest scale to cross the largest
    assert posterior.attrs["num_gradients"] / (2 * 40) < 60
