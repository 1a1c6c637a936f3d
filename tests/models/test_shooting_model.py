# SPDX-License-Identifier: Apache-2.0
"""Multiple shooting in a model of series: the single solve with exact starts, densities of jumps, ragged series."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from decay_model import TIMES, N, T, draw, model, series
from pyro import poutine

import pyro_latentde as lde
from pyro_latentde.errors import LatentDEError, ShapeError
from pyro_latentde.models.shooting import Shooting
from pyro_latentde.sites.settings import extra_times


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


# ---- in a Pyro model of one's own


def _cosine(t, y):
    return torch.stack([y[1], -y[0]])


@pytest.mark.parametrize(("parts", "t0"), [(1, None), (3, None), (2, -0.5)])
def test_of_exact_starts_the_trajectory_is_that_of_one_solve(parts, t0):
    times, y0 = torch.tensor([0.0, 0.7, 1.0, 2.5]).double(), torch.tensor([1.0, 0.0]).double()
    begin = 0.0 if t0 is None else t0
    fine = torch.cat([times[:-1, None] + torch.arange(parts) / parts * times.diff()[:, None]], 1).flatten()[1:]
    fine = torch.cat([fine, times[-1:]])
    shots = torch.stack([(fine - begin).cos(), -(fine - begin).sin()], 1)
    shooting, settings = Shooting(1, 0.1, parts), {"rtol": 1e-9, "atol": 1e-9}

    def model():
        return lde.ode("z", _cosine, y0, times, t0=t0, shooting=shooting, **settings)

    trace = poutine.trace(poutine.condition(model, data={"shots": shots})).get_trace()
    right = torch.stack([(times - begin).cos(), -(times - begin).sin()], 1)
    torch.testing.assert_close(trace.nodes["z"]["value"], right, rtol=0, atol=1e-7)
    trace.compute_log_prob()
    # no jumps: 2 numbers of each start at the top of their normal density
    density = -2 * len(fine) * math.log(0.1 * math.sqrt(2 * math.pi))
    assert float(trace.nodes["continuity"]["log_prob_sum"]) == pytest.approx(density, rel=1e-6)


def test_a_shared_start_is_that_of_all_series_in_a_plate():
    times = torch.linspace(0, 1, 4).double().expand(3, -1)

    def model():
        y0 = pyro.sample("y0", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("series", 3):
            return lde.ode("z", _cosine, y0, times, shooting=Shooting(1, 0.1))

    trace = poutine.trace(model).get_trace()
    assert trace.nodes["shots"]["value"].shape == (3, 3, 2)
    assert trace.nodes["z"]["value"].shape == (3, 4, 2)


def test_what_shooting_cannot_do_is_told():
    with pytest.raises(ShapeError, match="shooting needs the state as one tensor"):
        y0 = {"a": torch.ones(1), "b": torch.ones(1)}
        lde.ode("z", lambda t, y: y, y0, torch.arange(3.0), shooting=Shooting(1, 0.1))
    with pytest.raises(ValueError, match="parts = 2"):
        Shooting(3, 0.1, parts=2)


def test_shooting_of_another_type_is_told():
    with pytest.raises(LatentDEError, match=r"ode 'z': shooting: expected models.Shooting\(length, sd\), got float"):
        lde.ode("z", lambda t, z: -z, torch.ones(1).double(), torch.linspace(0.0, 1.0, 3).double(), shooting=0.1)
