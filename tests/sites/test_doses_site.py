# SPDX-License-Identifier: Apache-2.0
"""Doses at an ``lde.ode`` site: series in a plate, doses of their own, the log-joint and its gradient."""

import pyro
import pyro.distributions as dist
import torch

import pyro_latentde as lde

DOUBLE = torch.float64
TIMES = torch.tensor([1.0, 5.0, 9.0, 20.0], dtype=DOUBLE)
DOSES = torch.tensor([[0.0, 8.0], [2.0, torch.nan]], dtype=DOUBLE)


def field(t, y, p):
    return torch.stack([-p["ka"] * y[0], p["ka"] * y[0] - p["ke"] * y[1]])


def model(doses, data=None):
    ka = pyro.sample("ka", dist.LogNormal(torch.zeros((), dtype=DOUBLE), 0.3))
    with pyro.plate("series", 2):
        ke = pyro.sample("ke", dist.LogNormal(torch.full((), -2.0, dtype=DOUBLE), 0.3))
        bio = pyro.sample("bio", dist.Beta(torch.full((), 5.0, dtype=DOUBLE), 2.0))
        pills = lde.Dose(doses, 10.0 * bio[..., None].expand(*bio.shape, 2), "gut")
        zero = torch.zeros(2, dtype=DOUBLE)
        settings = {"t0": 0.0, "states": ("gut", "blood"), "doses": pills, "rtol": 1e-8, "atol": 1e-9}
        z = lde.ode("z", field, zero, TIMES, {"ka": ka, "ke": ke}, **settings)
        pyro.sample("obs", dist.Normal(z[..., 1], 0.1).to_event(1), obs=data)


def law(ka, ke, amount, when):
    s = (TIMES - when).clamp(min=0)
    return amount * ka / (ka - ke) * (torch.exp(-ke * s) - torch.exp(-ka * s)) * (TIMES >= when)


def test_series_have_doses_of_their_own():
    pyro.set_rng_seed(0)
    nodes = pyro.poutine.trace(model).get_trace(DOSES).nodes
    ka, ke, bio = (nodes[name]["value"] for name in ("ka", "ke", "bio"))
    assert nodes["z"]["infer"]["lde_ode"]["states"] == ("gut", "blood")
    first = law(ka, ke[0], 10 * bio[0], 0.0) + law(ka, ke[0], 10 * bio[0], 8.0)
    right = torch.stack([first, law(ka, ke[1], 10 * bio[1], 2.0)])
    torch.testing.assert_close(nodes["z"]["value"][..., 1], right, rtol=1e-6, atol=1e-7)


def test_many_chains_and_new_times():
    pyro.set_rng_seed(1)
    data = pyro.poutine.trace(model).get_trace(DOSES).nodes["obs"]["value"]
    posterior = lde.infer.nuts(model, DOSES, data, num_samples=5, num_warmup=5, num_chains=2, seed=0)
    assert torch.isfinite(posterior["bio"]).all() and not posterior.stats["ode_failed"].any()
    path = posterior.predict(torch.tensor([7.9, 8.0], dtype=DOUBLE)).trajectories["z"]
    rise = path[..., 0, 1, 0] - path[..., 0, 0, 0]  # the first series is given its second dose
    assert path.shape == (2, 5, 2, 2, 2) and (rise > 0).all()
