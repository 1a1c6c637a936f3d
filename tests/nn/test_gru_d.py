# SPDX-License-Identifier: Apache-2.0
"""GRU-D: the decay in closed form, and the whole against the equations one number at a time."""

import math

import torch

from pyro_latentde.nn import GRUDEncoder


def by_hand(encoder, times, values, mask):
    """Che et al. (2018), equations 4, 5, 11 - 17 for one row, read backwards, feature by feature."""
    features, hidden = encoder.in_features, encoder.out_features
    rate, bias, means = (x.tolist() for x in (encoder.input_rate, encoder.input_bias, encoder.means))
    h, last, since = torch.zeros(1, hidden, dtype=torch.float64), [None] * features, [None] * features
    for i in reversed(range(len(times))):
        if not mask[i].any() and i > 0:
            continue
        x, delta = [], []
        for d in range(features):
            since[d] = times[i].item() if since[d] is None else since[d]
            delta.append(since[d] - times[i].item())
            keep = math.exp(-max(0.0, rate[d] * delta[d] + bias[d]))
            before = means[d] if last[d] is None else last[d]
            x.append(values[i, d].item() if mask[i, d] else keep * before + (1 - keep) * means[d])
        for d in range(features):
            if mask[i, d]:
                last[d], since[d] = values[i, d].item(), times[i].item()
        decay = encoder.state_decay.weight @ torch.tensor(delta, dtype=torch.float64) + encoder.state_decay.bias
        inputs = torch.tensor([x + mask[i].tolist()], dtype=torch.float64)
        h = encoder.cell(inputs, torch.exp(-decay.clamp(min=0)) * h)
    return h


def test_equals_the_equations_one_number_at_a_time():
    torch.manual_seed(0)
    encoder = GRUDEncoder(3, 4).double()
    torch.nn.init.normal_(encoder.input_bias, std=0.3)
    torch.nn.init.normal_(encoder.state_decay.weight)
    times = 2 * torch.rand(6, 8, dtype=torch.float64).cumsum(1)
    values, mask = torch.randn(6, 8, 3, dtype=torch.float64), torch.rand(6, 8, 3) < 0.4
    encoder.set_means(values, mask)
    out = encoder(times, values, mask)
    for i in range(6):
        expected = by_hand(encoder, times[i], values[i], mask[i])
        torch.testing.assert_close(out[i : i + 1], expected, rtol=1e-12, atol=1e-12)


def test_missing_input_decays_to_its_mean():
    """Feature 0 is read once (value 3), then missing for 0.5, then for 2: mean + (3 - mean) exp(-w t)."""
    encoder = GRUDEncoder(2, 4).double()
    encoder.means.copy_(torch.tensor([1.0, -1.0]))
    seen = []
    encoder.cell.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, 0].item()))
    mask = torch.tensor([[[False, True], [False, True], [True, True]]])
    values = torch.tensor([[[9.0, 0.0], [9.0, 0.0], [3.0, 0.0]]], dtype=torch.float64)
    encoder(torch.tensor([[0.0, 1.5, 2.0]], dtype=torch.float64), values, mask)
    w = encoder.input_rate[0].item()
    expected = [3.0, 1 + 2 * math.exp(-0.5 * w), 1 + 2 * math.exp(-2 * w)]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_means_are_of_what_is_observed_and_are_saved():
    encoder = GRUDEncoder(2, 4)
    values = torch.tensor([[[1.0, 5.0], [3.0, 1e6]], [[8.0, 1e6], [1e6, 1e6]]])
    mask = torch.tensor([[[True, False], [True, False]], [[True, False], [False, False]]])
    encoder.set_means(values, mask)
    assert encoder.means.tolist() == [4.0, 0.0]
    assert encoder.state_dict()["means"].tolist() == [4.0, 0.0]
