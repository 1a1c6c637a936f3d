# SPDX-License-Identifier: Apache-2.0
"""Vector fields as people write them: the compiled kernel against the torch engine, values and every gradient."""

from typing import NamedTuple

import pytest
import torch
from ode_fields import DOUBLE, tensor
from torch import nn

import pyro_latentde as lde

# the smallest kernels, which still evaluate and differentiate the field at several times
QUICK = {"method": "euler", "step_size": 0.25}


def leaves_of(structure):
    return [x for x in torch.utils._pytree.tree_leaves(structure) if isinstance(x, torch.Tensor)]


def weights(*shape, seed=0, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=DOUBLE)


def compare(f, y0, params=None, captured=(), **settings):
    """Solve with both engines; compare values and the gradients of y0, parameters and captured tensors."""
    times = torch.linspace(0.1, 1.1, 4, dtype=DOUBLE)
    inputs = [x for x in [*leaves_of(y0), *leaves_of(params), *captured] if x.dtype.is_floating_point]
    for x in inputs:
        x.requires_grad_()
    results = []
    for engine in ("fused", "torch"):
        solution = lde.odesolve(f, y0, times, params, engine=engine, **QUICK, **settings)
        assert solution.engine == engine
        flat = torch.cat([x.reshape(-1) for x in leaves_of(solution.ys)])
        seed = torch.cos(torch.arange(flat.numel(), dtype=DOUBLE))
        results.append([flat.detach(), *torch.autograd.grad((seed * flat).sum(), inputs)])
    for fused, plain in zip(*results, strict=True):
        assert plain.isfinite().all()
        torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-12)
    assert all(gradient.abs().sum() > 0 for gradient in results[0][1:])
    return results[0]


def test_torch_stack_and_unpacking():
    def f(t, y, p):
        u, v = y
        return torch.stack([p[0] * u - p[1] * u * v, -p[2] * v + torch.sin(t) * u])

    compare(f, tensor(1.0, 2.0), tensor(0.5, 0.3, 0.8))


def test_written_in_place():
    def f(t, y, k):
        dy = torch.zeros_like(y)
        dy[0] = -k[0] * y[0] + k[1] * y[1] * y[2]
        dy[2] = k[2] * y[1] ** 2
        dy[1] = -dy[0] - dy[2]
        dy[1:] += 0.1
        dy *= 2.0
        return dy

    compare(f, tensor(1.0, 0.5, 0.2), tensor(0.4, 1.0, 0.3))


def test_an_in_place_write_reaches_every_view():
    def f(t, y, k):
        out = torch.empty(2, 2, dtype=y.dtype)
        first, flat = out[0], out.view(-1)
        out.fill_(1.0)
        first.copy_(y[:2] * k)
        flat[3] = y[3] * first[0].clone()
        flat[2].add_(y[2])
        return flat

    compare(f, tensor(1.0, 0.5, 0.2, 0.7), tensor(0.4, 0.9), event_dims={"p": 1})


def test_closure_over_floats_and_tensors():
    rate, half, table = 0.7, 2, tensor(0.3, 0.6, requires_grad=True)

    def f(t, y):
        return -rate * y + table * y**half + table.sum()

    compare(f, tensor(1.0, 0.5), captured=[table])


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(weights(3))
        self.register_buffer("shift", tensor(0.1, 0.2, 0.3))
        self.power = 2.0

    def forward(self, t, y, p):
        return torch.sigmoid(self.gate * t + self.shift) * y**self.power - p * y


def test_module_with_buffers_and_attributes():
    module = Gated()
    compare(module, tensor(1.0, 0.5, 0.8), torch.tensor(0.4, dtype=DOUBLE), [module.gate, module.shift])


def test_dict_state_and_dict_parameters():
    def f(t, y, p):
        flow = p["rates"]["in"] * y["s"] * y["i"]
        return {"s": -flow, "i": flow - p["rates"]["out"] * y["i"], "r": p["rates"]["out"] * y["i"] * p["scale"]}

    y0 = {name: torch.tensor(v, dtype=DOUBLE) for name, v in (("s", 0.9), ("i", 0.1), ("r", 0.0))}
    rates = {name: torch.tensor(v, dtype=DOUBLE) for name, v in (("in", 0.8), ("out", 0.3))}
    compare(f, y0, {"rates": rates, "scale": torch.tensor(1.1, dtype=DOUBLE)})


class Motion(NamedTuple):
    position: torch.Tensor
    velocity: torch.Tensor


def test_named_tuple_state_with_vectors():
    def f(t, y, k):
        return Motion(y.velocity, -k * y.position)

    y0 = Motion(tensor(1.0, 0.0), tensor(0.0, 0.5))
    times = torch.linspace(0.1, 1.1, 4, dtype=DOUBLE)
    ranks = {"position": 1, "velocity": 1}
    solution = lde.odesolve(f, y0, times, tensor(2.0)[0], engine="fused", event_dims=ranks, **QUICK)
    assert isinstance(solution.ys, Motion) and solution.ys.position.shape == (4, 2)
    compare(f, y0, tensor(2.0)[0], event_dims=ranks)


@pytest.mark.parametrize("search", ["searchsorted", "bucketize", "right"])
def test_forcing_from_a_table(search):
    knots, heights = tensor(0.0, 0.3, 0.5, 0.9, 2.0), weights(5).requires_grad_()

    def f(t, y, k):
        if search == "searchsorted":
            i = torch.searchsorted(knots, t.reshape(1)).clamp(1, 4)[0]
        elif search == "right":
            i = torch.searchsorted(knots, t.reshape(1), right=True).clamp(1, 4)[0]
        else:
            i = torch.bucketize(t, knots).clamp(1, 4)
        share = (t - knots[i - 1]) / (knots[i] - knots[i - 1])
        force = heights[i - 1] * (1 - share) + heights.gather(0, i.reshape(1))[0] * share
        return -k * y + force

    compare(f, tensor(1.0, 0.5), torch.tensor(0.4, dtype=DOUBLE), [heights, knots])


def test_a_table_of_each_row():
    knots = torch.linspace(0, 2, 5, dtype=DOUBLE)

    def f(t, y, p):
        i = torch.searchsorted(knots, t).clamp(1, 4)
        share = (t - knots[i - 1]) / (knots[i] - knots[i - 1])
        return -y + p["doses"][i - 1] * (1 - share) + p["doses"][i] * share

    compare(f, weights(3, 1), {"doses": weights(3, 5, seed=1)}, event_dims={"doses": 1})


ACTIVATIONS = [nn.Tanh, nn.Softplus, nn.SiLU, nn.ELU, nn.GELU, nn.ReLU, nn.Sigmoid, nn.LeakyReLU]


def test_sequential_networks_of_every_activation():
    torch.manual_seed(1)
    layers = [nn.Linear(3, 2)]
    for activation in ACTIVATIONS:
        layers += [activation(), nn.Linear(2, 2)]
    net = nn.Sequential(*layers).double()

    def f(t, y, p):
        return net(torch.cat([y, t.reshape(1)])) * p

    compare(f, weights(4, 2), torch.tensor(0.7, dtype=DOUBLE), list(net.parameters()))


def test_module_field_alone():
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()

        def forward(self, t, y, p=None):
            return self.net(y)

    torch.manual_seed(2)
    field = Field()
    compare(field, weights(3, 2), captured=list(field.parameters()))


def test_products_of_small_matrices():
    def f(t, y, p):
        a, b = p["a"], p["b"]
        state = y.reshape(2, 3)
        out = a @ state + torch.einsum("ij,kj->ik", state, b) + torch.outer(y[:2], y[3:])
        out = out + torch.bmm(state[None], b[None])[0] + (state * torch.softmax(state, -1)).roll(1, 0)
        out = out + torch.linalg.norm(y) * state.flip(1) + torch.tril(b)[:2] * torch.trace(a)
        return out.reshape(-1) / (1 + (y @ y)) - a.T.mv(state.mean(1)).sum()

    compare(f, weights(6), {"a": weights(2, 2, seed=1), "b": weights(3, 3, seed=2)})


def test_products_of_large_matrices_stay_loops():
    def f(t, y, p):
        hidden = torch.tanh(p["w"] @ y)
        return (
            p["w"].T @ hidden - torch.nn.functional.linear(y, p["w"][::2, :4].repeat(2, 2)[:, :6]) + p["w"][1, :4].sum()
        )

    compare(f, weights(2, 6), {"w": weights(6, 6, seed=1, scale=0.3)})


def test_clamp_where_min_max():
    def f(t, y, p):
        out = torch.where(y > p, y.clamp(-0.5, 0.9), y.clamp(min=p)) + torch.minimum(y, p) * torch.maximum(y, -p)
        out = out + y.max() * y.amin() + torch.relu(y - 0.3) + y.min(0).values - y.abs().max(0)[0] + y.clamp_max(0.1)
        return out * torch.where(t < 0.5, 1.0, 0.5) - torch.cumsum(y, 0).std() + y.prod() + y.var(unbiased=False)

    compare(f, tensor(0.6, -0.4, 0.25), torch.tensor(0.2, dtype=DOUBLE))


def test_shapes_and_views():
    def f(t, y, p):
        a, b = y.split(2)
        c = torch.cat([a[1:], b[:1] * 2, y.view(2, 2).T.reshape(-1)[:2]])
        d = torch.stack([a, b]).permute(1, 0).flatten().unsqueeze(-1).expand(4, 3).sum(-1)
        e = torch.nn.functional.pad(a, (1, 1))
        rows = torch.tensor([3, 0, 2, 1])
        return (
            c * p + d * y[rows] + e + y[[1, 1, 0, 2]] * y.new_full((4,), 0.5) + torch.arange(4) * torch.eye(4)[0].to(y)
        )

    compare(f, weights(4), torch.tensor(0.2, dtype=DOUBLE))


def test_a_field_that_returns_a_captured_tensor():
    speed = tensor(0.5, -0.2, requires_grad=True)
    values, y0_bar, speed_bar = compare(lambda t, y: speed, tensor(1.0, 2.0), captured=[speed])
    torch.testing.assert_close(values.reshape(4, 2)[-1], tensor(1.5, 1.8))


def test_detached_values_have_no_gradient():
    def f(t, y, p):
        return -p * y.detach() + p.detach() * y * torch.sin(y).detach()

    compare(f, tensor(1.0, 0.5), torch.tensor(0.4, dtype=DOUBLE))


def test_gradients_are_none_where_there_is_no_path():
    def f(t, y, p):
        return -p["k"] * y + 0 * p["unused"]

    y0 = tensor(1.0)
    k, unused = (torch.tensor(v, dtype=DOUBLE, requires_grad=True) for v in (0.5, 0.2))
    ys = lde.odesolve(f, y0, tensor(0.0, 1.0), {"k": k, "unused": unused}, engine="fused", **QUICK).ys
    bars = torch.autograd.grad(ys.sum(), [k, unused])
    assert bars[0] != 0 and bars[1] == 0
