# SPDX-License-Identifier: Apache-2.0
"""Encodings, forecasts, interventions and prior draws of a decay with an exact guide: all has a closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

import pyro_latentde as lde
from pyro_latentde.distributions.likelihoods import Categorical
from pyro_latentde.errors import DataError, LatentDEError, ShapeError
from pyro_latentde.infer import Fit, fit_svi
from pyro_latentde.models import GOKU

RATES = torch.tensor([0.3, 0.8, 1.5], dtype=torch.float64)
STARTS = torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64)
NOISE = 0.1


def decay(t, y, p):
    return -p["rate"] * y


def model(series, times=None):
    """z' = -rate z from the first time on, observed with noise."""
    with lde.series_plate(series):
        z0 = pyro.sample("z0", dist.Normal(torch.full((1,), 2.0).double(), 0.5).to_event(1))
        rate = pyro.sample("rate", dist.LogNormal(torch.tensor(-0.4).double(), 0.3))
        pyro.deterministic("half_life", math.log(2.0) / rate, event_dim=0)
        where = series.times if times is None else times.expand(len(series), -1)
        options = {"event_dims": {"rate": 0}, "rtol": 1e-10, "atol": 1e-12}
        z = lde.ode("z", decay, z0, where, {"rate": rate}, t0=series.times[:, 0], **options)
        lde.observe("obs", dist.Normal(z, NOISE), series if times is None and series.values is not None else None)


def sure_guide(series, times=None):
    """What values without noise say: the first one, and the rate between the first two."""
    (y0, y1), (t0, t1) = series.values[:, :2, 0].unbind(1), series.times[:, :2].unbind(1)
    with lde.series_plate(series):
        pyro.sample("z0", dist.Delta(y0[:, None], event_dim=1))
        pyro.sample("rate", dist.Delta((y0 / y1).log() / (t1 - t0)))


def unsure_guide(series, times=None):
    """Right on average."""
    with lde.series_plate(series):
        pyro.sample("z0", dist.Normal(series.values[:, 0], 0.05).to_event(1))
        pyro.sample("rate", dist.LogNormal(RATES.log(), 0.1))


def curve(times, rates=RATES, starts=STARTS):
    """(N, T, 1) at times (N, T) or (T,)."""
    times = times.expand(3, -1)
    return (starts[:, None] * torch.exp(-rates[:, None] * (times - times[:, :1])))[..., None]


def make_fit(guide=sure_guide, of=model):
    return Fit(torch.zeros(0).double(), 0, guide, of, (), {}, 0.0, {})


@pytest.fixture
def series():
    times = torch.tensor([[1.0, 1.5, 2.0, 3.0], [0.0, 0.2, 0.4, 0.5], [-1.0, 0.0, 2.0, 2.2]]).double()
    return lde.Series.from_tensors(times, curve(times))


def exact(series, times):
    return STARTS[:, None, None] * torch.exp(-RATES[:, None] * (times.expand(3, -1) - series.times[:, :1]))[..., None]


def test_forecast_of_steps_goes_on_at_the_last_gap(series):
    forecast = make_fit().forecast(series, 3, num_samples=2)
    steps = torch.tensor([1.0, 2.0, 3.0]).double()
    expected = torch.tensor([[3.0], [0.5], [2.2]]).double() + torch.tensor([[1.0], [0.1], [0.2]]).double() * steps
    assert_close(forecast.times, expected)
    assert_close(forecast.mean, exact(series, expected), rtol=1e-6, atol=1e-8)
    assert forecast.z.shape == forecast.means.shape == forecast.values.shape == (2, 3, 3, 1)
    assert_close(forecast.latents["rate"], RATES.expand(2, 3))
    assert repr(forecast) == "Forecast(2 draws, 3 series, 3 times, 1 values)"


def test_forecast_of_steps_after_ragged_series():
    """The second series ends at its second time; what pads it is no gap."""
    times = [torch.tensor([0.0, 1.0, 3.0]).double(), torch.tensor([0.0, 0.5]).double()]
    values = [2.0 * torch.exp(-0.3 * times[0]), torch.exp(-0.8 * times[1])]
    series = lde.Series.from_tensors(times, values)
    forecast = make_fit().forecast(series, 2, num_samples=1)
    assert_close(forecast.times, torch.tensor([[5.0, 7.0], [1.0, 1.5]]).double())
    expected = [[2 * math.exp(-1.5), 2 * math.exp(-2.1)], [math.exp(-0.8), math.exp(-1.2)]]
    assert_close(forecast.mean[..., 0], torch.tensor(expected).double(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shared", [True, False])
def test_forecast_at_given_times_inside_and_after(series, shared):
    times = torch.tensor([3.0, 3.5, 9.0]).double()
    if not shared:
        times = series.times[:, :1] + torch.tensor([0.0, 0.7, 5.0]).double()
    forecast = make_fit().forecast(series, times, num_samples=1)
    assert_close(forecast.times, times.expand(3, -1))
    assert_close(forecast.mean, exact(series, times), rtol=1e-6, atol=1e-8)


def test_reconstruction_is_at_the_own_times(series):
    forecast = make_fit().reconstruct(series, 2, noise=False)
    assert_close(forecast.mean, series.values, rtol=1e-6, atol=1e-8)
    assert forecast.values is None


def test_encoding_holds_sites_and_what_the_model_makes_of_them(series):
    draws = make_fit(unsure_guide).encode(series, 400, seed=3)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {
        "z0": (400, 3, 1),
        "rate": (400, 3),
        "half_life": (400, 3),
    }
    assert_close(draws["half_life"], math.log(2.0) / draws["rate"])
    # five standard errors of a mean of 400 draws
    assert_close(draws["z0"].mean(0)[:, 0], STARTS, rtol=0, atol=5 * 0.05 / 20)
    assert_close(draws["rate"].log().std(0), torch.full((3,), 0.1).double(), rtol=0.2, atol=0)
    assert torch.equal(draws["z0"], make_fit(unsure_guide).encode(series, 400, seed=3)["z0"])


@pytest.mark.parametrize("value", [0.5, torch.tensor(0.5), torch.tensor([0.5, 1.0, 2.0])])
def test_intervention_on_the_rate(series, value):
    times = torch.linspace(3.0, 6.0, 4).double()
    forecast = make_fit().forecast(series, times, num_samples=2, do={"rate": value}, noise=False)
    rates = torch.as_tensor(value).double().expand(3)
    expected = STARTS[:, None, None] * torch.exp(-rates[:, None] * (times - series.times[:, :1]))[..., None]
    assert_close(forecast.mean, expected, rtol=1e-6, atol=1e-8)


def test_intervention_on_the_start(series):
    forecast = make_fit().forecast(series, 1, num_samples=1, do={"z0": [7.0]}, noise=False)
    expected = 7.0 / STARTS[:, None, None] * exact(series, forecast.times)
    assert_close(forecast.mean, expected, rtol=1e-6, atol=1e-8)


def test_intervention_on_a_named_parameter_of_a_goku_net():
    """All pendulums of one length, whatever the guide says: the field with that length, from the drawn starts."""

    def pendulum(t, z, p):
        return torch.stack([z[1], -10.0 / p["length"] * z[0].sin()])

    start = dist.Normal(torch.zeros(2), 0.5).to_event(1)
    pair = GOKU(pendulum, start, {"length": dist.Uniform(1.0, 2.0)}, values=4)
    videos = lde.Series.from_tensors(torch.linspace(0, 1, 5), torch.rand(3, 5, 4), dtype=torch.float32)
    fit = fit_svi(pair.model, pair.guide, videos, num_steps=1, progress=False)
    ahead = torch.linspace(1, 2, 6)
    for length in (1.25, torch.tensor([1.25, 1.5, 2.5])):
        forecast = fit.forecast(videos, ahead, num_samples=2, do={"length": length}, noise=False)
        p = {"length": torch.as_tensor(length).expand(3)}
        for i in range(2):
            z0 = forecast.latents["z0"][i]
            solved = lde.odesolve(pendulum, z0, ahead, p, t0=torch.zeros(3), event_dims={"length": 0}).ys
            assert_close(forecast.z[i], solved, rtol=1e-3, atol=1e-4)
    assert not torch.equal(forecast.z, fit.forecast(videos, ahead, num_samples=2, noise=False).z)


def test_the_encoder_runs_once_however_many_draws_are_made():
    start = dist.Normal(torch.zeros(2), 0.5).to_event(1)
    pair = GOKU(decay, start, {"rate": dist.Uniform(1.0, 2.0)}, values=4)
    videos = lde.Series.from_tensors(torch.linspace(0, 1, 5), torch.rand(3, 5, 4), dtype=torch.float32)
    fit = Fit(torch.zeros(0).double(), 0, pair.guide, pair.model, (videos,), {}, 0.0, {})
    rows = []
    pair.guide.frames.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    uses = {
        "encode": lambda: fit.encode(videos, 7),
        "forecast": lambda: fit.forecast(videos, 2, 7),
        "log_evidence": lambda: fit.log_evidence(videos, 25, rows_at_once=6),
        "pareto_k": lambda: fit.pareto_k(videos, 25),
        "posterior": lambda: fit.posterior(7),
        "elbo": lambda: fit.elbo(7),
    }
    for name, use in uses.items():
        rows.clear()
        use()
        assert rows == [3], name


def test_an_intervention_on_no_site_is_refused(series):
    with pytest.raises(LatentDEError, match=r"no site \['rtae'\].*\['z0', 'rate', 'half_life', 'z'\]"):
        make_fit().forecast(series, 1, num_samples=1, do={"rtae": 0.5, "rate": 1.0})


def test_further_arguments_of_the_fit_are_passed_on(series):
    """A model in another unit, by a positional and a named argument: 300 times as large."""

    def scaled(series, factor, *, gain=1.0, times=None):
        with lde.series_plate(series):
            z0 = pyro.sample("z0", dist.Normal(torch.full((1,), 2.0).double(), 0.5).to_event(1))
            where = series.times if times is None else times.expand(len(series), -1)
            pyro.deterministic("size", factor * gain * z0[:, 0], event_dim=0)
            mean = factor * gain * z0.unsqueeze(-2).expand(-1, where.shape[-1], 1)
            lde.observe("obs", dist.Normal(mean, NOISE), None if times is not None else series)

    def scaled_guide(series, factor, *, gain=1.0):
        with lde.series_plate(series):
            pyro.sample("z0", dist.Delta(series.values[:, 0] / factor / gain, event_dim=1))

    fit = Fit(torch.zeros(0).double(), 0, scaled_guide, scaled, (series, 100.0), {"gain": 3.0}, 0.0, {})
    assert_close(fit.forecast(series, 2, 1).mean, series.values[:, :1].expand(-1, 2, 1))
    assert_close(fit.reconstruct(series, 1).mean, series.values[:, :1].expand(-1, 4, 1))
    draws = fit.encode(series, 1)
    assert_close(draws["z0"][0], series.values[:, 0] / 300.0)
    assert_close(draws["size"][0], series.values[:, 0, 0])
    # means N(600, 150^2) of 1,000 series: five standard errors
    assert fit.sample([0.0, 1.0], 1000).means.mean() == pytest.approx(600.0, abs=5 * 150 / math.sqrt(1000))


def test_a_model_that_takes_no_times_is_told_how(series):
    def stiff(series):
        return model(series)

    for use in (lambda fit: fit.forecast(series, 1), lambda fit: fit.encode(series), lambda fit: fit.sample([0.0])):
        with pytest.raises(LatentDEError, match=r"takes \(series\).*def model\(series, times=None\)"):
            use(make_fit(of=stiff))


def test_samples_share_what_the_guide_has_learned(series):
    """A level that all series have in common, N(0, 1) before, and N(7, 10^-6) after the data."""

    def level_model(series, times=None):
        level = pyro.sample("level", dist.Normal(torch.zeros(()).double(), 1.0))
        with lde.series_plate(series):
            z0 = pyro.sample("z0", dist.Normal(torch.zeros(1).double(), 0.1).to_event(1))
            where = series.times if times is None else times.expand(len(series), -1)
            mean = (level + z0).unsqueeze(-2).expand(-1, where.shape[-1], 1)
            lde.observe("obs", dist.Normal(mean, NOISE), None if times is not None else series)

    def level_guide(series, times=None):
        pyro.sample("level", dist.Normal(7.0 * series.values.new_ones(()), 1e-6))
        with lde.series_plate(series):
            pyro.sample("z0", dist.Normal(series.values[:, 0], 0.05).to_event(1))

    fit = Fit(torch.zeros(0).double(), 0, level_guide, level_model, (series,), {}, 0.0, {})
    drawn = fit.sample([0.0, 1.0], 1000)
    assert drawn.latents["level"].shape == (1,) and set(drawn.latents) == {"level"}
    # five standard errors
    assert drawn.means.mean() == pytest.approx(7.0, abs=5 * 0.1 / math.sqrt(1000))
    assert drawn.means[0, :, 0, 0].std() == pytest.approx(0.1, rel=5 / math.sqrt(2000))
    with pytest.raises(LatentDEError, match=r"all series share \['level'\].*Fit.load\(path, model, guide, series\)"):
        make_fit(level_guide, level_model).sample([0.0, 1.0])


def test_noise_is_that_of_the_model(series):
    forecast = make_fit().forecast(series, 5, num_samples=400)
    residual = forecast.values - forecast.means
    # 6,000 draws; five standard errors
    assert residual.std() == pytest.approx(NOISE, rel=5 / math.sqrt(2 * 6000))
    assert residual.mean() == pytest.approx(0.0, abs=5 * NOISE / math.sqrt(6000))
    low, high = forecast.band(0.9)
    assert (high - low).mean() == pytest.approx(2 * 1.645 * NOISE, rel=0.1)
    narrow = forecast.band(0.9, noise=False)
    assert_close(narrow[0], narrow[1])


def test_scores_of_an_honest_forecast(series):
    """The truth is a draw of the forecast's own distribution: 3,000 values, intervals of 1,000 draws."""
    times = torch.linspace(3.0, 4.0, 1000).double()
    forecast = make_fit().forecast(series, times, num_samples=1000)
    clean = exact(series, times)
    truth = clean + NOISE * torch.randn(clean.shape).double()
    found = forecast.scores(truth, probability=0.8)
    assert found["rmse"] == pytest.approx(NOISE, rel=0.07)  # five standard errors
    assert found["l1"] == pytest.approx(NOISE * math.sqrt(2 / math.pi), rel=0.07)
    assert found["coverage"] == pytest.approx(0.8, abs=0.04)
    assert found["crps"] == pytest.approx(NOISE / math.sqrt(math.pi), rel=0.1)  # of a normal law, for its own draws
    half = torch.rand(clean.shape) < 0.5
    observed = lde.Series.from_tensors(times, torch.where(half, clean, clean + 100), mask=half)
    assert forecast.scores(observed)["l1"] == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ShapeError, match=r"\(3, 7, 1\).*\(3, 1000, 1\)"):
        forecast.scores(truth[:, :7])


def test_band_covers_as_often_as_it_says(series):
    """Twenty draws of 3,000 values: plain quantiles would cover .81. Five binomial standard errors."""
    times = torch.linspace(3.0, 4.0, 1000).double()
    forecast = make_fit().forecast(series, times, num_samples=20)
    truth = exact(series, times) + NOISE * torch.randn(3, 1000, 1).double()
    low, high = forecast.band(0.9)
    covered = ((truth >= low) & (truth <= high)).double().mean()
    assert covered == pytest.approx(0.9, abs=5 * 0.3 / math.sqrt(3000))
    assert covered == pytest.approx(forecast.scores(truth)["coverage"])


def test_samples_have_the_moments_of_the_prior():
    """4,000 series: each mean within five standard errors, a false alarm in a million."""
    times = torch.tensor([0.0, 1.0]).double()
    drawn = make_fit().sample(times, 4000, seed=5)
    assert drawn.means.shape == drawn.values.shape == (1, 4000, 2, 1) and not drawn.latents
    first = drawn.values[0, :, 0, 0]
    assert first.mean() == pytest.approx(2.0, abs=5 * math.sqrt(0.26 / 4000))
    assert first.var() == pytest.approx(0.26, rel=5 * math.sqrt(2 / 4000))
    rate = (drawn.z[0, :, 0, 0] / drawn.z[0, :, 1, 0]).log()
    assert rate.log().mean() == pytest.approx(-0.4, abs=5 * 0.3 / math.sqrt(4000))
    assert rate.log().std() == pytest.approx(0.3, rel=5 / math.sqrt(8000))


def test_memory_is_bounded(series):
    with pytest.raises(LatentDEError, match=r"1000 draws take .* GB, more than memory='1MB'.*num_samples="):
        make_fit().forecast(series, torch.linspace(3, 4, 50).double(), num_samples=1000, memory="1MB")


@pytest.mark.parametrize("horizon", [0, -2])
def test_steps_are_positive(series, horizon):
    with pytest.raises(DataError, match=f"horizon = {horizon}"):
        make_fit().forecast(series, horizon)


def test_steps_after_a_single_time_have_no_length():
    one = lde.Series.from_tensors(torch.zeros(3, 1).double(), STARTS[:, None, None])
    with pytest.raises(DataError, match="the step is not known.*give the times"):
        make_fit().forecast(one, 4)


def test_models_without_observations_are_refused(series):
    def silent(series, times=None):
        with lde.series_plate(series):
            pyro.sample("z0", dist.Normal(torch.zeros(1).double(), 0.5).to_event(1))
            pyro.sample("rate", dist.LogNormal(torch.tensor(0.0).double(), 0.3))

    with pytest.raises(LatentDEError, match="one lde.observe site in the model, found 0"):
        make_fit(of=silent).forecast(series, 2)


@pytest.mark.gpu
def test_results_are_where_the_series_are(series):
    class Rate(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.zeros(()).double())

        def forward(self, series, times=None):
            with lde.series_plate(series):
                pyro.sample("z0", dist.Delta(series.values[:, 0] + self.shift, event_dim=1))
                pyro.sample("rate", dist.Delta(torch.ones_like(series.times[:, 0])))

    guide = Rate().cuda()
    fit = Fit(torch.zeros(0).double(), 0, guide, model, (), {}, 0.0, {}, weights=dict(guide.named_parameters()))
    assert fit.encode(series, 2)["z0"].device == series.times.device


def test_classes_are_forecast_by_their_probabilities():
    """Of three classes with logits (z, 0, -z), z = z0 exp(-rate t), all by hand."""

    def classes(series, times=None):
        with lde.series_plate(series):
            z0 = pyro.sample("z0", dist.Normal(torch.full((1,), 2.0).double(), 0.5).to_event(1))
            rate = pyro.sample("rate", dist.LogNormal(torch.tensor(-0.4).double(), 0.3))
            where = series.times if times is None else times.expand(len(series), -1)
            z = lde.ode("z", decay, z0, where, {"rate": rate}, t0=series.times[:, 0], event_dims={"rate": 0}, rtol=1e-9)
            law = Categorical(3)(torch.cat([z, torch.zeros_like(z), -z], -1))
            lde.observe("obs", law, series if times is None and series.values is not None else None)

    def sure(series, times=None):
        with lde.series_plate(series):
            pyro.sample("z0", dist.Delta(STARTS[:, None], event_dim=1))
            pyro.sample("rate", dist.Delta(RATES))

    times = torch.linspace(0.0, 2.0, 5).double()
    seen = lde.Series.from_tensors(times, torch.zeros(3, 5, 1).double())
    forecast = make_fit(sure, classes).forecast(seen, times, num_samples=400)
    z = curve(times)
    right = torch.stack([z, torch.zeros_like(z), -z], -1).softmax(-1)
    assert forecast.means.shape == (400, 3, 5, 1, 3)
    assert_close(forecast.mean, right, rtol=0, atol=1e-6)
    assert set(forecast.values.unique().tolist()) <= {0.0, 1.0, 2.0}
    truth = torch.ones(3, 5, 1).double()
    truth[:, 0] = 0.0
    found = forecast.scores(truth)
    came = torch.nn.functional.one_hot(truth.long(), 3)
    assert found["accuracy"] == pytest.approx(1 / 5)  # the first class is always the most probable one
    assert found["brier"] == pytest.approx(float(((right - came) ** 2).sum(-1).mean()), abs=1e-6)
