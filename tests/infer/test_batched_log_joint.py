# SPDX-License-Identifier: Apache-2.0
"""The engines of the batched log-joint give the same numbers, or step aside and say why."""

import logging

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer import batched_log_joint
from pyro_latentde.infer.batched_log_joint import BatchedLogJoint
from pyro_latentde.infer.log_joint import LogJoint

X = torch.linspace(-1, 1, 30, dtype=torch.float64)
Y = 0.5 + 2 * X


def regression(x, y):
    zero = torch.zeros((), dtype=torch.float64)
    slope = pyro.sample("slope", dist.Normal(zero, 3.0))
    noise = pyro.sample("noise", dist.HalfNormal(zero + 1.0))
    failed = slope > 50.0
    record = {"status": failed.long().reshape(1), "n_steps": torch.full((1,), 7)}
    z = (slope * x).unsqueeze(-1)
    infer = {"_deterministic": True, "lde_ode": record}
    pyro.sample("z", dist.Delta(z, event_dim=2).mask(False), obs=z, infer=infer)
    with pyro.plate("n", len(x)):
        pyro.sample("obs", dist.Normal(z[:, 0], noise), obs=y)


@pytest.mark.parametrize("engine", ["loop", "eager", "traced"])
def test_engines_agree_with_the_log_joint(engine):
    joint = LogJoint(regression, (X, Y))
    u = np.random.default_rng(0).standard_normal((4, 2))
    batched = BatchedLogJoint(joint, u, engine=engine)
    assert batched.engine == engine
    u[2, 0] = 60.0  # this row fails
    lp, grad, failed, steps = batched(u)
    right_lp, right_grad, _ = joint.value_and_grad(torch.from_numpy(u))
    assert np.allclose(lp, right_lp, rtol=1e-12) and np.allclose(grad, right_grad, rtol=1e-10)
    assert lp[2] == -np.inf and not grad[2].any() and failed == [False, False, True, False] and steps == [7] * 4
    assert batched.num_calls == 1


def test_the_compiled_engine_agrees_and_its_warnings_stay_inside():
    joint = LogJoint(regression, (X, Y))
    u = np.random.default_rng(0).standard_normal((4, 2))
    batched = BatchedLogJoint(joint, u, engine="compiled")
    lp, grad, _, _ = batched(u)
    right_lp, right_grad, _ = joint.value_and_grad(torch.from_numpy(u))
    # without a C++ compiler the traced engine takes over and says so
    assert batched.engine == "compiled" or "compiler" in batched.reason
    assert np.allclose(lp, right_lp, rtol=1e-10) and np.allclose(grad, right_grad, rtol=1e-9)


def test_without_a_compiler_the_record_is_replayed_and_told(monkeypatch, caplog):
    monkeypatch.setattr(batched_log_joint, "_has_compiler", lambda: False)
    with caplog.at_level(logging.INFO, "pyro_latentde"):
        batched = BatchedLogJoint(LogJoint(regression, (X, Y)), np.zeros((2, 2)), expected_calls=10**9)
    assert batched.engine == "traced"
    assert "needs a C++ compiler" in caplog.text


def test_without_torchscript_the_graph_itself_is_run(monkeypatch):
    joint = LogJoint(regression, (X, Y))
    monkeypatch.delattr(torch.jit, "trace")
    batched = BatchedLogJoint(joint, np.zeros((2, 2)), engine="traced")
    assert batched.engine == "traced"
    assert np.allclose(batched(np.ones((2, 2)))[0], joint.value_and_grad(torch.ones(2, 2).double())[0])


@pytest.mark.parametrize(("scripted", "compiler_wanted"), [(True, False), (False, True)])
def test_auto_compiles_earlier_where_python_would_replay_the_record(scripted, compiler_wanted, monkeypatch):
    if not scripted:
        monkeypatch.delattr(torch.jit, "trace")
    monkeypatch.setattr(batched_log_joint, "_has_compiler", lambda: False)
    batched = BatchedLogJoint(LogJoint(regression, (X, Y)), np.zeros((2, 2)), expected_calls=30_000)
    assert ("needs a C++ compiler" in batched.reason) == compiler_wanted


def test_a_branch_on_a_value_falls_back_to_the_loop_and_says_why():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        scale = 1.0 if x.item() > 0 else 2.0
        pyro.sample("obs", dist.Normal(x, scale), obs=torch.tensor(0.5, dtype=torch.float64))

    batched = BatchedLogJoint(LogJoint(model), np.array([[1.0], [-1.0]]))
    assert batched.engine == "loop" and "item()" in batched.reason
    lp, grad, _, _ = batched(np.array([[1.0], [-1.0]]))
    for row, x, scale in ((0, 1.0, 1.0), (1, -1.0, 2.0)):
        by_hand = dist.Normal(0.0, 1.0).log_prob(torch.tensor(x)) + dist.Normal(x, scale).log_prob(torch.tensor(0.5))
        assert lp[row] == pytest.approx(by_hand.item(), rel=1e-6)
        assert grad[row, 0] == pytest.approx(-x + (0.5 - x) / scale**2)


def test_a_fault_of_the_model_itself_is_raised_as_it_is():
    calls = []

    def model():
        x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
        calls.append(x)
        if len(calls) > 2:
            raise KeyError("the user's own")

    joint = LogJoint(model)
    with pytest.raises(KeyError, match="the user's own"):
        BatchedLogJoint(joint, np.zeros((2, 1)))


def test_a_record_that_differs_from_the_model_is_not_used(monkeypatch):
    joint = LogJoint(regression, (X, Y))
    monkeypatch.setattr(batched_log_joint, "_replay", lambda graph, u: lambda v: (graph(v)[0] + 1, *graph(v)[1:]))
    batched = BatchedLogJoint(joint, np.zeros((2, 2)))
    assert batched.engine == "eager" and "another log-density" in batched.reason


def test_float32_models_answer_in_float64():
    joint = LogJoint(lambda: pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1)))
    lp, grad, _, _ = BatchedLogJoint(joint, np.zeros((2, 3)))(np.ones((2, 3)))
    assert grad.dtype == np.float64 and np.allclose(grad, -1) and isinstance(lp[0], float)


def test_an_unknown_engine_is_refused():
    with pytest.raises(LatentDEError, match="log_joint_engine: expected one of .*'traced'.* got 'turbo'"):
        BatchedLogJoint(LogJoint(regression, (X, Y)), np.zeros((2, 2)), engine="turbo")
