# SPDX-License-Identifier: Apache-2.0
"""ODE-RNN: zero and linear fields have closed forms, and its steps are those of odesolve."""

import pytest
import torch

from pyro_latentde.nn import ODERNNEncoder
from pyro_latentde.solve.integrate import odesolve

F, H = 2, 5


def an_encoder(**options):
    torch.manual_seed(0)
    return ODERNNEncoder(F, H, units=12, **options).double()


def a_complete_batch(n=3, length=6):
    torch.manual_seed(1)
    times = torch.rand(n, length, dtype=torch.float64).cumsum(1)
    return times, torch.randn(n, length, F, dtype=torch.float64), torch.ones(n, length, F, dtype=torch.bool)


def test_zero_field_is_the_gru():
    encoder = an_encoder(gru_units=None)
    for parameter in encoder.field.parameters():
        torch.nn.init.zeros_(parameter)
    times, values, mask = a_complete_batch()
    gru = torch.nn.GRU(2 * F, H, batch_first=True, dtype=torch.float64)
    gru.load_state_dict({f"{name}_l0": weight for name, weight in encoder.unit.named_parameters()})
    expected = gru(torch.cat([values, mask.double()], dim=-1).flip(1))[0].flip(1)
    torch.testing.assert_close(encoder.states(times, values, mask), expected, rtol=1e-12, atol=1e-12)


class Decay(torch.nn.Module):
    """dh/ds = -a h."""

    def __init__(self):
        super().__init__()
        self.rates = torch.nn.Parameter(torch.tensor([0.0, 0.1, 0.5, 1.0, 2.0], dtype=torch.float64))

    def forward(self, h):
        return -self.rates * h


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4), ("tsit5", 5)])
def test_linear_field_decays_with_the_order_of_the_method(method, order):
    """One observation at t1, nothing at t0 < t1: the encoding is its state times exp(-a (t1 - t0))."""
    gaps = torch.tensor([0.0, 0.02, 0.5, 1.0], dtype=torch.float64)
    times = torch.stack([-gaps, torch.zeros(4, dtype=torch.float64)], dim=1)
    values, mask = torch.randn(4, 2, F, dtype=torch.float64), torch.tensor([False, True])[:, None].expand(4, 2, F)
    errors = []
    for steps in (4, 8):
        encoder = an_encoder(method=method, steps=steps, gru_units=7)
        encoder.field = Decay()
        states = encoder.states(times, values, mask)
        exact = states[:, 1] * torch.exp(-encoder.field.rates * gaps[:, None])
        assert torch.equal(states[0, 0], states[0, 1])  # a gap of length zero
        errors.append((states[:, 0] - exact).abs().max().item())
    assert errors[0] / errors[1] > 0.5 * 2**order
    assert errors[1] < {1: 2e-1, 2: 1e-2, 4: 1e-4, 5: 1e-6}[order]


@pytest.mark.parametrize(("method", "steps"), [("euler", 1), ("midpoint", 2), ("rk4", 3), ("dopri5", 2)])
def test_a_gap_is_what_odesolve_gives(method, steps):
    """Values and gradients of the weights, with gaps that differ from row to row (and one that is zero)."""
    encoder = an_encoder(method=method, steps=steps)
    gaps = torch.tensor([0.3, 0.0, 1.2], dtype=torch.float64)
    torch.manual_seed(2)
    h = torch.randn(3, H, dtype=torch.float64)
    ours = encoder._evolve(h, gaps)
    unit_time = torch.tensor([0.0, 1.0], dtype=torch.float64)
    solved = odesolve(
        lambda t, y, p: p["gap"] * encoder.field(y),
        h,
        unit_time,
        {"gap": gaps},
        method=method,
        step_size=1 / steps,
        engine="torch",
    ).ys[:, -1]
    torch.testing.assert_close(ours, solved, rtol=1e-12, atol=1e-12)
    weights = list(encoder.field.parameters())
    expected = torch.autograd.grad(solved.square().sum(), weights)
    for grad, other in zip(torch.autograd.grad(ours.square().sum(), weights), expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-12)


def test_default_step_is_accurate_for_gaps_of_a_scale():
    """The one step of the default and eight of higher order differ by little over gaps of up to one unit."""
    encoder = an_encoder()
    times, values, mask = a_complete_batch(20, 10)
    coarse = encoder(times, values, mask)
    encoder.method, encoder.steps = "tsit5", 8
    error = (encoder(times, values, mask) - coarse).abs().max()
    assert 0 < error < 1e-4
