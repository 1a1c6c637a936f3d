# SPDX-License-Identifier: Apache-2.0
"""lde.events against closed forms and quadrature: densities, gradients, marks, rows, draws, handlers, inference."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import torch
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch.testing import assert_close

import pyro_latentde as lde
from pyro_latentde.data import EventTimes
from pyro_latentde.errors import DataError, ShapeError, SolveError
from pyro_latentde.infer.batched_log_joint import BatchedLogJoint
from pyro_latentde.infer.log_joint import LogJoint
from pyro_latentde.sites.settings import extra_times

TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def still(t, z, p):
    return 0 * z


def site(*args, **keywords):
    trace = pyro.poutine.trace(lde.events).get_trace("e", *args, **{**TIGHT, **keywords})
    return trace.nodes["e"], trace


def log_prob(*args, **keywords):
    node, _ = site(*args, **keywords)
    return node["fn"].log_prob(node["value"])


ROWS = [[0.4, 1.0, 2.9], [], [2.0], [0.0, 3.0]]
DATA = EventTimes.from_lists(ROWS, start=0.0, end=3.0)


def constant(t, z, p):
    return p["rate"].log()


def linear(t, z, p):
    return (p["rate"] + 0.7 * t).log()


def wave(t, z, p):
    """z turns; the rate is exp(rate sin t)."""
    return p["rate"] * z[0]


def turning(t, z, p):
    return torch.stack([z[1], -z[0]])


CASES = {
    "constant": (still, constant, lambda t, r: r),
    "linear": (still, linear, lambda t, r: r + 0.7 * t),
    "sinusoid": (turning, wave, lambda t, r: math.exp(r * math.sin(t))),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("engine", ["fused", "torch"])
def test_density_against_quadrature(case, engine):
    """Rows with a rate each; one has no event at all, and events lie on both ends."""
    f, log_intensity, rate = case
    rates = double(0.5, 1.0, 2.0, 3.0)
    lp = log_prob(f, log_intensity, double(0.0, 1.0).expand(4, 2), DATA, {"rate": rates}, engine=engine)
    for row, r, value in zip(ROWS, rates.tolist(), lp, strict=True):
        integral = scipy.integrate.quad(rate, 0.0, 3.0, args=(r,), epsabs=1e-12)[0]
        exact = sum(math.log(rate(t, r)) for t in row) - integral
        assert value.item() == pytest.approx(exact, abs=1e-7)


def test_intervals_of_their_own():
    data = EventTimes.from_lists([[1.5], [-0.5, 0.0]], start=[1.0, -1.0], end=[2.0, 4.0])
    lp = log_prob(still, linear, torch.zeros(2, 1).double(), data, {"rate": double(2.0, 2.0)})
    exact = [math.log(2 + 0.7 * 1.5) - (2 + 0.35 * 3), math.log(1.65) + math.log(2.0) - (10 + 0.35 * 15)]
    assert_close(lp, double(*exact), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("engine", ["fused", "torch"])
@pytest.mark.parametrize("gradient", ["discrete", "forward"])
def test_gradients_by_central_differences(engine, gradient):
    """Through the state, the parameters, and a weight that the intensity captures; steps fixed."""
    weight = double(0.3).requires_grad_()
    y0 = torch.randn(4, 2).double().requires_grad_()
    rates = double(0.5, 1.0, 2.0, 3.0).requires_grad_()
    keywords = {"engine": engine, "method": "rk4", "step_size": 0.25, "rtol": None, "atol": None}
    if engine == "torch" and gradient == "forward":
        return

    def total(y0, rates, weight):
        def log_intensity(t, z, p):
            return p["rate"] * z[0] + weight[0] * t

        return log_prob(turning, log_intensity, y0, DATA, {"rate": rates}, gradient=gradient, **keywords)

    assert torch.autograd.gradcheck(total, (y0, rates, weight), atol=1e-6)


def test_types_of_events():
    """Two types: the density is that of two processes side by side."""
    marks = [[0, 1, 1], [], [0], [1, 0]]
    data = EventTimes.from_lists(ROWS, start=0.0, end=3.0, marks=marks)

    def both(t, z, p):
        return torch.stack([p["rate"].log(), (1.0 + 0.7 * t).log()])

    rates = double(0.5, 1.0, 2.0, 3.0)
    _, trace = site(still, both, torch.zeros(4, 1).double(), data, {"rate": rates}, types=2)
    trace.compute_log_prob()
    total = trace.nodes["e"]["log_prob"] + trace.nodes["e_marks"]["log_prob"]
    split = [
        [[t for t, m in zip(row, kinds, strict=True) if m == k] for row, kinds in zip(ROWS, marks, strict=True)]
        for k in (0, 1)
    ]
    parts = [EventTimes.from_lists(rows, start=0.0, end=3.0) for rows in split]
    y0 = torch.zeros(4, 1).double()
    expected = log_prob(still, constant, y0, parts[0], {"rate": rates}) + log_prob(
        still, linear, y0, parts[1], {"rate": torch.ones(4).double()}
    )
    assert_close(total, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(DataError, match="types = 2 needs marks 0 to 1; the data have no marks"):
        site(still, both, y0, DATA, {"rate": rates}, types=2)
    with pytest.raises(ShapeError, match=r"returned shape \(2,\); expected \(\) or \(1,\)"):
        site(lambda t, z: 0 * z, lambda t, z: torch.stack([z[0], z[0]]), y0, data)


def test_states_at_the_events():
    y0 = double(0.0, 1.0).expand(4, 2)
    _, trace = site(turning, wave, y0, DATA, {"rate": torch.ones(4).double()}, states=("x", "v"))
    z = trace.nodes["_RETURN"]["value"]
    times = torch.where(DATA.mask, DATA.times, 3.0)
    assert_close(z, torch.stack([times.sin(), times.cos()], -1), rtol=1e-8, atol=1e-8)
    record = trace.nodes["e_states"]
    assert record["infer"]["lde_ode"]["states"] == ("x", "v", "e") and record["value"].shape == (4, 4, 3)
    assert_close(record["value"][:, -1, 2], trace.nodes["e"]["fn"].integral)
    with extra_times(double(1.0, 2.0)) as store:
        lde.events("e", turning, wave, y0, DATA, {"rate": torch.ones(4).double()}, **TIGHT)
    assert_close(store["e_states"][..., 0], double(1.0, 2.0).sin().expand(4, 2), rtol=1e-8, atol=1e-8)


def test_solver_settings_reach_the_solve():
    y0, rates = torch.zeros(4, 1).double(), {"rate": torch.ones(4).double()}
    with lde.solver(method="dopri8", sites=["e"]), lde.solver(engine="torch"):
        trace = pyro.poutine.trace(lde.events).get_trace("e", still, constant, y0, DATA, rates)
    settings = trace.nodes["e_states"]["infer"]["lde_ode"]["settings"]
    assert (settings["method"], settings["engine"]) == ("dopri8", "torch")


def test_plates_one_row_and_particles():
    rates = double(0.5, 1.0, 2.0, 3.0)
    y0 = torch.zeros(1).double()
    expected = log_prob(still, constant, y0, DATA, {"rate": rates})
    _, trace = site(still, constant, y0, DATA, {"rate": rates})
    assert [f.name for f in trace.nodes["e"]["cond_indep_stack"]] == ["e_series"]

    def one(i):
        return log_prob(still, constant, y0, DATA[i], {"rate": rates[i]})

    assert_close(torch.stack([one(i) for i in range(4)]), expected)

    def model(subsample=None):
        with pyro.plate("rows", 4, subsample=subsample) as i:
            rate = pyro.sample("rate", dist.Delta(rates[i]))
            lde.events("e", still, constant, y0, DATA[i], {"rate": rate}, **TIGHT)

    assert_close(pyro.poutine.trace(model).get_trace().log_prob_sum(), expected.sum())
    half = pyro.poutine.trace(model).get_trace(torch.tensor([1, 3])).log_prob_sum()
    assert_close(half, 2 * expected[[1, 3]].sum())
    with pyro.plate("particles", 3, dim=-2):
        trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert_close(trace.nodes["e"]["log_prob"], expected.expand(3, 4))
    with (
        pytest.raises(ShapeError, match="site 'e': 4 rows of events in plate 'other' of size 2"),
        pyro.plate("other", 2),
    ):
        lde.events("e", still, constant, y0, DATA, {"rate": double(1.0, 2.0)})


def test_draws_follow_the_intensity():
    """Counts and mean times of 3 rows of 2,000 draws, within 5 standard errors: false alarm 4e-6."""
    rates = double(1.0, 2.0, 4.0)

    def model():
        with pyro.plate("rows", 3):
            z = lde.events(
                "e", still, linear, torch.zeros(3, 1).double(), None, {"rate": rates}, start=0.0, end=3.0, max_events=60
            )
            assert z.shape[-2:] == (60, 1)

    draws = Predictive(model, num_samples=2000, parallel=True)()["e"]
    assert draws.shape == (2000, 3, 60)
    there = draws.isfinite()
    expected = 3 * rates + 0.35 * 9
    assert ((there.sum(-1).double().mean(0) - expected).abs() < 5 * (expected / 2000).sqrt()).all()
    sums = torch.where(there, draws, 0.0).sum(-1)
    mean, square = rates * 4.5 + 0.7 * 9, rates * 9 + 0.7 * 81 / 4  # integrals of t lambda and of t^2 lambda
    assert ((sums.mean(0) - mean).abs() < 5 * (square / 2000).sqrt()).all()
    assert Predictive(model, num_samples=2)()["e"].shape == (2, 3, 60)


def test_drawn_marks_and_states():
    """Share of the first type within 5 standard errors: false alarm 6e-7."""

    def two(t, z, p):
        return torch.stack([z[0], z[0] + math.log(3.0)])

    y0 = torch.full((400, 1), 1.5).double()
    with pyro.plate("rows", 400):
        trace = pyro.poutine.trace(lde.events).get_trace(
            "e", still, two, y0, start=0.0, end=1.0, types=2, max_events=80
        )
    there = trace.nodes["e"]["value"].isfinite()
    marks = trace.nodes["e_marks"]["value"][there]
    assert abs(marks.mean() - 0.75) < 5 * math.sqrt(0.75 * 0.25 / len(marks)) and set(marks.tolist()) == {0.0, 1.0}
    assert trace.nodes["_RETURN"]["value"].shape == (400, 80, 1)
    assert trace.log_prob_sum().isfinite()


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_the_log_joint_of_nuts(engine):
    """Of u = log rate, with a Gamma(2, 1) prior and 10 events in 4 rows of length 2: slope 12 - 9 exp(u)."""
    rows = [torch.rand(n, generator=torch.Generator().manual_seed(n)).double() * 2 for n in (3, 0, 5, 2)]
    data = EventTimes.from_lists(rows, start=0.0, end=2.0)

    def model():
        rate = pyro.sample("rate", dist.Gamma(double(2.0)[0], 1.0))
        lde.events("e", still, constant, torch.zeros(4, 1).double(), data, {"rate": rate}, **TIGHT)

    u = np.array([[-0.5], [0.0], [0.7]])
    batched = BatchedLogJoint(LogJoint(model), u, engine=engine)
    assert batched.engine == engine
    lp, grad, failed, _ = batched(u)
    assert not any(failed)
    assert grad == pytest.approx(12 - 9 * np.exp(u), abs=1e-8)
    assert np.diff(lp) == pytest.approx(np.diff(12 * u[:, 0] - 9 * np.exp(u[:, 0])), abs=1e-8)


def test_sampled_weights_are_drawn_once_for_state_and_intensity():
    class Net(PyroModule):
        def __init__(self):
            super().__init__()
            self.w = PyroSample(dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))

        def forward(self, t, z):
            return -self.w * z

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self):
            y0 = torch.ones(4, 2).double()
            return lde.events("e", lambda t, z: self.net(t, z), lambda t, z: self.net.w[0] * z[1], y0, DATA, **TIGHT)

    model = Model()
    trace = pyro.poutine.trace(model).get_trace()
    w = trace.nodes["net.w"]["value"]
    times = torch.where(DATA.mask, DATA.times, 3.0)
    z = torch.exp(-w * times[..., None])
    assert_close(trace.nodes["_RETURN"]["value"], z, rtol=1e-7, atol=1e-8)
    grid = torch.linspace(0, 3, 20_001).double()
    integral = torch.trapezoid((w[0] * torch.exp(-w[1] * grid)).exp(), grid)
    expected = torch.where(DATA.mask, w[0] * z[..., 1], 0.0).sum(-1) - integral
    assert_close(trace.nodes["e"]["fn"].log_prob(DATA.times), expected, rtol=1e-6, atol=1e-6)
    guide = AutoNormal(model)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    loss = elbo.differentiable_loss(model, guide)
    grads = torch.autograd.grad(loss, list(guide.parameters()))
    assert loss.isfinite() and all(g.isfinite().all() and (g != 0).any() for g in grads)


def test_intensities_far_below_are_exact():
    """An event at a rate of exp(-900), which is zero in float64, costs 900 nats."""
    data = EventTimes.from_lists([[0.5]], start=0.0, end=1.0)
    lp = log_prob(still, lambda t, z, p: z[0], double(-900.0), data, None)
    assert lp.item() == pytest.approx(-900.0)


def test_what_is_refused():
    y0, p = torch.zeros(4, 1).double(), {"rate": double(1.0)[0]}
    with pytest.raises(DataError, match="site 'e': give either data"):
        lde.events("e", still, constant, y0, None, p)
    with pytest.raises(DataError, match="give either data"):
        lde.events("e", still, constant, y0, DATA, p, start=0.0, end=1.0)
    with pytest.raises(DataError, match="expected EventTimes, got list"):
        lde.events("e", still, constant, y0, ROWS, p)
    with pytest.raises(ShapeError, match="stack a structured state"):
        lde.events("e", still, constant, {"x": y0}, DATA, p)
    with pytest.raises(SolveError, match="while it is solved"):
        lde.events("e", still, lambda t, z, p: pyro.sample("x", dist.Normal(0.0, 1.0)), y0, DATA, p)
    with pytest.raises(SolveError, match="site 'e': unknown|settings of"):
        lde.events("e", still, constant, y0, DATA, p, tolerance=1e-3)
