# SPDX-License-Identifier: Apache-2.0
"""One contract over every encoder, head and pattern of missing data."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyro_latentde import Series, nn
from pyro_latentde.distributions.joint import Joint
from pyro_latentde.distributions.likelihoods import Gaussian
from pyro_latentde.errors import ShapeError
from pyro_latentde.guides.series_guide import SeriesGuide
from pyro_latentde.models.latents import Latent
from pyro_latentde.models.series_model import SeriesModel

VALUES = 3
ENCODERS = {
    "rnn": lambda size: nn.RecurrentEncoder(size, 6, cell="rnn"),
    "gru": lambda size: nn.RecurrentEncoder(size, 6, cell="gru", layers=2),
    "bilstm": lambda size: nn.RecurrentEncoder(size, 6, cell="lstm", bidirectional=True),
    "ode_rnn": lambda size: nn.ODERNNEncoder(size, 6, units=8, gru_units=8),
    "gru_d": lambda size: nn.GRUDEncoder(size, 6),
    "attention": lambda size: nn.AttentionEncoder(size, 8, heads=2, layers=1),
}
FRAMES = {"values": lambda: None, "residual": lambda: nn.ResidualMLP(VALUES, 5, width=8)}
HEADS = ("normal", "full_rank", "flow")
PATTERNS = ("complete", "missing values", "missing rows", "ragged", "one observation")


def make_series(pattern: str, n: int = 4, t: int = 6, dtype: torch.dtype = torch.float32) -> Series:
    generator = torch.Generator().manual_seed(1)
    times = torch.rand(n, t, generator=generator).sort(dim=-1).values.to(dtype)
    values = torch.randn(n, t, VALUES, generator=generator).to(dtype)
    keep = torch.ones(n, t, VALUES, dtype=torch.bool)
    if pattern == "missing values":
        keep = torch.rand(n, t, VALUES, generator=generator) < 0.6
        keep[:, 0] = True
    elif pattern == "missing rows":
        keep[:, 1:4:2] = False
    elif pattern == "ragged":
        keep[0, 4:], keep[1, 2:] = False, False
    elif pattern == "one observation":
        keep[:, 1:] = False
        keep[:, 0, 1:] = False
    return Series.from_tensors(times, values.masked_fill(~keep, torch.nan))


def local_priors() -> dict[str, dist.Distribution]:
    return {
        "z0": dist.Normal(torch.zeros(2), 1.0).to_event(1),
        "theta": Joint({"length": dist.Uniform(1.0, 2.0), "drag": dist.LogNormal(0.0, 1.0)}),
    }


def decay(t: torch.Tensor, z: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([z[1], -p["length"] * z[0] - p["drag"] * z[1]])


def make_model() -> SeriesModel:
    torch.manual_seed(0)
    theta = Latent({"length": dist.Uniform(1.0, 2.0), "drag": dist.LogNormal(0.0, 1.0)})
    start = Latent(dist.Normal(torch.zeros(2), 1.0).to_event(1))
    return SeriesModel(decay, start, torch.nn.Linear(2, VALUES), Gaussian(sd=0.5), theta=theta)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_guide_gives_finite_elbo_and_gradients(encoder: str, head: str, pattern: str) -> None:
    torch.manual_seed(2)
    model, series = make_model(), make_series(pattern)
    guide = SeriesGuide(model.local_priors(), ENCODERS[encoder](VALUES), head=head)
    loss = Trace_ELBO().differentiable_loss(model, guide, series)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in guide.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
    assert sum(float(p.grad.abs().sum()) for p in guide.heads.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_series_alone_and_in_a_batch_have_the_same_posterior(encoder: str, frames: str) -> None:
    torch.manual_seed(3)
    series = make_series("missing values", dtype=torch.float64)
    network = FRAMES[frames]()
    size = VALUES if network is None else network.out_features
    guide = SeriesGuide(local_priors(), ENCODERS[encoder](size), frames=network).double()
    means = []
    for batch in (series, series[2:3]):
        trace = poutine.trace(guide).get_trace(batch)
        means.append(trace.nodes["z0"]["fn"].mean.detach())
    torch.testing.assert_close(means[0][2:3], means[1], rtol=1e-6, atol=1e-8)


def test_filler_of_missing_values_never_matters() -> None:
    torch.manual_seed(4)
    series = make_series("missing values")
    other = copy.copy(series)
    object.__setattr__(other, "values", torch.where(series.mask, series.values, 1e6))
    guide = SeriesGuide(local_priors(), nn.RecurrentEncoder(5, 6), frames=nn.ResidualMLP(VALUES, 5, width=8))
    means = [poutine.trace(guide).get_trace(s).nodes["z0"]["fn"].mean for s in (series, other)]
    assert torch.equal(*means)


def test_density_of_a_draw_is_that_of_its_parts() -> None:
    """log q(z0, theta) by hand: base normals and the bijection's Jacobian (standard formulas)."""
    torch.manual_seed(5)
    series = make_series("complete", dtype=torch.float64)
    guide = SeriesGuide(local_priors(), nn.RecurrentEncoder(VALUES, 6), head="normal", structured=False).double()
    trace = poutine.trace(guide).get_trace(series)
    trace.compute_log_prob()
    context = guide.encoders["all"](series.times - series.times[:, :1], series.values, series.mask)
    base = guide.heads["theta"](context)
    theta = trace.nodes["theta"]["value"]
    share = theta[:, 0] - 1.0  # length in (1, 2): logit(length - 1); drag > 0: log(drag)
    free = torch.stack([share.logit(), theta[:, 1].log()], dim=-1)
    expected = base.log_prob(free) - (share * (1 - share)).log() - theta[:, 1].log()
    torch.testing.assert_close(trace.nodes["theta"]["log_prob"], expected, rtol=1e-8, atol=1e-8)


def test_structured_guide_correlates_sites_and_unstructured_does_not() -> None:
    torch.manual_seed(6)
    series = make_series("complete")
    for structured in (True, False):
        guide = SeriesGuide(local_priors(), nn.RecurrentEncoder(VALUES, 6), structured=structured)
        trace = poutine.trace(guide).get_trace(series)
        moved = {"z0": trace.nodes["z0"]["value"] + 1.0}
        again = poutine.trace(poutine.condition(guide, data=moved)).get_trace(series)
        same = torch.allclose(trace.nodes["theta"]["fn"].base_dist.mean, again.nodes["theta"]["fn"].base_dist.mean)
        assert same is not structured


def test_minibatch_has_the_scale_of_the_data_set() -> None:
    series = make_series("complete", n=8)
    guide = SeriesGuide(local_priors(), nn.RecurrentEncoder(VALUES, 6))
    trace = poutine.trace(guide).get_trace(series.batch(torch.tensor([1, 5])).window(0, 3, sample=True))
    assert float(trace.nodes["z0"]["scale"]) == pytest.approx(8 / 2 * 6 / 3)


def test_mean_field_elbo_accepts_a_normal_guide() -> None:
    model, series = make_model(), make_series("complete")
    guide = SeriesGuide(model.local_priors(), nn.RecurrentEncoder(VALUES, 6), head="normal")
    with pyro.validation_enabled(True):
        assert TraceMeanField_ELBO().differentiable_loss(model, guide, series).isfinite()


def test_covariates_reach_the_heads() -> None:
    torch.manual_seed(7)
    base = make_series("complete")
    means = []
    for value in (0.0, 1.0):
        series = Series.from_tensors(base.times, base.values, covariates=torch.full((4, 1), value))
        torch.manual_seed(8)
        guide = SeriesGuide(local_priors(), nn.RecurrentEncoder(VALUES, 6), covariates=1)
        means.append(poutine.trace(guide).get_trace(series).nodes["z0"]["fn"].mean)
    assert not torch.allclose(*means)


def test_stations_in_the_padding_have_no_density() -> None:
    torch.manual_seed(9)
    times = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0, 2.0, 2.0]])
    priors = local_priors() | {"shots": dist.Normal(torch.zeros(2), 1.0).to_event(1)}
    stations = {"shots": lambda length: list(range(1, length))}
    guide = SeriesGuide(priors, nn.RecurrentEncoder(VALUES, 6), stations=stations)
    trace = poutine.trace(guide).get_trace(Series.from_tensors(times, torch.randn(2, 5, VALUES)))
    trace.compute_log_prob()
    site = trace.nodes["shots"]
    assert site["value"].shape == (2, 4, 2)
    parts = site["fn"].base_dist.base_dist.log_prob(site["value"])
    expected = torch.stack([parts[0].sum(), parts[1, :2].sum()])
    torch.testing.assert_close(site["log_prob"], expected)


def test_wrong_names_and_missing_values_are_told() -> None:
    with pytest.raises(ValueError, match=r"encoders for \['z'\], but the local sites are \['theta', 'z0'\]"):
        SeriesGuide(local_priors(), {"z": nn.RecurrentEncoder(VALUES, 6)})
    guide = SeriesGuide(local_priors(), nn.RecurrentEncoder(VALUES, 6))
    with pytest.raises(ShapeError, match="without values"):
        guide(Series.at_times(torch.arange(3.0)))


def _draws(guide: SeriesGuide, series: Series, count: int = 3) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(5)
    return [guide(series) for _ in range(count)]


def _counted(guide: SeriesGuide) -> list[int]:
    rows: list[int] = []
    guide.frames.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    return rows


@pytest.mark.parametrize("stations", [None, {"shots": lambda length: list(range(2, length, 2))}])
def test_a_series_is_read_once_for_many_draws(stations: dict | None) -> None:
    """The same draws, later sites still following earlier ones, from one run of the networks."""
    torch.manual_seed(2)
    series, priors = make_series("missing rows"), local_priors()
    if stations:
        priors["shots"] = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    encoder = nn.RecurrentEncoder(5, 6, bidirectional=bool(stations))
    guide = SeriesGuide(priors, encoder, frames=FRAMES["residual"](), stations=stations)
    with torch.no_grad():
        torch.nn.init.normal_(guide.heads["theta"].loc.weight)  # so that theta depends on the draw of z0
        each, rows = _draws(guide, series), _counted(guide)
        with guide.reading(series):
            once = _draws(guide, series)
        assert rows == [4]
        for a, b in zip(each, once, strict=True):
            assert set(a) == set(b) == set(priors)
            assert all(torch.equal(a[name], b[name]) for name in a)
        guide(series)
        assert rows == [4, 4]  # outside, every call reads again


def test_copies_of_a_series_that_was_read_have_its_posterior() -> None:
    torch.manual_seed(2)
    series = make_series("missing values")
    guide = SeriesGuide(local_priors(), nn.RecurrentEncoder(5, 6), frames=FRAMES["residual"]())
    copies = series[torch.arange(4).repeat(3)]
    with torch.no_grad():
        each, rows = _draws(guide, copies, 1)[0], _counted(guide)
        with guide.reading(series):
            once = _draws(guide, copies, 1)[0]
            for other in (series[:3], series.window(0, 5)):
                with pytest.raises(ShapeError, match="reading 4 series of 6 times, and was called with"):
                    guide(other)
    assert rows == [4]
    torch.testing.assert_close(once["z0"], each["z0"])
    torch.testing.assert_close(once["theta"], each["theta"])
