# SPDX-License-Identifier: Apache-2.0
"""Calibration accepts right samplers, and rejects wrong ones."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from benchmarks.calibration_study import coarse_sgld, momenta_doubled
from pyro_latentde.analysis import calibration
from pyro_latentde.analysis.rank_tests import anderson_darling, rank_p_value, uniform_band
from pyro_latentde.analysis.sbc import _meaning
from pyro_latentde.errors import LatentDEError, SolveError
from pyro_latentde.sites.ode_site import ode

TIMES = torch.linspace(0.0, 3.0, 6, dtype=torch.float64)
LEVEL = 1e-3  # false alarms of each test of a right sampler; seeds are fixed


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def decay(y):
    """dx/dt = -k x, one rate and a noise, six times."""
    k = pyro.sample("k", dist.LogNormal(tensor(0.0), 0.5))
    noise = pyro.sample("noise", dist.LogNormal(tensor(-2.0), 0.3))
    z = ode("z", lambda t, x, p: -p["k"] * x, tensor([2.0]), TIMES, {"k": k})
    pyro.sample("y", dist.Normal(z[:, 0], noise).to_event(1), obs=y)


SMALL = {"num_replications": 128, "num_chains": 8, "num_warmup": 60, "num_samples": 24, "num_ranks": 31, "batch": 64}


@pytest.mark.parametrize("method", ["ensemble_hmc", "nuts"])
def test_right_samplers_pass(method):
    smaller = {"num_chains": 2, "num_samples": 60} if method == "nuts" else {}
    found = calibration(decay, tensor([0.0] * 6), method=method, **{**SMALL, **smaller})
    assert found.ranks.shape == (128, 2)
    assert found.passed(LEVEL), str(found)
    assert "no sign" in str(found)
    # 128 replications: a coverage of .8 has a standard error of .035
    assert np.abs(found.table["coverage80"] - 0.8).max() < 4 * 0.035


@pytest.mark.parametrize("wrong", [momenta_doubled, coarse_sgld])
def test_wrong_samplers_are_rejected(wrong):
    found = calibration(decay, tensor([0.0] * 6), method=wrong, **SMALL)
    assert not found.passed(LEVEL)
    assert "MISCALIBRATED" in str(found)
    assert found.facts["method"] == wrong.__name__


COARSE = {"method": "euler", "step_size": 1.0}


def test_a_coarse_solver_is_rejected_by_data_of_an_exact_one():
    """From time to time Euler makes 1 - .6 k of exp(-.6 k): rates come out too small, by more than their error."""
    small = {"num_replications": 32, "num_chains": 4, "num_warmup": 40, "num_samples": 12, "num_ranks": 15, "batch": 32}
    right, wrong = (calibration(decay, tensor([0.0] * 6), solver=s, **small) for s in (None, COARSE))
    assert right.passed(LEVEL), str(right)
    assert not wrong.passed(LEVEL), str(wrong)
    assert wrong.table["bias"]["k"] > 0.9  # truths above nearly all draws
    assert wrong.facts["solver"] == COARSE and right.facts["solver"] == {}


def test_the_solver_of_the_fits_reaches_other_processes():
    tiny = {**SMALL, "num_replications": 8, "batch": 4, "num_warmup": 30, "num_samples": 8, "num_ranks": 15}
    found = calibration(decay, tensor([0.0] * 6), num_jobs=2, solver=COARSE, **tiny)
    # the mean of 8 uniform ranks is above .8 twice in 1000 times
    assert found.table["bias"]["k"] > 0.8
    with pytest.raises(SolveError, match="Did you mean 'method'"):
        calibration(decay, tensor([0.0] * 6), solver={"methd": "euler"}, **tiny)


def test_processes_give_the_ranks_of_one():
    small = {**SMALL, "num_replications": 8, "batch": 4, "num_warmup": 20, "num_samples": 8, "num_ranks": 15}
    one = calibration(decay, tensor([0.0] * 6), **small)
    two = calibration(decay, tensor([0.0] * 6), num_jobs=2, **small)
    assert (one.ranks.to_numpy() == two.ranks.to_numpy()).mean() > 0.9  # rounding of other threads may move a rank
    assert one.ranks.columns.tolist() == ["k", "noise"]


def test_draws_that_cannot_be_simulated_are_replaced():
    def explosive(y):
        k = pyro.sample("k", dist.LogNormal(tensor(0.0), 1.0))
        z = ode("z", lambda t, x, p: p["k"] * x**2, tensor([0.5]), TIMES, {"k": k})  # infinite at t = 2 / k
        pyro.sample("y", dist.Normal(z[:, 0], 0.1).to_event(1), obs=y)

    found = calibration(explosive, tensor([0.0] * 6), **{**SMALL, "num_replications": 32, "batch": 32})
    # P(k < 2 / 3) = .343: of 96 draws or more, two thirds fail
    assert found.num_failed > 40
    assert "could not be simulated" in str(found)


def test_statistic_and_p_value():
    counts = np.array([[2, 2, 2], [6, 0, 0]])
    # by hand: below 2, 4 of 6 at q = 1/3, 2/3; and 6, 6
    assert np.allclose(anderson_darling(counts), [0.0, (16 / (6 * 2 / 9) + 4 / (6 * 2 / 9)) / 3])
    rng = np.random.default_rng(0)
    p = np.array([rank_p_value(rng.integers(0, 16, 64), 15) for _ in range(400)])
    # p-values of uniform ranks are uniform: 400 of them, shares at three levels within five standard errors
    for level in (0.05, 0.2, 0.5):
        assert abs((p < level).mean() - level) < 5 * np.sqrt(level * (1 - level) / 400)
    band = uniform_band(64, 15)
    inside = 0
    for _ in range(400):
        share = np.cumsum(np.bincount(rng.integers(0, 16, 64), minlength=16)) / 64 - np.arange(1, 17) / 16
        inside += bool(((share >= band[0] - 1e-9) & (share <= band[1] + 1e-9)).all())
    assert abs(inside / 400 - 0.99) < 5 * np.sqrt(0.99 * 0.01 / 400)


def test_picture_shows_all_scalars():
    found = calibration(decay, tensor([0.0] * 6), **{**SMALL, "num_replications": 16, "batch": 16})
    figure = found.plot()
    assert [axis.get_title() for axis in figure.axes[:2]] == ["k", "noise"]


def test_bad_input():
    y = tensor([0.0] * 6)
    with pytest.raises(LatentDEError, match="num_ranks=1000"):
        calibration(decay, y, num_ranks=1000)
    with pytest.raises(LatentDEError, match="ensemble_hmc"):
        calibration(decay, y, method="gibbs")

    def nothing_observed():
        pyro.sample("k", dist.Normal(tensor(0.0), 1.0))

    with pytest.raises(LatentDEError, match="observes nothing"):
        calibration(nothing_observed, **SMALL)


@pytest.mark.parametrize(
    ("bias", "spread", "word"), [(0.1, 1.5, "below"), (0.8, 1.2, "above"), (0.5, 1.3, "narrow"), (0.52, 0.7, "wide")]
)
def test_verdict_names_the_larger_fault(bias, spread, word):
    assert word in _meaning("k", {"bias": bias, "spread": spread})
