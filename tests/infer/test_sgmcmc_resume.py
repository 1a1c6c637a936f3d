# SPDX-License-Identifier: Apache-2.0
"""Stochastic-gradient samplers go on where a checkpoint left them, bit for bit."""

import signal

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_latentde as lde
from pyro_latentde.errors import CheckpointError, LatentDEError
from pyro_latentde.infer import psgld, schedules, sghmc, sgld
from pyro_latentde.infer.sgmcmc_chains import Chains

ZERO = torch.zeros((), dtype=torch.float64)
SETTINGS = {"num_chains": 3, "num_warmup": 15, "num_samples": 12, "thinning": 3, "progress": False, "seed": 4}
SETTINGS["start"] = {"level": torch.zeros(2)}
TOTAL = 15 + 12 * 3
SAMPLERS = {sgld: 0.05, psgld: 0.5, sghmc: 0.05}
SERIES = lde.Series.from_tensors(torch.arange(3.0).double(), torch.linspace(-1, 2, 15).double().reshape(5, 3, 1))


def model(series):
    """Normal levels whose "solve" fails where their sum is above .8, so that steps are undone."""
    level = pyro.sample("level", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    failed = level.sum() > 0.8
    z = torch.where(failed, torch.nan, level.sum()).reshape(1, 1)
    infer = {"_deterministic": True, "lde_ode": {"status": failed.long(), "n_steps": torch.full((), 4)}}
    pyro.sample("z", dist.Delta(z, event_dim=2).mask(False), obs=z, infer=infer)
    with lde.series_plate(series):
        lde.observe("obs", dist.Normal(z[..., None] * series.times[:, :, None], 2.0), series)


def run(sampler, *args, **changes):
    return sampler(model, *(args or (SERIES,)), **({"step_size": SAMPLERS[sampler]} | SETTINGS | changes))


def interrupt(patch, action, steps):
    """Do something before the step of this number of the run that follows."""
    calls, step = [], Chains.step

    def counted(self, evaluate):
        calls.append(0)
        if len(calls) == steps:
            action()
        step(self, evaluate)

    patch.setattr(Chains, "step", counted)


def fail():
    raise KeyboardInterrupt


def assert_equal(one, two):
    assert torch.equal(one["level"], two["level"])
    assert all(torch.equal(one.stats[name], two.stats[name]) for name in one.stats)
    facts = [{name: fact for name, fact in p.attrs.items() if name != "sampling_time"} for p in (one, two)]
    assert facts[0] == facts[1]


def counts(text):
    return [line.split("gradients; ")[1] for line in text.splitlines() if "steps undone, " in line]


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_interrupted_and_uninterrupted_runs_are_bit_equal(sampler, batch_size, tmp_path, monkeypatch, caplog):
    path = tmp_path / "run.pt"
    whole = run(sampler, batch_size=batch_size)
    assert whole.stats["diverging"].any() and not whole.stats["diverging"].all()
    monkeypatch.setattr("pyro_latentde.infer.sgmcmc_chains._NUMBERS_AT_ONCE", 3 * 2 * 8)  # blocks of eight steps
    for steps in (3, 14, 20):  # of each attempt: in warm-up, at its end, and among the draws
        with monkeypatch.context() as patch:
            interrupt(patch, fail, steps)
            with pytest.raises(KeyboardInterrupt):
                run(sampler, batch_size=batch_size, checkpoint=path, checkpoint_minutes=0)
    resumed = run(sampler, batch_size=batch_size, checkpoint=path)
    assert_equal(whole, resumed)
    assert len(set(counts(caplog.text))) == 1 and len(counts(caplog.text)) == 2
    longer = run(sampler, batch_size=batch_size, checkpoint=path, num_samples=20)
    assert torch.equal(longer["level"][:, :12], whole["level"])
    assert_equal(longer, run(sampler, batch_size=batch_size, num_samples=20))


@pytest.mark.parametrize(
    "schedule", ["polynomial", "cyclical", {"schedule": schedules.exponential(0.05, 0.01, 50), "step_size": None}]
)
def test_falling_steps_go_on_in_the_same_run_only(schedule, tmp_path, monkeypatch):
    path, changes = tmp_path / "run.pt", schedule if isinstance(schedule, dict) else {"schedule": schedule}
    whole = run(sgld, **changes)
    with monkeypatch.context() as patch:
        interrupt(patch, fail, 30)
        with pytest.raises(KeyboardInterrupt):
            run(sgld, checkpoint=path, checkpoint_minutes=0, **changes)
    assert_equal(whole, run(sgld, checkpoint=path, **changes))
    with pytest.raises(CheckpointError, match="num_samples 12 .now 13.*left as it is"):
        run(sgld, checkpoint=path, **changes, num_samples=13)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_written(number, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    whole = run(sghmc, batch_size=2, start=None)
    with monkeypatch.context() as patch:
        interrupt(patch, lambda: signal.raise_signal(number), 6)
        with pytest.raises(LatentDEError, match="interrupted at step 6 of 51, before the first draw"):
            run(sghmc, batch_size=2, start=None, checkpoint=path)
    with monkeypatch.context() as patch:
        interrupt(patch, lambda: signal.raise_signal(number), 20)
        part = run(sghmc, batch_size=2, start=None, checkpoint=path)
    assert part.attrs["interrupted"] and part.num_draws == 3 and part.attrs["num_gradients"] == 3 * 26
    assert torch.equal(part["level"], whole["level"][:, :3])
    assert_equal(whole, run(sghmc, batch_size=2, start=None, checkpoint=path))


def test_a_finished_run_takes_no_steps(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    whole = run(psgld, batch_size=2, checkpoint=path)
    interrupt(monkeypatch, fail, 1)
    assert_equal(whole, run(psgld, batch_size=2, checkpoint=path))


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    path = tmp_path / "run.pt"
    run(sgld, checkpoint=path)
    before = path.read_bytes()
    later = lde.Series.from_tensors(SERIES.times + 1.0, SERIES.values)

    def other(series):
        model(series)

    for changes, message in (
        ({"seed": 5}, "seed 4 .now 5."),
        ({"num_warmup": 14}, "num_warmup 15 .now 14."),
        ({"thinning": 2}, "thinning 3 .now 2."),
        ({"num_chains": 2}, "num_chains 3 .now 2."),
        ({"batch_size": 2}, "batch_size None .now 2."),
        ({"step_size": 0.01}, "step_size 0.05 .now 0.01."),
        ({"schedule": "polynomial"}, "schedule constant .now polynomial."),
        ({"temperature": 2.0}, "temperature 1.0 .now 2.0."),
        ({"metric": torch.ones(2)}, "kernel .*Langevin"),
        ({"start": None}, "start .* .now None."),
        ({"num_samples": 5}, "holds 12 draws of each chain, and num_samples=5"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(sgld, checkpoint=path, **changes)
    with pytest.raises(CheckpointError, match="sampler sgld .now sghmc."):
        run(sghmc, checkpoint=path)
    with pytest.raises(CheckpointError, match="arguments"):
        run(sgld, later, checkpoint=path)
    with pytest.raises(CheckpointError, match="model .*other"):
        sgld(other, SERIES, step_size=0.05, checkpoint=path, **SETTINGS)
    assert path.read_bytes() == before
    path.write_bytes(before[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        run(sgld, checkpoint=path)
    assert path.read_bytes() == before[:1000]


@pytest.mark.parametrize(
    ("sampler", "changes"), [(psgld, {"decay": 0.9}), (sghmc, {"friction": 0.2}), (sghmc, {"gradient_variance": 0.1})]
)
def test_settings_of_one_sampler_count_too(sampler, changes, tmp_path):
    path = tmp_path / "run.pt"
    run(sampler, checkpoint=path)
    with pytest.raises(CheckpointError, match="kernel .* .now "):
        run(sampler, checkpoint=path, **changes)
