# SPDX-License-Identifier: Apache-2.0
"""Heads: densities that integrate to one, a known start, gradients, particles, and posteriors they can learn."""

import math
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.testing import assert_close

from pyro_latentde.errors import LatentDEError, ShapeError
from pyro_latentde.guides.heads import FlowHead, FullRankHead, NormalHead, make_head

KINDS = {
    "normal": NormalHead,
    "full_rank": FullRankHead,
    "nsf": FlowHead,
    "maf": lambda h, p, *args, **kwargs: FlowHead(h, p, *args, kind="maf", **kwargs),
}


def shaken(kind, in_features, size, *args):
    """A head whose parameters are not at their start any more, in float64."""
    torch.manual_seed(1)
    head = KINDS[kind](in_features, size, *args).double()
    with torch.no_grad():
        for name, p in head.named_parameters():
            p.add_((0.08 if name.startswith("flow") else 0.3) * torch.randn_like(p))
    return head


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3])
def test_start_is_a_narrow_normal_for_any_context(kind, size):
    head = KINDS[kind](5, size, sd=0.2)
    context = 10 * torch.randn(6, 5)
    q = head(context)
    loc = head.loc(context)
    assert q.batch_shape == (6,) and q.event_shape == (size,) and q.has_rsample
    x = loc + torch.randn(6, size) * 0.2
    assert_close(q.log_prob(x), dist.Normal(loc, 0.2).to_event(1).log_prob(x), rtol=1e-4, atol=1e-4)
    assert (loc.std(0) > 0.1).all()  # series differ from the first step on


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2])
def test_density_integrates_to_one(kind, size):
    q = shaken(kind, 4, size)(torch.randn(4).double())
    draws = q.sample((2000,))
    low, high = draws.min(0)[0] - 2, draws.max(0)[0] + 2
    points = 4000 if size == 1 else 400
    axes = [torch.linspace(a, b, points, dtype=torch.float64) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    grid = torch.cartesian_prod(*axes).reshape(-1, size)
    cell = math.prod((b - a) / (points - 1) for a, b in zip(low.tolist(), high.tolist(), strict=True))
    assert q.log_prob(grid).exp().sum().item() * cell == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_the_density(kind):
    """Mean of log q over draws against its integral, within 5 standard errors: false alarm 6e-7 for each head."""
    q = shaken(kind, 4, 2)(torch.randn(4).double())
    draws = q.sample((4000,))
    low, high = draws.min(0)[0] - 2, draws.max(0)[0] + 2
    axes = [torch.linspace(a, b, 500, dtype=torch.float64) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    log_q = q.log_prob(torch.cartesian_prod(*axes))
    weights = torch.softmax(log_q, 0)
    at_draws = q.log_prob(draws)
    assert abs(at_draws.mean() - (weights * log_q).sum()) < 5 * at_draws.std() / math.sqrt(4000)


def test_full_rank_covariance():
    head = shaken("full_rank", 4, 3)
    q = head(torch.randn(2, 4).double())
    assert torch.equal(q.scale_tril, q.scale_tril.tril()) and (q.scale_tril.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert (q.covariance_matrix[:, 0, 1].abs() > 1e-3).all()
    assert torch.equal(head.place.sum(0), torch.ones(3, 3).tril(-1).double())
    assert set(head.state_dict()) == {f"{n}.{w}" for n in ("loc", "scale", "below") for w in ("weight", "bias")}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter_and_the_context(kind):
    head = shaken(kind, 4, 3, (6,))
    context = torch.randn(5, 4).double().requires_grad_()
    q = head(context)
    x = q.rsample()
    (x.square().sum() + q.log_prob(x).sum()).backward()
    for name, p in (*head.named_parameters(), ("context", context)):
        assert p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_left_dimensions_are_independent(kind):
    head = shaken(kind, 4, 3)
    context, x = torch.randn(7, 5, 4).double(), torch.randn(7, 5, 3).double()
    log_q = head(context).log_prob(x)
    assert log_q.shape == (7, 5)
    assert_close(log_q[2, 3], head(context[2, 3]).log_prob(x[2, 3]))
    wide = head(context[0]).expand((7, 5))
    assert wide.rsample((2,)).shape == (2, 7, 5, 3)
    assert_close(wide.log_prob(x), torch.stack([head(context[0]).log_prob(row) for row in x]))


@pytest.mark.parametrize("kind", KINDS)
def test_vectorized_particles_learn_a_posterior(kind):
    """Gap to the evidence of a correlated posterior: closed by all but the normal, which stops at its own optimum."""
    head = KINDS[kind](1, 2)
    y = torch.tensor([[0.5], [-1.0]])

    def model(y):
        with pyro.plate("series", 2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z.sum(-1, keepdim=True), 0.5).to_event(1), obs=y)

    def guide(y):
        with pyro.plate("series", 2):
            pyro.sample("z", head(y))

    elbo = Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=1)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for step in range(300):
        if step == 200:
            optimizer.param_groups[0]["lr"] = 0.004
        optimizer.zero_grad()
        elbo.differentiable_loss(model, guide, y).backward()
        optimizer.step()
    evidence = dist.Normal(0.0, math.sqrt(2.25)).log_prob(y).sum().item()
    with torch.no_grad():
        gap = evidence + sum(elbo.loss(model, guide, y) for _ in range(60)) / 60
    # posterior precision I + 4 J, J of ones: eigenvalues 9 and 1; the best factorised normal has precision 5, twice
    expected = 2 * 0.5 * math.log(25 / 9) if kind == "normal" else 0.0
    assert gap == pytest.approx(expected, abs=0.1)


def test_half_precision_contexts_give_full_precision_laws():
    for kind in KINDS:
        with torch.autocast("cpu", torch.bfloat16):
            q = KINDS[kind](4, 2)(torch.randn(3, 4))
        x = q.rsample()
        assert x.dtype == torch.float32 and q.log_prob(x).isfinite().all(), kind


def test_make_head_and_what_it_refuses(monkeypatch):
    assert type(make_head("normal", 4, 2)) is NormalHead and type(make_head("full_rank", 4, 2)) is FullRankHead
    assert type(make_head("flow", 4, 2)) is FlowHead
    assert make_head(lambda h, p: NormalHead(h, p, (7,)), 4, 2).width == 7
    with pytest.raises(LatentDEError, match="expected one of 'normal', 'full_rank', 'flow'"):
        make_head("diagonal", 4, 2)
    with pytest.raises(ShapeError, match=r"expected contexts \(..., 4\), got \(3, 5\)"):
        NormalHead(4, 2)(torch.zeros(3, 5))
    with pytest.raises(LatentDEError, match="positive standard deviation"):
        NormalHead(4, 2, sd=0.0)
    with pytest.raises(LatentDEError, match="kind = 'iaf'"):
        FlowHead(4, 2, kind="iaf")
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(ImportError, match=r"pyro-latentde\[flows\]"):
        FlowHead(4, 2)
