# SPDX-License-Identifier: Apache-2.0
"""The generative model of series: densities by hand, scales, hierarchy, codes, shooting, intervention."""

import math

import pyro
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
from pyro_latentde.sites.settings import extra_times

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


def test_shooting_takes_shared_vectors_and_scalars() -> None:
    def field(t: torch.Tensor, z: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
        return -(p["rate"] + p["pair"][0] - p["pair"][1] + p["one"]) * z

    zero = torch.zeros(2, dtype=torch.float64)
    shared = {"pair": dist.Normal(zero, 1.0).to_event(1), "one": dist.Normal(zero[0], 1.0)}
    known = model(shooting=Shooting(3, 0.1), shared=shared)
    known.field = field
    latents = draw() | {"pair": torch.tensor([0.5, 0.2]).double(), "one": torch.tensor(0.3).double()}
    exact = latents["z0"] * torch.exp(-(latents["theta"] + 0.6) * TIMES)
    data = latents | {"shots": exact[:, [3, 6], None]}
    z = poutine.trace(poutine.condition(known, data=data)).get_trace(series()).nodes["z"]["value"]
    torch.testing.assert_close(z[..., 0], exact, rtol=1e-6, atol=1e-7)


def ragged() -> lde.Series:
    """Seven times, and four of them: the second row is padded from position 4 on."""
    return lde.Series.from_tensors([TIMES, TIMES[:4]], [torch.ones(7, 1).double(), torch.ones(4, 1).double()])


def short() -> lde.Series:
    return lde.Series.from_tensors(TIMES[:4], torch.ones(1, 4, 1).double())


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_shooting_of_a_ragged_series_is_that_of_the_series_alone(length: int) -> None:
    shooting = Shooting(length, 0.1)
    latents = {name: value[:2] for name, value in draw().items()}
    shots = torch.randn(2, len(shooting.stations(7)), 1, generator=torch.Generator().manual_seed(3)).double()
    at = torch.tensor([0.1, 0.5, 0.8, 3.0], dtype=torch.float64)
    number = len(shooting.stations(4))
    alone = {name: value[1:] for name, value in latents.items()} | ({"shots": shots[1:, :number]} if number else {})
    found = []
    for data, given in ((ragged(), latents | {"shots": shots}), (short(), alone)):
        conditioned = poutine.condition(model(shooting=shooting), data=given)
        trace = poutine.trace(conditioned).get_trace(data)
        trace.compute_log_prob()
        density = trace.nodes["continuity"]["log_prob"][-1] if "continuity" in trace.nodes else torch.tensor(0.0)
        ahead = poutine.trace(conditioned).get_trace(data, times=at).nodes["z"]["value"][-1]
        found.append((density.double(), trace.nodes["z"]["value"][-1], ahead))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0][1][:4], found[1][1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[0][1][4:], found[1][1][-1:].expand(3, 1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-6, atol=1e-7)


def test_shooting_with_particles_is_that_of_each() -> None:
    shooting = Shooting(3, 0.1)
    rows = [{name: value[:2] + 0.1 * i for name, value in draw().items()} for i in range(3)]
    rows = [row | {"shots": torch.full((2, 2, 1), 0.3 * i).double()} for i, row in enumerate(rows)]
    known = model(shooting=shooting)

    def particles() -> None:
        with pyro.plate("particles", 3, dim=-2):
            known(ragged())

    together = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    trace = poutine.trace(poutine.condition(particles, data=together)).get_trace()
    trace.compute_log_prob()
    for i, row in enumerate(rows):
        one = poutine.trace(poutine.condition(known, data=row)).get_trace(ragged())
        one.compute_log_prob()
        torch.testing.assert_close(trace.nodes["z"]["value"][i], one.nodes["z"]["value"])
        for name in ("continuity", "obs"):
            torch.testing.assert_close(trace.nodes[name]["log_prob"][i], one.nodes[name]["log_prob"])


def test_replicates_at_the_last_time_have_one_state() -> None:
    times = torch.tensor([0.0, 0.5, 1.0, 1.0], dtype=torch.float64)
    data = lde.Series.from_tensors(times, torch.zeros(1, 4, 1).double())
    latents = {name: value[:1] for name, value in draw().items()} | {"shots": torch.full((1, 1, 1), 9.0).double()}
    conditioned = poutine.condition(model(shooting=Shooting(3, 0.1)), data=latents)
    z = poutine.trace(conditioned).get_trace(data).nodes["z"]["value"][0, :, 0]
    torch.testing.assert_close(z, latents["z0"][0] * torch.exp(-latents["theta"][0] * times), rtol=1e-6, atol=1e-7)


def test_starts_that_are_not_given_are_draws_of_their_prior() -> None:
    """Jumps are N(0, .3^2), independent: four z-scores within 4.4, false alarms of 5e-5."""
    torch.manual_seed(0)
    count = 1000
    latents = {"z0": torch.ones(count, 1).double(), "theta": torch.ones(count, 1).double()}
    shooting = model(shooting=Shooting(3, 0.3))
    trace = poutine.trace(poutine.condition(shooting, data=latents)).get_trace(series(count))
    starts = torch.cat([latents["z0"], trace.nodes["shots"]["value"][..., 0]], dim=1)
    jumps = (starts[:, 1:] - starts[:, :-1] * torch.exp(-(TIMES[[3, 6]] - TIMES[[0, 3]]))) / 0.3
    scores = torch.cat([jumps.mean(0) * count**0.5, (jumps.square().mean(0) - 1) * (count / 2) ** 0.5])
    assert float(scores.abs().max()) < 4.4


def test_times_before_the_first_are_solved_backward() -> None:
    latents = draw()
    exact = latents["z0"] * torch.exp(-latents["theta"] * TIMES)
    at = torch.tensor([-0.5, 0.1], dtype=torch.float64)
    data = latents | {"shots": exact[:, [4], None]}
    trace = poutine.trace(poutine.condition(model(shooting=Shooting(4, 0.5)), data=data)).get_trace(series(), times=at)
    expected = latents["z0"] * torch.exp(-latents["theta"] * at)
    torch.testing.assert_close(trace.nodes["z"]["value"][..., 0], expected, rtol=1e-6, atol=1e-7)


def test_shooting_gives_extra_times_and_how_it_was_solved() -> None:
    latents = draw()
    data = latents | {"shots": torch.ones(N, 1, 1).double()}
    at = torch.tensor([0.1, 0.9, 3.0], dtype=torch.float64)
    conditioned = poutine.condition(model(shooting=Shooting(4, 0.5)), data=data)
    with extra_times(at) as solved:
        trace = poutine.trace(conditioned).get_trace(series())
    expected = poutine.trace(conditioned).get_trace(series(), times=at).nodes["z"]["value"]
    torch.testing.assert_close(solved["z"], expected)
    record = trace.nodes["z"]["infer"]["lde_ode"]
    assert record["status"].tolist() == [0] * N
    assert record["n_steps"].shape == (N,)
    with lde.solver(max_steps=1), pyro.validation_enabled(False):
        failed = poutine.trace(conditioned).get_trace(series()).nodes["z"]["infer"]["lde_ode"]
    assert failed["status"].tolist() == [1] * N


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
