# SPDX-License-Identifier: Apache-2.0
"""Two processes: the gradients of one with the same batch, shared skips and stops, one checkpoint for both."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from pyro_latentde.infer.devices import OneDevice, make_devices

HERE = str(Path(__file__).parent)

# Draws that depend on the series alone, so that a shard has the draws of the whole batch.
SCRIPT = """
import sys, os
sys.path.insert(0, {here!r})
import torch, pyro, pyro.distributions as dist
from linear_ode import smooth_series
import pyro_latentde as lde
from pyro_latentde.errors import LatentDEError

class Quantile(dist.Normal):
    def rsample(self, sample_shape=()):
        return self.loc + 0.7 * self.scale

class Model(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.decoder = torch.nn.Linear(1, 3).double()
    def forward(self, series):
        slope = pyro.sample("slope", dist.Normal(torch.tensor(0.2).double(), 2.0))
        with lde.series_plate(series):
            level = pyro.sample("level", dist.Normal(slope * 0.1, 1.0))
            mean = self.decoder(level[:, None, None]) + slope * series.times[..., None]
            if FAIL(series):
                mean = mean * float("nan")
            lde.observe("obs", dist.Normal(mean, 0.5), series)

class Guide(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(3, 1).double()
        self.center = torch.nn.Parameter(torch.tensor(0.4).double())
    def forward(self, series):
        pyro.sample("slope", Quantile(self.center, 0.3))
        with lde.series_plate(series):
            pyro.sample("level", Quantile(self.encoder(series.values.mean(1)).squeeze(-1), 0.2))

rank = int(os.environ.get("LOCAL_RANK", 0))
calls = []
def FAIL(series):
    calls.append(torch.is_grad_enabled())
    return {fail} and rank == 1 and sum(calls) in (3, 4) and calls[-1]

def fit():
    model, guide, series = Model(), Guide(), smooth_series()
    return lde.infer.fit_svi(model, guide, series, num_steps=10, batch_size=6, window=4, learning_rate=0.02,
                             heldout=series[:7], eval_every=3, progress=False, **{options})

torch.manual_seed(rank)  # other parameters on each rank: those of the first count
first, again = fit(), fit()  # the second one resumes, if there is a checkpoint
torch.save({{"losses": first.losses, "weights": {{n: p.detach() for n, p in first.weights.items()}},
            "heldout": first.attrs["heldout_elbo"], "resumed": again.attrs.get("resumed_at"),
            "again": {{n: p.detach() for n, p in again.weights.items()}}}}, {out!r} + str(rank))
"""


def launch(tmp_path, name, options, fail=False, by_hand=True):
    """Run the script on two ranks, or one, and give what each of them saved."""
    file = tmp_path / f"{name}.py"
    file.write_text(SCRIPT.format(here=HERE, options=options, fail=fail, out=str(tmp_path / name)))
    world = options.get("devices", 1)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    base = {**os.environ, "PYTHONWARNINGS": "ignore", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    base |= {"GLOO_SOCKET_IFNAME": "lo"}
    launched = [{}] if world == 1 or not by_hand else [
        {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "x",
         "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(world)} for r in range(world)
    ]  # fmt: skip
    processes = [
        subprocess.Popen([sys.executable, str(file)], env=base | own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for own in launched
    ]
    for process in processes:
        error = process.communicate(timeout=240)[1]
        assert process.returncode == 0, error.decode()[-3000:]
    return [torch.load(f"{tmp_path / name}{rank}", weights_only=True) for rank in range(world)]


DDP = {"devices": 2, "accelerator": "cpu", "strategy": "ddp"}


def test_two_processes_are_one(tmp_path):
    (alone,) = launch(tmp_path, "alone", {})
    first, second = launch(tmp_path, "both", DDP)
    for rank in (first, second):
        assert_close(rank["losses"], alone["losses"], rtol=1e-9, atol=1e-6)
        assert rank["heldout"] == pytest.approx(alone["heldout"], rel=1e-9)
        for name, value in alone["weights"].items():
            assert_close(rank["weights"][name], value, rtol=0, atol=1e-6)
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])


def test_a_fault_on_one_rank_skips_on_all_and_the_checkpoint_is_shared(tmp_path):
    """Started by Lightning itself this time, which runs the script a second time."""
    options = {**DDP, "checkpoint": str(tmp_path / "run")}
    first, second = launch(tmp_path, "fault", options, fail=True, by_hand=False)
    assert first["losses"].isnan().nonzero().flatten().tolist() == [2, 3]
    assert torch.equal(first["losses"].isnan(), second["losses"].isnan())
    assert first["resumed"] == second["resumed"] == 10
    for name, value in first["weights"].items():
        for other in (second["weights"], first["again"], second["again"]):
            assert torch.equal(value, other[name])


def test_one_device_is_plain():
    devices = make_devices(None, 1, "auto", 1, "32-true", None)
    assert type(devices) is OneDevice and devices.gather(3) == [3] and devices.world == 1
    tensor = torch.ones(2)
    assert devices.average(tensor) is tensor and devices.place(tensor) is tensor


def test_spawning_strategies_are_refused():
    with pytest.raises(ValueError, match="'ddp_spawn' spawns its processes.*torchrun"):
        make_devices("cpu", 2, "ddp_spawn", 1, "32-true", None)
