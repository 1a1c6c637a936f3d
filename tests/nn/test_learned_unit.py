# SPDX-License-Identifier: Apache-2.0
"""One unit of decoder and guide: its gradient, the density of the states measured in it, which one is right."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_latentde as lde
from pyro_latentde.distributions.likelihoods import Gaussian
from pyro_latentde.errors import LatentDEError
from pyro_latentde.models import GOKU, Latent, Shooting
from pyro_latentde.nn import LearnedUnit, ResidualMLP, Select

FIELDS = {
    "linear": lambda t, z, p: torch.stack([z[1], -p["stiffness"] * z[0]]),
    "pendulum": lambda t, z, p: torch.stack([z[1], -p["stiffness"] * z[0].sin()]),
}
SD = torch.tensor([0.5, 2.0])


def _pair(field: str = "pendulum", **options) -> GOKU:
    torch.manual_seed(0)
    start, theta = dist.Normal(torch.zeros(2), SD).to_event(1), {"stiffness": dist.Uniform(1.0, 4.0)}
    names = {"states": ("angle", "rate"), "visible": ("angle",)}
    pair = GOKU(FIELDS[field], start, theta, values=5, width=16, rtol=1e-9, atol=1e-9, **{**names, **options})
    return pair.double()


def _series() -> lde.Series:
    values = torch.rand(4, 9, 5, generator=torch.manual_seed(1), dtype=torch.float64)
    return lde.Series.from_tensors(torch.linspace(0, 3, 9), values)


def _traces(pair: GOKU, series: lde.Series) -> tuple[poutine.Trace, poutine.Trace]:
    torch.manual_seed(2)
    drawn = poutine.trace(pair.guide).get_trace(series)
    scored = poutine.trace(poutine.replay(pair.model, drawn)).get_trace(series)
    scored.compute_log_prob()
    return drawn, scored


@pytest.mark.parametrize("field", FIELDS)
def test_only_what_is_not_linear_tells_the_unit(field: str) -> None:
    pair = _pair(field, learn_unit=True)
    unit = pair.guide.units["z0"].slow_log_unit
    _, scored = _traces(pair, _series())
    (slope,) = torch.autograd.grad(scored.nodes["obs"]["log_prob_sum"], unit)
    if field == "linear":
        assert slope.abs() < 1e-5
    else:
        assert slope.abs() > 1e-2


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_states_are_drawn_in_the_unit(factor: float) -> None:
    series, plain, pair = _series(), _pair(), _pair(learn_unit=True)
    with torch.no_grad():
        pair.guide.units["z0"].slow_log_unit.fill_(math.log(factor) / 3)
    (drawn, scored), (same, one) = _traces(pair, series), _traces(plain, series)
    torch.testing.assert_close(drawn.nodes["z0"]["value"], factor * same.nodes["z0"]["value"])
    torch.testing.assert_close(drawn.nodes["theta"]["value"], same.nodes["theta"]["value"])  # reads u, in any unit
    drawn.compute_log_prob(), same.compute_log_prob()
    shift = drawn.nodes["z0"]["log_prob"] - same.nodes["z0"]["log_prob"]
    torch.testing.assert_close(shift, torch.full((4,), -2 * math.log(factor), dtype=torch.float64))
    first = (scored.nodes["obs"]["fn"].mean[:, 0], one.nodes["obs"]["fn"].mean[:, 0])
    torch.testing.assert_close(*first)  # the decoder sees the same state


@pytest.mark.parametrize("field", FIELDS)
def test_the_right_unit_explains_far_swings_best(field: str) -> None:
    """States u times too large behind a decoder in units of u: the same pictures only where the field is linear."""
    times, start = torch.linspace(0, 8, 33, dtype=torch.float64), torch.tensor([[1.2, 0.0], [-0.6, 0.5]]).double()
    decoder, stiffness = torch.nn.Linear(1, 3).double(), torch.tensor([2.0, 3.0], dtype=torch.float64)
    z = lde.odesolve(FIELDS[field], start, times, {"stiffness": stiffness}, event_dims={"stiffness": 0}).ys
    net = LearnedUnit(decoder)
    pair = _pair(field, decoder=Select(net, [0], 2), visible=None, guide={"unit": net}, likelihood=Gaussian(0.05))
    series = lde.Series.from_tensors(times, decoder(z[..., :1]).detach())
    found = []
    for factor in (0.5, 0.8, 1.0, 1.25, 2.0):
        with torch.no_grad():
            net.slow_log_unit.fill_(math.log(factor) / 3)
            latents = {"z0": factor * start, "theta": stiffness[:, None]}
            scored = poutine.trace(poutine.condition(pair.model, latents)).get_trace(series)
            scored.compute_log_prob()
        found.append(scored.nodes["obs"]["log_prob_sum"].item())
    if field == "linear":
        assert max(found) - min(found) < 1e-4
    else:
        assert found[0] < found[1] < found[2] > found[3] > found[4]


def test_a_decoder_of_ones_own_is_wrapped_by_hand() -> None:
    with pytest.raises(LatentDEError, match=r"put your own into nn\.LearnedUnit"):
        _pair(decoder=ResidualMLP(2, 5), learn_unit=True, visible=None)


def test_states_without_a_unit_are_told() -> None:
    positive = dist.LogNormal(torch.zeros(2), 0.5).to_event(1)
    code = Latent(dist.Normal(torch.zeros(3), 1.0).to_event(1), torch.nn.Linear(3, 2))
    for start, told in ((positive, "support"), (code, r"none of \['theta', 'z0_code'\]")):
        with pytest.raises(LatentDEError, match=f"learned unit for the site 'z0', which .*{told}"):
            GOKU(FIELDS["linear"], start, {"stiffness": dist.Uniform(1.0, 4.0)}, values=5, learn_unit=True)


def test_shooting_measures_its_starts_in_the_unit() -> None:
    pair = _pair(learn_unit=True, shooting=Shooting(3, 0.1))
    with torch.no_grad():
        pair.guide.units["z0"].slow_log_unit.fill_(math.log(2.0) / 3)
    (drawn, _), (same, _) = _traces(pair, _series()), _traces(_pair(shooting=Shooting(3, 0.1)), _series())
    torch.testing.assert_close(drawn.nodes["shots"]["value"], 2.0 * same.nodes["shots"]["value"])
