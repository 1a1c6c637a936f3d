# SPDX-License-Identifier: Apache-2.0
"""torch.func, forward mode, higher derivatives, make_fx and torch.compile through a fused solve."""

import pytest
import torch
from ode_fields import DOUBLE, ENGINES, RATES, STARTS, prey_predator, solve, tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_latentde as lde

TIMES = tensor(0.0, 0.4, 1.1)
SETTINGS = {"method": "midpoint", "step_size": 0.1}


def loss(p, engine="fused", y0=STARTS[0]):
    return (solve(engine, y0=y0, times=TIMES, p=p, **SETTINGS).ys * tensor(1.0, -0.5)).square().sum()


def plain_gradients(function, rows):
    out = []
    for row in rows:
        row = row.clone().requires_grad_()
        out.append(torch.autograd.grad(function(row), row)[0])
    return torch.stack(out)


def test_grad_and_jacobians():
    p = RATES[0]
    expected = plain_gradients(loss, [p])[0]
    torch.testing.assert_close(grad(loss)(p), expected, rtol=1e-13, atol=0)

    def ys(p):
        return solve(y0=STARTS[0], times=TIMES, p=p, **SETTINGS).ys

    reverse, forward = jacrev(ys)(p), jacfwd(ys)(p)
    assert reverse.shape == (3, 2, 4)
    torch.testing.assert_close(reverse, forward, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(
        forward,
        jacfwd(lambda p: solve("torch", y0=STARTS[0], times=TIMES, p=p, **SETTINGS).ys)(p),
        rtol=1e-11,
        atol=1e-13,
    )


def test_vmap_of_grad():
    mapped = vmap(grad(loss))(RATES)
    torch.testing.assert_close(mapped, plain_gradients(loss, RATES), rtol=1e-13, atol=0)
    assert torch.equal(vmap(grad(loss), chunk_size=2)(RATES), mapped)


def test_nested_vmap():
    grid = RATES[:, None] * torch.linspace(0.8, 1.2, 4, dtype=DOUBLE)[:, None]
    for function in (loss, grad(loss)):
        nested = vmap(vmap(function))(grid)
        single = vmap(function)(grid.reshape(12, 4)).reshape(nested.shape)
        assert torch.equal(nested, single)
    other = vmap(lambda p: vmap(lambda y: loss(p, y0=y))(STARTS))(RATES)
    for i in range(3):
        for j in range(3):
            assert torch.equal(other[i, j], loss(RATES[i], y0=STARTS[j]))


def test_vmap_over_rows_that_are_a_batch_themselves():
    def f(scale):
        return solve(p=RATES * scale, times=TIMES, **SETTINGS).ys

    scales = tensor(0.9, 1.0, 1.1)
    mapped = vmap(f)(scales)
    assert mapped.shape == (3, 3, 3, 2)
    assert torch.equal(mapped, torch.stack([f(s) for s in scales]))


def test_vmap_over_times_and_starts():
    times = tensor([0.0, 0.4, 1.1], [0.0, 0.5, 0.9], [0.0, -0.3, -0.6])
    mapped = vmap(lambda t, y: solve(times=t, y0=y, p=RATES[0], **SETTINGS).ys)(times, STARTS)
    assert torch.equal(mapped, solve(times=times, p=RATES[0], **SETTINGS).ys)
    slopes = vmap(grad(lambda t, y: solve(times=t, y0=y, p=RATES[0], **SETTINGS).ys.sum()))(times, STARTS)
    again = times.clone().requires_grad_()
    expected = torch.autograd.grad(solve(times=again, p=RATES[0], **SETTINGS).ys.sum(), again)[0]
    torch.testing.assert_close(slopes, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_captured_tensor_under_vmap_of_grad_is_as_good_as_a_parameter(engine):
    def captured(p):
        return loss_of_field(lambda t, y: prey_predator(t, y, p), None)

    def explicit(p):
        return loss_of_field(prey_predator, p)

    def loss_of_field(f, p):
        return lde.odesolve(f, STARTS[0], TIMES, p, engine=engine, **SETTINGS).ys.square().sum()

    torch.testing.assert_close(grad(captured)(RATES[0]), grad(explicit)(RATES[0]), rtol=1e-13, atol=0)
    torch.testing.assert_close(vmap(grad(captured))(RATES), vmap(grad(explicit))(RATES), rtol=1e-13, atol=0)
    scaled = vmap(grad(lambda p: captured(2.0 * p)))(RATES / 2)
    torch.testing.assert_close(scaled, 2 * vmap(grad(explicit))(RATES), rtol=1e-12, atol=0)


def test_a_captured_tensor_of_the_outer_level():
    """d/dq of sum_i over rows, where q is captured inside a vmap over something else."""

    def total(q):
        def one(y0):
            return lde.odesolve(lambda t, y: prey_predator(t, y, q), y0, TIMES, engine="fused", **SETTINGS).ys.sum()

        return vmap(one)(STARTS).sum()

    q = RATES[0].clone().requires_grad_()
    expected = torch.autograd.grad(solve(times=TIMES, p=q, **SETTINGS).ys.sum(), q)[0]
    torch.testing.assert_close(grad(total)(RATES[0]), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(total(q), q)[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("second", ["hessian", "reverse over reverse", "forward over forward"])
def test_second_derivatives(second):
    make = {
        "hessian": hessian,
        "reverse over reverse": lambda f: jacrev(jacrev(f)),
        "forward over forward": lambda f: jacfwd(jacfwd(f)),
    }[second]
    fused, plain = (make(lambda p, e=e: loss(p, e))(RATES[0]) for e in ENGINES)
    torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(fused, fused.T, rtol=1e-10, atol=1e-11)


def test_hessian_under_vmap():
    mapped = vmap(hessian(loss))(RATES)
    torch.testing.assert_close(mapped, torch.stack([hessian(loss)(p) for p in RATES]), rtol=1e-11, atol=1e-12)


def test_double_backward():
    results = []
    for engine in ENGINES:
        p, y0 = RATES[0].clone().requires_grad_(), STARTS[0].clone().requires_grad_()
        first = torch.autograd.grad(loss(p, engine, y0), [p, y0], create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), [p, y0]))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-11)

    def penalty(p):
        g = grad(loss)(p)
        return g.square().sum()

    mixed = grad(penalty)(RATES[0])
    expected = 2 * hessian(loss)(RATES[0]) @ grad(loss)(RATES[0])
    torch.testing.assert_close(mixed, expected, rtol=1e-10, atol=1e-10)


def test_gradcheck_of_the_second_derivative():
    p = RATES[0].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda p: loss(p), p, atol=1e-5, rtol=1e-5)


def test_forward_mode():
    direction = torch.linspace(-1, 1, 4, dtype=DOUBLE)
    values, dots = jvp(loss, (RATES[0],), (direction,))
    torch.testing.assert_close(dots, grad(loss)(RATES[0]) @ direction, rtol=1e-11, atol=0)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(RATES[0], direction)
        tangent = forward_ad.unpack_dual(loss(dual)).tangent
        y0 = forward_ad.make_dual(STARTS[0], tensor(1.0, 2.0))
        of_y0 = forward_ad.unpack_dual(loss(RATES[0], y0=y0)).tangent
    torch.testing.assert_close(tangent, dots, rtol=1e-13, atol=0)
    slope = grad(lambda y0: loss(RATES[0], y0=y0))(STARTS[0])
    torch.testing.assert_close(of_y0, slope @ tensor(1.0, 2.0), rtol=1e-11, atol=0)
    assert values == loss(RATES[0])


def test_forward_mode_of_every_input_at_an_adaptive_solve():
    inputs = (STARTS, tensor(0.3, 0.8, 1.4), torch.tensor(0.0, dtype=DOUBLE), RATES)
    moves = tuple(torch.cos(torch.arange(x.numel(), dtype=DOUBLE)).reshape(x.shape) for x in inputs)

    def ys(y0, times, t0, p):
        return solve(y0=y0, times=times, t0=t0, p=p, rtol=1e-5).ys

    dots = jvp(ys, inputs, moves)[1]
    seed = torch.sin(torch.arange(dots.numel(), dtype=DOUBLE)).reshape(dots.shape)
    bars = vjp(ys, *inputs)[1](seed)
    expected = sum((bar * move).sum() for bar, move in zip(bars, moves, strict=True))
    torch.testing.assert_close((seed * dots).sum(), expected, rtol=1e-11, atol=0)


def test_functional_call_of_a_module():
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 2).double()
    weights = {k: v.detach() for k, v in net.named_parameters()}

    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, t, y):
            return torch.tanh(self.net(y))

    field = Field()

    def total(weights):
        def f(t, y):
            return functional_call(field, {f"net.{k}": v for k, v in weights.items()}, (t, y))

        return lde.odesolve(f, STARTS, TIMES, engine="fused", **SETTINGS).ys.square().sum()

    ys = lde.odesolve(field, STARTS, TIMES, engine="fused", **SETTINGS).ys
    expected = torch.autograd.grad(ys.square().sum(), list(net.parameters()))
    torch.testing.assert_close(tuple(grad(total)(weights).values()), expected, rtol=1e-12, atol=0)
    stacked = {k: torch.stack([v, 0.5 * v]) for k, v in weights.items()}
    mapped = vmap(grad(total))(stacked)
    for k, v in grad(total)({k: 0.5 * v for k, v in weights.items()}).items():
        torch.testing.assert_close(mapped[k][1], v, rtol=1e-12, atol=0)


# ---- traced and compiled ---------------------------------------------------------------------------------------


def test_make_fx_of_vmap_of_grad():
    function = vmap(grad(lambda p: loss(p)))
    traced = make_fx(function)(RATES)
    for rates in (RATES, RATES * 1.1):
        torch.testing.assert_close(traced(rates), function(rates), rtol=1e-13, atol=0)
    assert "rows" in str(traced.graph)  # the opaque operator, not constants


def test_make_fx_of_a_closure():
    def total(p):
        y0 = p[:2] * 2
        return lde.odesolve(lambda t, y: y * p[2] - p[3] * y**2, y0, TIMES, engine="fused", **SETTINGS).ys.sum()

    function = vmap(grad(total))
    traced = make_fx(function)(RATES)
    for rates in (RATES, RATES * 1.1):
        torch.testing.assert_close(traced(rates), function(rates), rtol=1e-13, atol=0)


def test_compiled_graph_of_vmap_of_grad():
    function = vmap(grad(lambda p: loss(p)))
    compiled = torch.compile(make_fx(function)(RATES), backend="aot_eager", fullgraph=True)
    for rates in (RATES, RATES * 1.1):
        torch.testing.assert_close(compiled(rates), function(rates), rtol=1e-13, atol=0)


def test_kernels_of_a_traced_graph_outlive_the_field():
    import gc

    def make():
        bend = 0.7

        def total(p):
            return lde.odesolve(lambda t, y: -p[:2] * y**bend, STARTS[0], TIMES, engine="fused", **SETTINGS).ys.sum()

        return make_fx(grad(total))(RATES[0]), grad(total)(RATES[0])

    traced, expected = make()
    lde.clear_cache()
    gc.collect()
    torch.testing.assert_close(traced(RATES[0]), expected, rtol=1e-13, atol=0)
