# SPDX-License-Identifier: Apache-2.0
"""The generative model of series: densities by hand, scales, hierarchy, codes, intervention."""

import pyro.distributions as dist
import pytest
import torch
from decay_model import TIMES, N, T, decay, draw, model, series
from pyro import poutine
from pyro.infer import Trace_ELBO

import pyro_latentde as lde
from pyro_latentde.errors import ShapeError
from pyro_latentde.models.goku import GOKU
from pyro_latentde.models.latent_ode import LatentODE
from pyro_latentde.models.latents import Latent
from pyro_latentde.models.shooting import Shooting
from pyro_latentde.models.unknown import Hybrid


def test_log_joint_is_the_closed_form() -> None:
    data, latents = series(), draw()
    trace = poutine.trace(poutine.condition(model(), data=latents)).get_trace(data)
    z = latents["z0"] * torch.exp(-latents["theta"] * TIMES)
    expected = torch.distributions.Normal(z, 0.5).log_prob(data.values[..., 0]).sum()
    expected += torch.distributions.Normal(0.0, 1.0).log_prob(latents["z0"]).sum()
    expected += torch.distributions.LogNormal(0.0, 0.5).log_prob(latents["theta"]).sum()
    assert float(trace.log_prob_sum()) == pytest.approx(float(expected), abs=1e-6)


def test_sites_plates_and_names() -> None:
    trace = poutine.trace(model()).get_trace(series())
    assert trace.nodes["z0"]["value"].shape == (N, 1)
    assert trace.nodes["theta"]["value"].shape == (N, 1)
    assert trace.nodes["z"]["value"].shape == (N, T, 1)
    assert trace.nodes["obs"]["value"].shape == (N, T, 1)
    assert torch.equal(trace.nodes["rate"]["value"], trace.nodes["theta"]["value"][:, 0])
    assert [frame.name for frame in trace.nodes["theta"]["cond_indep_stack"]] == ["series"]


def test_other_times_are_drawn_from_the_same_start() -> None:
    later = torch.tensor([0.6, 2.0, 3.0], dtype=torch.float64)
    latents = draw()
    trace = poutine.trace(poutine.condition(model(), data=latents)).get_trace(series(), times=later)
    expected = latents["z0"] * torch.exp(-latents["theta"] * later)
    torch.testing.assert_close(trace.nodes["z"]["value"][..., 0], expected, rtol=1e-7, atol=1e-8)
    assert not trace.nodes["obs"]["is_observed"]


def test_do_sets_a_parameter_by_its_name() -> None:
    latents = draw()
    changed = poutine.do(poutine.condition(model(), data=latents), data={"rate": torch.full((N,), 2.0).double()})
    z = poutine.trace(changed).get_trace(series()).nodes["z"]["value"][..., 0]
    torch.testing.assert_close(z, latents["z0"] * torch.exp(-2.0 * TIMES), rtol=1e-7, atol=1e-8)


def test_population_prior_depends_on_shared_sites() -> None:
    shared = {
        "mean": dist.Normal(torch.tensor(0.3).double(), 1.0),
        "spread": dist.HalfNormal(torch.tensor(1.0).double()),
    }
    theta = Latent(lambda s: {"rate": dist.LogNormal(s["mean"], s["spread"])})
    hierarchy = model(theta=theta, shared=shared)
    values = {"mean": torch.tensor(0.7).double(), "spread": torch.tensor(0.2).double()}
    trace = poutine.trace(poutine.condition(hierarchy, data=values | draw())).get_trace(series())
    trace.compute_log_prob()
    expected = torch.distributions.LogNormal(0.7, 0.2).log_prob(draw()["theta"][:, 0])
    torch.testing.assert_close(trace.nodes["theta"]["log_prob"].double(), expected.double(), rtol=1e-6, atol=1e-6)
    assert trace.nodes["mean"]["cond_indep_stack"] == ()


def test_code_with_a_head_is_the_published_form() -> None:
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Softplus()).double()
    coded = model(theta=Latent(dist.Normal(torch.zeros(4).double(), 1.0).to_event(1), head, names=["rate"]))
    assert set(coded.local_priors()) == {"z0", "theta_code"}
    trace = poutine.trace(coded).get_trace(series())
    torch.testing.assert_close(trace.nodes["theta"]["value"], head(trace.nodes["theta_code"]["value"]))


def test_prior_that_is_no_vector_is_told() -> None:
    with pytest.raises(ShapeError, match=r"event shape \(\).*to_event\(1\)"):
        Latent(dist.Normal(torch.zeros(2), 1.0))("z0", {})


def test_hybrid_adds_to_the_chosen_equations_only() -> None:
    net = torch.nn.Linear(2, 1)
    field = Hybrid(lambda t, z, p: torch.stack([z[1], -z[0]]), net, into=[1], bayesian=False)
    z = torch.tensor([0.3, -0.4])
    expected = torch.stack([z[1], -z[0] + net(z)[0]])
    torch.testing.assert_close(field(torch.tensor(0.0), z, None), expected)
    wrong = Hybrid(lambda t, z, p: z, torch.nn.Linear(2, 3), into=[1], bayesian=False)
    with pytest.raises(ShapeError, match="3 numbers for 1 equations"):
        wrong(torch.tensor(0.0), z, None)


def test_hybrid_counts_equations_from_the_end_and_refuses_others() -> None:
    z = torch.tensor([0.3, -0.4])

    def field(*into: int) -> Hybrid:
        torch.manual_seed(0)
        return Hybrid(lambda t, z, p: -z, torch.nn.Linear(2, len(into)), into=into, bayesian=False)

    assert torch.equal(field(-1)(torch.tensor(0.0), z), field(1)(torch.tensor(0.0), z))
    assert not torch.equal(field(-1)(torch.tensor(0.0), z), -z)
    for wrong in ((2,), (-3,), (1, 1), (1, -1)):
        with pytest.raises(ShapeError, match=r"among 2 equations, in -2, \.\.\., 1"):
            field(*wrong)(torch.tensor(0.0), z)


def test_hybrid_weights_are_sites_with_their_priors() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    zero = torch.zeros(1, dtype=torch.float64)
    goku = GOKU(
        decay, dist.Normal(zero, 1.0).to_event(1), {"rate": dist.LogNormal(zero.sum(), 0.5)}, values=1, unknown=net
    )
    goku = goku.double()
    loss = Trace_ELBO().differentiable_loss(goku.model, goku.guide, series())
    loss.backward()
    trace = poutine.trace(goku.model).get_trace(series())
    names = [name for name, node in trace.nodes.items() if node["type"] == "sample" and name.startswith("field.")]
    assert sorted(names) == sorted(
        ["field.scale"] + [f"field.network.{i}.{w}" for i in (0, 2) for w in ("weight", "bias")]
    )
    spread = trace.nodes["field.network.2.weight"]["fn"].base_dist.scale
    assert spread.unique().tolist() == pytest.approx([0.5])
    assert all(p.grad.isfinite().all() for p in goku.guide.parameters() if p.grad is not None)


def test_unknown_part_with_plain_weights_learns() -> None:
    torch.manual_seed(0)
    zero = torch.zeros(1, dtype=torch.float64)
    field = Hybrid(decay, torch.nn.Linear(1, 1), bayesian=False)
    goku = GOKU(field, dist.Normal(zero, 1.0).to_event(1), {"rate": dist.LogNormal(zero.sum(), 0.5)}, values=1).double()
    Trace_ELBO().differentiable_loss(goku.model, goku.guide, series()).backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in field.network.parameters())


def test_weights_of_a_latent_ode_can_be_sampled() -> None:
    torch.manual_seed(0)
    pair = LatentODE(values=1, latent=2, units=4, weight_sd=1.0)
    loss = Trace_ELBO().differentiable_loss(pair.model, pair.guide, series(dtype=torch.float32))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in pair.guide.parameters() if p.grad is not None)
    names = [name for name, _ in pair.guide.named_parameters()]
    assert any("shared" in name and "weight" in name for name in names)


def test_augmented_dimensions_begin_at_zero() -> None:
    torch.manual_seed(0)
    pair = LatentODE(values=1, latent=2, units=4, augment=3)
    trace = poutine.trace(pair.model).get_trace(series(dtype=torch.float32))
    z = trace.nodes["z"]["value"]
    assert z.shape == (N, T, 5)
    z = z.detach()
    assert float(z[:, 0, 2:].abs().max()) == 0.0
    assert float(z[:, -1, 2:].abs().max()) > 0.0


def elbo(pair: torch.nn.Module, data: lde.Series) -> torch.Tensor:
    return Trace_ELBO().differentiable_loss(pair.model, pair.guide, data)


def test_models_made_in_float32_work_in_float64() -> None:
    torch.manual_seed(0)
    start = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    rate = {"rate": dist.Uniform(torch.tensor(0.0), torch.tensor(2.0))}
    coded = Latent(dist.Normal(torch.zeros(3), 1.0).to_event(1), torch.nn.Linear(3, 1), names=["rate"])
    pairs = [
        GOKU(decay, start, rate, values=1, unknown=torch.nn.Linear(1, 1)),
        GOKU(decay, start, coded, values=1, shared={"size": dist.LogNormal(0.0, 1.0)}),
        LatentODE(values=1, latent=2, units=4, weight_sd=1.0),
    ]
    for pair in pairs:
        loss = elbo(pair.double(), series())
        loss.backward()
        assert loss.dtype == torch.float64
        assert loss.isfinite()
        trace = poutine.trace(pair.guide).get_trace(series())
        drawn = [node["value"] for node in trace.nodes.values() if node["type"] == "sample"]
        assert {value.dtype for value in drawn if value.is_floating_point()} == {torch.float64}
        trace = poutine.trace(pair.model).get_trace(series())
        drawn = [node["value"] for node in trace.nodes.values() if node["type"] == "sample"]
        assert {value.dtype for value in drawn if value.is_floating_point()} == {torch.float64}


def test_start_may_depend_on_shared_sites() -> None:
    torch.manual_seed(0)

    def start(shared: dict[str, torch.Tensor]) -> dist.Distribution:
        return dist.Normal(shared["mean"].expand(2), 1.0).to_event(1)

    shared = {"mean": dist.Normal(torch.tensor(0.0), 1.0)}
    pair = GOKU(lambda t, z, p: -z, start, None, values=1, shared=shared, shooting=Shooting(3, 0.1))
    assert pair.model.decoder(torch.zeros(2)).shape == (1,)
    assert elbo(pair, series(dtype=torch.float32)).isfinite()


def test_wrong_number_of_names_is_told() -> None:
    theta = Latent(dist.Normal(torch.zeros(3), 1.0).to_event(1), names=["rate", "size"])
    with pytest.raises(ShapeError, match="3 entries for 2 names, rate, size"):
        model(theta=theta)(series())
