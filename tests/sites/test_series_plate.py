# SPDX-License-Identifier: Apache-2.0
"""The scale of minibatches and windows, exactly: by enumerating all of them."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.testing import assert_close

import pyro_latentde as lde

N, T = 5, 6
TIMES = torch.arange(T, dtype=torch.float64)
SERIES = lde.Series.from_tensors(TIMES, torch.randn(N, T, 2, generator=torch.Generator().manual_seed(3)).double())


def model(series):
    shared = pyro.sample("shared", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    with lde.series_plate(series):
        z0 = pyro.sample("z0", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        states = z0[..., None, :] * series.times[..., None].cos() + shared[..., None, None]
        lde.observe("obs", dist.Normal(states, 0.7), series)


def log_joint(series, z0, shared):
    given = {"z0": z0, "shared": shared}
    trace = pyro.poutine.trace(pyro.poutine.condition(model, given)).get_trace(series)
    trace.compute_log_prob()
    return {name: trace.nodes[name]["log_prob_sum"] for name in ("shared", "z0", "obs")}


def leaves():
    z0 = torch.randn(N, 2, dtype=torch.float64).requires_grad_()
    return z0, torch.tensor(0.3, dtype=torch.float64).requires_grad_()


def test_average_over_all_minibatches_is_the_whole():
    """Density and gradient, over the 10 minibatches of 2 of 5 series."""
    z0, shared = leaves()
    full = log_joint(SERIES, z0, shared)
    batches = [torch.tensor(rows) for rows in itertools.combinations(range(N), 2)]
    parts = [log_joint(SERIES.batch(rows), z0[rows], shared) for rows in batches]
    for name in full:
        assert_close(sum(part[name] for part in parts) / len(parts), full[name], rtol=1e-13, atol=1e-13)
    assert all(part["shared"] == full["shared"] for part in parts)  # global sites are not scaled
    grads = torch.autograd.grad(sum(sum(part.values()) for part in parts) / len(parts), (z0, shared))
    expected = torch.autograd.grad(sum(full.values()), (z0, shared))
    assert_close(grads, expected, rtol=1e-12, atol=1e-12)


def test_average_over_windows_is_the_whole():
    """Windows that lie one beside the other, alone and with minibatches."""
    z0, shared = leaves()
    full = log_joint(SERIES, z0, shared)
    starts, batches = (0, 2, 4), list(itertools.combinations(range(N), 3))
    windows = [log_joint(SERIES.window(start, 2, sample=True), z0, shared) for start in starts]
    assert_close(sum(w["obs"] for w in windows) / 3, full["obs"], rtol=1e-13, atol=1e-13)
    both = [
        log_joint(SERIES.batch(list(rows)).window(start, 2, sample=True), z0[list(rows)], shared)["obs"]
        for rows in batches
        for start in starts
    ]
    assert_close(sum(both) / len(both), full["obs"], rtol=1e-13, atol=1e-13)
    assert windows[0]["shared"] == full["shared"]
    assert_close(windows[0]["z0"], 3 * full["z0"])  # each window is a series with a start of its own


def test_a_plain_cut_is_a_data_set_of_its_own():
    """The density of its own values by hand, each once, and that of the start."""
    z0, shared = leaves()
    found = log_joint(SERIES.window(1, 2), z0, shared)
    times, values = SERIES.times[:, 1:3, None], SERIES.values[:, 1:3]
    expected = dist.Normal(z0[:, None] * times.cos() + shared, 0.7).log_prob(values).sum()
    assert_close(found["obs"], expected, rtol=1e-13, atol=1e-13)
    assert_close(found["z0"], dist.Normal(0.0, 1.0).log_prob(z0).sum(), rtol=1e-13, atol=1e-13)


class Fixed(dist.TorchDistribution):
    """The density of N(1, 0.5), and always the same draw."""

    arg_constraints = {}
    has_rsample = True

    def __init__(self, draw):
        self.draw = draw
        super().__init__(draw.shape[:-1], draw.shape[-1:], validate_args=False)

    def expand(self, batch_shape, _instance=None):
        assert torch.Size(batch_shape) == self.batch_shape
        return self

    def rsample(self, sample_shape=()):
        return self.draw

    def log_prob(self, value):
        return dist.Normal(1.0, 0.5).log_prob(value).sum(-1)


def test_elbo_of_all_minibatches_is_the_elbo():
    """The guide uses the plate too, and its entropy has the same scale."""
    draws = torch.randn(N, 2, dtype=torch.float64)

    def guide(series):
        pyro.sample("shared", dist.Delta(torch.tensor(0.1, dtype=torch.float64)))
        with lde.series_plate(series) as rows:
            pyro.sample("z0", Fixed(draws[rows]))

    elbo = Trace_ELBO()
    full = elbo.loss(model, guide, SERIES)
    parts = [elbo.loss(model, guide, SERIES.batch(list(rows))) for rows in itertools.combinations(range(N), 2)]
    assert sum(parts) / len(parts) == pytest.approx(full, rel=1e-12)


def test_positions_name_and_dimension():
    with lde.series_plate(SERIES) as rows:
        assert torch.equal(rows, torch.arange(N))
        assert pyro.sample("x", dist.Normal(0.0, 1.0)).shape == (N,)
    with lde.series_plate(SERIES.batch([4, 1]), name="animals", dim=-2) as rows:
        assert rows.tolist() == [4, 1]
        assert pyro.sample("x", dist.Normal(torch.zeros(3), 1.0)).shape == (2, 3)
    trace = pyro.poutine.trace(model).get_trace(SERIES.batch([4, 1]))
    frame = trace.nodes["z0"]["cond_indep_stack"][0]
    assert (frame.name, frame.size, frame.full_size) == ("series", 2, N)
    assert trace.nodes["series"]["value"].tolist() == [4, 1]


def test_one_series_and_vectorized_particles():
    one = SERIES.batch([2])
    z0, shared = leaves()
    full = [log_joint(SERIES.batch([i]), z0[[i]], shared)["obs"] for i in range(N)]
    assert_close(sum(full) / N, log_joint(SERIES, z0, shared)["obs"])
    with pyro.plate("particles", 7, dim=-2):
        trace = pyro.poutine.trace(model).get_trace(one)
    assert trace.nodes["z0"]["value"].shape == (7, 1, 2) and trace.nodes["obs"]["scale"] == N
