# SPDX-License-Identifier: Apache-2.0
"""Solver checks: a crude solver is caught and its error corrected, a fine one passes."""

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_latentde as lde
from pyro_latentde import Posterior
from pyro_latentde.analysis import solver_check
from pyro_latentde.errors import LatentDEError
from pyro_latentde.posterior import inspect_model

TIMES = torch.linspace(0, 10, 11).double()
DATA = TIMES.cos() + 0.05 * torch.randn(11, generator=torch.Generator().manual_seed(0)).double()
START = torch.tensor([1.0, 0.0]).double()
GRID = torch.linspace(0.5, 1.5, 200_001).double()


def oscillator(data=None):
    w = pyro.sample("w", dist.LogNormal(torch.zeros(()).double(), 0.2))
    z = lde.ode("z", lambda t, y, w: torch.stack([y[1], -w * w * y[0]]), START, TIMES, w)
    pyro.sample("obs", dist.Normal(z[..., 0], 0.05).to_event(1), obs=data)


def log_density(w, states):
    """By hand, in the coordinate w, up to a constant."""
    prior = -0.5 * (w.log() / 0.2) ** 2 - w.log()
    return prior - 0.5 * (((DATA - states) / 0.05) ** 2).sum(-1)


def exact_states(w):
    return (w[:, None] * TIMES).cos()


def euler_states(w, step):
    """Each step multiplies q + i p/w by 1 - i w h, so its real part is known."""
    factor = torch.complex(torch.ones_like(w), -w * step)
    return (factor[:, None] ** (TIMES / step).round()).real


def sample(log_p, num, seed):
    """Exact draws from a density on the grid."""
    weights = (log_p - log_p.max()).exp()
    index = torch.multinomial(weights, num, replacement=True, generator=torch.Generator().manual_seed(seed))
    return GRID[index], float((weights * GRID).sum() / weights.sum())


def posterior(states, num=400, stats=None, **settings):
    w, mean = sample(log_density(GRID, states), num, seed=1)
    with lde.solver(**settings):
        sites = inspect_model(oscillator, DATA)
    return Posterior(
        samples={"w": w.reshape(2, -1)}, stats=stats or {}, sites=sites, model=oscillator, args=(DATA,)
    ), mean


def test_a_tight_solver_passes():
    fine, _ = posterior(exact_states(GRID))
    report = solver_check(fine)
    assert report.pareto_k < 0.5 and report.reliable and report.suggested == {}
    assert "insensitive to the solver's tolerance" in str(report)
    assert list(report.table.index) == ["tsit5, rtol=1e-09, atol=1e-11", "dopri8, rtol=1e-09, atol=1e-11"]
    assert report.changes.shape == (2, 200)
    # a tolerance of 1e-6 with residuals of .05 over 11 observations: changes of the order 1e-4 at most
    assert 0 < report.table["max_change"].max() < 1e-3


def test_a_crude_fixed_step_is_caught():
    with lde.solver(method="euler", step_size=0.2):
        crude = lde.infer.nuts(oscillator, DATA, num_samples=100, num_warmup=200, seed=0, progress=False)
    report = solver_check(crude)
    assert report.pareto_k > 0.7 and not report.reliable
    assert f"Pareto k = {report.pareto_k:.2g}: the solver's error changes the posterior; rerun inside" in str(report)


def test_the_change_is_measured_from_the_density_that_was_sampled():
    """Draws from Euler's posterior, made by hand with the density that a sampler would keep."""
    crude, _ = posterior(euler_states(GRID, 0.02))
    w = crude.samples["w"].flatten()
    lp = log_density(w, euler_states(w, 0.02)) + w.log()
    stats, facts = {"lp": lp.reshape(2, -1)}, {"inference": "nuts"}
    report = solver_check(replace(crude, stats=stats, attrs=facts), num_draws=400)
    assert not report.reliable
    expected = log_density(w, exact_states(w)) - log_density(w, euler_states(w, 0.02))
    change = torch.from_numpy(report.changes[-1])
    torch.testing.assert_close(change - change.mean(), expected - expected.mean(), rtol=0, atol=1e-5)
    # the same weights by hand
    weights = np.exp(expected.numpy() - expected.numpy().max())
    assert report.means.loc["w", "reweighted"] == pytest.approx(np.average(w.numpy(), weights=weights), abs=1e-8)


def test_the_reweighted_mean_is_that_of_the_exact_solution():
    """A mild error: Runge and Kutta's method of a step in which one mean moves by a part of an sd."""
    settings = {"method": "rk4", "step_size": 0.5}
    fine, exact_mean = posterior(exact_states(GRID))
    with lde.solver(**settings):
        crude = lde.infer.nuts(oscillator, DATA, num_samples=300, num_warmup=100, seed=0, progress=False)
    report = solver_check(crude, num_draws=1200)
    row = report.means.loc["w"]
    assert abs(row["shift"]) > 0.1  # the error of the mean, in sds; a tenth is 3.5 standard errors of 1,200 draws
    assert not report.reliable and report.used == "rk4, step_size=0.5"
    assert report.suggested["method"] == "tsit5" and report.suggested["step_size"] is None
    ess = crude.summary().loc["w", "ess_bulk"]
    # 4 standard errors: a false alarm in 16,000
    assert row["reweighted"] == pytest.approx(exact_mean, abs=4 * row["sd"] / math.sqrt(min(ess, 1200)))


def rk4_states(w, step):
    """Each step multiplies q + i p/w by the exponential series of -i w h up to its fourth power."""
    x = torch.complex(torch.zeros_like(w), -w * step)
    factor = (1 + x + x**2 / 2 + x**3 / 6 + x**4 / 24)[:, None]
    return (factor ** (TIMES / step).round()).real


def by_prior():
    return lde.infer.prior(oscillator, DATA, num_samples=60)


def by_sgld():
    sizes = {"num_samples": 15, "num_warmup": 5, "start": {"w": torch.ones(()).double()}, "progress": False}
    return lde.infer.sgld(oscillator, DATA, step_size=1e-5, **sizes)


@pytest.mark.parametrize("draw", [by_prior, by_sgld])
def test_a_coarse_step_set_around_draws_without_a_density_is_seen(draw):
    with lde.solver(method="rk4", step_size=1.0):
        crude = draw()
    with lde.solver(method="bosh3", step_size=0.01, gradient="adjoint"):  # nothing that is set around the check counts
        report = solver_check(crude, num_draws=60)
    assert not report.reliable and report.used == "rk4, step_size=1"
    assert list(report.table.index) == ["tsit5, rtol=1e-09, atol=1e-11", "dopri8, rtol=1e-09, atol=1e-11"]
    assert report.suggested["method"] == "tsit5" and report.suggested["step_size"] is None
    w = crude.samples["w"].flatten()
    expected = log_density(w, exact_states(w)) - log_density(w, rk4_states(w, 1.0))
    assert expected.abs().max() > 1
    # two solves at 1e-9 differ from the exact states by less than 1e-7, times a residual of up to 2 / .05^2, 11 times
    torch.testing.assert_close(torch.from_numpy(report.changes[-1]), expected, rtol=1e-3, atol=1e-3)


def test_a_guide_is_checked_against_the_solver_it_was_fitted_with(tmp_path):
    """The draws are made outside of lde.solver, and again from files with the model given anew."""
    options = {"num_steps": 40, "start_at": {"w": torch.ones(()).double()}, "progress": False}
    with lde.solver(method="rk4", step_size=1.0):
        fit = lde.infer.fit_svi(oscillator, AutoNormal, DATA, **options)
    path = fit.save(tmp_path / "fit.pt")
    loaded = lde.infer.Fit.load(path, oscillator, AutoNormal(oscillator), DATA)
    crude = fit.posterior(60)
    file = crude.save(tmp_path / "draws.nc")
    bare = Posterior.load(file)
    again = Posterior.load(file, model=oscillator, args=(DATA,))
    for posterior in (crude, loaded.posterior(60), again, bare.with_model(oscillator, DATA)):
        assert (posterior.sites["z"].settings["method"], posterior.sites["z"].settings["step_size"]) == ("rk4", 1.0)
    report = solver_check(again)
    assert not report.reliable and report.used == "rk4, step_size=1"
    w = again.samples["w"].flatten()
    expected = log_density(w, exact_states(w)) - log_density(w, rk4_states(w, 1.0))
    torch.testing.assert_close(torch.from_numpy(report.changes[-1]), expected, rtol=1e-3, atol=1e-3)


def test_steps_that_torchdiffeq_took_are_taken_by_it_again():
    """Its error estimate is a mean over the states, so at the same tolerance it takes other steps than ours."""
    settings = {"engine": "torchdiffeq", "method": "dopri5", "rtol": 1e-2, "atol": 1e-2}
    crude, _ = posterior(exact_states(GRID), num=60, **settings)
    report = solver_check(crude)
    w = crude.samples["w"].flatten()
    field = lambda t, y, w: torch.stack([y[1], -w * w * y[0]])  # noqa: E731
    theirs = torch.stack([lde.odesolve(field, START, TIMES, one, **settings).ys[:, 0] for one in w])
    expected = log_density(w, exact_states(w)) - log_density(w, theirs)
    torch.testing.assert_close(torch.from_numpy(report.changes[-1]), expected, rtol=1e-2, atol=1e-2)


def test_a_solve_recorded_under_another_name_is_solved_again():
    """Events of the intensity e^(w t): Runge and Kutta's method integrates it by Simpson's rule."""
    data = lde.data.EventTimes.from_lists([[1.0, 4.0, 7.0]], start=0.0, end=8.0)

    def model(data):
        w = pyro.sample("w", dist.LogNormal(torch.zeros(()).double(), 0.2))
        lde.events("e", lambda t, z, w: w + 0 * z, lambda t, z, w: z[0], torch.zeros(1, 1).double(), data, w)

    w = torch.linspace(0.2, 1.0, 50).double()
    with lde.solver(method="rk4", step_size=2.0):
        sites = inspect_model(model, data)
    report = solver_check(Posterior(samples={"w": w[None]}, sites=sites, model=model, args=(data,)))
    nodes, weights = torch.arange(9.0).double(), torch.tensor([1.0, 4, 2, 4, 2, 4, 2, 4, 1]).double() / 3
    simpson = (w[:, None] * nodes).exp() @ weights
    torch.testing.assert_close(
        torch.from_numpy(report.changes[-1]), simpson - ((8 * w).exp() - 1) / w, rtol=1e-5, atol=1e-5
    )


def test_the_suggested_settings_pass():
    crude, _ = posterior(exact_states(GRID), method="bosh3", rtol=1e-2, atol=1e-2)
    report = solver_check(crude)
    assert not report.reliable and report.suggested["rtol"] < 1e-2 and "step_size" not in report.suggested
    better, _ = posterior(exact_states(GRID), **report.suggested)
    assert solver_check(better).reliable


def test_tolerances_and_method_are_those_asked_for():
    fine, _ = posterior(exact_states(GRID))
    report = solver_check(fine, rtol=1e-7, atol=1e-10, method="bosh3", num_draws=30)
    assert list(report.table.index) == ["tsit5, rtol=1e-07, atol=1e-10", "bosh3, rtol=1e-07, atol=1e-10"]


def test_what_cannot_be_checked_says_so():
    fine, _ = posterior(exact_states(GRID))
    with pytest.raises(LatentDEError, match="has none"):
        solver_check(Posterior(samples=fine.samples))
    with pytest.raises(LatentDEError, match="at least 25 draws, got 20"):
        solver_check(fine, num_draws=20)

    def plain(data):
        pyro.sample("obs", dist.Normal(pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0)), 1.0), obs=data)

    with pytest.raises(LatentDEError, match="no lde.ode site"):
        solver_check(lde.infer.prior(plain, torch.tensor(0.0), num_samples=50))
