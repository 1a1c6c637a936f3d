# SPDX-License-Identifier: Apache-2.0
"""``lde.dde``: a delay equation as a site, its lag sampled."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroSample

import pyro_latentde as lde

DOUBLE = torch.float64
TIMES = torch.linspace(0, 4, 9, dtype=DOUBLE)
ONE = torch.ones(1, dtype=DOUBLE)
ZERO = torch.zeros((), dtype=DOUBLE)


def grow(t, y, lagged, r):
    """Hutchinson's equation with capacity 1."""
    return r * y * (1.0 - lagged[0])


def model(data=None, times=TIMES):
    tau = pyro.sample("tau", dist.LogNormal(ZERO, 0.3))
    r = pyro.sample("r", dist.LogNormal(ZERO, 0.3))
    z = lde.dde("z", grow, 0.5 * ONE, tau, times, r, t0=0.0, states=("x",))
    return pyro.sample("obs", dist.Normal(z, 0.1).to_event(2), obs=data)


def truth(tau=1.2, r=1.1):
    return lde.ddesolve(grow, 0.5 * ONE, tau, TIMES, torch.tensor(r, dtype=DOUBLE)).ys


def test_the_site_is_recorded_as_the_trajectory():
    trace = poutine.trace(model).get_trace()
    node = trace.nodes["z"]
    tau, r = trace.nodes["tau"]["value"], trace.nodes["r"]["value"]
    assert torch.equal(node["value"], truth(tau, float(r)))
    record = node["infer"]["lde_ode"]
    assert record["states"] == ("x",) and int(record["status"]) == 0
    replayed = poutine.condition(model, {"z": torch.zeros(9, 1, dtype=DOUBLE)})
    assert not poutine.trace(replayed).get_trace().nodes["z"]["value"].any()


def test_settings_from_outside():
    values = {"tau": 1.2 * ONE[0], "r": 1.1 * ONE[0]}
    plain = poutine.trace(poutine.condition(model, values)).get_trace().nodes["z"]
    with lde.solver(method="dopri8", rtol=1e-11, atol=1e-12, engine="torch", sites=["z"]):
        fine = poutine.trace(poutine.condition(model, values)).get_trace().nodes["z"]
    assert fine["infer"]["lde_ode"]["settings"]["method"] == "dopri8"
    assert 0 < (fine["value"] - plain["value"]).abs().max() < 1e-5
    with lde.solver(gradient="adjoint"), pytest.raises(lde.errors.GradientPathError, match="site 'z'"):
        model()


def test_a_plate_of_rows_with_lags_of_their_own():
    def plated():
        with pyro.plate("series", 3):
            tau = pyro.sample("tau", dist.LogNormal(ZERO, 0.3))
            return tau, lde.dde("z", grow, 0.5 * ONE, [tau], TIMES, 1.1)

    tau, z = plated()
    assert z.shape == (3, 9, 1)
    for i in range(3):
        assert torch.equal(z[i], truth(float(tau[i])))
    with pytest.raises(lde.errors.ShapeError):
        with pyro.plate("series", 4):
            lde.dde("z", grow, 0.5 * torch.ones(3, 1, dtype=DOUBLE), [tau], TIMES, 1.1)


def test_a_lag_that_is_not_positive_is_a_failed_row_under_a_handler_and_an_error_without():
    def loose():
        tau = pyro.sample("tau", dist.Normal(ZERO, 1.0))
        return lde.dde("z", grow, 0.5 * ONE, tau, TIMES, 1.1)

    bad = poutine.condition(loose, {"tau": -ONE[0]})
    node = poutine.trace(bad).get_trace().nodes["z"]
    assert lde.Status(int(node["infer"]["lde_ode"]["status"])) == lde.Status.BAD_LAG
    assert torch.isnan(node["value"][1:]).all()
    with pytest.raises(lde.errors.DataError, match="site 'z': lag 0 is -1"):
        lde.dde("z", grow, 0.5 * ONE, -1.0, TIMES, 1.1)


def test_log_joint_gradient_reaches_the_sampled_lag():
    data = truth()

    def log_joint(tau, r):
        return poutine.trace(poutine.condition(model, {"tau": tau, "r": r})).get_trace(data).log_prob_sum()

    tau, r = (1.0 * ONE[0]).requires_grad_(), (1.05 * ONE[0]).requires_grad_()
    with lde.solver(rtol=1e-11, atol=1e-12):
        gradients = torch.autograd.grad(log_joint(tau, r), [tau, r])
        for i, gradient in enumerate(gradients):
            moved = [[x.detach() + (s * 1e-5 if j == i else 0) for j, x in enumerate((tau, r))] for s in (1, -1)]
            expected = (log_joint(*moved[0]) - log_joint(*moved[1])) / 2e-5
            torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)


def test_nuts_finds_the_lag_and_predicts_at_new_times():
    noise = 0.02 * torch.randn(9, 1, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))
    posterior = lde.infer.nuts(model, truth() + noise, num_samples=60, num_warmup=60, num_chains=2, seed=1)
    tau = posterior.samples["tau"]
    assert torch.isfinite(tau).all() and abs(float(tau.mean()) - 1.2) < 0.15
    z = posterior.predict(times=torch.tensor([0.5, 3.3], dtype=DOUBLE)).trajectories["z"]
    assert z.shape == (2, 60, 2, 1)
    one = lde.ddesolve(grow, 0.5 * ONE, tau[1, 7], torch.tensor([0.0, 0.5, 3.3]), posterior.samples["r"][1, 7]).ys
    torch.testing.assert_close(z[1, 7], one[1:], rtol=1e-4, atol=1e-5)


def test_sampled_weights_of_field_and_history():
    class Growth(PyroModule):
        def __init__(self):
            super().__init__()
            self.rate = PyroSample(dist.LogNormal(ZERO, 0.3))

        def forward(self, t, y, lagged, p):
            return self.rate * y * (1.0 - lagged[0])

        def before(self, t):
            return 0.5 * torch.ones(1, dtype=DOUBLE) * torch.exp(0.1 * self.rate * t)

    net = Growth()

    def field(t, y, lagged, p):
        return net(t, y, lagged, p)

    trace = poutine.trace(lambda: lde.dde("z", field, net.before, 1.2, TIMES)).get_trace()
    rate = trace.nodes["rate"]["value"]
    expected = lde.ddesolve(grow, lambda t, r: 0.5 * ONE * torch.exp(0.1 * r * t), 1.2, TIMES, rate).ys
    torch.testing.assert_close(trace.nodes["z"]["value"], expected, rtol=1e-10, atol=1e-12)
