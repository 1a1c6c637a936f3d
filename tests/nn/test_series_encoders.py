# SPDX-License-Identifier: Apache-2.0
"""One contract for every encoder of series, over every pattern of missing data."""

import copy
import pickle

import pytest
import torch

from pyro_latentde.errors import LatentDEError, ShapeError
from pyro_latentde.nn import (
    MLP,
    AttentionEncoder,
    FrameWise,
    GRUDEncoder,
    ODERNNEncoder,
    RecurrentEncoder,
    StatisticsPooling,
)

N, T, F, H = 5, 7, 3, 6
ENCODERS = {
    "rnn": lambda: RecurrentEncoder(F, H, cell="rnn"),
    "gru-2-layers": lambda: RecurrentEncoder(F, H, cell="gru", layers=2),
    "lstm-bidirectional": lambda: RecurrentEncoder(F, H, cell="lstm", layers=2, bidirectional=True),
    "ode-rnn": lambda: ODERNNEncoder(F, H, units=10, gru_units=8),
    "ode-rnn-gru-cell": lambda: ODERNNEncoder(F, H, units=10, gru_units=None, method="rk4", steps=2),
    "gru-d": lambda: GRUDEncoder(F, H),
    "attention": lambda: AttentionEncoder(F, H, heads=2),
    "pooled": lambda: StatisticsPooling(RecurrentEncoder(F, H, cell="lstm")),
    "pooled-attention": lambda: StatisticsPooling(AttentionEncoder(F, H, heads=2)),
    "frames": lambda: FrameWise(MLP(F, 4, (8,)), RecurrentEncoder(4, H)),
}
PATTERNS = ("complete", "features", "rows", "ragged", "single", "nothing")


def a_mask(pattern):
    """Mask (N, T, F); the last row of "nothing" has no observation, the others are complete."""
    mask = torch.ones(N, T, F, dtype=torch.bool)
    if pattern == "features":
        mask = torch.rand(N, T, F) < 0.5
    if pattern == "rows":
        mask = (torch.rand(N, T, 1) < 0.5).expand(N, T, F) & (torch.rand(N, T, F) < 0.8)
    if pattern == "ragged":
        mask = (torch.arange(T) < torch.tensor([7, 5, 3, 6, 1])[:, None])[..., None].expand(N, T, F).clone()
    if pattern == "single":
        mask = torch.zeros(N, T, F, dtype=torch.bool)
        mask[torch.arange(N), torch.tensor([0, 6, 3, 2, 5]), 1] = True
    if pattern == "nothing":
        mask[-1] = False
    return mask


def a_batch(pattern, dtype=torch.float64):
    torch.manual_seed(3)
    times = torch.rand(N, T, dtype=dtype).cumsum(dim=1)
    times[:, 3] = times[:, 2]  # a replicate
    mask = a_mask(pattern)
    if pattern == "ragged":  # padding repeats the last time, as a Series does
        times = times.gather(1, torch.minimum(torch.arange(T), mask[..., 0].sum(1, keepdim=True) - 1))
    return times, torch.where(mask, torch.randn(N, T, F, dtype=dtype), 0.5), mask


@pytest.fixture(params=ENCODERS, name="encoder")
def an_encoder(request):
    torch.manual_seed(1)
    encoder = ENCODERS[request.param]().double()
    if isinstance(encoder, GRUDEncoder):
        encoder.set_means(*a_batch("features")[1:])
    return encoder


over_patterns = pytest.mark.parametrize("pattern", PATTERNS)


def same(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@over_patterns
def test_shapes_and_gradients(encoder, pattern):
    batch = a_batch(pattern)
    out, states = encoder(*batch), encoder.states(*batch)
    assert out.shape == (N, encoder.out_features) and states.shape == (N, T, encoder.out_features)
    assert out.isfinite().all() and states.isfinite().all()
    (states.square().sum() + out.square().sum()).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # One observation leaves nothing to choose (softmax), to carry (recurrent weights) or to cross (fields), and
        # inputs of GRU-D decay only where some features are missing at a time when others are not.
        used = pattern in ("features", "rows") if name.startswith("input_") else pattern != "single"
        if used:
            assert parameter.grad.abs().max() > 0, name


@over_patterns
def test_filler_changes_nothing(encoder, pattern):
    times, values, mask = a_batch(pattern)
    results = []
    for filler in (0.0, 1e6):
        filled = torch.where(mask, values, filler).requires_grad_()
        encoder.zero_grad()
        states = encoder.states(times, filled, mask)
        (states.square().sum() + encoder(times, filled, mask).sum()).backward()
        assert filled.grad[~mask].eq(0).all()
        results.append([states, filled.grad, *(p.grad for p in encoder.parameters())])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@over_patterns
def test_every_observation_matters_where_it_should(encoder, pattern):
    """Backward in time: a state depends on what is observed from its time on, and on nothing before."""
    times, values, mask = a_batch(pattern)
    values.requires_grad_()
    forth = isinstance(encoder, RecurrentEncoder) and len(encoder.directions) == 2
    backward = encoder.states(times, values, mask)[..., :H]  # behind are a forward part, and averages over all times
    for i in range(T):
        (grad,) = torch.autograd.grad(backward[:, i].square().sum(), values, retain_graph=True)
        influence = grad.abs() > 0
        assert not influence[:, :i].any()
        assert not influence[~mask].any()
        if i == 0 and not forth:
            assert torch.equal(influence.any(2), mask.any(2)) or isinstance(encoder, FrameWise)  # ReLU may be off


@over_patterns
def test_padding_changes_nothing(encoder, pattern):
    times, values, mask = a_batch(pattern)
    longer = (
        torch.cat([times, times[:, -1:].expand(N, 4) + torch.tensor([0.0, 0.0, 1.0, 9.0])], dim=1),
        torch.cat([values, values.new_full((N, 4, F), 7.0)], dim=1),
        torch.cat([mask, mask.new_zeros(N, 4, F)], dim=1),
    )
    same(encoder(*longer), encoder(times, values, mask))
    same(encoder.states(*longer)[:, :T], encoder.states(times, values, mask))


def test_a_time_with_nothing_observed_changes_nothing_between_others(encoder):
    times, values, mask = a_batch("features")
    at = 4
    mask[:, at] = False
    states = encoder.states(times, values, mask)
    keep = [i for i in range(T) if i != at]
    same(encoder.states(times[:, keep], values[:, keep], mask[:, keep]), states[:, keep])
    if not isinstance(getattr(encoder, "encoder", encoder), AttentionEncoder):
        assert torch.equal(states[:, at, :H], states[:, at + 1, :H])


def test_gap_from_the_start_to_the_first_observation_matters(encoder):
    times, values, mask = a_batch("complete")
    mask[:, 0] = False
    earlier = times.clone()
    earlier[:, 0] -= 0.7
    assert (encoder(times, values, mask) - encoder(earlier, values, mask)).abs().max() > 1e-4


@over_patterns
def test_rows_do_not_see_each_other(encoder, pattern):
    batch = a_batch(pattern)
    together = encoder(*batch)
    for i in range(N):
        same(encoder(*(x[i : i + 1] for x in batch)), together[i : i + 1], 1e-10)
    order = torch.tensor([3, 0, 4, 2, 1])
    same(encoder(*(x[order] for x in batch)), together[order], 1e-10)


def test_times_matter_only_through_gaps_and_scale(encoder):
    times, values, mask = a_batch("features")
    out = encoder(times, values, mask)
    same(encoder(times + 50.0, values, mask), out, 1e-10)
    assert (encoder(2 * times, values, mask) - out).abs().max() > 1e-4
    inner = getattr(encoder, "encoder", encoder)
    inner.time_scale = 2.0
    same(encoder(2 * times, values, mask), out, 1e-10)


def test_float32_agrees_with_float64(encoder):
    out = encoder(*a_batch("rows"))
    times, values, mask = a_batch("rows")
    single = encoder.float()(times.float(), values.float(), mask)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), out, rtol=1e-4, atol=1e-5)
    same(encoder(times, values.float(), mask), single, 1e-5)  # times may keep more digits than values


def test_copies_give_the_same(encoder):
    batch = a_batch("features")
    out = encoder(*batch)
    torch.manual_seed(9)
    for clone in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(clone(*batch), out)
        for parameter in clone.parameters():
            torch.nn.init.normal_(parameter)
        assert not torch.equal(clone(*batch), out)
        clone.load_state_dict(encoder.state_dict())
        assert torch.equal(clone(*batch), out)


def test_autocast_leaves_the_recursion_in_full_precision(encoder):
    encoder = encoder.float()
    batch = a_batch("features", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = encoder(*batch)
    assert mixed.dtype == torch.float32
    tolerance = 5e-2 if isinstance(encoder, FrameWise) else 0.0  # there the frames are computed in 8 bits
    torch.testing.assert_close(mixed, encoder(*batch), rtol=tolerance, atol=tolerance)


def test_bad_input_is_explained(encoder):
    times, values, mask = a_batch("complete")
    with pytest.raises(ShapeError, match="values are torch.float32, the weights torch.float64"):
        encoder(times, values.float(), mask)
    with pytest.raises(ShapeError, match=r"values and mask \(N, T, 3\); got \(5, 7\), \(5, 7, 2\)"):
        encoder(times, values[..., :2], mask[..., :2])
    with pytest.raises(ShapeError, match=r"expected times \(N, T\)"):
        encoder(times[0], values[0], mask[0])
    with pytest.raises(ShapeError, match="bool mask"):
        encoder(times, values, mask.double())
    with pytest.raises(ShapeError, match="weights on cpu"):
        encoder(times, values.to("meta"), mask)


def test_unknown_names_are_explained():
    with pytest.raises(LatentDEError, match="cell: expected one of rnn, gru, lstm; got 'gruu'. Did you mean 'gru'"):
        RecurrentEncoder(2, 3, cell="gruu")
    with pytest.raises(LatentDEError, match="Did you mean 'rk4'"):
        ODERNNEncoder(2, 3, method="rk5")
    with pytest.raises(LatentDEError, match="at least one step per gap"):
        ODERNNEncoder(2, 3, steps=0)
