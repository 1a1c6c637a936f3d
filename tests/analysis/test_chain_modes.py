# SPDX-License-Identifier: Apache-2.0
"""Chains in different modes are told apart, those that only mix slowly are not; LOO by ArviZ's own one line."""

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_latentde import Posterior
from pyro_latentde.analysis import chain_report
from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer import nuts


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def autoregressive(chains, draws, size, rho, rng):
    x = rng.standard_normal((draws, chains, size))
    for t in range(1, draws):
        x[t] = rho * x[t - 1] + np.sqrt(1 - rho**2) * x[t]
    return torch.from_numpy(x.swapaxes(0, 1).copy())


@pytest.fixture
def two_modes():
    at = torch.tensor([0.0, 9.0, 0.0, 9.0]).double()[:, None]
    lp = torch.tensor([-512.0, -4806.0, -512.0, -4806.0]).double()[:, None]
    return Posterior(
        samples={"omega": 3 + at + random(4, 200), "k": random(4, 200, 2, seed=1)},
        stats={"lp": lp + 0.1 * random(4, 200, seed=2)},
        attrs={"inference": "nuts"},
    )


def test_two_modes_are_named_with_their_chains(two_modes):
    report = chain_report(two_modes)
    assert report.modes == ((0, 2), (1, 3))
    assert report.worst == "omega"
    expected = float(arviz.rhat(two_modes["omega"].numpy()))
    assert report.r_hat["omega"] == pytest.approx(expected, rel=1e-6)
    text = str(report)
    assert text.startswith(f"R-hat {expected:.3f} for 'omega': chains 0, 2 (lp -512) and 1, 3 (lp -4,806) are in diff")
    assert "Mode 1 is lower by 4,294 nats" in text and "posterior.select(chains=[0, 2])" in text
    first = two_modes["omega"][[0, 2]].numpy()
    assert report.table.loc[0, ("omega", "mean")] == pytest.approx(first.mean())
    assert report.table.loc[0, ("omega", "sd")] == pytest.approx(first.std(ddof=1))
    assert report.table.loc[1, ("lp", "mean")] == pytest.approx(two_modes.stats["lp"][[1, 3]].mean().item())


def test_modes_of_like_density_are_to_be_stacked(two_modes):
    report = chain_report(Posterior(samples=two_modes.samples))
    assert report.modes == ((0, 2), (1, 3))
    assert "stacking" in str(report) and "lp" not in str(report)


def test_modes_that_differ_in_density_alone_are_seen(two_modes):
    report = chain_report(Posterior(samples={"k": two_modes["k"]}, stats=two_modes.stats))
    assert report.modes == ((0, 2), (1, 3))


def test_three_modes_and_many_chains():
    at = 8.0 * (torch.arange(60) % 3).double()[:, None]
    report = chain_report(Posterior(samples={"x": at + random(60, 20)}))
    assert report.modes == tuple(tuple(range(i, 60, 3)) for i in range(3))


def test_a_chain_that_visits_both_modes_joins_them():
    """Then the chains are not stuck: more draws will weigh the modes."""
    x = random(3, 200)
    x[1] += 8
    x[2] += 8.0 * (torch.arange(200) // 20 % 2)
    report = chain_report(Posterior(samples={"x": x}))
    assert report.modes == ((0, 1, 2),)
    assert "they mix slowly" in str(report)


@pytest.mark.parametrize(
    ("chains", "draws", "rho"), [(4, 20, 0.0), (4, 50, 0.5), (4, 200, 0.9), (8, 200, 0.95), (4, 100, 0.98)]
)
def test_slow_mixing_is_not_taken_for_modes(chains, draws, rho):
    """False alarms among 100 posteriors of one mode: none; the rule is meant to have 1 % at most."""
    rng = np.random.default_rng(0)
    posteriors = [Posterior(samples={"x": autoregressive(chains, draws, 5, rho, rng)}) for _ in range(100)]
    assert all(len(chain_report(p).modes) == 1 for p in posteriors)


def test_chains_that_agree_and_that_nearly_do():
    x = random(4, 1000)
    assert str(chain_report(Posterior(samples={"x": x}))).startswith("The 4 chains agree: largest R-hat 1.00")
    x[0] += 0.3  # variance of the means (0.15 sd)^2: R-hat 1.011
    assert "nearly agree: largest R-hat 1.01" in str(chain_report(Posterior(samples={"x": x})))


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # ArviZ 0.23 beside pandas 3.1
def test_r_hat_is_that_of_arviz():
    """Also where only the spreads differ, and for heavy tails, which plain split R-hat does not see."""
    x = torch.stack([random(4, 300), random(4, 300).tan(), random(4, 300)], -1)
    x[2, :, 2] *= 3.0
    posterior = Posterior(samples={"x": x})
    np.testing.assert_allclose(chain_report(posterior).r_hat, posterior.summary()["r_hat"], rtol=1e-12)


def test_a_constant_is_no_mode():
    x = torch.stack([random(4, 50), torch.ones(4, 50).double()], -1)
    assert chain_report(Posterior(samples={"x": x})).modes == ((0, 1, 2, 3),)


def test_figure_colours_chains_by_mode(two_modes):
    figure = chain_report(two_modes).plot()
    first = figure.axes[0]
    assert first.get_ylabel() == "omega"
    colours = [line.get_color() for line in first.get_lines()[:4]]
    assert colours[0] == colours[1] != colours[2] == colours[3]  # chains 0, 2, then 1, 3
    np.testing.assert_allclose(first.get_lines()[1].get_ydata(), two_modes["omega"][2])


def test_too_little_to_compare_is_refused():
    with pytest.raises(LatentDEError, match="at least 2 of them with 8 draws each, got 1 with 100"):
        chain_report(Posterior(samples={"x": random(1, 100)}))


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # ArviZ 0.23 beside pandas 3.1
def test_loo_and_comparison_are_one_line_of_arviz():
    """The leave-one-out density of a normal mean, against its closed form; the true model wins."""
    y = torch.tensor([0.3, -0.5, 1.2, 0.1, -0.9, 0.4, 0.8, -0.2]).double()

    def model(y, shift):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean + shift, 1.0), obs=y)

    fits = {
        name: nuts(model, y, shift, num_samples=500, num_warmup=200, progress=False).to_arviz(
            ["posterior", "log_likelihood"]
        )
        for name, shift in (("right", 0.0), ("wrong", 6.0))
    }
    n = len(y)
    rest = y.sum() - y
    mean, variance = rest / n, 1 + 1 / n  # posterior of n - 1 data and a standard normal prior: sum / n, 1 / n
    expected = torch.distributions.Normal(mean, variance**0.5).log_prob(y).sum().item()
    loo = arviz.loo(fits["right"])
    elpd = getattr(loo, "elpd_loo", None)  # ArviZ 0.x; elpd in 1.x
    assert (loo.elpd if elpd is None else elpd) == pytest.approx(expected, abs=0.1)
    assert arviz.compare(fits).index[0] == "right"
