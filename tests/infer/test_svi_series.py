# SPDX-License-Identifier: Apache-2.0
"""Amortized fits of series: ELBO against exact evidence, minibatches, held-out selection, precision, bad input."""

import copy
import csv

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_ode import ExactGuide, exact, linear_model, linear_series, network_pair, smooth_series
from pyro.nn import PyroModule
from torch.testing import assert_close

import pyro_latentde as lde
from pyro_latentde.errors import DataError, LatentDEError
from pyro_latentde.infer import fit_svi, schedules
from pyro_latentde.infer.devices import FullPrecisionSites
from pyro_latentde.infer.training_log import COLUMNS


def quick(model, guide, series, **options):
    options = {"num_steps": 12, "batch_size": 4, "learning_rate": 0.01, "progress": False} | options
    return fit_svi(model, guide, series, **options)


def test_elbo_of_the_exact_guide_is_the_evidence():
    series = linear_series()
    fit = fit_svi(linear_model, ExactGuide(), series, num_steps=1, learning_rate=1e-9, progress=False)
    evidence = exact(series)[0]
    assert fit.elbo(num_particles=3) == pytest.approx(evidence.sum().item(), abs=1e-4)  # each draw, not the mean
    assert_close(fit.log_evidence(series, 2), evidence, atol=1e-4, rtol=0)


def test_elbo_of_another_guide_is_below_by_the_divergence():
    series = linear_series()
    fit = fit_svi(linear_model, ExactGuide(0.3, 0.5), series, num_steps=1, learning_rate=1e-9, progress=False)
    evidence, _, covariance = exact(series)
    q = dist.MultivariateNormal(torch.full((2,), 0.3).double(), covariance * torch.tensor(0.5).double().exp())
    gap = torch.distributions.kl_divergence(q, dist.MultivariateNormal(torch.zeros(2).double(), covariance)).sum()
    # sd of one draw of all series about 4 nats
    elbo = fit.elbo(num_particles=400)
    assert elbo == pytest.approx((evidence.sum() - gap).item(), abs=0.8) and elbo < evidence.sum() - 5


def test_log_evidence_rises_with_particles_to_the_exact_one():
    series = linear_series(n=8)
    fit = fit_svi(linear_model, ExactGuide(0.15, 1.0), series, num_steps=1, learning_rate=1e-9, progress=False)
    evidence = exact(series)[0]
    few, some, many = (
        torch.stack([fit.log_evidence(series, k, seed=seed) for seed in range(runs)]).mean(0)
        for k, runs in ((1, 100), (8, 20), (1000, 1))
    )
    assert few.sum() < some.sum() - 1 < evidence.sum() - 1
    assert_close(many, evidence, atol=0.15, rtol=0)  # weights have an sd of about 1: 4.5 sd / sqrt(1000)
    assert torch.equal(
        fit.log_evidence(series, 64, rows_at_once=24)[:3], fit.log_evidence(series, 64, rows_at_once=24)[:3]
    )


def test_log_evidence_needs_the_shared_sites():
    model, guide = network_pair()
    series = smooth_series()
    fit = quick(model, guide, series, num_steps=30)
    with pytest.raises(LatentDEError, match=r"site 'slope' is outside of plate 'series'.*given="):
        fit.log_evidence(series)
    given = fit.log_evidence(series, 50, given={"slope": torch.tensor(0.3).double()})
    assert given.shape == (12,) and given.isfinite().all()
    other = fit.log_evidence(series, 50, given={"slope": torch.tensor(3.0).double()})
    assert (other < given).all()


def test_minibatches_of_windows_find_what_all_data_find():
    """A shared mean from windows and minibatches: the exact posterior of one level under all values."""

    class Level(PyroModule):
        def forward(self, series):
            level = pyro.sample("level", dist.Normal(torch.zeros(()).double(), 1.0))
            with lde.series_plate(series):
                lde.observe("obs", dist.Normal(level.expand(series.values.shape), 1.0), series)

    series = lde.Series.from_tensors(torch.arange(10.0), 0.4 + torch.randn(20, 10, 1).double())
    fit = fit_svi(
        Level(), pyro.infer.autoguide.AutoNormal(Level()), series, num_steps=3000, batch_size=5, window=5,
        learning_rate=0.02, start_at=None, progress=False,
    )  # fmt: skip
    draws = fit.posterior(4000)["level"]
    # times in the middle are in more windows than the ends: five windows of 1, 2, 3, 4, 5, 5, 4, 3, 2, 1 in 6 starts
    starts = torch.tensor([min(t, 9 - t, 4, 5) + 1 for t in range(10)]).double() / 6 * 2
    target = (series.values[..., 0] * starts).sum() / (1 + 20 * starts.sum())
    assert starts.sum() == pytest.approx(10.0)
    assert draws.mean() == pytest.approx(target.item(), abs=0.03)
    assert draws.std() == pytest.approx(201**-0.5, rel=0.25)
    assert fit.losses[-200:].mean() == pytest.approx(-fit.elbo(500), rel=0.1), "in nats of the whole data set"


def test_heldout_elbo_disturbs_nothing():
    series = smooth_series()
    runs = [quick(*network_pair(), series, heldout=held, eval_every=3, keep="last") for held in (None, series[:5])]
    assert torch.equal(runs[0].losses, runs[1].losses)
    assert runs[1].attrs["heldout_steps"] == [2, 5, 8, 11] and len(set(runs[1].attrs["heldout_elbo"])) == 4


def test_heldout_elbo_is_that_of_all_series_at_full_weight():
    """Six series in chunks of four and two, training at another weight: each draw of the exact guide is exact."""
    series, trained = linear_series(), linear_series(n=20, seed=1)
    options = {"batch_size": 4, "kl_weight": 0.3, "num_steps": 1, "learning_rate": 1e-9}
    fit = quick(linear_model, ExactGuide(), trained, heldout=series, eval_every=1, **options)
    per_value = exact(series)[0].sum().item() / series.n_observed
    assert fit.attrs["heldout_elbo"] == [pytest.approx(per_value * trained.n_observed, abs=1e-3)]


def test_heldout_elbo_compares_with_the_elbo_of_the_training_series():
    """A quarter of the series, in half their times: local sites weigh eight times as much, a shared one as before."""

    class Level(PyroModule):
        def forward(self, series):
            level = pyro.sample("level", dist.Normal(torch.zeros(()).double(), 1.0))
            with lde.series_plate(series):
                lde.observe("obs", dist.Normal(level.expand(series.values.shape), 1.0), series)

    class Sure(PyroModule):
        def __init__(self):
            super().__init__()
            self.at = torch.nn.Parameter(torch.zeros(()).double())

        def forward(self, series):
            pyro.sample("level", dist.Normal(self.at, 1.0))

    trained = lde.Series.from_tensors(torch.arange(6.0), torch.zeros(8, 6, 1).double())
    short = lde.Series.from_tensors(torch.arange(3.0), [0.0, 0.0, 0.0])
    parts = (trained, trained[:2], trained[:2].window(0, 3), short)
    options = {"batch_size": 8, "eval_every": 1, "num_steps": 1, "learning_rate": 1e-9}
    fits = [quick(Level(), Sure(), trained, heldout=part, **options) for part in parts]
    elbos = [fit.attrs["heldout_elbo"][0] for fit in fits]
    assert elbos == [pytest.approx(elbos[0], rel=1e-9)] * 4  # the same draw of the level in all of them


def test_the_best_parameters_are_kept():
    series = smooth_series()
    rate = schedules.warmup(1, schedules.exponential(0.01, 3.0, 80))  # good at first, then absurd
    fit = quick(*network_pair(), series, heldout=series, eval_every=1, num_steps=80, learning_rate=rate)
    elbos, best = fit.attrs["heldout_elbo"], fit.attrs["best_step"]
    assert best == max(range(80), key=elbos.__getitem__) and 5 < best < 79
    short = quick(*network_pair(), series, num_steps=best + 1, learning_rate=rate)
    assert all(torch.equal(fit.weights[name], short.weights[name]) for name in fit.weights)
    for (name, a), (_, b) in zip(fit.model.named_buffers(), short.model.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    last = quick(*network_pair(), series, heldout=series, eval_every=1, num_steps=80, learning_rate=rate, keep="last")
    assert last.attrs["heldout_elbo"] == elbos and "best_step" not in last.attrs
    assert not torch.equal(last.weights["center"], fit.weights["center"])


class Faulty(PyroModule):
    """A model whose evaluations fail as asked for, by an error or by NaN; training steps do not."""

    def __init__(self, model, fails):
        super().__init__()
        self.model, self.fails, self.calls = model, fails, 0

    def forward(self, series):
        self.calls += not torch.is_grad_enabled()
        if not torch.is_grad_enabled() and self.fails(self.calls):
            torch.linalg.cholesky(-torch.eye(2))
        self.model(series)


def test_an_evaluation_that_fails_does_not_end_the_run():
    """Calls without gradients: three before training, then one for each evaluation of one chunk."""
    series = smooth_series()
    model, guide = network_pair()
    options = {"eval_every": 2, "batch_size": 12, "kl_weight": 0.3}
    calls = Faulty(model, lambda n: False)
    fine = quick(calls, guide, series, heldout=series, **options)
    before = calls.calls - 6
    model, guide = network_pair()
    fit = quick(Faulty(model, lambda n: n - before in (1, 2)), guide, series, heldout=series, patience=1, **options)
    elbos, expected = torch.tensor([fit.attrs["heldout_elbo"], fine.attrs["heldout_elbo"]]).double()
    assert elbos.isnan().tolist() == [True, True, False, False, False, False]
    assert torch.equal(elbos[2:], expected[2:]) and torch.equal(fit.losses, fine.losses)


def test_heldout_series_that_always_fail_are_told():
    model, guide = network_pair()
    fails = []
    faulty = Faulty(model, lambda n: bool(fails))
    rate = lambda step: fails.append(step) or 0.01  # noqa: E731  from the first update on
    with pytest.warns(UserWarning, match="none of 6 evaluations of the ELBO was finite.*last parameters are kept"):
        fit = quick(
            faulty, guide, smooth_series(), heldout=smooth_series(), eval_every=2, patience=1, learning_rate=rate
        )
    assert len(fit.losses) == 12 and "best_step" not in fit.attrs and "stopped_early" not in fit.attrs


def test_heldout_windows_may_hold_no_observation():
    series = smooth_series()
    mask = series.mask.clone()
    mask[3, :5] = False
    gap = lde.Series.from_tensors(series.times, series.values, mask=mask).window(0, 5)
    fit = quick(*network_pair(), series, heldout=gap, num_steps=1, eval_every=1)
    assert torch.tensor(fit.attrs["heldout_elbo"]).isfinite().all()


def test_early_stopping():
    series = smooth_series()
    rate = schedules.exponential(0.01, 100.0, 80)
    fit = quick(*network_pair(), series, heldout=series, eval_every=2, num_steps=500, learning_rate=rate, patience=4)
    stopped, best = fit.attrs["stopped_early"], fit.attrs["best_step"]
    assert len(fit.losses) == stopped < 100 and stopped == best + 1 + 2 * 4


def test_learning_rates_and_schedulers(tmp_path):
    series = smooth_series()
    rate = schedules.linear(0.01, 0.0, 12)
    quick(*network_pair(), series, learning_rate=rate, log=tmp_path / "a.csv")
    factory = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.1)  # noqa: E731
    quick(*network_pair(), series, scheduler=factory, log=tmp_path / "b.csv")
    quick(*network_pair(), series, decay=0.01, log=tmp_path / "c.csv")
    found = {name: [float(row["learning_rate"]) for row in rows(tmp_path / f"{name}.csv")] for name in "abc"}
    assert found["a"] == pytest.approx([rate(step) for step in range(12)])
    assert found["b"] == pytest.approx([0.01 * 0.1 ** ((step + 1) // 4) for step in range(12)])
    assert found["c"] == pytest.approx([0.01 * 0.01 ** max(0.0, step / 6 - 1) for step in range(12)])


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_log_of_a_run(tmp_path):
    series, weight = smooth_series(), schedules.linear(0.0, 1.0, 10)
    fit = quick(*network_pair(), series, log=tmp_path / "run", kl_weight=weight, heldout=series, eval_every=5)
    table = rows(tmp_path / "run" / "training.csv")
    assert tuple(table[0]) == COLUMNS and [int(row["step"]) for row in table] == list(range(12))
    elbos = torch.tensor([float(row["elbo"]) for row in table]).double()
    parts = torch.tensor([float(row["reconstruction"]) - float(row["kl"]) for row in table]).double()
    assert_close(elbos, -fit.losses, rtol=1e-6, atol=1e-4)
    assert_close(parts, elbos, rtol=1e-6, atol=1e-3)
    assert [float(row["kl_weight"]) for row in table] == pytest.approx([weight(step) for step in range(12)])
    assert [row["step"] for row in table if row["heldout_elbo"]] == ["4", "9", "11"]
    seconds = [float(row["seconds"]) for row in table]
    assert seconds == sorted(seconds) and {row["skipped"] for row in table} == {"0"}
    assert all(float(row["grad_norm"]) > 0 for row in table)


def test_skipped_steps_in_the_log(tmp_path):
    model, guide = network_pair()
    calls = []

    def failing(series):
        calls.append(torch.is_grad_enabled())
        pyro.factor("fault", torch.tensor(float("nan") if sum(calls) in (3, 5) and calls[-1] else 0.0))
        model(series)

    fit = quick(failing, guide, smooth_series(), log=tmp_path)
    table = rows(tmp_path / "training.csv")
    assert fit.n_skipped == 2 and [row["skipped"] for row in table] == list("001122222222")
    assert [row["elbo"] == "" for row in table] == [False, False, True, False, True] + [False] * 7


def test_bf16_networks():
    """Networks compute in bfloat16; parameters, distributions and draws are of full precision."""
    networks, sites = set(), set()

    def watched(series):
        with pyro.poutine.trace() as found:
            guide(series)
        sites.update((site["value"].dtype, site["fn"].mean.dtype) for site in found.trace.nodes.values() if "fn" in site
                     and hasattr(site["fn"], "mean"))  # fmt: skip

    series = smooth_series().to(torch.float32)
    model, guide = network_pair(dtype=torch.float32)
    guide.head.register_forward_hook(lambda module, inputs, output: networks.add(output.dtype))
    fit = quick(model, watched, series, num_steps=1)
    assert networks == {torch.float32}
    networks.clear(), sites.clear()
    fit = quick(model, watched, series, precision="bf16-mixed", num_steps=40)
    assert torch.bfloat16 in networks and sites == {(torch.float32, torch.float32)}
    assert fit.losses.isfinite().all() and fit.losses[-10:].mean() < fit.losses[:10].mean()
    assert all(param.dtype == torch.float32 for param in fit.weights.values())


def test_distributions_in_full_precision():
    low = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)

    def model():
        a = pyro.sample("a", dist.Normal(low, low).to_event(1))
        b = pyro.sample("b", dist.MultivariateNormal(low, scale_tril=torch.eye(2, dtype=torch.bfloat16)))
        c = pyro.sample("c", dist.LogNormal(low.double(), 1.0).to_event(1))
        return a.dtype, b.dtype, c.dtype

    assert FullPrecisionSites()(model)() == (torch.float32, torch.float32, torch.float64)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 40}, DataError, "40 of 12 series"),
        ({"window": 11}, DataError, "window: 11 times from series of 10"),
        ({"window": 0}, DataError, "window: 0 times from series of 10"),
        ({"batch_size": 0}, DataError, "batch_size: 0 of 12 series"),
        ({"window": schedules.progressive(3, 12, 11)}, DataError, "window: 11 times at step 10 from series of 10"),
        ({"heldout": torch.zeros(3)}, DataError, "heldout: expected a Series, got Tensor"),
        ({"heldout": lde.Series.from_tensors([0.0, 1.0], [1.0, 2.0])}, DataError, "heldout: 1 values.*have 3"),
        ({"patience": 3}, ValueError, "heldout="),
        ({"keep": "worst"}, ValueError, "'best' or 'last'"),
        ({"kl_weight": -1.0}, ValueError, "kl_weight"),
        ({"kl_weight": lambda step: -1.0}, ValueError, "kl_weight"),
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"precision": "64-true"}, ValueError, r"series.to\(torch.float64\)"),
        ({"precision": "16"}, ValueError, "bf16-mixed"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        quick(*network_pair(), smooth_series(), **options)


def test_bad_data_and_models():
    model, guide = network_pair()
    with pytest.raises(DataError, match="batch_size: needs a Series as the first argument.*got Tensor"):
        quick(model, guide, torch.zeros(3))
    guide.network = torch.nn.Linear(2, 2)
    guide.network.add_module("0", torch.nn.Linear(2, 8))
    with pytest.raises(LatentDEError, match="both have a parameter 'network.0.weight'"):
        quick(model, guide, smooth_series())


def test_nothing_is_started_for_one_device():
    import subprocess
    import sys

    code = (
        "import sys, torch, pyro, pyro.distributions as dist, pyro_latentde as lde\n"
        "def model(y):\n    pyro.sample('y', dist.Normal(pyro.sample('x', dist.Normal(0., 1.)), 1.), obs=y)\n"
        "lde.infer.fit_svi(model, pyro.infer.autoguide.AutoNormal, torch.zeros(()), num_steps=3, progress=False)\n"
        "assert not any(name.startswith('lightning') for name in sys.modules)\n"
        "assert not torch.distributed.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=300)


def test_a_second_run_begins_without_the_gradients_of_the_first():
    """They would be part of the first update, and of the scale by which Adam divides all of them."""
    model, guide = network_pair()
    series = smooth_series()
    quick(model, guide, series, num_steps=1, learning_rate=1e-9)
    assert any(p.grad is not None for p in guide.parameters())
    fresh_model, fresh = copy.deepcopy(model), copy.deepcopy(guide)
    for module in (fresh_model, fresh):
        module.zero_grad(set_to_none=True)
    again, new = quick(model, guide, series), quick(fresh_model, fresh, series)
    assert torch.equal(again.losses, new.losses)
