# SPDX-License-Identifier: Apache-2.0
"""Networks as vector fields: kernels that solve several rows side by side."""

import pytest
import torch
from ode_fields import DOUBLE
from torch import nn
from torchdiffeq import odeint

import pyro_latentde as lde
from pyro_latentde.errors import SolveError
from pyro_latentde.solve.fused import cpu

TIMES = torch.linspace(0.0, 2.0, 9, dtype=DOUBLE)


def network(*sizes, activation=nn.Tanh, seed=0):
    torch.manual_seed(seed)
    layers = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1]).double()


def starts(rows, states, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, states, generator=generator, dtype=DOUBLE)


def outcome(net, y0, times=TIMES, **settings):
    """The solution, and gradients with respect to y0, times and all weights."""
    y0, times = y0.clone().requires_grad_(), times.clone().requires_grad_()
    solution = lde.odesolve(lambda t, y: net(y) - 0.1 * t * y, y0, times, t0=0.0, **settings)
    weights = torch.linspace(-1.0, 1.5, solution.ys.numel(), dtype=solution.ys.dtype).reshape(solution.ys.shape)
    loss = (solution.ys.nan_to_num() * weights).square().sum()
    return solution, torch.autograd.grad(loss, [y0, times, *net.parameters()])


def assert_near(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.detach().abs().max()), equal_nan=True)


ACTIVATIONS = {
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients_are_those_of_the_torch_engine(activation):
    net, y0 = network(3, 9, 6, 3, activation=ACTIVATIONS[activation]), starts(21, 3)
    found, gradients = outcome(net, y0, rtol=1e-6)
    assert found.engine == "fused"
    assert "side by side" in found.reason
    expected, others = outcome(net, y0, engine="torch", replay=found)
    assert_near([found.ys, *gradients], [expected.ys, *others], 1e-10)
    own_steps, _ = outcome(net, y0, rtol=1e-6, engine="torch")
    assert torch.equal(found.stats["n_accepted"], own_steps.stats["n_accepted"])
    assert torch.equal(found.stats["n_evals"], own_steps.stats["n_evals"])


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "heun", "rk4"])
def test_every_explicit_method(method):
    net, y0 = network(4, 8, 4), starts(11, 4)
    settings = {"step_size": 0.13} if method == "rk4" else {"rtol": 1e-4, "atol": 1e-5}
    found, gradients = outcome(net, y0, method=method, **settings)
    expected, others = outcome(net, y0, method=method, engine="torch", replay=found)
    assert_near([found.ys, *gradients], [expected.ys, *others], 1e-10)
    again, same = outcome(net, y0, method=method, engine="fused", replay=found)
    assert_near([again.ys, *same], [expected.ys, *others], 1e-10)


def test_against_torchdiffeq():
    net, y0 = network(4, 20, 20, 4), starts(10, 4)
    found, gradients = outcome(net, y0, rtol=1e-10, atol=1e-11, method="dopri5")
    start = y0.clone().requires_grad_()
    ys = odeint(lambda t, y: net(y) - 0.1 * t * y, start, TIMES, rtol=1e-10, atol=1e-11, method="dopri5")
    weights = torch.linspace(-1.0, 1.5, ys.numel(), dtype=DOUBLE).reshape(10, 9, 4)
    expected = torch.autograd.grad((ys.transpose(0, 1) * weights).square().sum(), [start, *net.parameters()])
    assert_near([found.ys], [ys.transpose(0, 1)], 1e-9)
    assert_near([gradients[0], *gradients[2:]], expected, 1e-7)


def sampled(net, rows, seed=2):
    """Weights of its own for every row, near those of the network."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name.replace(".", "_"): w.detach() + 0.1 * torch.randn(rows, *w.shape, generator=generator, dtype=DOUBLE)
        for name, w in net.named_parameters()
    }


def two_layers(t, y, p):
    hidden = nn.functional.elu(nn.functional.linear(y, p["0_weight"], p["0_bias"]))
    return torch.where(p["fast"] > 0, y * y, nn.functional.linear(hidden, p["2_weight"], p["2_bias"]))


def solve_rows(y0, p, times=TIMES):
    """Values, statistics and gradients of rows with weights of their own."""
    y0, p = y0.clone().requires_grad_(), {k: v.clone().requires_grad_() for k, v in p.items()}
    ranks = {name: 1 + ("weight" in name) if name != "fast" else 0 for name in p}
    solution = lde.odesolve(two_layers, y0, times, p, rtol=1e-5, event_dims=ranks, on_failure="nan", engine="fused")
    gradients = torch.autograd.grad(solution.ys.nan_to_num().square().sum(), [y0, *p.values()])
    return [solution.ys.detach(), solution.status, *solution.stats.values(), *gradients]


@pytest.fixture
def threads():
    before = cpu._POOL.threads
    yield cpu.set_pool_size
    cpu.set_pool_size(before)


def test_a_row_alone_and_in_company_is_the_same_bits(threads):
    """Rows with weights of their own, some of which explode; alone, in the batch, by any number of threads."""
    y0, p = 1.0 + starts(45, 3).abs(), sampled(network(3, 8, 3), 45)
    p["fast"] = torch.where(torch.arange(45) % 6 == 4, 1.0, -1.0).to(DOUBLE)
    together = solve_rows(y0, p)
    failed = together[1] != 0
    assert failed.tolist() == (p["fast"] > 0).tolist()
    assert all(gradient[failed].abs().max() == 0 for gradient in together[-6:])
    assert all(gradient.isfinite().all() for gradient in together[-6:])
    for i in (0, 4, 7, 29, 44):
        alone = solve_rows(y0[i : i + 1], {k: v[i : i + 1] for k, v in p.items()})
        for one, many in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], many[i], rtol=0, atol=0, equal_nan=True)
    for count in (1, 3):
        threads(count)
        for a, b in zip(solve_rows(y0, p), together, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_shared_weights_give_the_bits_of_weights_of_ones_own(threads):
    y0, net = starts(150, 3).abs(), network(3, 8, 3)
    p = {name.replace(".", "_"): w.detach() for name, w in net.named_parameters()}
    p["fast"] = torch.tensor(-1.0, dtype=DOUBLE)
    shared, own = solve_rows(y0, p), solve_rows(y0, {k: v.expand(150, *v.shape) for k, v in p.items()})
    alone = solve_rows(y0[33], p)
    for a, b, c in zip(shared[:6], own, alone, strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a[33], c, rtol=0, atol=0)
    assert_near(shared[6:], [gradient.sum(0) for gradient in own[6:]], 1e-12)
    for count in (1, 2, 5):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(solve_rows(y0, p), shared, strict=True))


def test_rows_with_more_steps_than_there_was_room_for():
    net, y0 = network(2, 10, 2), starts(13, 2)
    y0[5] *= 40.0
    times = torch.tensor([0.0, 30.0], dtype=DOUBLE)
    found, gradients = outcome(net, y0, times, rtol=1e-9, atol=1e-11)
    assert found.stats["n_accepted"].max() > 100
    expected, others = outcome(net, y0, times, engine="torch", replay=found)
    assert_near([found.ys, *gradients], [expected.ys, *others], 1e-10)


def test_a_last_row_that_never_starts():
    """Its neighbours' records lie before its own, of which there are none."""
    y0, p = starts(1000, 3).abs(), {k: v[0] for k, v in sampled(network(3, 8, 3), 1).items()}
    p["fast"] = torch.tensor(-1.0, dtype=DOUBLE)
    whole = solve_rows(y0, p)
    y0[-1] = torch.nan
    found = solve_rows(y0, p)
    assert found[1].nonzero().tolist() == [[999]]
    torch.testing.assert_close(found[5][:-1], whole[5][:-1], rtol=0, atol=0)


def test_transforms_and_second_derivatives():
    net, y0 = network(2, 8, 2), starts(3, 2)
    names = [name for name, _ in net.named_parameters()]
    values = [w.detach() for w in net.parameters()]

    def loss(engine, start, *weights):
        def field(t, y):
            return torch.func.functional_call(net, dict(zip(names, weights, strict=True)), (y,))

        return lde.odesolve(field, start, TIMES, rtol=1e-5, engine=engine).ys.square().sum()

    def results(engine):
        one = torch.func.vmap(
            torch.func.grad(lambda s, *w: loss(engine, s, *w), argnums=(0, 1)), (0, None, None, None, None)
        )
        hessian = torch.func.hessian(lambda s: loss(engine, s, *values))(y0[0])
        moved = torch.func.jvp(lambda s: loss(engine, s, *values), (y0[0],), (torch.ones(2, dtype=DOUBLE),))
        return [*one(y0, *values), hessian, *moved]

    assert_near(results("fused"), results("torch"), 1e-6)


def test_single_precision_and_backwards():
    net, y0 = network(3, 12, 3, activation=nn.ELU), starts(5, 3)
    reference, exact = outcome(net, y0, -TIMES, rtol=1e-9)
    found, gradients = outcome(net.float(), y0.float(), -TIMES.float(), rtol=1e-5)
    assert found.ys.dtype == torch.float32
    assert "side by side" in found.reason
    assert_near([found.ys.double(), *(g.double() for g in gradients[:1])], [reference.ys, *exact[:1]], 2e-4)


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.norm, self.leave = nn.Linear(3, 7), nn.LayerNorm(7), nn.Linear(7, 3)

    def forward(self, t, y):
        return self.leave(torch.tanh(self.norm(self.enter(y))))


def test_layers_that_are_no_loops():
    torch.manual_seed(4)
    module, y0 = Normalised().double(), starts(9, 3)
    found = lde.odesolve(module, y0, TIMES)
    assert "side by side" in found.reason
    expected = lde.odesolve(module, y0, TIMES, engine="torch", replay=found)
    assert_near([found.ys], [expected.ys], 1e-10)
    gradients = [torch.autograd.grad(s.ys.square().sum(), list(module.parameters())) for s in (found, expected)]
    assert_near(*gradients, 1e-10)


def test_what_is_no_network_or_no_explicit_method_has_kernels_of_single_rows():
    net, y0 = network(3, 8, 3), starts(2, 3)
    table = torch.linspace(0, 1, 20, dtype=DOUBLE)
    for field, method in ((lambda t, y: net(y), "kvaerno3"), (lambda t, y: -y, "tsit5")):
        solution = lde.odesolve(field, y0, TIMES[:3], method=method)
        assert (solution.engine, solution.reason) == ("fused", "the field compiles to one kernel")
    looked_up = lde.odesolve(lambda t, y: net(y) * table[torch.floor(t).long()], y0, TIMES[:3])
    assert looked_up.reason == "the field compiles to one kernel"


def test_a_network_wider_than_kernels_of_single_rows():
    """Its torch engine goes layer by layer, its tangents replay the steps."""
    net, y0 = network(3, 300, 3, activation=nn.ELU), starts(5, 3)
    found, gradients = outcome(net, y0, rtol=1e-5)
    assert found.engine == "fused"
    expected, others = outcome(net, y0, engine="torch", replay=found)
    assert_near([found.ys, *gradients], [expected.ys, *others], 1e-10)

    def values(start):
        return lde.odesolve(lambda t, y: net(y), start, TIMES, rtol=1e-5, engine="fused").ys

    turned = torch.func.jvp(values, (y0,), (torch.ones_like(y0),))[1]
    seed = torch.linspace(-1, 1, turned.numel(), dtype=DOUBLE).reshape(turned.shape)
    _, pull = torch.func.vjp(values, y0)
    torch.testing.assert_close((turned * seed).sum(), pull(seed)[0].sum(), rtol=1e-10, atol=0)


def test_single_precision_goes_to_matrix_products_sooner():
    net, y0 = network(2, 512, 512, 2), 0.3 * starts(4, 2)
    exact, gradients = outcome(net, y0, TIMES[:3], rtol=1e-8)
    assert exact.engine == "fused"
    found, others = outcome(net.float(), y0.float(), TIMES[:3].float(), rtol=1e-5)
    assert found.engine == "torch"
    assert "264192 matrix entries" in found.reason
    assert_near([found.ys.double(), others[0].double()], [exact.ys, gradients[0]], 2e-3)
    with pytest.raises(SolveError, match="matrix products in float32"):
        outcome(net, y0.float(), TIMES[:3].float(), engine="fused")
