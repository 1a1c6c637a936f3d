# SPDX-License-Identifier: Apache-2.0
"""Averages of states, against those of the observed times alone, normalized by hand."""

import torch
from torch.testing import assert_close

from pyro_latentde.nn import RecurrentEncoder, StatisticsPooling


def test_mean_and_sd_are_those_of_the_observed_times():
    torch.manual_seed(0)
    inner = RecurrentEncoder(3, 5, bidirectional=True)
    encoder = StatisticsPooling(inner).double()
    times, values = torch.rand(4, 9).double().cumsum(1), torch.randn(4, 9, 3).double()
    mask = torch.rand(4, 9, 3) < 0.4
    mask[2] = False
    found, states = encoder.states(times, values, mask), inner.states(times, values, mask)
    assert encoder.out_features == 33 and found.shape == (4, 9, 33)
    assert torch.equal(encoder(times, values, mask), found[:, 0])
    assert torch.equal(found[..., 30:], values * mask)
    assert_close(found[..., :10], normalized(states))
    for i in range(4):
        seen = states[i, mask[i].any(-1)]
        mean = seen.mean(0) if len(seen) else torch.zeros(10).double()
        variance = seen.var(0, correction=0) if len(seen) else torch.zeros(10).double()
        right = normalized(torch.cat([mean, (variance + 1e-6).sqrt()]))
        assert_close(found[i, :, 10:30], right.expand(9, -1))


def normalized(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
