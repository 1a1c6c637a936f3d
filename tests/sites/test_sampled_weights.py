# SPDX-License-Identifier: Apache-2.0
"""PyroModule vector fields: each weight one site and one value per solve, with exact gradients."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn
from torch.testing import assert_close

import pyro_latentde as lde
from pyro_latentde.errors import ShapeError

TIMES = torch.linspace(0.0, 1.0, 4, dtype=torch.float64)
START = torch.tensor([0.5, -0.3], dtype=torch.float64)


def normal(*shape):
    return dist.Normal(torch.zeros(shape, dtype=torch.float64), 0.5).to_event(len(shape))


class Field(PyroModule):
    """Sampled weights in a nested module, a constrained parameter, plain parameters of Pyro and of plain modules."""

    def __init__(self):
        super().__init__()
        self.net = PyroModule[nn.Sequential](
            PyroModule[nn.Linear](2, 2).double(), PyroModule[nn.Tanh](), nn.Linear(2, 2).double()
        )
        self.net[0].weight = PyroSample(normal(2, 2))
        self.scale = PyroParam(torch.tensor(0.7, dtype=torch.float64), constraint=dist.constraints.positive)
        self.shift = nn.Parameter(torch.tensor([0.1, 0.2], dtype=torch.float64))

    def forward(self, t, y):
        return self.net(y) * self.scale + self.shift


def explicit(t, y, p):
    """The same field with every weight handed over."""
    hidden = torch.tanh(p["w"] @ y + p["b"])
    return (p["v"] @ hidden + p["c"]) * p["scale"] + p["shift"]


RANKS = {"w": 2, "b": 1, "v": 2, "c": 1, "scale": 0, "shift": 1}


def weights_of(field, w):
    first, last = field.net[0], field.net[2]
    return {"w": w, "b": first.bias, "v": last.weight, "c": last.bias, "scale": field.scale, "shift": field.shift}


SITES = {"net.0.weight", "net.0.bias", "net.2$$$weight", "net.2$$$bias", "scale", "shift", "z"}


@pytest.fixture
def field(request):
    torch.manual_seed(0)
    with pyro.settings.context(module_local_params=getattr(request, "param", False)):
        yield Field()


# Pyro keeps the parameters of modules in its store, or in the modules
either = pytest.mark.parametrize("field", [False, True], ids=["global", "local"], indirect=True)


ROUTES = {"module": lambda field: field, "lambda": lambda field: lambda t, y: field(t, y)}


@pytest.mark.parametrize(
    ("field", "route", "engine"),
    [
        (False, "module", "fused"),
        (False, "module", "torch"),
        (False, "lambda", "torch"),
        (True, "module", "torch"),
        (True, "lambda", "torch"),
    ],
    indirect=["field"],
)
def test_sites_values_and_gradients_equal_those_of_explicit_parameters(field, engine, route):
    f = ROUTES[route](field)
    trace = poutine.trace(lambda: lde.ode("z", f, START, TIMES, engine=engine)).get_trace()
    assert SITES == {n for n, s in trace.nodes.items() if s["type"] in ("sample", "param")}
    ys, w = trace.nodes["z"]["value"], trace.nodes["net.0.weight"]["value"].requires_grad_()
    ys = poutine.condition(lambda: lde.ode("z", f, START, TIMES, engine=engine), data={"net.0.weight": w})()
    reference = lde.odesolve(explicit, START, TIMES, weights_of(field, w), event_dims=RANKS, engine="torch").ys
    assert_close(ys, reference, rtol=1e-10, atol=1e-12)
    assert torch.equal(ys, trace.nodes["z"]["value"])
    roots = [w, *field.parameters()]
    cotangent = torch.randn_like(ys)
    ours, theirs = (torch.autograd.grad((x * cotangent).sum(), roots) for x in (ys, reference))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert a.abs().max() > 0


@either
def test_without_handlers_one_draw_serves_the_whole_solve(field):
    """Were weights drawn anew at each evaluation, the solver could not hold its tolerance."""
    loose, tight = [], []
    for found, rtol in ((loose, 1e-6), (tight, 1e-10)):
        pyro.set_rng_seed(3)
        found.append(lde.ode("z", field, START, TIMES, rtol=rtol, engine="torch"))
    assert_close(loose[0], tight[0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(
        loose[0], lde.ode("z", field, START, TIMES, rtol=1e-6, engine="torch")
    )  # the next solve draws again


class Model(PyroModule):
    """A model that is a PyroModule itself; its field a method that reads two of its attributes."""

    def __init__(self):
        super().__init__()
        self.net = PyroModule[nn.Linear](2, 2).double()
        self.net.weight = PyroSample(normal(2, 2))
        self.rate = PyroSample(dist.LogNormal(torch.zeros((), dtype=torch.float64), 0.1))
        self.sigma = PyroSample(dist.LogNormal(torch.zeros((), dtype=torch.float64), 0.1))

    def dynamics(self, t, y):
        return self.decay(y) + torch.tanh(self.net(y))

    def decay(self, y):
        return -self.rate * y

    def forward(self, data=None):
        z = lde.ode("z", self.dynamics, START, TIMES, engine="torch")
        return pyro.sample("x", dist.Normal(z, self.sigma).to_event(2), obs=data)


def test_a_method_of_the_model_takes_only_what_it_reads():
    trace = poutine.trace(Model()).get_trace()
    order = [n for n, s in trace.nodes.items() if s["type"] == "sample"]
    assert set(order) == {"rate", "net.weight", "z", "sigma", "x"}
    assert order.index("sigma") > order.index("z")
    w, k, b = (trace.nodes[n]["value"] for n in ("net.weight", "rate", "net.bias"))
    expected = lde.odesolve(lambda t, y: -k * y + torch.tanh(w @ y + b), START, TIMES, engine="torch").ys
    assert_close(trace.nodes["z"]["value"], expected)


def test_the_submodule_of_a_running_model_is_drawn_once_for_solve_and_likelihood():
    class Two(PyroModule):
        def __init__(self):
            super().__init__()
            self.field = Field()

        def forward(self):
            a = lde.ode("a", self.field, START, TIMES, engine="torch")
            b = lde.ode("b", self.field, START, TIMES, engine="torch")
            return a, b, self.field.net[0].weight

    trace = poutine.trace(Two()).get_trace()
    a, b, w = trace.nodes["_RETURN"]["value"]
    assert torch.equal(a, b) and torch.equal(w, trace.nodes["field.net.0.weight"]["value"])


def test_weights_declared_by_decorators_and_priors_that_depend_on_others():
    class Lazy(PyroModule):
        @PyroSample
        def scale(self):
            return dist.LogNormal(torch.zeros((), dtype=torch.float64), 0.1)

        @PyroSample
        def rate(self):
            return dist.LogNormal(self.scale.log(), 0.1)

        @PyroParam(constraint=dist.constraints.positive)
        def level(self):
            return torch.tensor(0.5, dtype=torch.float64)

        def forward(self, t, y):
            return self.rate * (self.level - y)

    lazy = Lazy()
    trace = poutine.trace(lambda: lde.ode("z", lazy, START, TIMES, engine="torch")).get_trace()
    assert {"scale", "rate", "level", "z"} <= set(trace.nodes)
    k, level = trace.nodes["rate"]["value"], trace.nodes["level"]["value"]
    assert_close(
        trace.nodes["z"]["value"], level + (START - level) * torch.exp(-k * TIMES)[:, None], rtol=1e-5, atol=1e-7
    )


def test_a_network_made_bayesian_in_place():
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    to_pyro_module_(net)
    for layer in (net[0], net[2]):
        for name, value in list(layer.named_parameters()):
            setattr(layer, name, PyroSample(normal(*value.shape)))

    def model():
        return lde.ode("z", lambda t, y: net(y), START, TIMES, engine="torch")

    trace = poutine.trace(model).get_trace()
    assert {"0.weight", "0.bias", "2.weight", "2.bias", "z"} == set(trace.stochastic_nodes) | {"z"}
    w, b, v, c = (trace.nodes[n]["value"] for n in ("0.weight", "0.bias", "2.weight", "2.bias"))
    expected = lde.odesolve(lambda t, y: v @ torch.tanh(w @ y + b) + c, START, TIMES, engine="torch").ys
    assert_close(trace.nodes["z"]["value"], expected, rtol=1e-9, atol=1e-11)


def test_pyro_modules_inside_a_plain_module():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = PyroModule[nn.Linear](2, 2).double()
            self.inner.weight = PyroSample(normal(2, 2))

        def forward(self, t, y):
            return -self.inner(y)

    plain = Plain()
    trace = poutine.trace(lambda: lde.ode("z", plain, START, TIMES, engine="torch")).get_trace()
    w, b = trace.nodes["weight"]["value"], plain.inner.bias
    expected = lde.odesolve(lambda t, y: -(w @ y + b), START, TIMES, engine="torch").ys
    assert_close(trace.nodes["z"]["value"], expected)


@either
def test_a_lifted_parameter_is_one_draw_in_the_whole_solve(field):
    """poutine.lift turns a PyroParam into a draw; neither the raw parameter nor a second draw may be used instead."""
    prior = {"scale": dist.LogNormal(torch.zeros((), dtype=torch.float64), 0.5)}
    solve = poutine.lift(lambda: lde.ode("z", field, START, TIMES, engine="torch"), prior=prior)
    trace = poutine.trace(solve).get_trace()
    scale, w = trace.nodes["scale"]["value"], trace.nodes["net.0.weight"]["value"]
    params = {**weights_of(field, w), "scale": scale}
    expected = lde.odesolve(explicit, START, TIMES, params, event_dims=RANKS, engine="torch").ys
    assert_close(trace.nodes["z"]["value"], expected)
    ours, theirs = (torch.autograd.grad(x.sum(), field.shift)[0] for x in (trace.nodes["z"]["value"], expected))
    assert_close(ours, theirs)


def bayesian(field, data, engine="auto"):
    z = lde.ode("z", field, START, TIMES, engine=engine)
    pyro.sample("x", dist.Normal(z, 0.1).to_event(2), obs=data)


@pytest.mark.parametrize("engine", ["fused", "torch"])
def test_vectorized_particles_are_batched_weights(engine):
    field = Field()
    guide = AutoNormal(lambda data: bayesian(field, data, engine))
    data = torch.zeros(4, 2, dtype=torch.float64)
    guide(data)

    def model(data):
        bayesian(field, data, engine)

    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=0)
    traces = list(elbo._get_traces(model, guide, (data,), {}))
    site = traces[0][0].nodes["z"]
    w = traces[0][1].nodes["net.0.weight"]["value"]
    assert w.shape == (5, 2, 2) and site["value"].shape == (5, 4, 2)
    for i in range(5):
        alone = lde.odesolve(explicit, START, TIMES, weights_of(field, w[i]), event_dims=RANKS, engine="torch").ys
        assert_close(site["value"][i], alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("field", "engine"), [(False, "fused"), (False, "torch"), (True, "torch")], indirect=["field"])
def test_gradients_of_the_elbo_reach_the_guide_and_every_parameter(field, engine):
    """The same ELBO as with the weight sampled by hand and handed over as a parameter."""
    data = torch.zeros(4, 2, dtype=torch.float64)

    def by_hand(data):
        w = pyro.sample("net.0.weight", normal(2, 2))
        z = lde.ode("z", explicit, START, TIMES, weights_of(field, w), event_dims=RANKS, engine="torch")
        pyro.sample("x", dist.Normal(z, 0.1).to_event(2), obs=data)

    def model(data):
        bayesian(field, data, engine)

    loc = torch.full((2, 2), 0.3, dtype=torch.float64, requires_grad=True)

    def guide(data):
        pyro.sample("net.0.weight", dist.Normal(loc, 0.1).to_event(2))

    found = []
    for m in (model, by_hand):
        pyro.set_rng_seed(5)
        loss = TraceMeanField_ELBO().differentiable_loss(m, guide, data)
        found.append((loss, torch.autograd.grad(loss, [loc, *field.parameters()])))
    assert_close(found[0][0], found[1][0])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_svi_learns_and_compiles_once(monkeypatch):
    from pyro_latentde.solve.fused.cpu import CpuKernel
    from pyro_latentde.solve.vector_field import clear_fields

    made = []
    start = CpuKernel.__init__
    monkeypatch.setattr(CpuKernel, "__init__", lambda self, *a, **k: (made.append(self), start(self, *a, **k))[1])
    clear_fields()  # in memory; the file of the kernel may stay
    field = Field()
    data = torch.stack([0.5 + TIMES, -0.3 - TIMES], dim=-1)

    def model(data):
        bayesian(field, data, "fused")

    guide = AutoNormal(model, init_scale=0.01)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    guide(data)
    before = {n: p.detach().clone() for n, p in [*field.named_parameters(), *guide.named_parameters()]}
    losses = [svi.step(data) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10]) - 50
    after = dict([*field.named_parameters(), *guide.named_parameters()])
    assert all(not torch.equal(before[n], after[n]) for n in before)
    assert len(made) == 1
    for parallel in (False, True):
        draws = Predictive(model, guide=guide, num_samples=6, parallel=parallel)(None)
        assert draws["z"].shape == (6, 4, 2) and draws["z"].isfinite().all()
        assert (draws["z"] - data).abs().max() < 0.5


@pytest.mark.parametrize("field", [True], indirect=True)
def test_local_parameters_are_optimised_by_torch(field):
    """With module_local_params the ELBO is a module and torch's optimisers take its parameters."""
    data = torch.stack([0.5 + TIMES, -0.3 - TIMES], dim=-1)

    class Whole(PyroModule):
        def __init__(self):
            super().__init__()
            self.field = field

        def forward(self, data):
            bayesian(self.field, data, "torch")

    model = Whole()
    guide = AutoNormal(model, init_scale=0.01)
    guide(data)
    elbo = Trace_ELBO()(model, guide)
    elbo(data).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in elbo.parameters())


def test_a_prior_without_to_event_is_told_by_name():
    class Loose(PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = PyroSample(dist.Normal(torch.zeros(3, 2, dtype=torch.float64), 1.0))

        def forward(self, t, y):
            return torch.tanh(self.weight @ y)[:2]

    loose = Loose()
    with pytest.raises(ShapeError, match="site 'z': .*weight.*to_event"):
        lde.ode("z", loose, START, TIMES)
