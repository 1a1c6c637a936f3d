# SPDX-License-Identifier: Apache-2.0
"""Ensemble HMC against posteriors that are known, its adaptation, and what it survives."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_latentde.data import load_lynx_hare
from pyro_latentde.errors import CheckpointError, LatentDEError
from pyro_latentde.infer import ensemble_hmc
from pyro_latentde.infer.devices import OneDevice
from pyro_latentde.infer.ensemble_adaptation import TrajectoryLength, halton, stuck_chains
from pyro_latentde.infer.ensemble_chains import EnsembleChains, EnsembleSettings
from pyro_latentde.infer.ensemble_kernel import Points, Scale, transition
from pyro_latentde.models.systems import lotka_volterra

DIM = 5


def gaussian(covariance):
    """Density of N(0, covariance) as the chains ask for it."""
    precision = torch.linalg.inv(covariance)

    def density(u):
        grad = -u @ precision
        return 0.5 * (u * grad).sum(-1), grad, torch.zeros(len(u), dtype=torch.bool), torch.ones(len(u)).long()

    return density


def some_covariance(seed=0):
    a = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T + 0.1 * torch.eye(DIM)


def starts(groups=1, chains=32, seed=1):
    return torch.randn(groups, chains, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(chains):
    while not chains.finished:
        chains.iterate()
    return chains


@pytest.mark.parametrize("dense", [True, False])
def test_moments_of_a_gaussian(dense):
    # 32 x 400 draws; the smallest of many effective sample sizes is about 5000 (dense) or 1200 (diagonal): five
    # standard errors of 2 DIM moments are a false alarm in 1e-5 of seeds
    covariance, size = some_covariance(), 5000 if dense else 1200
    chains = run(EnsembleChains(gaussian(covariance), starts(), EnsembleSettings(150, 400, dense_mass=dense)))
    draws = chains.draws[:, 0].flatten(0, 1)
    sd = covariance.diagonal().sqrt()
    assert (draws.mean(0).abs() < 5 * sd / size**0.5).all()
    assert ((draws.std(0) / sd - 1).abs() < 5 / (2 * size) ** 0.5).all()


def test_wrong_momenta_would_be_seen():
    """The test above has the power to see kinetic energies of another scale."""
    covariance = some_covariance()
    chains = EnsembleChains(gaussian(covariance), starts(), EnsembleSettings(150, 400))
    random = chains._random
    chains._random = lambda: (1.15 * random()[0], random()[1])
    draws = run(chains).draws[:, 0].flatten(0, 1)
    assert ((draws.std(0) / covariance.diagonal().sqrt() - 1).abs() > 5 / (2 * 5000) ** 0.5).any()


def test_leapfrog_is_reversible_and_keeps_the_energy():
    covariance = some_covariance()
    density, scale = gaussian(covariance), Scale(torch.linalg.cholesky(covariance)[None])
    start = Points.at(density, starts())
    noise = torch.randn(start.q.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step, zeros = torch.tensor([0.05], dtype=torch.float64), torch.zeros(1, 32, dtype=torch.float64)
    there = transition(density, start, noise, zeros, scale, step, [20])
    back = transition(density, there.end, -there.momentum, zeros, scale, step, [20])
    assert torch.allclose(back.end.q, start.q, atol=1e-12)
    # in white coordinates the exact flow of a Gaussian is a rotation by the time travelled, 1
    white, white0 = scale.whiten(there.end.q), scale.whiten(start.q)
    assert torch.allclose(white, white0 * np.cos(1.0) + noise * np.sin(1.0), atol=2e-3)


def test_groups_do_not_feel_each_other():
    densities = [gaussian(some_covariance(0)), gaussian(100.0 * some_covariance(1))]

    def both(u):
        parts = [density(rows) for density, rows in zip(densities, u.chunk(2), strict=True)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    together = run(EnsembleChains(both, starts(2), EnsembleSettings(150, 300)))
    sd = [100.0**0.5 * some_covariance(1).diagonal().sqrt(), some_covariance(0).diagonal().sqrt()]
    for group, right in ((1, sd[0]), (0, sd[1])):
        draws = together.draws[:, group].flatten(0, 1)
        assert ((draws.std(0) / right - 1).abs() < 5 / (2 * 3500) ** 0.5).all()


def test_length_is_a_quarter_of_a_period():
    # the criterion's maximum for jitter uniform on (0, 1): sin(2 T) / (2 T) is least at T = 2.25; steps are coarse
    # and shorten what is walked, so T itself lies around it
    chains = run(EnsembleChains(gaussian(some_covariance()), starts(chains=256), EnsembleSettings(300, 1, 0.95)))
    assert 1.3 < chains.lengths[0].length < 3.2
    assert 0.9 < float(chains.stats["acceptance_rate"].mean())


def test_halton_fills_the_interval():
    found = sorted(halton(i) for i in range(31))
    assert np.allclose(found, np.arange(1, 32) / 32)


def test_stuck_chains_are_recognised_and_rescued():
    lp = np.array([-5.0, -6.0, -4.0, -5.5, -900.0, -5.0, -np.inf, -4.5])
    accept = np.array([0.8, 0.8, 0.9, 0.7, 0.8, 0.0, 0.8, 0.8])
    assert stuck_chains(lp, accept, dim=4).tolist() == [False] * 4 + [True, True, True, False]
    assert not stuck_chains(np.full(4, -1.0), np.zeros(4), dim=4).any()  # nobody can help

    def two_wells(u):
        """A mode at 0, and another 60 nats lower and 30 away in each coordinate."""
        near, far = -0.5 * u.square().sum(-1), -0.5 * (u - 30.0).square().sum(-1) - 60.0
        first = near >= far
        grad = torch.where(first[:, None], -u, 30.0 - u)
        return torch.where(first, near, far), grad, torch.zeros_like(first), torch.ones_like(first).long()

    q = starts()
    q[0, :5] += 30.0
    chains = run(EnsembleChains(two_wells, q, EnsembleSettings(100, 50)))
    assert chains.num_rescued >= 5
    assert (chains.draws.abs() < 10).all()


def test_two_modes_of_equal_mass_are_kept():
    def two_wells(u):
        near, far = -0.5 * u.square().sum(-1), -0.5 * (u - 30.0).square().sum(-1)
        first = near >= far
        grad = torch.where(first[:, None], -u, 30.0 - u)
        return torch.where(first, near, far), grad, torch.zeros_like(first), torch.ones_like(first).long()

    q = starts()
    q[0, :16] += 30.0
    chains = run(EnsembleChains(two_wells, q, EnsembleSettings(100, 50, target_accept=0.9)))
    assert chains.num_rescued == 0
    assert int((chains.draws[-1, 0, :, 0] > 15).sum()) == 16


class _Ranks(OneDevice):
    """Two processes in two threads: what they gather they leave for each other."""

    world = 2

    def __init__(self, rank, barrier, board):
        self.rank, self.barrier, self.board = rank, barrier, board

    def gather(self, thing):
        self.board[self.rank] = thing
        self.barrier.wait()
        found = list(self.board)
        self.barrier.wait()
        return found


def test_two_ranks_draw_what_one_draws():
    settings, density = EnsembleSettings(15, 5), gaussian(some_covariance())
    alone = run(EnsembleChains(density, starts(), settings))
    barrier, board, halves = threading.Barrier(2), [None, None], [None, None]

    def work(rank):
        halves[rank] = run(EnsembleChains(density, starts(), settings, devices=_Ranks(rank, barrier, board)))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = torch.cat([half.draws for half in halves], dim=2)
    assert torch.allclose(together, alone.draws, rtol=0, atol=1e-10)


def test_lynx_hare_posterior():
    # reference: posteriordb; bounds of the yardstick, .1 sd of means and 8 % of sds, are 5 - 7 standard errors here
    posterior = ensemble_hmc(lotka_volterra.model, load_lynx_hare(), num_samples=150, progress=False, seed=3)
    found = posterior.summary()
    means = [0.54686, 0.027747, 0.80010, 0.024086, 34.035, 5.936, 0.24806, 0.25102]
    sds = [0.06305, 0.004155, 0.08937, 0.003528, 2.917, 0.531, 0.0433, 0.0436]
    assert (np.abs(found["mean"].to_numpy() - means) < 0.1 * np.array(sds)).all()
    assert (np.abs(found["sd"].to_numpy() / sds - 1) < 0.08).all()
    assert found["ess_bulk"].min() > 2000
    assert found["r_hat"].max() < 1.02  # of 64 x 2 halves of 75 draws
    assert not posterior.stats["diverging"].any()


def decay():
    """A posterior that is quick to sample, with a solve in it."""
    rate = pyro.sample("rate", dist.LogNormal(torch.tensor(0.0, dtype=torch.float64), 1.0))
    pyro.sample("y", dist.Normal(torch.exp(-rate), 0.1), obs=torch.tensor(0.4, dtype=torch.float64))


SMALL = {"num_chains": 8, "num_warmup": 30, "num_samples": 20, "progress": False, "seed": 4}


def test_same_seed_same_draws_and_resume_is_bit_equal(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    whole = ensemble_hmc(decay, **SMALL)
    again = ensemble_hmc(decay, checkpoint=path, **SMALL)
    assert torch.equal(whole["rate"], again["rate"])
    assert not torch.equal(whole["rate"], ensemble_hmc(decay, **{**SMALL, "seed": 5})["rate"])
    path.unlink()
    for stop in (7, 12, 31, 44):  # in warm-up twice, and among the draws twice
        iterate, calls = EnsembleChains.iterate, []

        def some(self, calls=calls, stop=stop, iterate=iterate):
            if self.count >= stop:
                raise KeyboardInterrupt
            iterate(self)

        with monkeypatch.context() as patch:
            patch.setattr(EnsembleChains, "iterate", some)
            with pytest.raises(KeyboardInterrupt):
                ensemble_hmc(decay, checkpoint=path, checkpoint_minutes=0, **SMALL)
    resumed = ensemble_hmc(decay, checkpoint=path, **SMALL)
    assert torch.equal(whole["rate"], resumed["rate"])
    assert all(torch.equal(whole.stats[name], resumed.stats[name]) for name in whole.stats)
    longer = ensemble_hmc(decay, checkpoint=path, **{**SMALL, "num_samples": 30})
    assert torch.equal(longer["rate"][:, :20], whole["rate"])


def test_checkpoints_of_other_runs_are_refused_and_left_alone(tmp_path):
    path = tmp_path / "run.pt"
    ensemble_hmc(decay, checkpoint=path, **SMALL)
    before = path.read_bytes()

    def other():
        pyro.sample("rate", dist.LogNormal(torch.tensor(0.0), 2.0))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(CheckpointError, match="model"):
        ensemble_hmc(other, checkpoint=path, **SMALL)
    with pytest.raises(CheckpointError, match="target_accept"):
        ensemble_hmc(decay, checkpoint=path, target_accept=0.9, **SMALL)
    with pytest.raises(CheckpointError, match="20 draws"):
        ensemble_hmc(decay, checkpoint=path, **{**SMALL, "num_samples": 10})
    assert path.read_bytes() == before
    half = before[: len(before) // 2]
    path.write_bytes(half)
    with pytest.raises(CheckpointError, match="damaged"):
        ensemble_hmc(decay, checkpoint=path, **SMALL)
    assert path.read_bytes() == half


SLOW = """
import sys, torch, pyro, pyro.distributions as dist
from pyro_latentde import infer
torch.set_num_threads(1)
def model():
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.sum(), 0.1), obs=torch.tensor(0.4))
posterior = getattr(infer, sys.argv[3])(model, num_chains=8, num_warmup=40, num_samples=int(sys.argv[2]),
                                        progress=False, checkpoint=sys.argv[1], checkpoint_minutes=0)
torch.save(posterior["x"], sys.argv[1] + ".draws")
"""


def _start(path, num_samples, sampler):
    return subprocess.Popen([sys.executable, "-c", SLOW, str(path), str(num_samples), sampler])


def _draws(path, sampler):
    """Draws of each chain in a checkpoint, (chain, draw, 3), as few as the shortest chain has."""
    saved = torch.load(path, weights_only=True)["state"]["chains"]
    if sampler == "ensemble_hmc":
        assert saved["counts"]["count"] > 0
        return saved["draws"][:, 0].transpose(0, 1)
    shortest = min(chain["count"] for chain in saved)
    return torch.stack([chain["positions"][40:shortest] for chain in saved]) if shortest > 40 else torch.zeros(8, 0, 3)


@pytest.mark.parametrize(
    ("sampler", "number"),
    [("ensemble_hmc", signal.SIGKILL), ("ensemble_hmc", signal.SIGTERM), ("nuts", signal.SIGKILL)],
)
def test_a_killed_run_loses_nothing_before_its_checkpoint(tmp_path, sampler, number):
    path = tmp_path / "run.pt"
    process = _start(path, 100_000, sampler)
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(process.pid, number)
    code = process.wait(timeout=120)
    draws = _draws(path, sampler)
    if number == signal.SIGTERM and draws.shape[1]:  # valid draws came back; all of them are in the file
        assert code == 0
        assert torch.load(str(path) + ".draws", weights_only=True).shape == draws.shape
    assert _start(path, draws.shape[1] + 50, sampler).wait(timeout=120) == 0
    resumed = torch.load(str(path) + ".draws", weights_only=True)
    assert torch.equal(resumed[:, : draws.shape[1]], draws.float())


def test_settings_are_checked():
    for name, value in (("num_chains", 3), ("num_samples", 0), ("target_accept", 1.0), ("max_num_steps", 0)):
        with pytest.raises(LatentDEError, match=name):
            ensemble_hmc(decay, **{**SMALL, name: value})

    def improper():
        pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))

    with pytest.raises(LatentDEError, match="proper prior"):
        ensemble_hmc(improper, **SMALL)

    def flat():
        pyro.sample("x", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1e30))

    with pytest.raises(LatentDEError, match="improper"):
        ensemble_hmc(flat, start={"x": torch.tensor(0.0)}, **SMALL)


def test_length_needs_at_least_two_moving_chains():
    length = TrajectoryLength(1.0)
    x = torch.zeros(4, 2, dtype=torch.float64)
    length.update(x, x * torch.nan, x, torch.zeros(4), 1.0)
    assert length.length == 1.0


RANKS = """
import sys, torch, pyro, pyro.distributions as dist
from pyro_latentde.infer import ensemble_hmc
torch.set_num_threads(1)
def model(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.sum(), 0.3), obs=y)
posterior = ensemble_hmc(model, torch.tensor(0.4, dtype=torch.float64), num_chains=8, num_warmup=15, num_samples=5,
                         progress=False, **eval(sys.argv[2]))
torch.save(posterior["x"], sys.argv[1])
"""


def test_two_processes_draw_what_one_draws(tmp_path):
    """Gloo this time, started as torchrun starts them; 20 iterations."""
    alone = [sys.executable, "-c", RANKS, str(tmp_path / "alone"), "{}"]
    assert subprocess.run(alone, timeout=240, check=False).returncode == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    base = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    base |= {"PYTHONWARNINGS": "ignore", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    ddp = "{'devices': 2, 'accelerator': 'cpu', 'strategy': 'ddp'}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(tmp_path / f"rank{rank}"), ddp],
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "x"},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    draws = torch.load(tmp_path / "alone", weights_only=True)
    for rank in range(2):
        both = torch.load(tmp_path / f"rank{rank}", weights_only=True)
        assert torch.allclose(both, draws, rtol=0, atol=1e-10)


def test_ranks_that_stopped_at_different_iterations_cannot_go_on_together(tmp_path, monkeypatch):
    path = tmp_path / "run"
    ensemble_hmc(decay, checkpoint=path, **SMALL)
    before = path.read_bytes()

    class Behind(OneDevice):
        """Tells of another rank that is an iteration behind."""

        def gather(self, thing):
            return [thing, thing - 1] if isinstance(thing, int) else [thing]

    monkeypatch.setattr("pyro_latentde.infer.ensemble_run.make_devices", lambda *args: Behind())
    with pytest.raises(CheckpointError, match="the ranks stopped after .* iterations"):
        ensemble_hmc(decay, checkpoint=path, **{**SMALL, "num_samples": 30})
    assert path.read_bytes() == before
