# SPDX-License-Identifier: Apache-2.0
"""The site of a population: its law, its centring, correlated values."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import biject_to, constraints

import pyro_latentde as lde
from pyro_latentde.errors import LatentDEError, ShapeError
from pyro_latentde.infer.log_joint import LogJoint

CENTRE, SPREAD = torch.tensor([0.3, -1.0, 2.0]).double(), torch.tensor([0.5, 0.2, 1.5]).double()
LINKS = ("log", "identity", "logit")


def draw(n, **options):
    with pyro.plate("series", n):
        return lde.population("x", CENTRE[0], SPREAD[0], **options)


@pytest.mark.parametrize("centered", [False, 0.4, True])
def test_law_is_that_of_the_population(centered):
    x = draw(20_000, centered=centered).log()
    # mean and sd within 5 standard errors: a false alarm in 850,000
    assert abs(x.mean() - CENTRE[0]) < 5 * SPREAD[0] / 20_000**0.5
    assert abs(x.std() / SPREAD[0] - 1) < 5 / 40_000**0.5


def test_centring_of_each_series():
    c = torch.tensor([0.0, 0.25, 1.0]).double()
    trace = poutine.trace(draw).get_trace(3, centered=c)
    u, fn = trace.nodes["log_x_decentered"]["value"], trace.nodes["log_x_decentered"]["fn"]
    torch.testing.assert_close(fn.loc, c * CENTRE[0])
    torch.testing.assert_close(fn.scale, SPREAD[0] ** c)
    expected = CENTRE[0] + SPREAD[0] ** (1 - c) * (u - c * CENTRE[0])
    torch.testing.assert_close(trace.nodes["x"]["value"].log(), expected)


def test_any_transform_is_a_link():
    x = draw(100, link=biject_to(constraints.interval(2.0, 3.0)))
    assert 2 < x.min() and x.max() < 3


def correlated(centered, n=4):
    factor = pyro.sample("factor", dist.LKJCholesky(3, torch.tensor(1.5).double()))
    with pyro.plate("series", n):
        return lde.population("x", CENTRE, SPREAD, link=LINKS, centered=centered, correlation=factor)


def test_correlated_values_in_both_parameterisations():
    """The centred density is Pyro's multivariate normal, the other our own product: they differ by the volume."""
    torch.manual_seed(1)
    trace = poutine.trace(correlated).get_trace(True)
    factor, linked = trace.nodes["factor"]["value"], trace.nodes["link_x"]["value"]
    scale = SPREAD[:, None] * factor
    u = torch.linalg.solve_triangular(scale, (linked - CENTRE).T, upper=False).T
    densities = []
    for centered, value in ((True, {"link_x": linked}), (False, {"link_x_decentered": u})):
        joint = LogJoint(correlated, (centered,))
        densities.append(joint.log_density(joint.unconstrain({"factor": factor, **value}))[0])
        again = poutine.trace(poutine.condition(correlated, {"factor": factor, **value})).get_trace(centered)
        torch.testing.assert_close(again.nodes["_RETURN"]["value"], trace.nodes["_RETURN"]["value"])
    torch.testing.assert_close(densities[1] - densities[0], 4 * scale.diagonal().log().sum(), atol=1e-10, rtol=0)
    x = trace.nodes["x"]["value"]
    expected = torch.stack([linked[:, 0].exp(), linked[:, 1], linked[:, 2].sigmoid()], dim=-1)
    torch.testing.assert_close(x, expected)


def test_errors():
    with pytest.raises(LatentDEError, match="link = 'probit'; expected one of identity, log, logit"):
        draw(3, link="probit")
    with pytest.raises(LatentDEError, match=r"centered = 1.5; expected a bool or a number in \[0, 1\]"):
        draw(3, centered=1.5)
    with pytest.raises(LatentDEError, match="centred or not"):
        correlated(0.5)
    with pytest.raises(ShapeError, match="3 links, centre"), pyro.plate("series", 3):
        lde.population("x", CENTRE, SPREAD, link=LINKS, correlation=torch.eye(2))
