# SPDX-License-Identifier: Apache-2.0
"""lde.ode itself: names of states, structured states, failures, errors that name the site, other times."""

import contextlib
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.testing import assert_close

import pyro_latentde as lde
from pyro_latentde.errors import DataError, GradientPathError, ShapeError, SolveError
from pyro_latentde.sites.settings import extra_times

TIMES = torch.linspace(0.0, 2.0, 5, dtype=torch.float64)
START = torch.tensor([1.0, 2.0], dtype=torch.float64)


def decay(t, y, k):
    return -k * y


def blow_up(t, y, k):
    """y' = k y^2 ends at t = 1 / (k y0)."""
    return k * y * y


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def one_rate(**keywords):
    return lde.ode("z", decay, START, TIMES, scalar(0.5), event_dims={"p": 0}, **keywords)


def record_of(model, *args):
    return poutine.trace(model).get_trace(*args).nodes["z"]["infer"]["lde_ode"]


def test_without_a_handler_it_is_odesolve():
    expected = lde.odesolve(decay, START, TIMES, scalar(0.5), event_dims={"p": 0}).ys
    assert torch.equal(one_rate(), expected)
    with pyro.validation_enabled(False):
        assert torch.equal(one_rate(), expected)


def test_states_are_named():
    assert record_of(one_rate)["states"] is None
    assert record_of(lambda: one_rate(states=("hare", "lynx")))["states"] == ("hare", "lynx")
    assert record_of(lambda: one_rate(states=["hare", "lynx"]))["states"] == ("hare", "lynx")


@pytest.mark.parametrize("states", [("hare",), ("a", "b", "c"), "ab"])
def test_a_wrong_number_of_names_is_told(states):
    with pytest.raises(
        ShapeError, match=r"site 'z': states expects one name per coordinate, 2 in all; got .*(names|'ab')"
    ):
        one_rate(states=states)


def test_dict_states_come_back_as_a_dict_and_are_recorded_side_by_side():
    def field(t, y, p):
        return {"level": -p["k"] * y["level"], "speed": -2 * p["k"] * y["speed"]}

    def model():
        y0 = {"level": scalar(1.0), "speed": START}
        return lde.ode("z", field, y0, TIMES, {"k": scalar(0.5)}, event_dims={"speed": 1, "k": 0}, engine="torch")

    trace = poutine.trace(model).get_trace()
    z = trace.nodes["_RETURN"]["value"]
    assert set(z) == {"level", "speed"} and z["level"].shape == (5,) and z["speed"].shape == (5, 2)
    assert_close(z["speed"], START * torch.exp(-TIMES)[:, None], rtol=1e-5, atol=1e-7)
    assert trace.nodes["z"]["value"].shape == (5, 3)
    assert trace.nodes["z"]["infer"]["lde_ode"]["states"] == ("level", "speed[0]", "speed[1]")
    given = torch.arange(15.0, dtype=torch.float64).reshape(5, 3)
    given_back = poutine.condition(model, data={"z": given})()
    assert torch.equal(given_back["level"], given[:, 0]) and torch.equal(given_back["speed"], given[:, 1:])


def test_a_failed_row_raises_outside_handlers_and_is_nan_inside():
    times = torch.linspace(0.0, 2.0, 5, dtype=torch.float64)
    rates = torch.tensor([0.1, 5.0], dtype=torch.float64)

    def model():
        return lde.ode("z", blow_up, torch.ones(1, dtype=torch.float64), times, rates, max_steps=200)

    with pytest.raises(
        SolveError, match=r"site 'z': 1 of 2 trajectories failed: .*First: row \[1\].*parameters \{p: 5\}.*Try: "
    ):
        model()
    trace = poutine.trace(model).get_trace()
    z, record = trace.nodes["z"]["value"], trace.nodes["z"]["infer"]["lde_ode"]
    assert record["status"].tolist()[0] == lde.Status.OK and record["status"].tolist()[1] != lde.Status.OK
    assert z[0].isfinite().all() and z[1, -1].isnan().all()
    assert_close(z[0, :, 0], 1 / (1 - 0.1 * times), rtol=1e-5, atol=1e-6)


def test_status_in_the_record_counts_steps_by_row():
    rates = torch.tensor([0.1, 5.0, 50.0], dtype=torch.float64)
    record = record_of(lambda: lde.ode("z", decay, torch.ones(1, dtype=torch.float64), TIMES, rates))
    assert record["n_steps"].shape == (3,) and record["n_steps"][0] < record["n_steps"][1] < record["n_steps"][2]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (ShapeError, {"y0": torch.ones(2, dtype=torch.int64)}, "y0 has dtype torch.int64"),
        (DataError, {"times": torch.tensor([0.0, float("nan")])}, r"times\[1\] is nan"),
        (SolveError, {"method": "tsit6"}, "Did you mean 'tsit5'"),
        (SolveError, {"engine": "gpu"}, "engine: expected one of auto, .* got 'gpu'"),
        (SolveError, {"rtoll": 1e-3}, r"settings of ode\(\): expected one of .* got 'rtoll'. Did you mean 'rtol'"),
        (SolveError, {"on_failure": "nan"}, r"settings of ode\(\): expected one of .* got 'on_failure'"),
    ],
)
def test_every_error_names_the_site(kind, arguments, message):
    arguments = {"f": decay, "y0": START, "times": TIMES, "params": scalar(0.5), "event_dims": {"p": 0}, **arguments}
    with pytest.raises(kind, match="^site 'hares': .*" + message):
        lde.ode("hares", **arguments)


@pytest.mark.parametrize(
    ("size", "batch", "hint"),
    [
        (5, (4,), r"\. Try: a plate of size 4.*y0\[i\]"),
        (4, (4, 3), "Try: dim=-2 for the plate, where the batch has 4; or"),
    ],
)
def test_a_plate_of_another_size_than_the_batch_is_explained(size, batch, hint):
    message = rf"site 'hares': the batch shape is {re.escape(str(batch))}, but plate 'people' .* size {size} at dim -1"
    with pyro.plate("people", size), pytest.raises(ShapeError, match=message + ".*" + hint):
        lde.ode("hares", decay, START.expand(*batch, 2), TIMES, scalar(0.5), event_dims={"p": 0})


@pytest.mark.parametrize(
    ("shape", "plates"),
    [((4, 2), {-1: (9, 4)}), ((3, 1, 2), {-1: (5, 5), -2: (3, 3)}), ((7, 1, 2), {-1: (5, 5)}), ((2,), {-1: (5, 5)})],
    ids=["subsample", "one batch dimension of two", "particles", "one row"],
)
def test_plates_that_fit_the_batch(shape, plates):
    with contextlib.ExitStack() as stack:
        for dim, (full, size) in plates.items():
            stack.enter_context(pyro.plate(f"plate{dim}", full, subsample_size=size, dim=dim))
        assert lde.ode("hares", decay, START.expand(shape), TIMES, scalar(0.5), event_dims={"p": 0}).shape[-2:] == (
            5,
            2,
        )


@pytest.mark.parametrize("engine", ["auto", "torch"])
@pytest.mark.parametrize("handler", [lambda model: model, poutine.trace])
def test_a_field_that_calls_pyro_is_refused(engine, handler):
    def noisy(t, y):
        return -pyro.sample("k", dist.LogNormal(scalar(0.0), 1.0)) * y

    def learning(t, y):
        return -pyro.param("k", scalar(1.0)) * y

    for field, statement in ((noisy, "sample"), (learning, "param")):
        with pytest.raises(
            SolveError, match=rf"site 'z': the vector field calls pyro.{statement}\('k'\).*before lde.ode"
        ):
            handler(lambda: lde.ode("z", field, START, TIMES, engine=engine))()  # noqa: B023


def test_settings_of_the_site_reach_the_solver():
    loose, tight = (one_rate(rtol=r, atol=1e-12)[-1, 0] - scalar(-1.0).exp() for r in (1e-3, 1e-10))
    assert abs(float(tight)) < 1e-9 < abs(float(loose))
    assert_close(one_rate(method="euler", step_size=0.5, engine="torch")[-1], START * 0.75**4)
    assert torch.equal(one_rate(method=None, engine=None), one_rate())
    replicates = lde.ode("z", decay, START, [1.0, 0.5, 0.5], scalar(0.5), t0=0.0, event_dims={"p": 0})
    assert_close(
        replicates, START * torch.exp(-0.5 * torch.tensor([[1.0], [0.5], [0.5]]).double()), rtol=1e-5, atol=1e-7
    )


def test_extra_times_collects_other_times_and_leaves_the_model_its_own():
    more = torch.linspace(0.0, 4.0, 9, dtype=torch.float64)
    with extra_times(more) as found:
        z = one_rate()
    assert z.shape == (5, 2) and set(found) == {"z"}
    assert_close(found["z"], START * torch.exp(-0.5 * more)[:, None], rtol=1e-5, atol=1e-7)
    with extra_times(more, sites=["other"]) as found:
        one_rate()
    assert found == {}


def test_extra_times_keep_the_start_of_the_site():
    """y0 belongs to the model's first time, or to its t0, not to the first of the other times."""
    late = TIMES + 1.0
    with extra_times(torch.tensor([3.0, 1.5], dtype=torch.float64)) as found:
        lde.ode("z", decay, START, late, scalar(0.5), event_dims={"p": 0})
        lde.ode("from_zero", decay, START, late, scalar(0.5), t0=0.0, event_dims={"p": 0})
    assert_close(found["z"], START * torch.exp(scalar([[-1.0], [-0.25]])), rtol=1e-5, atol=1e-7)
    assert_close(found["from_zero"], START * torch.exp(scalar([[-1.5], [-0.75]])), rtol=1e-5, atol=1e-7)


def test_extra_times_and_draws_under_vmap():
    more = torch.linspace(0.0, 4.0, 3, dtype=torch.float64)
    rates = torch.linspace(0.1, 1.0, 4, dtype=torch.float64)

    def model():
        k = pyro.sample("k", dist.LogNormal(scalar(0.0), 1.0))
        return lde.ode("z", decay, START, TIMES, k, event_dims={"p": 0})

    def one(k):
        with extra_times(more) as found:
            trace = poutine.trace(poutine.condition(model, data={"k": k})).get_trace()
        return trace.nodes["z"]["value"], found["z"], trace.nodes["z"]["infer"]["lde_ode"]["status"]

    with pyro.validation_enabled(False):
        z, extra, status = torch.func.vmap(one)(rates)
    assert_close(z, START * torch.exp(-rates[:, None, None] * TIMES[:, None]), rtol=1e-5, atol=1e-7)
    assert_close(extra, START * torch.exp(-rates[:, None, None] * more[:, None]), rtol=1e-5, atol=1e-7)
    assert status.shape == (4,) and not status.any()


def test_the_gradient_of_a_conditioned_model_is_exact():
    k = scalar(0.5).requires_grad_()

    def model():
        rate = pyro.sample("k", dist.LogNormal(scalar(0.0), 1.0))
        return lde.ode("z", lambda t, y: -rate * y, START, TIMES)

    with poutine.condition(data={"k": k}):
        (grad,) = torch.autograd.grad(model()[-1, 0], k)
    assert_close(grad, -2.0 * scalar(-1.0).exp(), rtol=1e-5, atol=1e-7)


def test_error_kinds_are_kept():
    """The site's name is added in place: the class and its bases stay what they were."""
    with pytest.raises(ValueError, match="site 'z'") as caught:
        lde.ode("z", decay, torch.ones((), dtype=torch.float64), TIMES, scalar(1.0))
    assert type(caught.value) is ShapeError and not isinstance(caught.value, GradientPathError)
