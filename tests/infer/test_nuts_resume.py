# SPDX-License-Identifier: Apache-2.0
"""NUTS goes on where a checkpoint left it, bit for bit."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_latentde.errors import CheckpointError
from pyro_latentde.infer import nuts
from pyro_latentde.infer.batched_log_joint import BatchedLogJoint

SETTINGS = {"num_chains": 3, "num_warmup": 60, "num_samples": 30, "progress": False, "seed": 4}


def model():
    rate = pyro.sample("rate", dist.LogNormal(torch.tensor(0.0, dtype=torch.float64), 1.0))
    level = pyro.sample("level", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(torch.exp(-rate) + level.sum(), 0.1), obs=torch.tensor(0.4, dtype=torch.float64))


def test_interrupted_and_uninterrupted_runs_are_bit_equal(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    whole = nuts(model, **SETTINGS)
    call = BatchedLogJoint.__call__
    for stop in (3, 40, 150, 151, 400):  # calls of each attempt, in and between windows of warm-up, and among the draws

        def some(self, u, stop=stop):
            if self.num_calls >= stop:
                raise KeyboardInterrupt
            return call(self, u)

        with monkeypatch.context() as patch:
            patch.setattr(BatchedLogJoint, "__call__", some)
            with pytest.raises(KeyboardInterrupt):
                nuts(model, checkpoint=path, checkpoint_minutes=0, **SETTINGS)
    resumed = nuts(model, checkpoint=path, **SETTINGS)
    for name in ("rate", "level"):
        assert torch.equal(whole[name], resumed[name])
    assert all(torch.equal(whole.stats[name], resumed.stats[name]) for name in whole.stats)
    assert whole.attrs["num_gradients"] == resumed.attrs["num_gradients"]
    longer = nuts(model, checkpoint=path, **{**SETTINGS, "num_samples": 40})
    assert torch.equal(longer["rate"][:, :30], whole["rate"])
    assert torch.equal(longer["rate"], nuts(model, **{**SETTINGS, "num_samples": 40})["rate"])


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    path = tmp_path / "run.pt"
    nuts(model, checkpoint=path, **SETTINGS)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="seed 4 .now 5."):
        nuts(model, checkpoint=path, **{**SETTINGS, "seed": 5})
    with pytest.raises(CheckpointError, match="30 draws"):
        nuts(model, checkpoint=path, **{**SETTINGS, "num_samples": 5})
    assert path.read_bytes() == before
