# SPDX-License-Identifier: Apache-2.0
"""Trajectories, new observations and likelihoods against closed forms."""

import math
import warnings

import conjugate_model as conjugate
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_latentde as lde
from pyro_latentde import Posterior, Series
from pyro_latentde.errors import LatentDEError
from pyro_latentde.posterior import inspect_model

TIMES = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
START = torch.tensor([2.0, 3.0], dtype=torch.float64)


def solved(times, k):
    return lde.ode("z", lambda t, y, k: -k * y, START, times, k, states=("a", "b"))


def fixed_times(data):
    """A model that knows its times by heart."""
    k = pyro.sample("k", dist.LogNormal(torch.zeros(()).double(), 0.5))
    pyro.sample("obs", dist.Normal(solved(TIMES, k), 0.1).to_event(2), obs=data)


def open_times(times, data=None):
    k = pyro.sample("k", dist.LogNormal(torch.zeros(()).double(), 0.5))
    pyro.sample("obs", dist.Normal(solved(times, k), 0.1).to_event(2), obs=data)


def careful_times(times, data=None):
    """As above, but it breaks when data and times do not fit."""
    k = pyro.sample("k", dist.LogNormal(torch.zeros(()).double(), 0.5))
    z = solved(times, k)
    mask = torch.ones_like(z, dtype=torch.bool) if data is None else ~data.isnan() & (z < 1e9)
    pyro.sample("obs", dist.Normal(z, 0.1).mask(mask).to_event(2), obs=data)


def by_series(series):
    k = pyro.sample("k", dist.LogNormal(torch.zeros(()).double(), 0.5))
    z = lde.ode("z", lambda t, y, k: -k * y, START, series.times[0], k)
    lde.observe("obs", lambda z: dist.Normal(z, 0.1), series, z)


def draws_of(model, *args, k=None):
    k = torch.linspace(0.5, 1.5, 6, dtype=torch.float64).reshape(2, 3) if k is None else k
    return Posterior(samples={"k": k}, sites=inspect_model(model, *args), model=model, args=args)


def exact(k, times):
    return START * torch.exp(-k[..., None, None] * times[:, None])


DATA = exact(torch.tensor(1.0).double(), TIMES)


def test_log_likelihood_in_closed_form():
    y = conjugate.data()
    p = conjugate.posterior(y, draws=50)
    residual = (y - p["mu"][..., None]) / conjugate.SD_NOISE
    expected = -0.5 * residual**2 - math.log(conjugate.SD_NOISE) - 0.5 * math.log(2 * math.pi)
    for memory in ("1GB", 4000):
        assert torch.allclose(p.log_likelihood(memory)["y"], expected, rtol=1e-12)


def test_log_likelihood_of_events_masks_and_observe():
    series = Series.from_tensors(TIMES, torch.where(DATA > 2.5, torch.nan, DATA))
    p = draws_of(by_series, series)
    values, z = p.log_likelihood()["obs"], exact(p["k"], TIMES)
    expected = -0.5 * ((DATA - z) / 0.1) ** 2 - math.log(0.1) - 0.5 * math.log(2 * math.pi)
    missing = DATA > 2.5
    assert missing.sum() == 1 and (values[..., missing] == 0).all()
    assert torch.allclose(values[..., ~missing], expected[..., ~missing], atol=1e-3)
    summed = draws_of(fixed_times, DATA).log_likelihood()["obs"]
    assert summed.shape == (2, 3) and torch.allclose(summed, expected.sum((-1, -2)), atol=1e-2)


def test_log_likelihood_is_zero_under_a_mask_and_knows_no_scale():
    y, mask = conjugate.data(), torch.tensor([True, False, True, True, False])

    def masked(y):
        with pyro.poutine.mask(mask=mask), pyro.poutine.scale(scale=7.0):
            conjugate.model(y)

    plain = conjugate.posterior(y, draws=10)
    p = Posterior(samples=plain.samples, sites=inspect_model(masked, y), model=masked, args=(y,))
    assert torch.equal(p.log_likelihood()["y"], plain.log_likelihood()["y"] * mask)


def test_log_likelihood_needs_every_latent_site():
    p = draws_of(open_times, TIMES, DATA)
    p = Posterior(samples={"other": p["k"]}, sites=p.sites, model=p.model, args=p.args)
    with pytest.raises(LatentDEError, match=r"\['k'\]"):
        p.log_likelihood()


def test_posterior_predictive_has_the_closed_form_law():
    y = conjugate.data()
    mean, sd = conjugate.exact(y)
    new = conjugate.posterior(y).predict(seed=4).observations["y"]
    assert new.shape == (2, 2000, 5)
    total, n = math.hypot(sd, conjugate.SD_NOISE), 4000
    # five observations share mu: n draws, and five standard errors for the mean, five for the sd
    assert abs(new.mean() - mean) < 5 * total / n**0.5
    assert abs(new[..., 0].std() - total) < 5 * total / (2 * n) ** 0.5
    shared = torch.cov(new.flatten(0, 1).T)[0, 1]
    assert abs(shared - sd**2) < 5 * total**2 / n**0.5


def test_trajectories_at_own_and_new_times():
    p = draws_of(open_times, TIMES, DATA)
    own = p.predict()
    assert torch.allclose(own.trajectories["z"], exact(p["k"], TIMES), rtol=1e-4)
    assert torch.equal(own.times_of("z"), TIMES)
    new = torch.tensor([3.0, 0.25, 0.5, 0.25]).double()  # neither sorted nor without repeats
    made = p.predict(new)
    assert torch.allclose(made.trajectories["z"], exact(p["k"], new), rtol=1e-4)
    assert made.observations["obs"].shape == (2, 3, 4, 2)
    # noise of sd 0.1: forty-eight values, six standard deviations
    assert (made.observations["obs"] - made.trajectories["z"]).abs().max() < 0.6


@pytest.mark.parametrize("model", [open_times, careful_times])
def test_new_observations_follow_the_times_argument(model):
    p = draws_of(model, TIMES, DATA, k=torch.ones(1, 500).double())
    new = torch.linspace(0, 4, 9).double()
    made = p.predict(new, seed=1)
    noise = (made.observations["obs"] - made.trajectories["z"]).flatten()
    # 9000 values: five standard errors
    assert abs(noise.mean()) < 5 * 0.1 / 9000**0.5 and abs(noise.std() - 0.1) < 5 * 0.1 / 18000**0.5


def test_a_series_argument_is_moved_to_the_new_times():
    p = draws_of(by_series, Series.from_tensors(TIMES, DATA))
    made = p.predict(torch.tensor([0.0, 3.0]).double())
    assert (made.observations["obs"] - exact(p["k"], torch.tensor([0.0, 3.0]).double())).abs().max() < 0.6


def test_times_known_by_heart_give_trajectories_and_a_telling_error():
    p = draws_of(fixed_times, DATA)
    made = p.predict([0.0, 5.0])
    assert torch.allclose(made.trajectories["z"], exact(p["k"], torch.tensor([0.0, 5.0]).double()), rtol=1e-3)
    with pytest.raises(LatentDEError, match="site 'obs'.*Take the times as an argument of the model"):
        made.observations["obs"]
    with pytest.raises(LatentDEError, match="site 'obs'"):
        p.predict([0.0, 5.0], observations=True)
    with pytest.raises(KeyError, match="'obs'"):
        made.observations["nothing"]


def test_times_before_the_start_that_move_it_are_told():
    p = draws_of(open_times, TIMES, DATA)
    made = p.predict([-1.0, 0.0])
    assert torch.allclose(made.trajectories["z"], exact(p["k"], torch.tensor([-1.0, 0.0]).double()), rtol=1e-4)
    with pytest.raises(LatentDEError, match="t0="):
        made.observations["obs"]
    with pytest.raises(LatentDEError, match="t0="):
        p.predict([-1.0, 0.0], observations=True)


def ragged():
    """Two series of different lengths, times and doses, the second padded."""
    values = [torch.ones(4, 1).double(), torch.ones(2, 1).double()]
    times = [TIMES, torch.tensor([1.5, 2.5]).double()]
    return Series.from_tensors(times, values, covariates=[[3.0], [5.0]], ids=["Ann", "Bo"])


def dosed(series):
    """k shared, z = dose at the first time of each series."""
    k = pyro.sample("k", dist.LogNormal(torch.zeros(()).double(), 0.5))
    with lde.series_plate(series):
        z = lde.ode("z", lambda t, y, k: -k * y, series.covariates, series.times, k, event_dims={"p": 0})
        lde.observe("obs", lambda z: dist.Normal(z, 0.01), series, z)


def dosed_at(series, times=None):
    k = pyro.sample("k", dist.LogNormal(torch.zeros(()).double(), 0.5))
    with lde.series_plate(series):
        where, start = series.times if times is None else times, series.times[:, 0]
        z = lde.ode("z", lambda t, y, k: -k * y, series.covariates, where, k, t0=start, event_dims={"p": 0})
        lde.observe("obs", lambda z: dist.Normal(z, 0.01), series if times is None else None, z)


@pytest.mark.parametrize("model", [dosed, dosed_at])
def test_series_with_times_of_their_own_at_new_times(model):
    p = draws_of(model, ragged())
    new = torch.tensor([4.0, 1.5, 2.5, 3.0]).double()
    made = p.predict(new)
    start, dose = torch.tensor([0.0, 1.5]).double(), torch.tensor([3.0, 5.0]).double()
    expected = dose[:, None] * torch.exp(-p["k"][..., None, None] * (new - start[:, None]))
    assert torch.allclose(made.trajectories["z"][..., 0], expected, rtol=1e-4)
    observed = made.observations["obs"][..., 0]
    # noise of sd 0.01: forty-eight values, six standard deviations
    assert observed.shape == (2, 3, 2, 4) and (observed - expected).abs().max() < 0.06
    assert (observed - expected).abs().min() > 0  # noise there is


def test_new_times_before_the_first_of_one_series():
    new = torch.tensor([0.5, 3.0]).double()  # Bo begins at 1.5
    with pytest.raises(LatentDEError, match="t0=.*after the first of each series"):
        draws_of(dosed, ragged()).predict(new).observations["obs"]
    assert draws_of(dosed_at, ragged()).predict(new).observations["obs"].shape == (2, 3, 2, 2, 1)


def test_inputs_are_not_known_at_new_times():
    series = Series.from_tensors(TIMES, DATA, inputs=torch.zeros(4, 1).double())
    with pytest.raises(LatentDEError, match="'obs'.*inputs, which are known at their own times only"):
        draws_of(by_series, series).predict([0.0, 3.0]).observations["obs"]


def test_failed_rows_are_nan_counted_and_left_out():
    def model(times, data=None):
        k = pyro.sample("k", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("row", 2):
            start = torch.tensor([[1.0], [0.1]]).double()
            z = lde.ode("z", lambda t, y, k: k * y * y, start, times, k)
            pyro.sample("obs", dist.Normal(z, 0.1).to_event(2), obs=data)

    # y' = k y^2 from 1 is infinite at t = 1/k: k = 2 fails in the first row only, before the last time
    k = torch.tensor([[-1.0, 2.0, 0.0]]).double()
    times = torch.tensor([0.0, 0.25, 1.0]).double()
    p = draws_of(model, times, torch.zeros(2, 3, 1).double(), k=k)
    with pytest.warns(UserWarning, match="1 of 6 rows of site 'z'"):
        made = p.predict(times)
    z = made.trajectories["z"]
    assert made.n_failed == {"z": 1} and z[0, 1, 0].isnan().all() and z.isnan().sum() == 3
    median = made.quantile("z", [0.5])[0]
    assert median[0, 2].item() == pytest.approx((0.5 + 1.0) / 2, rel=1e-4)  # of k = -1 and k = 0 alone


def test_a_distribution_that_refuses_nan_does_not_end_the_run():
    def model(times, data=None):
        k = pyro.sample("k", dist.Normal(torch.zeros(()).double(), 1.0))
        z = lde.ode("z", lambda t, y, k: k * y * y, torch.ones(1).double(), times, k)
        pyro.sample("obs", dist.Poisson(z.clamp(min=0) + torch.where(z.isnan(), -1.0, 0.0)).to_event(2), obs=data)

    times = torch.tensor([0.0, 1.0]).double()
    p = draws_of(model, times, torch.ones(2, 1).double(), k=torch.tensor([[0.1, 5.0, 0.2]]).double())
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        counts = p.predict().observations["obs"]
    assert counts[0, 1].isnan().all() and counts[0, [0, 2]].isfinite().all()


def test_model_that_cannot_be_batched_gives_the_same():
    def awkward(times, data=None):
        k = pyro.sample("k", dist.LogNormal(torch.zeros(()).double(), 0.5))
        k = torch.tensor(k.item(), dtype=torch.float64)
        pyro.sample("obs", dist.Normal(solved(times, k), 0.1).to_event(2), obs=data)

    p, q = draws_of(awkward, TIMES, DATA), draws_of(open_times, TIMES, DATA)
    assert torch.allclose(p.predict().trajectories["z"], q.predict().trajectories["z"], rtol=1e-9)
    assert torch.allclose(p.log_likelihood()["obs"], q.log_likelihood()["obs"], rtol=1e-7)


def test_bad_times():
    p = draws_of(open_times, TIMES, DATA)
    for bad in ([math.nan], [[0.0, 1.0]], []):
        with pytest.raises(LatentDEError, match="times: expected finite"):
            p.predict(bad)


def test_global_state_is_left_alone():
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        draws_of(open_times, TIMES, DATA).predict()
    assert torch.equal(torch.get_rng_state(), before) and pyro.settings.get("validate_distributions_pyro")
