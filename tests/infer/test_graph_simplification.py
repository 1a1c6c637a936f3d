# SPDX-License-Identifier: Apache-2.0
"""What is left out of a recorded function, and that it stays the same function."""

import pyro
import pyro.distributions as dist
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_latentde.infer.graph_simplification import simplify
from pyro_latentde.infer.log_joint import LogJoint

X = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)


def operations(graph):
    return [node.name for node in graph.graph.nodes if node.op == "call_function"]


def simplified(function, *example):
    """The graph, after a check that it gives the same as before at other inputs, to the last bit."""
    graph = simplify(make_fx(function)(*example), *example)
    others = [2.5 * x - 1.0 for x in example]
    for one, other in zip(_flat(graph(*others)), _flat(function(*others)), strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    return graph


def _flat(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def test_constants_are_computed_once():
    scale = torch.tensor(3.0, dtype=torch.float64)
    assert operations(simplified(lambda x: x * (2 * scale.log() + scale.lgamma()), X)) == ["mul_1"]


def test_of_some_inputs_only_the_shape_is_read():
    graph = simplified(lambda x: x.sin() + torch.full_like(x, 2.0).exp() + x.new_zeros(6).cos(), X)
    assert operations(graph) == ["sin", "add", "add_1"]


def test_constant_outputs_are_still_computed_from_the_input():
    """TorchScript replays no output that is a constant."""
    graph = simplified(lambda x: (x + 0.0, x.new_zeros(2).long() + 1), X)
    assert operations(graph) == ["new_zeros", "_to_copy", "add_1"]


def test_entries_of_constant_tuples():
    pair = torch.arange(12.0, dtype=torch.float64).reshape(6, 2)
    assert operations(simplified(lambda x: x + pair.unbind(-1)[1].exp(), X)) == ["add"]


def test_copies_are_left_out():
    graph = simplified(lambda x: ((x.view(6).expand(6)[0:6] + 0.0) * 1.0).detach().exp() / 1, X)
    assert operations(graph) == ["exp"]


def test_what_changes_shape_or_type_stays():
    whole = torch.arange(6)
    graph = simplified(lambda x, n: (x[1:], x.view(2, 3), x.expand(2, 6), n + 0.0, x + 1, x * 0), X, whole)
    assert len(operations(graph)) == 6


def test_twice_is_once():
    graph = simplified(lambda x: x.exp() * x.sin() + x.exp() / x.sin(), X)
    assert sorted(operations(graph)) == ["add", "div", "exp", "mul", "sin"]


def test_unread_results_are_left_out():
    def function(x):
        x.exp().sum()
        return x.sin()

    assert operations(simplified(function, X)) == ["sin"]


def test_inputs_are_no_constants():
    graph = simplified(lambda x, data: (x - data.mean()).square().sum() + data.std().log(), X, X.flip(0))
    assert {"mean", "std", "log"} <= set(operations(graph))


def test_functions_with_side_effects_are_left_alone():
    for function in (lambda x: x.clone().add_(0.0), lambda x: x + 0.0 + torch.rand_like(x)):
        graph = make_fx(function)(X)
        before = operations(graph)
        assert operations(simplify(graph, X)) == before


def test_of_a_log_joint_half_is_left():
    def model(y):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0).double(), 3.0))
        spread = pyro.sample("spread", dist.HalfNormal(torch.tensor(1.0).double()))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.StudentT(4.0, rate, spread), obs=y)

    joint = LogJoint(model, (X,))
    u = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)
    graph = make_fx(lambda u: joint.value_and_grad(u)[:2])(u)
    before = len(operations(graph))
    simplify(graph, u)
    assert len(operations(graph)) < 0.6 * before
    for one, other in zip(graph(u + 0.3), joint.value_and_grad(u + 0.3)[:2], strict=True):
        assert torch.allclose(one, other, rtol=1e-14, atol=1e-14)
