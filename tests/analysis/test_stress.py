# SPDX-License-Identifier: Apache-2.0
"""Stress tests: failures are counted, explained and located where analysis says they are."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_latentde as lde
from pyro_latentde.analysis import stress_test
from pyro_latentde.analysis.stiffness import stiffness_of
from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer.regions import best_region

ZERO = torch.zeros((), dtype=torch.float64)
TIMES = torch.linspace(0, 0.5, 4).double()


def explosion(factor=1.0):
    """y = 1 / (1 - k t) is infinite before the last time for k > 2."""
    k = pyro.sample("k", dist.LogNormal(ZERO, 1.0))
    other = pyro.sample("other", dist.Normal(ZERO, 1.0))
    lde.ode("z", lambda t, y, p: p["k"] * y * y + 0 * p["o"], torch.ones(1).double(), TIMES, {"k": k, "o": other})


def product():
    """Infinite for a b > 2, which no bound on one of them tells."""
    a = pyro.sample("a", dist.LogNormal(ZERO, 1.0))
    b = pyro.sample("b", dist.LogNormal(ZERO, 1.0))
    lde.ode("z", lambda t, y, k: k * y * y, torch.ones(1).double(), TIMES, a * b)


def stiff(data=None):
    """Eigenvalues -1 and -c."""
    c = pyro.sample("c", dist.LogNormal(torch.tensor(7.0).double(), 0.1))
    z = lde.ode("z", lambda t, y, c: torch.stack([-y[0], -c * (y[1] - y[0])]), torch.ones(2).double(), 20 * TIMES, c)
    pyro.sample("obs", dist.Normal(z, 1.0).to_event(2), obs=data)


def test_the_bound_beyond_which_the_solution_explodes_is_found():
    report = stress_test(explosion, num_draws=400)
    bad = report.table["k"] > 2
    assert ((report.table["cause"] != "ok") == bad).all()
    assert report.failed == bad.sum() > 20
    (region,) = report.regions.values()
    assert (region.expression, region.relation) == ("k", ">")
    assert region.threshold == pytest.approx(2, abs=0.1)
    assert region.accuracy == 1
    assert list(report.bounds.values()) == ["k < " + f"{region.threshold:.3g}"]
    text = str(report)
    assert "prior draws failed" in text and "Suggested prior bounds: k < " in text and "Slowest draws" in text


def test_a_bound_on_a_product_is_found():
    report = stress_test(product, num_draws=400)
    (region,) = report.regions.values()
    assert (region.names, region.expression, region.relation) == (("a", "b"), "a * b", ">")
    assert region.threshold == pytest.approx(2, abs=0.1)


def test_fixed_steps_are_the_models_own():
    def fixed(rate):
        c = pyro.sample("c", dist.LogNormal(torch.zeros(()).double(), 0.1))
        one = torch.ones(1).double()
        lde.ode("z", lambda t, y, c: -rate * c * y, one, TIMES, c, method="rk4", step_size=0.25)

    fits, breaks = (str(stress_test(fixed, rate, num_draws=40)) for rate in (1.0, 100.0))
    assert "fixed steps are longer than stability allows in 0 % of the draws" in fits
    assert "in 100 % of the draws" in breaks


def test_steps_agree_with_the_solver_and_stiffness_with_the_eigenvalues():
    report = stress_test(stiff, torch.zeros(4, 2).double(), num_draws=50)
    assert report.failed == 0 and not report.regions
    np.testing.assert_allclose(report.table["stiffness"], report.table["c"], rtol=1e-6)
    assert (report.table["step_times_decay"] > 2).all()
    assert "stability sets the steps" in str(report)
    row = report.table.iloc[7]
    field = lambda t, y, c: torch.stack([-y[0], -c * (y[1] - y[0])])  # noqa: E731
    alone = lde.odesolve(field, torch.ones(2).double(), 20 * TIMES, torch.tensor(row["c"]))
    stats = alone.stats
    assert row["steps"] == int(stats["n_accepted"] + stats["n_rejected"])
    assert row["step_times_decay"] == pytest.approx(row["c"] * 10 / int(stats["n_accepted"]))


def test_likelihoods_that_are_not_finite_are_blamed_on_their_site():
    def model(data):
        mean = pyro.sample("mean", dist.Normal(ZERO, 1.0))
        pyro.sample("good", dist.Normal(mean, 1.0), obs=data)
        pyro.sample("bad", dist.Normal(mean.sqrt(), 1.0), obs=data)

    report = stress_test(model, ZERO, num_draws=200)
    (cause,) = report.causes
    assert cause == "non-finite log-likelihood at 'bad'"
    assert report.failed == (report.table["mean"] < 0).sum()
    assert report.regions[cause].relation == "<" and abs(report.regions[cause].threshold) < 0.1
    assert "No lde.ode site" in str(report)


def test_stiffness_of_known_matrices():
    decays = torch.diag(torch.tensor([-1.0, -50.0, 0.0]))
    turns = torch.tensor([[0.0, 2.0, 0.0], [-2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    ratio, decay = stiffness_of(torch.stack([decays, turns, torch.full((3, 3), torch.nan)])[:, None])
    np.testing.assert_allclose(ratio, [50, 1, np.nan])
    np.testing.assert_allclose(decay, [50, 0, np.nan])


def test_no_region_is_made_up():
    """False alarms: 20 hits of 400 at random in 10 columns, a hundred times; none is claimed."""
    rng = np.random.default_rng(0)
    columns = {f"x{i}": rng.lognormal(size=400) for i in range(10)}
    for _ in range(100):
        hit = np.zeros(400, bool)
        hit[rng.choice(400, 20, replace=False)] = True
        assert best_region(columns, hit, ~hit) is None


def test_figure_shows_every_draw():
    report = stress_test(explosion, num_draws=200)
    left, right = report.plot().axes
    solved, failed = left.get_lines()
    assert len(failed.get_xdata()) == report.failed
    assert len(solved.get_xdata()) == 200 - report.failed
    assert left.get_xlabel() == "k"
    assert sum(patch.get_height() for patch in right.patches) == 200


def test_a_model_without_latent_sites_is_refused():
    with pytest.raises(LatentDEError, match="no latent site"):
        stress_test(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=ZERO))
