# SPDX-License-Identifier: Apache-2.0
"""Attention against its definition, one pair of times after the other."""

import torch

from pyro_latentde.nn.attention import TimeAttention


def turned(x, t, rates):
    """Pairs (first half, second half) as complex numbers, times exp(i rate t)."""
    half = len(rates)
    z = torch.complex(x[:half], x[half:]) * torch.exp(1j * rates * t)
    return torch.cat([z.real, z.imag])


def test_equals_its_definition():
    torch.manual_seed(0)
    n, length, hidden, heads = 2, 4, 5, 2  # 2 pairs per head: 4 numbers for 5 / 2
    attention = TimeAttention(hidden, heads).double()
    torch.nn.init.normal_(attention.log_decay)
    x, times = torch.randn(n, length, hidden, dtype=torch.float64), torch.rand(n, length, dtype=torch.float64).cumsum(1)
    allowed = torch.rand(n, length, length) < 0.6
    allowed[0, 1] = False
    out = attention(x, times, allowed)
    q, k, v = (part(x).view(n, length, heads, 4) for part in (attention.query, attention.key, attention.value))
    rates, decay = attention.log_rate.exp(), attention.log_decay.exp()
    for b in range(n):
        for i in range(length):
            pieces = []
            for h in range(heads):
                total, weight = torch.zeros(4, dtype=torch.float64), 0.0
                for j in allowed[b, i].nonzero()[:, 0].tolist():
                    lag = times[b, j] - times[b, i]
                    logit = q[b, i, h] @ turned(k[b, j, h], lag, rates[h]) / 2.0 - decay[h] * lag.abs()
                    total = total + logit.exp() * turned(v[b, j, h], lag, rates[h])
                    weight = weight + logit.exp()
                pieces.append(total / weight if allowed[b, i].any() else total)
            expected = attention.join(torch.cat(pieces))
            torch.testing.assert_close(out[b, i], expected, rtol=1e-10, atol=1e-12)


def test_any_hidden_size_and_number_of_heads():
    for hidden, heads in ((1, 1), (3, 4), (30, 4)):
        attention = TimeAttention(hidden, heads)
        out = attention(torch.randn(2, 3, hidden), torch.rand(2, 3), torch.ones(2, 3, 3, dtype=torch.bool))
        assert out.shape == (2, 3, hidden)
        assert attention.log_rate.shape == (heads, attention.pairs)
