# SPDX-License-Identifier: Apache-2.0
"""lde.steady_state: record, handlers, plates, failures, settings from outside, starts of solves, inference."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from torch.testing import assert_close

import pyro_latentde as lde
from pyro_latentde.errors import ShapeError, SolveError
from pyro_latentde.infer.log_joint import LogJoint

TIMES = torch.linspace(0.0, 2.0, 5, dtype=torch.float64)
ONE = torch.ones(1, dtype=torch.float64)


def tensor(value):
    return torch.tensor(value, dtype=torch.float64)


def infusion(t, y, p):
    return p["rate"] - p["k"] * y


def no_root_below_zero(t, y, p):
    return p - y**2


def two_sites(k):
    """An infusion at steady state, then stopped: level = rate / k, z = level exp(-k t)."""
    p = {"rate": tensor(2.0), "k": k}
    level = lde.steady_state("level", infusion, ONE, p, states=["drug"])
    return lde.ode("z", lambda t, y, k: -k * y, level, TIMES, k, event_dims={"p": 0}, rtol=1e-10, atol=1e-12)


def roots(p, **keywords):
    return lde.steady_state("root", no_root_below_zero, ONE, p, event_dims={"p": 0}, **keywords)


def test_without_a_handler_it_is_steady_state_solve():
    p = tensor([4.0, 9.0])
    assert torch.equal(roots(p), lde.steady_state_solve(no_root_below_zero, ONE, p, event_dims={"p": 0}).y)


def test_what_is_recorded():
    trace = poutine.trace(two_sites).get_trace(tensor(0.5))
    node = trace.nodes["level"]
    record = node["infer"]["lde_steady_state"]
    assert node["infer"]["_deterministic"] and node["fn"].event_dim == 1 and float(trace.log_prob_sum()) == 0.0
    assert record["states"] == ("drug",) and record["status"] == 0 and record["n_steps"] == 0
    assert record["settings"] == {"method": "auto", "engine": "fused", "rtol": 1e-8, "atol": 1e-10}
    assert_close(node["value"], tensor([4.0]))


def test_a_solve_starts_from_it_with_gradients_through_both():
    k = tensor(0.5).requires_grad_()
    z = two_sites(k)
    expected = 2 / k * torch.exp(-k * TIMES)
    assert_close(z[:, 0].detach(), expected.detach(), rtol=1e-9, atol=0)
    seed = torch.linspace(1, 2, 5, dtype=torch.float64)
    (got,), (want,) = (torch.autograd.grad(x @ seed, k) for x in (z[:, 0], expected))
    assert_close(got, want, rtol=1e-8, atol=0)


def test_handlers():
    p = tensor([4.0, 9.0])
    given = tensor([[1.0], [7.0]])
    for handler in (poutine.condition(roots, data={"root": given}), poutine.do(roots, data={"root": given})):
        assert torch.equal(handler(p), given)
    trace = poutine.trace(roots).get_trace(p)
    assert torch.equal(poutine.replay(roots, trace=trace)(p), trace.nodes["root"]["value"])
    assert "root" not in poutine.trace(poutine.block(roots, hide=["root"])).get_trace(p).nodes
    with poutine.mask(mask=False), poutine.scale(scale=3.0):
        assert_close(roots(p), tensor([[2.0], [3.0]]))


def test_dict_states_come_back_as_a_dict():
    def field(t, y):
        return {"u": 1 - y["u"], "v": y["u"] - 2 * y["v"]}

    def model():
        return lde.steady_state("rest", field, {"u": tensor(0.0), "v": tensor(0.0)})

    trace = poutine.trace(model).get_trace()
    assert_close(trace.nodes["_RETURN"]["value"]["v"], tensor(0.5))
    assert trace.nodes["rest"]["infer"]["lde_steady_state"]["states"] == ("u", "v")
    assert_close(trace.nodes["rest"]["value"], tensor([1.0, 0.5]))


def test_plates():
    def model(size=3):
        with pyro.plate("people", size):
            k = pyro.sample("k", dist.LogNormal(tensor(0.0), 1.0))
            return lde.steady_state("level", infusion, ONE, {"rate": tensor(2.0), "k": k[:3]})

    trace = poutine.trace(model).get_trace()
    assert_close(trace.nodes["level"]["value"][:, 0], 2 / trace.nodes["k"]["value"])
    with pytest.raises(ShapeError, match=r"site 'level'.*plate 'people'.*size 4"):
        model(4)


def test_failures_raise_alone_and_are_nan_under_handlers():
    p = tensor([4.0, -1.0])
    with pytest.raises(SolveError, match=r"site 'root': 1 of 2 steady states failed.*row \[1\]"):
        roots(p)
    trace = poutine.trace(roots).get_trace(p)
    assert_close(trace.nodes["root"]["value"], tensor([[2.0], [torch.nan]]), equal_nan=True)
    assert (trace.nodes["root"]["infer"]["lde_steady_state"]["status"] != 0).tolist() == [False, True]


def uncertain(data=None):
    """Half of the prior has no root."""
    p = pyro.sample("p", dist.Normal(tensor(0.0), 1.0))
    pyro.sample("obs", dist.Normal(roots(p)[0], 0.1), obs=data)


def test_failures_count_in_the_log_joint_and_in_the_stress_test():
    joint = LogJoint(uncertain, (tensor(1.0),))
    lp, gradient, (failed, steps) = joint.value_and_grad(tensor([[1.0], [-1.0]]))
    assert failed.tolist() == [False, True] and steps[1] > 0
    assert lp[0].isfinite() and lp[1] == -torch.inf and gradient[1] == 0
    assert_close(gradient[0], tensor([-1.0]))  # at the datum only the prior has a slope
    report = lde.analysis.stress_test(uncertain, tensor(1.0), num_draws=20)
    causes = report.table["cause"].str.contains("at 'root'")
    assert causes.equals(report.table["p"] < 0) and 0 < causes.sum() < 20


def test_settings_from_outside_where_they_make_sense():
    def settings(**own):
        trace = poutine.trace(lambda: roots(tensor(4.0), **own)).get_trace()
        return trace.nodes["root"]["infer"]["lde_steady_state"]["settings"]

    with lde.solver(rtol=1e-5, method="bosh3", engine="torch", sites=["root"]):
        assert settings() == {"method": "bosh3", "engine": "torch", "rtol": 1e-5, "atol": 1e-10}
    with lde.solver(rtol=1e-5, sites=["other"]):
        assert settings(atol=1e-6)["rtol"] == 1e-8
    with lde.solver(method="rk4", step_size=0.1, engine="torchdiffeq", gradient="adjoint"):
        assert settings() == {"method": "auto", "engine": "fused", "rtol": 1e-8, "atol": 1e-10}
    with pytest.raises(SolveError, match=r"site 'root': settings of steady_state\(\).*step_size"):
        settings(step_size=0.1)
    with pytest.raises(SolveError, match=r"site 'root'.*no error estimate"):
        settings(method="rk4")


@pytest.mark.parametrize("states", [("a", "b"), "drug"])
def test_a_wrong_number_of_names_is_told(states):
    with pytest.raises(ShapeError, match="site 'root': states expects one name per coordinate, 1 in all"):
        roots(tensor(4.0), states=states)


def test_sampled_weights():
    class Decay(PyroModule):
        def __init__(self):
            super().__init__()
            self.k = PyroSample(dist.LogNormal(tensor(0.0), 1.0))

        def forward(self, t, y):
            return 2.0 - self.k * y

    decay = Decay()
    trace = poutine.trace(lambda: lde.steady_state("level", decay, ONE)).get_trace()
    k = trace.nodes["k"]["value"]
    assert_close(trace.nodes["level"]["value"], 2 / k.reshape(1))
    value = tensor(0.8).requires_grad_()
    level = poutine.condition(lambda: lde.steady_state("level", decay, ONE), data={"k": value})()
    assert_close(torch.autograd.grad(level[0], value)[0], -2 / value.detach() ** 2)


def hill(t, y, p):
    """One root, y = p."""
    return (p - y) + (p - y) ** 3


def conjugate(data):
    p = pyro.sample("p", dist.Normal(tensor(1.0), 0.5))
    y = lde.steady_state("y", hill, ONE, p, event_dims={"p": 0})
    pyro.sample("obs", dist.Normal(y, 0.5).to_event(1), obs=data)


def test_a_posterior_with_a_known_answer():
    data = tensor([2.0, 1.6, 2.4, 2.2])
    mean, sd = (4 * 1.0 + 4 * data.sum()) / 20, 20**-0.5
    posterior = lde.infer.nuts(conjugate, data, num_samples=400, num_warmup=200, num_chains=2, seed=1)
    draws = posterior.samples["p"].flatten()
    assert abs(float(draws.mean()) - mean) < 0.03 and abs(float(draws.std()) / sd - 1) < 0.15
    assert posterior.samples["y"].shape == (2, 400, 1) if "y" in posterior.samples else True
    assert int(posterior.stats["ode_failed"].sum()) == 0


def test_an_ensemble_with_a_recorded_log_joint(caplog):
    def model(data):
        k = pyro.sample("k", dist.LogNormal(tensor(-0.5), 0.3))
        pyro.sample("obs", dist.Normal(two_sites(k), 0.1).to_event(2), obs=data)

    data = 4 * torch.exp(-0.5 * TIMES)[:, None]
    posterior = lde.infer.ensemble_hmc(model, data, num_samples=30, num_warmup=60, num_chains=16, seed=0)
    assert posterior.stats["ode_failed"].sum() == 0
    grid = torch.linspace(-1.2, 0.2, 2001, dtype=torch.float64).exp()
    exact = 2 / grid[:, None] * torch.exp(-grid[:, None] * TIMES)
    log_density = -0.5 * ((exact - data[:, 0]) / 0.1).square().sum(1) - 0.5 * ((grid.log() + 0.5) / 0.3) ** 2
    weight = log_density.softmax(0)
    mean = float(weight @ grid)
    sd = float((weight @ (grid - mean) ** 2).sqrt())
    draws = posterior.samples["k"].flatten()
    assert abs(float(draws.mean()) - mean) < 0.25 * sd and abs(float(draws.std()) / sd - 1) < 0.2
