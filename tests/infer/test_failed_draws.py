# SPDX-License-Identifier: Apache-2.0
"""Draws whose solve failed, of an equation that blows up in finite time: what is left has a closed form."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch.testing import assert_close

import pyro_latentde as lde
from pyro_latentde.errors import SolveError
from pyro_latentde.infer import Fit, fit_svi
from pyro_latentde.infer.failed_draws import tell_failed
from pyro_latentde.posterior import scores

TIMES = torch.tensor([0.0, 0.5, 1.0]).double()
NOISE = 0.1


def model(series, times=None):
    """z' = rate z^2 from z(0) = 1: z = 1 / (1 - rate t), up to t = 1 / rate."""
    with lde.series_plate(series):
        rate = pyro.sample("rate", dist.Uniform(torch.tensor(0.0).double(), 2.0))
        where = series.times if times is None else times.expand(len(series), -1)
        y0, t0 = torch.ones(len(series), 1).double(), torch.zeros(len(series)).double()
        options = {"event_dims": {"rate": 0}, "rtol": 1e-10, "atol": 1e-12, "t0": t0}
        z = lde.ode("z", lambda t, y, p: p["rate"] * y**2, y0, where, {"rate": rate}, **options)
        lde.observe("obs", dist.Normal(z, NOISE), series if times is None and series.values is not None else None)


def guide(series, times=None):
    """Half of the draws of the second series blow up before t = 1, all of the third, none of the first."""
    # by the value at t = .5, since copies and parts of the series come too
    number = torch.bucketize(series.values[:, 1, 0].contiguous(), torch.tensor([1.3, 1.6]).double())
    low, high = torch.tensor([[0.1, 0.5], [0.5, 1.5], [1.2, 1.5]]).double()[number].unbind(1)
    with lde.series_plate(series):
        pyro.sample("rate", dist.Uniform(low, high))


def make(guide=guide):
    truth = 1.0 / (1.0 - torch.tensor([0.3, 0.6, 0.9]).double()[:, None] * TIMES)
    series = lde.Series.from_tensors(TIMES.expand(3, -1), truth[..., None])
    return series, Fit(torch.zeros(0).double(), 0, guide, model, (), {}, 0.0, {})


def test_failed_draws_are_left_out_of_a_forecast_series_by_series():
    series, fit = make()
    with pytest.warns(UserWarning, match=r"of 600 draws failed, of 2 series: .* no draw is left of series 2,"):
        forecast = fit.reconstruct(series, 200)
    rate = forecast.latents["rate"]
    good = rate < 1.0
    assert good[:, 0].all() and not good[:, 2].any() and 60 < good[:, 1].sum() < 140
    assert_close(forecast.failed, 1.0 - good.double().mean(0))
    z = 1.0 / (1.0 - rate[..., None] * TIMES)
    # also at t = .5, which a failed draw of a rate below 2 did reach
    for n in (0, 1):
        kept = z[good[:, n], n]
        assert_close(forecast.mean[n, :, 0], kept.mean(0), rtol=1e-6, atol=1e-8)
        low, high = forecast.band(0.8, noise=False)
        expected = scores.interval(kept, 0.8)
        assert_close(low[n, :, 0], expected[0], rtol=1e-6, atol=1e-8)
        assert_close(high[n, :, 0], expected[1], rtol=1e-6, atol=1e-8)
    for part in (forecast.mean, *forecast.band(0.8), forecast.z.nanmean(0)):
        assert part[:2].isfinite().all() and part[2].isnan().all()


def _scores(draws, means, truth):
    return {
        "l1": scores.l1(means, truth),
        "crps": scores.crps(draws, truth),
        "coverage": scores.coverage(draws, truth),
    }


def test_scores_of_what_is_left_are_those_of_the_good_draws():
    series, fit = make()
    with pytest.warns(UserWarning, match="failed, of 1 series"):
        forecast = fit.reconstruct(series[:2], 200)
    good = forecast.latents["rate"] < 1.0
    found = forecast.scores(series[:2])
    parts = [_scores(forecast.values[good[:, n], n], forecast.means[good[:, n], n], series.values[n]) for n in (0, 1)]
    for name in ("l1", "crps", "coverage"):
        assert found[name] == pytest.approx((parts[0][name] + parts[1][name]) / 2, rel=1e-9)
    with pytest.warns(UserWarning, match="no draw is left of series 2"):
        lost = fit.reconstruct(series, 50).scores(series)
    assert all(map(math.isnan, lost.values())) and set(lost) == {"l1", "rmse", "crps", "coverage"}


def test_failed_draws_have_weight_zero_in_the_evidence():
    """The mean of weights is the integral of the joint density over the rates that the guide draws, by quadrature."""
    series, fit = make()
    with pytest.warns(UserWarning, match=r"their weight is zero; no draw is left of series 2, whose results are NaN"):
        found = fit.log_evidence(series, 4000, seed=3)
    assert found[2].isnan()
    expected = []
    for n, (low, high) in enumerate(((0.1, 0.5), (0.5, 1.0))):  # from 1 on nothing is left
        rate = torch.linspace(low, high, 20_001).double()[:-1]
        joint = (
            0.5 * dist.Normal(1.0 / (1.0 - rate[:, None] * TIMES), NOISE).log_prob(series.values[n, :, 0]).sum(-1).exp()
        )
        expected.append((joint.mean() * (high - low)).log())
    # the relative sd of a weight is about 2 and 4: five sd of the mean of 4,000
    assert_close(found[:2], torch.stack(expected), atol=0.3, rtol=0)


def test_the_warning_counts_and_names():
    failed = torch.zeros(4, 8, dtype=torch.bool)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tell_failed(failed, "left out")
    failed[0, 1] = True
    with pytest.warns(UserWarning, match=r"^the solve of 1 of 32 draws failed, of 1 series: left out$"):
        tell_failed(failed, "left out")
    failed[:, 2:] = True
    with pytest.warns(UserWarning, match=r"25 of 32 draws failed, of 7 series: .* series 2, 3, 4, 5, 6, \.\.\., whose"):
        tell_failed(failed, "left out")


class Faulty:
    """A level under data, whose model fails as its own solve would, at the calls asked for."""

    def __init__(self, fails):
        self.fails, self.calls = fails, 0

    def __call__(self, series):
        with lde.series_plate(series):
            level = pyro.sample("level", dist.Normal(torch.zeros(3).double(), 1.0))
            self.calls += 1
            if self.fails(self.calls):
                raise SolveError("4 of 4 trajectories failed")
            lde.observe("obs", dist.Normal(level[:, None, None].expand(-1, 3, 1), 1.0), series)


class Level(PyroModule):
    def __init__(self):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(()).double())

    def forward(self, series):
        with lde.series_plate(series):
            pyro.sample("level", dist.Normal(self.mean, torch.ones(3).double()))


@pytest.mark.parametrize("call", [1, 3, 4, 5, 6])  # the second is the first draw again
def test_a_draw_that_fails_before_the_first_step_does_not_end_the_run(call, tmp_path):
    """The first calls inspect the model, check shapes and meet the parameters of a checkpoint; then come steps."""
    series, _ = make()
    options = {"num_steps": 5, "checkpoint": tmp_path, "progress": False}
    fit = fit_svi(Faulty(lambda n: n == call), Level(), series, **options)
    assert len(fit.losses) == 5 and fit.n_skipped == (call > 4)


@pytest.mark.parametrize("first", [3, 4])
def test_when_every_draw_fails_the_last_one_is_told(first, tmp_path):
    series, _ = make()
    model = Faulty(lambda n: n >= first)
    message = (
        r"4 of 4 trajectories failed\nBefore the first step, all of 10 draws failed. The last: level: \[-?\d.*\]\.$"
    )
    with pytest.raises(SolveError, match=message):
        fit_svi(model, Level(), series, num_steps=5, checkpoint=tmp_path, progress=False)
    assert model.calls == first + 9
