# SPDX-License-Identifier: Apache-2.0
"""RecurrentEncoder against loops written by hand."""

import pytest
import torch

from pyro_latentde.nn import RecurrentEncoder

torch_cells = {"rnn": torch.nn.RNNCell, "gru": torch.nn.GRUCell, "lstm": torch.nn.LSTMCell}


def by_hand(network, cell_name, layers, hidden, times, values, mask, backward):
    """Final state of a stack of cells for one row, with where-less Python: read, skip, carry."""
    cells = []
    for layer in range(layers):
        weights = {k.removesuffix(f"_l{layer}"): v for k, v in network.named_parameters() if k.endswith(f"_l{layer}")}
        cell = torch_cells[cell_name](weights["weight_ih"].shape[1], hidden, dtype=torch.float64)
        cell.load_state_dict(weights)
        cells.append(cell)
    state = [torch.zeros(1, hidden, dtype=torch.float64)] * layers
    state = [(h, h) for h in state] if cell_name == "lstm" else state
    order = reversed(range(len(times))) if backward else range(len(times))
    before = None
    for i in order:
        if not mask[i].any() and not (backward and i == 0):
            continue
        gap = 0.0 if before is None else abs(float(times[i] - before))
        before = times[i]
        x = [v if m else 0.0 for v, m in zip(values[i].tolist(), mask[i].tolist(), strict=True)]
        x = torch.tensor([[*x, *mask[i].tolist(), gap]], dtype=torch.float64)
        for layer, cell in enumerate(cells):
            state[layer] = cell(x, state[layer])
            x = state[layer][0] if cell_name == "lstm" else state[layer]
    return x


@pytest.mark.parametrize("cell", torch_cells)
@pytest.mark.parametrize("layers", [1, 2])
def test_equals_a_loop_by_hand(cell, layers):
    torch.manual_seed(0)
    n, length, features, hidden = 4, 6, 2, 5
    encoder = RecurrentEncoder(features, hidden, cell=cell, layers=layers, bidirectional=True).double()
    times = torch.rand(n, length, dtype=torch.float64).cumsum(1)
    values, mask = torch.randn(n, length, features, dtype=torch.float64), torch.rand(n, length, features) < 0.45
    mask[2, 0] = False
    mask[3] = True
    out = encoder(times, values, mask)
    for i in range(n):
        parts = [
            by_hand(network, cell, layers, hidden, times[i], values[i], mask[i], name == "from_end")
            for name, network in encoder.directions.items()
        ]
        torch.testing.assert_close(out[i : i + 1], torch.cat(parts, dim=1), rtol=1e-12, atol=1e-12)


def test_time_scale_divides_the_gaps():
    torch.manual_seed(0)
    encoder = RecurrentEncoder(1, 4, time_scale=10.0)
    times, values = torch.tensor([[0.0, 5.0, 30.0]]), torch.randn(1, 3, 1)
    mask = torch.ones(1, 3, 1, dtype=torch.bool)
    gaps = torch.tensor([0.0, 2.5, 0.5])  # backwards
    inputs = torch.stack([values[0, :, 0].flip(0), torch.ones(3), gaps], dim=1)[None]
    expected = encoder.directions["from_end"](inputs)[0]
    torch.testing.assert_close(encoder.states(times, values, mask), expected.flip(1))


def test_forward_states_of_a_bidirectional_one_begin_at_zero():
    torch.manual_seed(0)
    encoder = RecurrentEncoder(1, 4, bidirectional=True)
    times, values, mask = torch.arange(3.0)[None], torch.randn(1, 3, 1), torch.tensor([[[False], [True], [True]]])
    states = encoder.states(times, values, mask)
    assert states[0, 0, 4:].eq(0).all() and states[0, 1, 4:].ne(0).all()
