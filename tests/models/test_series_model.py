# SPDX-License-Identifier: Apache-2.0
"""The generative model of series: densities by hand, scales, hierarchy, codes, shooting, intervention."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

import pyro_latentde as lde
from pyro_latentde.distributions.likelihoods import Gaussian
from pyro_latentde.errors import ShapeError
from pyro_latentde.models.goku import GOKU
from pyro_latentde.models.latent_ode import LatentODE
from pyro_latentde.models.latents import Latent
from pyro_latentde.models.series_model import SeriesModel
from pyro_latentde.models.shooting import Shooting
from pyro_latentde.models.unknown import Hybrid

N, T = 3, 7
TIMES = torch.linspace(0.0, 1.2, T, dtype=torch.float64)


def series(n: int = N, dtype: torch.dtype = torch.float64) -> lde.Series:
    generator = torch.Generator().manual_seed(0)
    return lde.Series.from_tensors(
        TIMES.to(dtype), torch.randn(n, T, 1, generator=generator, dtype=torch.float64).to(dtype)
    )


def decay(t: torch.Tensor, z: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
    return -p["rate"] * z


def model(**options) -> SeriesModel:
    """Exponential decay: z(t) = z0 exp(-rate t), observed with sd .5."""
    zero = torch.zeros(1, dtype=torch.float64)
    options = {"theta": Latent({"rate": dist.LogNormal(zero.sum(), 0.5)})} | options
    start = Latent(dist.Normal(zero, 1.0).to_event(1))
    return SeriesModel(decay, start, torch.nn.Identity(), Gaussian(sd=0.5), rtol=1e-9, atol=1e-9, **options)


def draw(n: int = N) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "z0": torch.randn(n, 1, generator=generator, dtype=torch.float64),
        "theta": torch.rand(n, 1, generator=generator, dtype=torch.float64) + 0.5,
    }


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


@pytest.mark.parametrize("length", [1, 2, 3, 6, 7, 10])
def test_shooting_with_exact_starts_is_the_single_solve(length: int) -> None:
    """Starts on the exact trajectory: same trajectory, and every jump has the density of zero."""
    latents = draw()
    exact = latents["z0"] * torch.exp(-latents["theta"] * TIMES)
    shooting = Shooting(length, 0.1)
    stations = shooting.stations(T)
    data = latents | ({"shots": exact[:, stations, None]} if stations else {})
    trace = poutine.trace(poutine.condition(model(shooting=shooting), data=data)).get_trace(series())
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["z"]["value"][..., 0], exact, rtol=1e-6, atol=1e-7)
    if stations:
        peak = -math.log(0.1) - 0.5 * math.log(2 * math.pi)
        expected = torch.full((N,), peak * len(stations), dtype=torch.float64)
        torch.testing.assert_close(trace.nodes["continuity"]["log_prob"], expected, rtol=0, atol=1e-4)
        assert float(trace.nodes["shots"]["log_prob"].abs().sum()) == 0.0


def test_shooting_continuity_is_a_normal_density_of_the_jumps() -> None:
    latents, jump = draw(), 0.05
    exact = latents["z0"] * torch.exp(-latents["theta"] * TIMES)
    shots = exact[:, [3], None] + jump
    data = latents | {
        "shots": torch.cat([shots, shots * torch.exp(-latents["theta"][..., None] * (TIMES[6] - TIMES[3]))], 1)
    }
    trace = poutine.trace(poutine.condition(model(shooting=Shooting(3, 0.1)), data=data)).get_trace(series())
    trace.compute_log_prob()
    normal = torch.distributions.Normal(0.0, 0.1)
    expected = float(normal.log_prob(torch.tensor(jump)) + normal.log_prob(torch.tensor(0.0)))
    assert trace.nodes["continuity"]["log_prob"].tolist() == pytest.approx([expected] * N, abs=1e-4)


def test_forecast_of_shooting_continues_the_last_segment() -> None:
    latents, jump = draw(), 0.3
    exact = latents["z0"] * torch.exp(-latents["theta"] * TIMES)
    data = latents | {"shots": exact[:, [4], None] + jump}
    at = torch.tensor([0.1, float(TIMES[4]) + 0.1, 3.0], dtype=torch.float64)
    trace = poutine.trace(poutine.condition(model(shooting=Shooting(4, 0.5)), data=data)).get_trace(series(), times=at)
    z = trace.nodes["z"]["value"][..., 0]
    later = (exact[:, [4]] + jump) * torch.exp(-latents["theta"] * (at[1:] - TIMES[4]))
    torch.testing.assert_close(z[:, :1], latents["z0"] * torch.exp(-latents["theta"] * 0.1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(z[:, 1:], later, rtol=1e-6, atol=1e-7)


def test_shooting_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="length = 0"):
        Shooting(0, 0.1)
    with pytest.raises(ValueError, match="must be positive"):
        Shooting(3, 0.0)


def test_hybrid_adds_to_the_chosen_equations_only() -> None:
    net = torch.nn.Linear(2, 1)
    field = Hybrid(lambda t, z, p: torch.stack([z[1], -z[0]]), net, into=[1], bayesian=False)
    z = torch.tensor([0.3, -0.4])
    expected = torch.stack([z[1], -z[0] + net(z)[0]])
    torch.testing.assert_close(field(torch.tensor(0.0), z, None), expected)
    wrong = Hybrid(lambda t, z, p: z, torch.nn.Linear(2, 3), into=[1], bayesian=False)
    with pytest.raises(ShapeError, match="3 numbers for 1 equations"):
        wrong(torch.tensor(0.0), z, None)


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
