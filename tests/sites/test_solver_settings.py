# SPDX-License-Identifier: Apache-2.0
"""lde.solver and the defaults in pyro.settings: which setting wins, and that it arrives through any handler."""

import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta

import pyro_latentde as lde
from pyro_latentde.errors import SolveError
from pyro_latentde.sites import settings as site_settings

TIMES = torch.linspace(0.0, 1.0, 3, dtype=torch.float64)
START = torch.ones(1, dtype=torch.float64)


@pytest.fixture
def seen(monkeypatch):
    """The keywords that reach odesolve, in order of the solves."""
    from pyro_latentde.sites import ode_site

    calls = []
    solve = ode_site.odesolve

    def recording(*args, **keywords):
        solution = solve(*args, **keywords)
        calls.append({**keywords, "method": solution.method, "engine": solution.engine})
        return solution

    monkeypatch.setattr(ode_site, "odesolve", recording)
    return calls


def field(t, y):
    return -y


def model(**own):
    for name in ("a", "b"):
        z = lde.ode(name, field, START, TIMES, engine="torch", **own)
    return z


def test_every_setting_can_be_changed_from_outside(seen):
    chosen = {
        "method": "bosh3",
        "rtol": 1e-3,
        "atol": 1e-5,
        "step_size": 0.25,
        "gradient": "discrete",
        "engine": "torch",
        "max_steps": 77,
    }
    with lde.solver(**chosen):
        lde.ode("a", field, START, TIMES)
    assert {k: seen[0][k] for k in chosen} == chosen


def test_outside_wins_over_the_site_and_innermost_over_outermost(seen):
    with lde.solver(rtol=1e-2, method="bosh3"), lde.solver(rtol=1e-5):
        model(rtol=1e-9, atol=1e-11)
    assert [(c["rtol"], c["atol"], c["method"]) for c in seen] == [(1e-5, 1e-11, "bosh3")] * 2
    model(rtol=1e-9)
    assert seen[-1]["rtol"] == 1e-9 and seen[-1]["method"] == "tsit5"  # nothing is left behind


def test_settings_for_some_sites_only(seen):
    with lde.solver(rtol=1e-2), lde.solver(sites=["b"], rtol=1e-5), lde.solver(sites="a", method="bosh3"):
        model()
    assert [(c["rtol"], c["method"]) for c in seen] == [(1e-2, "bosh3"), (1e-5, "tsit5")]


def test_none_is_the_default(seen):
    with lde.solver(step_size=None, rtol=None, method=None):
        model(method="euler", step_size=0.1, rtol=1e-3)
    assert seen[0]["method"] == "tsit5" and "step_size" not in seen[0] and "rtol" not in seen[0]


def test_it_survives_errors_inside(seen):
    with pytest.raises(ZeroDivisionError), lde.solver(rtol=1e-2):
        raise ZeroDivisionError
    model()
    assert "rtol" not in seen[0]


def test_it_works_as_a_decorator(seen):
    lde.solver(method="bosh3")(model)()
    assert seen[0]["method"] == "bosh3"


def test_it_works_through_block_svi_and_predictive(seen):
    def learned(data):
        k = pyro.sample("k", dist.LogNormal(torch.zeros((), dtype=torch.float64), 0.1))
        z = lde.ode("z", lambda t, y, p: -p * y, START, TIMES, k, engine="torch", event_dims={"p": 0})
        pyro.sample("x", dist.Normal(z, 1.0).to_event(2), obs=data)

    data = torch.zeros(3, 1, dtype=torch.float64)
    guide = AutoDelta(learned)
    with lde.solver(method="bosh3"):
        poutine.block(learned, hide_all=True)(data)
        SVI(learned, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(data)
        Predictive(learned, guide=guide, num_samples=2)(data)
        Predictive(learned, guide=guide, num_samples=2, parallel=True)(data)
    assert len(seen) >= 5 and {c["method"] for c in seen} == {"bosh3"}


def test_another_thread_does_not_see_it(seen):
    with lde.solver(rtol=1e-2):
        thread = threading.Thread(target=model)
        thread.start()
        thread.join()
        model()
    assert ["rtol" in c for c in seen] == [False, False, True, True]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"metod": "rk4"},
            r"settings of solver\(\): expected one of method, rtol, .* got 'metod'. Did you mean 'method'",
        ),
        ({"on_failure": "nan"}, "got 'on_failure'"),
        ({"method": "tsit"}, "Did you mean 'tsit5'"),
        ({"engine": "fast"}, "engine: .* got 'fast'"),
        ({"gradient": "exact"}, "gradient: .* got 'exact'"),
        ({"max_steps": 0}, "max_steps = 0"),
    ],
)
def test_mistakes_are_told_where_they_are_made(keywords, message):
    with pytest.raises(SolveError, match=message), lde.solver(**keywords):
        raise AssertionError("not reached")


def test_a_fixed_step_method_from_outside_needs_a_step(seen):
    with pytest.raises(SolveError, match=r"site 'a': method 'rk4' .*give step_size="), lde.solver(method="rk4"):
        model()
    with lde.solver(method="rk4", step_size=0.1):
        model()
    assert seen[0]["method"] == "rk4"


def test_defaults_lie_in_pyro_settings(seen):
    names = ["latentde_method", "latentde_engine", "latentde_gradient", "latentde_max_steps"]
    assert {n: pyro.settings.get(n) for n in names} == dict(
        zip(names, ["tsit5", "auto", "discrete", 10_000], strict=True)
    )
    with pyro.settings.context(latentde_method="bosh3", latentde_engine="torch", latentde_max_steps=55):
        lde.ode("a", field, START, TIMES)
        with lde.solver(method="dopri5"):
            lde.ode("a", field, START, TIMES, max_steps=66)
    assert [(c["method"], c["engine"], c["max_steps"]) for c in seen] == [
        ("bosh3", "torch", 55),
        ("dopri5", "torch", 66),
    ]
    assert site_settings.latentde_method == "tsit5"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("latentde_method", "rk5"),
        ("latentde_engine", "fast"),
        ("latentde_gradient", "exact"),
        ("latentde_max_steps", 0),
        ("latentde_max_steps", 1.5),
    ],
)
def test_defaults_are_checked(name, value):
    with pytest.raises(SolveError), pyro.settings.context(**{name: value}):
        raise AssertionError("not reached")
    assert pyro.settings.get(name) != value
