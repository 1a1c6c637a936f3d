# SPDX-License-Identifier: Apache-2.0
"""States solved as logarithms: values, derivatives, names, tolerances, the smallest numbers, refusals."""

import collections

import pyro
import pyro.distributions as dist
import pytest
import torch
from ode_fields import DOUBLE, ENGINES, RATES, STARTS, central_difference, scipy_solution, solve, tensor
from torch.func import grad, hessian, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_latentde as lde
from pyro_latentde.errors import DataError, ShapeError, SolveError

TIMES = tensor(0.0, 0.7, 1.5)


def growth(t, y, p):
    """Lotka-Volterra without a push: both stay positive."""
    return torch.stack([p[0] * y[0] - p[1] * y[0] * y[1], p[3] * y[0] * y[1] - p[2] * y[1]])


def growing(engine="fused", y0=STARTS, p=RATES, positive=True, **settings):
    return solve(engine, growth, y0, settings.pop("times", TIMES), p, positive=positive, **settings)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["tsit5", "auto", "kvaerno5"])
def test_values_are_those_of_the_user(engine, method):
    loose = method == "kvaerno5"
    found = growing(engine, method=method, rtol=1e-5 if loose else 1e-8, atol=1e-5 if loose else 1e-8)
    exact = torch.stack([scipy_solution(growth, y, TIMES, p) for y, p in zip(STARTS, RATES, strict=True)])
    torch.testing.assert_close(found.ys, exact, rtol=2e-4 if loose else 1e-6, atol=0)
    torch.testing.assert_close(found.ys[:, 0], STARTS, rtol=1e-15, atol=0)
    inner = found.at(tensor(0.7))
    torch.testing.assert_close(inner[:, 0], found.ys[:, 1], rtol=1e-13, atol=0)


def test_engines_agree_and_steps_are_taken_again():
    fused, plain = (growing(engine) for engine in ENGINES)
    torch.testing.assert_close(fused.ys, plain.ys, rtol=1e-10, atol=0)
    assert torch.equal(fused.counts, plain.counts)
    for engine in ENGINES:
        again = growing(engine, replay=fused, rtol=1e-3)  # the factor of the tolerances does not matter
        torch.testing.assert_close(again.ys, fused.ys, rtol=1e-11, atol=0)
    alone = growing(y0=STARTS[1], p=RATES[1])
    assert torch.equal(alone.ys, fused.ys[1])
    assert "Positive: 2 of 2 states, as logarithms" in str(fused)
    assert fused.implicit.sum() == 0 and torch.isfinite(fused.steps).all()


@pytest.mark.parametrize("positive", [True, [1]])
@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_along_the_same_steps(engine, positive):
    inside = tensor(0.2, 0.7, 1.4)
    first = growing(positive=positive, rtol=1e-4, t0=0.0)

    def loss(y0, times, p, engine="fused"):
        ys = growing(engine, y0, p, positive, times=times, t0=0.0, replay=first).ys
        return (ys * tensor(1.0, -0.5)).square().sum()

    inputs = [STARTS, inside.repeat(3, 1), RATES]
    leaves = [x.clone().requires_grad_() for x in inputs]
    found = torch.autograd.grad(loss(*leaves, engine), leaves)
    for i, gradient in enumerate(found):
        expected = central_difference(lambda x, i=i: float(loss(*inputs[:i], x, *inputs[i + 1 :])), inputs[i], 1e-4)
        torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-7 * float(expected.abs().max()))


def test_transforms_and_second_derivatives():
    settings = {"y0": STARTS[0], "method": "midpoint", "step_size": 0.1}

    def loss(p):
        return growing(p=p, **settings).ys.log().square().sum()

    mapped = vmap(grad(loss))(RATES)
    torch.testing.assert_close(mapped, torch.stack([grad(loss)(p) for p in RATES]), rtol=1e-12, atol=0)
    traced = make_fx(lambda p: vmap(grad(loss))(p))(RATES)
    torch.testing.assert_close(traced(1.1 * RATES), vmap(grad(loss))(1.1 * RATES), rtol=1e-12, atol=0)
    p = RATES[0]
    curvature = hessian(loss)(p)
    slopes = [(grad(loss)(p + s) - grad(loss)(p - s)) / 2e-5 for s in 1e-5 * torch.eye(4, dtype=DOUBLE)]
    torch.testing.assert_close(curvature, torch.stack(slopes), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_states_that_all_but_die_out_stay_positive(engine):
    """dy/dt = -k y over 30 and over 2,000 lifetimes: relative accuracy, then the root of the smallest normal number."""

    def f(t, y, k):
        return torch.stack([-k * y[0], k * y[0]])

    k = tensor(1.0).requires_grad_()
    times = tensor(0.0, 30.0, 2000.0)
    out = lde.odesolve(f, tensor(1.0, 0.0), times, k[0], positive=[0], engine=engine, rtol=1e-8)
    tiny = torch.finfo(DOUBLE).tiny ** 0.5
    torch.testing.assert_close(out.ys[1, 0], torch.tensor(-30.0, dtype=DOUBLE).exp(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.ys[2, 0], torch.tensor(tiny, dtype=DOUBLE), rtol=1e-12, atol=0)
    torch.testing.assert_close(out.ys[2, 1], torch.tensor(1.0, dtype=DOUBLE), rtol=1e-6, atol=0)
    slope = torch.autograd.grad(out.ys[1, 0].log() + out.ys[2, 0], k)[0]
    torch.testing.assert_close(slope, tensor(-30.0), rtol=1e-6, atol=0)
    plain = lde.odesolve(f, tensor(1.0, 0.0), tensor(0.0, 30.0), k[0], engine=engine)
    assert abs(plain.ys[1, 0].log() + 30) > 1e-2  # not so without logarithms


def test_dict_states_by_name_index_and_at_the_site():
    def f(t, s, p):
        return {"hare": p * s["hare"], "heat": -s["heat"] - s["hare"]}

    y0, p = {"hare": tensor(1.0)[0], "heat": tensor(-2.0)[0]}, tensor(0.3)[0]
    plain = lde.odesolve(f, y0, TIMES, p, rtol=1e-9)
    for positive in (["hare"], "hare", [0], 0, (-2,)):
        out = lde.odesolve(f, y0, TIMES, p, rtol=1e-9, positive=positive)
        assert out.shape_of_state.logs.mask.tolist() == [True, False]
        torch.testing.assert_close(out.ys, plain.ys, rtol=1e-7, atol=1e-8)
    Pair = collections.namedtuple("Pair", ["a", "b"])
    pair = lde.odesolve(
        lambda t, s: Pair(-s.a, -2 * s.b),
        Pair(tensor(1.0, 2.0), tensor(3.0)[0]),
        TIMES,
        positive="a",
        event_dims={"a": 1},
        rtol=1e-9,
    )
    assert pair.shape_of_state.logs.mask.tolist() == [True, True, False]
    torch.testing.assert_close(pair.ys.a[-1], tensor(1.0, 2.0) * torch.exp(TIMES[-1] * -1), rtol=1e-7, atol=0)


def test_a_model_with_positive_states():
    def model(positive=None):
        k = pyro.sample("k", dist.LogNormal(tensor(0.0)[0], 0.1))
        names = ("hare", "lynx")
        return lde.ode("z", growth, STARTS[0], TIMES, tensor(1.5, 1.0, 3.0, 1.0) * k, states=names, positive=positive)

    conditioned = pyro.condition(model, {"k": tensor(1.0)[0]})
    expected = growing(y0=STARTS[0], p=RATES[0]).ys
    torch.testing.assert_close(conditioned(["hare", "lynx"]), expected, rtol=1e-12, atol=0)
    with lde.solver(positive=True):
        torch.testing.assert_close(conditioned(), expected, rtol=1e-12, atol=0)
    with pytest.raises(ShapeError, match="site 'z': positive: expected one of hare, lynx; got 'lynks'. Did you mean"):
        conditioned(["lynks"])


def test_a_row_that_does_not_begin_positive_fails_alone():
    start = STARTS.clone()
    start[1, 0] = -1.0
    for engine in ENGINES:
        y0, p = start.clone().requires_grad_(), RATES.clone().requires_grad_()
        out = growing(engine, y0, p, on_failure="nan")
        assert out.status.tolist() == [0, lde.Status.NON_FINITE, 0]
        assert out.ys[1, :, 0].isnan().all() and out.ys[1, 1:].isnan().all()
        bars = torch.autograd.grad(out.ys[[0, 2]].sum() + out.ys[1].nansum(), (y0, p))
        assert all((bar[1] == 0).all() and bar[[0, 2]].isfinite().all() for bar in bars)
        torch.testing.assert_close(out.ys[0], growing(engine).ys[0], rtol=1e-12, atol=0)


def test_what_is_refused_and_why():
    start = STARTS.clone()
    start[2, 1] = 0.0
    with pytest.raises(DataError, match=r"positive state y\[1\] begins at 0 in row \[2\]: expected a number above 0"):
        growing(y0=start)
    with pytest.raises(ShapeError, match="positive names 'hare', but y0 is a vector.*states= of lde.ode"):
        growing(positive=["hare"])
    with pytest.raises(ShapeError, match="positive=2: expected an index of one of 2 states"):
        growing(positive=[2])
    with pytest.raises(ShapeError, match="positive: expected one of u, v; got 'w'"):
        lde.odesolve(lambda t, s: s, {"u": tensor(1.0)[0], "v": tensor(1.0)[0]}, TIMES, positive="w")
    with pytest.raises(SolveError, match="relative errors of rtol: expected rtol and atol above 0, got None, 0"):
        growing(atol=0.0)
    with pytest.raises(SolveError, match="logarithms have none"):
        lde.odesolve(growth, STARTS, TIMES, RATES, positive=True, method="leapfrog", step_size=0.1)
    dose = lde.Dose(tensor(0.5), tensor(1.0), 0)
    with pytest.raises(SolveError, match="positive= with doses=: a dose adds to a state whose logarithm"):
        growing(doses=dose)
    failed = lde.odesolve(lambda t, y: y * y, tensor(2.0), tensor(0.0, 3.0), positive=True, on_failure="nan")
    assert int(failed.status) != 0
    with pytest.raises(SolveError, match=r"y0 \[2\]"):
        lde.odesolve(lambda t, y: y * y, tensor(2.0), tensor(0.0, 3.0), positive=True)
