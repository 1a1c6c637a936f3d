# SPDX-License-Identifier: Apache-2.0
"""lde.ode under every Pyro handler: it behaves like a plain deterministic site."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.inspect import get_dependencies, get_model_relations
from pyro.infer.reparam import LocScaleReparam
from torch.testing import assert_close

import pyro_latentde as lde

TIMES = torch.linspace(0.0, 2.0, 5, dtype=torch.float64)
START = torch.tensor([1.0, 2.0], dtype=torch.float64)


def decay(t, y, k):
    return -k * y


def exact(k):
    """(*batch, T, 2) for rates (*batch,)."""
    k = torch.as_tensor(k, dtype=torch.float64)
    return START * torch.exp(-k[..., None, None] * TIMES[:, None])


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def model(data=None):
    k = pyro.sample("k", dist.LogNormal(scalar(-0.5), 0.3))
    z = lde.ode("z", decay, START, TIMES, k, states=("u", "v"), event_dims={"p": 0})
    pyro.sample("x", dist.Normal(z, 0.1).to_event(2), obs=data)
    return z


def plated(n=3, subsample=None, y0=START):
    with pyro.plate("series", n, subsample_size=subsample) as index:
        k = pyro.sample("k", dist.LogNormal(scalar(-0.5), 0.3))
        z = lde.ode("z", decay, y0 if y0.ndim == 1 else y0[index], TIMES, k, event_dims={"p": 0})
        pyro.sample("x", dist.Normal(z, 0.1).to_event(2))
    return index, z


def test_trace_records_the_trajectory_and_how_it_was_found():
    trace = poutine.trace(model).get_trace()
    site = trace.nodes["z"]
    assert_close(site["value"], exact(trace.nodes["k"]["value"]), rtol=1e-6, atol=1e-8)
    assert site["fn"].event_dim == 2 and site["is_observed"] and site["infer"]["_deterministic"]
    record = site["infer"]["lde_ode"]
    assert record["states"] == ("u", "v") and torch.equal(record["times"], TIMES)
    assert record["status"].shape == () and int(record["status"]) == lde.Status.OK
    assert record["n_steps"].shape == () and record["n_steps"].dtype == torch.int64 and int(record["n_steps"]) > 3
    trace.compute_log_prob()
    assert float(site["log_prob_sum"]) == 0.0
    assert list(trace.stochastic_nodes) == ["k", "x"]


def test_replay_gives_the_same_trajectory():
    first = poutine.trace(model).get_trace()
    second = poutine.trace(poutine.replay(model, trace=first)).get_trace()
    assert torch.equal(first.nodes["z"]["value"], second.nodes["z"]["value"])


def test_condition_on_a_parameter_and_on_the_site_itself():
    z = poutine.condition(model, data={"k": scalar(0.5)})()
    assert_close(z, exact(0.5), rtol=1e-6, atol=1e-8)
    given = torch.full((5, 2), 7.0, dtype=torch.float64)
    trace = poutine.trace(poutine.condition(model, data={"z": given})).get_trace()
    assert torch.equal(trace.nodes["z"]["value"], given) and torch.equal(trace.nodes["_RETURN"]["value"], given)
    assert_close(trace.nodes["x"]["fn"].base_dist.loc, given)


def test_do_cuts_the_site_and_the_parameter():
    given = torch.full((5, 2), 7.0, dtype=torch.float64)
    assert torch.equal(poutine.do(model, data={"z": given})(), given)
    assert_close(poutine.do(model, data={"k": scalar(0.25)})(), exact(0.25), rtol=1e-6, atol=1e-8)


def test_uncondition_keeps_the_trajectory_and_draws_the_data():
    data = torch.zeros(5, 2, dtype=torch.float64)
    conditioned = poutine.condition(model, data={"k": scalar(0.5)})
    trace = poutine.trace(poutine.uncondition(model)).get_trace(data)
    assert not torch.equal(trace.nodes["x"]["value"], data)
    assert_close(trace.nodes["z"]["value"], exact(trace.nodes["k"]["value"]), rtol=1e-6, atol=1e-8)
    assert_close(conditioned(data), exact(0.5), rtol=1e-6, atol=1e-8)


def test_block_hides_the_site_and_changes_nothing_else():
    hidden = poutine.trace(poutine.block(model, hide=["z"])).get_trace()
    assert "z" not in hidden.nodes and {"k", "x"} <= set(hidden.nodes)
    everything = poutine.trace(poutine.block(model, hide_all=True)).get_trace()
    assert set(everything.nodes) == {"_INPUT", "_RETURN"}
    assert everything.nodes["_RETURN"]["value"].shape == (5, 2)


@pytest.mark.parametrize("change", [lambda m: poutine.mask(m, mask=False), lambda m: poutine.scale(m, scale=3.0)])
def test_mask_and_scale_change_densities_not_trajectories(change):
    plain, changed = (poutine.trace(poutine.condition(m, data={"k": scalar(0.5)})) for m in (model, change(model)))
    data = exact(0.5)
    plain, changed = plain.get_trace(data), changed.get_trace(data)
    assert torch.equal(plain.nodes["z"]["value"], changed.nodes["z"]["value"])
    assert_close(changed.log_prob_sum(), plain.log_prob_sum() * (3.0 if changed.nodes["x"]["scale"] == 3.0 else 0.0))


def test_reparam_of_a_parameter():
    def centred():
        k = pyro.sample("k", dist.Normal(scalar(0.5), scalar(0.1)))
        return lde.ode("z", decay, START, TIMES, k, event_dims={"p": 0})

    trace = poutine.trace(poutine.reparam(centred, config={"k": LocScaleReparam(0.0)})).get_trace()
    assert "k_decentered" in trace.nodes
    assert_close(trace.nodes["z"]["value"], exact(trace.nodes["k"]["value"]), rtol=1e-6, atol=1e-8)


def test_lift_of_a_parameter():
    def lifted():
        k = pyro.param("k", scalar(0.5), constraint=dist.constraints.positive)
        return lde.ode("z", decay, START, TIMES, k, event_dims={"p": 0})

    trace = poutine.trace(poutine.lift(lifted, prior={"k": dist.LogNormal(scalar(0.0), 1.0)})).get_trace()
    assert trace.nodes["k"]["type"] == "sample"
    assert_close(trace.nodes["z"]["value"], exact(trace.nodes["k"]["value"]), rtol=1e-6, atol=1e-8)


def test_plate_of_series_and_nested_plates():
    trace = poutine.trace(plated).get_trace()
    assert_close(trace.nodes["z"]["value"], exact(trace.nodes["k"]["value"]), rtol=1e-6, atol=1e-8)
    assert trace.nodes["z"]["infer"]["lde_ode"]["status"].shape == (3,)
    assert [f.name for f in trace.nodes["z"]["cond_indep_stack"]] == ["series"]

    def nested():
        with pyro.plate("groups", 2, dim=-2), pyro.plate("series", 3, dim=-1):
            k = pyro.sample("k", dist.LogNormal(scalar(-0.5), 0.3))
            return k, lde.ode("z", decay, START, TIMES, k, event_dims={"p": 0})

    k, z = poutine.trace(nested).get_trace().nodes["_RETURN"]["value"]
    assert z.shape == (2, 3, 5, 2)
    assert_close(z, exact(k), rtol=1e-6, atol=1e-8)


def test_a_parameter_of_the_outer_plate_is_shared_by_the_inner_one():
    def nested():
        with pyro.plate("groups", 2, dim=-2):
            k = pyro.sample("k", dist.LogNormal(scalar(-0.5), 0.3))
            with pyro.plate("series", 3, dim=-1):
                y0 = pyro.sample("y0", dist.LogNormal(torch.zeros(2, dtype=torch.float64), 0.1).to_event(1))
                return k, y0, lde.ode("z", decay, y0, TIMES, k, event_dims={"p": 0})

    k, y0, z = poutine.trace(nested).get_trace().nodes["_RETURN"]["value"]
    assert k.shape == (2, 1) and y0.shape == (2, 3, 2)
    assert_close(z, y0[..., None, :] * torch.exp(-k[..., None, None] * TIMES[:, None]), rtol=1e-6, atol=1e-8)


def test_subsampling_solves_only_the_subsample():
    y0 = torch.arange(1.0, 21.0, dtype=torch.float64).reshape(10, 2)
    index, z = poutine.trace(plated).get_trace(10, 4, y0).nodes["_RETURN"]["value"]
    assert z.shape == (4, 5, 2)
    assert torch.equal(z[:, 0], y0[index])


def test_broadcast_and_infer_config():
    trace = poutine.trace(poutine.infer_config(model, config_fn=lambda site: {"mark": 1})).get_trace()
    assert trace.nodes["z"]["infer"]["mark"] == 1 and "lde_ode" in trace.nodes["z"]["infer"]


def test_escape_and_seed():
    with poutine.seed(rng_seed=3):
        first = model()
    with poutine.seed(rng_seed=3):
        assert torch.equal(first, model())


def closed_form(data=None):
    k = pyro.sample("k", dist.LogNormal(scalar(-0.5), 0.3))
    z = pyro.deterministic("z", exact(k), event_dim=2)
    pyro.sample("x", dist.Normal(z, 0.1).to_event(2), obs=data)


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("engine", ["fused", "torch"])
def test_relations_of_the_model_reach_through_the_solve(shown, engine):
    """What pyro.render_model draws: x descends from k through the trajectory, as with a closed form."""
    data = torch.zeros(5, 2, dtype=torch.float64)
    with lde.solver(engine=engine):
        relations = get_model_relations(model, model_args=(data,), include_deterministic=shown)
    assert relations == get_model_relations(closed_form, model_args=(data,), include_deterministic=shown)
    assert relations["sample_sample"]["x"] == (["z"] if shown else ["k"])


def test_dependencies_reach_through_a_field_that_captures_its_parameter():
    def capturing(data):
        k = pyro.sample("k", dist.LogNormal(scalar(-0.5), 0.3))
        z = lde.ode("z", lambda t, y: -k * y, START, TIMES)
        pyro.sample("x", dist.Normal(z, 0.1).to_event(2), obs=data)

    data = torch.zeros(5, 2, dtype=torch.float64)
    assert get_dependencies(capturing, (data,)) == get_dependencies(closed_form, (data,))


def test_plates_appear_in_the_relations():
    assert get_model_relations(plated)["plate_sample"] == {"series": ["k", "z", "x"]}
