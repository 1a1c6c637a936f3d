# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: a resumed run is the same run to the bit, a killed write leaves a good file, strangers are refused."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_ode import network_pair, smooth_series
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_latentde.data.series import Series
from pyro_latentde.errors import CheckpointError
from pyro_latentde.infer import Fit, Sleep, checkpoint, fit_svi, schedules
from pyro_latentde.infer.svi_loop import CHECKPOINT
from pyro_latentde.models import GOKU

SETTINGS = {
    "num_steps": 24,
    "batch_size": 5,
    "window": schedules.progressive(3, 10, 20),
    "kl_weight": schedules.cyclic(2, 0.5, 20),
    "learning_rate": 0.02,
    "eval_every": 4,
    "progress": False,
    "clip": "auto",
}


def run(series=None, pair=None, **options):
    series = smooth_series() if series is None else series
    held = options.pop("heldout", series[:7])
    return fit_svi(*(pair or network_pair()), series, heldout=held, **(SETTINGS | options))


def noisy_pair(at):
    """A model with noise from NumPy and Python too, that asks for an end, as Ctrl-C does, at one of its gradients."""
    model, guide = network_pair()
    gradients = []

    class Noisy(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.inner = model
            self.strength = torch.nn.Parameter(torch.tensor(0.1).double())

        def forward(self, series):
            shock = 1e4 if np.random.rand() < 0.2 else 1.0  # to be clipped by the norms of earlier steps
            pyro.factor("noise", self.strength * shock * (np.random.rand() + random.random()))
            self.inner(series)
            gradients.extend([1] * torch.is_grad_enabled())
            if torch.is_grad_enabled() and len(gradients) == at:
                os.kill(os.getpid(), signal.SIGINT)

    return Noisy(), guide


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"scheduler": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)},
        {"optimizer": "sgd", "learning_rate": 1e-4, "keep": "last", "num_particles": 2},
        {"batch_size": None, "window": None},
    ],
    ids=["all", "scheduler", "sgd", "full data"],
)
def test_resumed_is_uninterrupted_to_the_bit(tmp_path, extra):
    def go(name, at):
        return run(pair=noisy_pair(at), checkpoint=tmp_path / name, log=tmp_path / name, **extra)

    random.seed(3), np.random.seed(3)
    whole = go("whole", at=None)
    random.seed(3), np.random.seed(3)
    parts = [go("parts", at=8)]
    for at in (9, None):
        random.seed(99), np.random.seed(99), torch.manual_seed(99)
        parts.append(go("parts", at=at))
    lengths = [len(fit.losses) for fit in parts]
    assert lengths == ([8, 17, 24] if "num_particles" not in extra else [4, 9, 24])  # two gradients for a step
    assert [fit.attrs.get("resumed_at") for fit in parts] == [None, *lengths[:2]]
    resumed = parts[-1]
    assert torch.equal(resumed.losses, whole.losses)
    assert all(torch.equal(resumed.weights[name], whole.weights[name]) for name in whole.weights)
    buffers = zip(resumed.model.named_buffers(), whole.model.named_buffers(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in buffers)
    assert resumed.attrs["heldout_elbo"] == whole.attrs["heldout_elbo"]
    assert resumed.attrs.get("best_step") == whole.attrs.get("best_step")
    one, two = ((tmp_path / name / "training.csv").read_text().splitlines() for name in ("whole", "parts"))
    without_seconds = [[line.split(",")[:1] + line.split(",")[2:] for line in lines] for lines in (one, two)]
    assert without_seconds[0] == without_seconds[1] and len(one) == 25
    content = torch.load(tmp_path / "parts" / CHECKPOINT, weights_only=True)
    assert len(content["losses"]) == 24


def test_a_finished_run_is_only_read(tmp_path):
    first = run(checkpoint=tmp_path)
    stamp = (tmp_path / CHECKPOINT).read_bytes()
    again = run(checkpoint=tmp_path, pair=network_pair(seed=5))
    assert torch.equal(first.losses, again.losses) and again.attrs["resumed_at"] == 24
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)
    assert (tmp_path / CHECKPOINT).read_bytes() == stamp


def test_checkpointing_changes_nothing(tmp_path):
    plain, saved = run(), run(checkpoint=tmp_path, checkpoint_every=0.0)
    assert torch.equal(plain.losses, saved.losses)
    assert all(torch.equal(plain.weights[name], saved.weights[name]) for name in plain.weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"series": smooth_series(seed=2)}, r"data [0-9a-f]{16} \(now [0-9a-f]{16}\)"),
        ({"heldout": smooth_series(seed=2)}, "heldout [0-9a-f]{16} "),
        ({"learning_rate": 0.03}, r"learning_rate 0.02 \(now 0.03\)"),
        ({"kl_weight": schedules.linear(0.0, 1.0, 9)}, r"kl_weight cyclic\(2, 0.5, 20, 0.0, 1.0\) \(now linear"),
        ({"num_steps": 25}, r"num_steps 24 \(now 25\)"),
        ({"seed": 1}, r"seed 0 \(now 1\)"),
        ({"pair": network_pair(dtype=torch.float32), "series": smooth_series().to(torch.float32)}, "torch.float32"),
    ],
)
def test_another_run_is_refused(tmp_path, change, message):
    run(checkpoint=tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(CheckpointError, match=f"{message}(.|\n)*Give another folder"):
        run(checkpoint=tmp_path, **change)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_damaged_and_foreign_files(tmp_path):
    run(checkpoint=tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="damaged"):
        run(checkpoint=tmp_path)
    torch.save({"format": "something else"}, path)
    with pytest.raises(CheckpointError, match="found 'something else'"):
        run(checkpoint=tmp_path)
    torch.save({"code": print}, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(checkpoint=tmp_path)


KILLED = """
import os, sys, time
import torch
torch.set_num_threads(1)  # as in these tests: the order of sums depends on it
sys.path.insert(0, {here!r})
from linear_ode import network_pair, smooth_series
from pyro_latentde.infer import checkpoint, fit_svi

real, calls = os.fsync, []

def slow(number):
    calls.append(1)
    if len(calls) == 4:  # all is in the temporary file, which has not its name yet
        os.truncate(number, 3000)
        print("writing", flush=True)
        time.sleep(600)
    real(number)

checkpoint.os.fsync = slow
fit_svi(*network_pair(), smooth_series(), num_steps=50, batch_size=5, checkpoint={folder!r}, checkpoint_every=0.0,
        progress=False)
"""


def test_a_kill_while_writing_leaves_the_last_checkpoint(tmp_path):
    code = KILLED.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    command = [sys.executable, "-W", "ignore", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert len(list(tmp_path.glob(".*.partial"))) == 1
    content = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert len(content["losses"]) == 3
    options = {"num_steps": 50, "batch_size": 5, "progress": False}
    resumed = fit_svi(*network_pair(), smooth_series(), checkpoint=tmp_path, **options)
    assert resumed.attrs["resumed_at"] == 3 and not list(tmp_path.glob(".*.partial"))
    assert torch.equal(resumed.losses, fit_svi(*network_pair(), smooth_series(), **options).losses)


def test_fingerprints():
    a = torch.arange(4.0)
    same = checkpoint.fingerprint((a, {"x": [1, None]}), np.ones(2))
    assert same == checkpoint.fingerprint((a.clone(), {"x": [1, None]}), np.ones(2))
    others = [a.double(), a.reshape(2, 2), a + 1e-6]
    assert len({same, *(checkpoint.fingerprint((b, {"x": [1, None]}), np.ones(2)) for b in others)}) == 4
    series = smooth_series()
    gap = series.mask.clone()
    gap[0, 0, 0] = False
    assert checkpoint.fingerprint(series) == checkpoint.fingerprint(smooth_series())
    assert checkpoint.fingerprint(series) != checkpoint.fingerprint(type(series)(series.times, series.values, gap))
    assert checkpoint.describe(schedules.linear).startswith("pyro_latentde.infer.schedules.linear ")
    assert "0x" not in checkpoint.describe(object())


def constant_rate(rate, extra=None):
    return lambda step, power=1.0: rate**power + (extra or 0.0)


def itself(step):
    def inner(step):
        return inner(step - 1) if step else 0.5

    return inner


def different():
    return [
        constant_rate(0.1),
        constant_rate(0.2),
        constant_rate(torch.tensor(0.1)),
        constant_rate(0.1, 1.0),
        lambda step: 0.1,
        lambda step: 0.2,
        lambda step, by=1: 0.1,
        lambda step, by=2: 0.1,
        lambda step: step in {"a", "b", "c", "d"},
        lambda step: step in {"a", "b", "c", "e"},
        itself(3),
        functools.partial(constant_rate(0.1), power=2),
        functools.partial(constant_rate(0.1), power=3),
        pyro.optim.Adam({"lr": 0.01}),
        pyro.optim.Adam({"lr": 0.02}),
        pyro.optim.SGD({"lr": 0.02}),
        Trace_ELBO(1),
        Trace_ELBO(8),
        Sleep(),
        Sleep(plate="animals"),
        [lambda step: 0.1],
        [lambda step: 0.2],
        {"a": lambda step: 0.1},
        schedules.warmup(3, lambda step: 0.1),
        schedules.warmup(3, lambda step: 0.2),
    ]


def test_settings_are_told_apart_and_recognised_in_another_process():
    texts = [checkpoint.describe(thing) for thing in different()]
    assert len(set(texts)) == len(texts) and not any("0x" in text for text in texts)
    code = "import json, test_checkpoint as t; print(json.dumps([*map(t.checkpoint.describe, t.different())]))"
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(here)}
    found = subprocess.check_output([sys.executable, "-W", "ignore", "-c", code], env=environment)
    assert json.loads(found) == texts


def test_an_optimizer_with_another_rate_is_another_run(tmp_path):
    run(checkpoint=tmp_path, optimizer=pyro.optim.Adam({"lr": 0.01}))
    run(checkpoint=tmp_path, optimizer=pyro.optim.Adam({"lr": 0.01}))
    for change in ({"lr": 0.02}, {"lr": 0.01, "weight_decay": 0.1}):
        with pytest.raises(CheckpointError, match="optimizer .*lr"):
            run(checkpoint=tmp_path, optimizer=pyro.optim.Adam(change))


def test_weights_for_use(tmp_path):
    fit = run()
    path = fit.save(tmp_path / "weights.pt")
    assert torch.load(path, weights_only=True)["attrs"]["best_step"] == fit.attrs["best_step"]
    series = smooth_series()
    for args in ((), (series,)):
        loaded = Fit.load(path, *network_pair(seed=7), *args)
        given = {"slope": torch.tensor(0.3).double()}
        assert torch.equal(loaded.log_evidence(series, 5, given=given), fit.log_evidence(series, 5, given=given))
        assert not list(pyro.get_param_store())
    assert torch.equal(loaded.posterior(3)["code"], fit.posterior(3)["code"])
    assert "optimizer" not in torch.load(path, weights_only=True)
    with pytest.raises(CheckpointError, match=r"weight model.network.3.weight \(3, 8\).*\(now \(4, 8\)"):
        Fit.load(path, network_pair(values=4)[0], network_pair()[1])
    with pytest.raises(CheckpointError, match="give the data"):
        Fit.load(path, network_pair()[0], lambda series: None)


def test_weights_know_the_priors_they_were_trained_with(tmp_path):
    """Their shapes are the same, and what they say is not: a head works in the units and the support of its prior."""

    def pair(theta):
        start = dist.Normal(torch.zeros(1), 2.0).to_event(1)
        return GOKU(lambda t, z, p: -p["rate"] * z, start, {"rate": theta}, values=3, width=8, guide={"hidden": 4})

    torch.manual_seed(0)
    series = Series.from_tensors(torch.arange(4.0), torch.rand(5, 4, 3))
    first, same, other = pair(dist.Uniform(1.0, 2.0)), pair(dist.Uniform(1.0, 2.0)), pair(dist.LogNormal(0.4, 0.3))
    fit = fit_svi(first.model, first.guide, series, num_steps=2, progress=False)
    path = fit.save(tmp_path / "weights.pt")
    Fit.load(path, same.model, same.guide, series)
    with pytest.raises(CheckpointError, match=r"prior of theta .*Interval.*GreaterThan.*Give the guide the priors"):
        Fit.load(path, other.model, other.guide, series)


def test_weights_of_functions_and_autoguides(tmp_path):
    def model(y):
        noise = pyro.param("noise", torch.tensor(0.7).double(), constraint=dist.constraints.positive)
        mean = pyro.sample("mean", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, noise), obs=y)

    y = torch.randn(20).double() + 1
    fit = fit_svi(model, AutoNormal, y, num_steps=50, progress=False)
    path = fit.save(tmp_path / "weights.pt")
    loaded = Fit.load(path, model, AutoNormal(model), y)
    assert loaded.elbo(7) == fit.elbo(7)
    assert torch.equal(loaded.posterior(9).predict().observations["y"], fit.posterior(9).predict().observations["y"])
    assert torch.equal(loaded.params["params"]["noise"], fit.params["params"]["noise"])


def test_interval_between_checkpoints(tmp_path):
    model, guide = network_pair()
    sizes = []

    def slow(series):
        sizes.append((tmp_path / CHECKPOINT).exists())
        time.sleep(0.01)
        model(series)

    fit_svi(slow, guide, smooth_series(), num_steps=20, checkpoint=tmp_path, checkpoint_every=0.001, progress=False)
    assert True in sizes and False in sizes[5:]


def test_long_starts_are_told_apart_by_all_of_their_numbers():
    """Their texts are the same: PyTorch leaves out the middle."""
    one, other = torch.zeros(5000), torch.zeros(5000)
    other[2500] = 1.0
    assert repr({"x": one}) == repr({"x": other})
    assert checkpoint.describe({"x": one}) != checkpoint.describe({"x": other})
    assert checkpoint.describe([one]) != checkpoint.describe([other])
    assert checkpoint.describe({"x": one}) == checkpoint.describe({"x": torch.zeros(5000)})
