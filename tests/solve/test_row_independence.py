# SPDX-License-Identifier: Apache-2.0
"""A row alone and in any company gives the same bits; so do any number of threads."""

import pytest
import torch
from ode_fields import DOUBLE, RATES, STARTS, solve, tensor

from pyro_latentde.solve.fused import cpu

TIMES = torch.linspace(0.0, 1.3, 5, dtype=DOUBLE)


def relax_or_explode(t, y, p):
    """y' = y**2 where the rate is negative (over at t = 1 / y0), else towards cos t at this rate."""
    rate, shift = p
    towards = -rate * (y - torch.cos(t) - shift * y.flip(0))
    return torch.where(rate < 0, y * y, towards)


def run(y0, p, times=TIMES):
    """Values, statistics, and gradients by row of one solve."""
    y0, p, times = (x.clone().requires_grad_() for x in (y0, p, times.expand(len(y0), -1)))
    settings = {"rtol": 1e-5, "max_steps": 400, "on_failure": "nan"}
    solution = solve(f=relax_or_explode, y0=y0, p=p, times=times, t0=0.0, **settings)
    loss = (solution.ys.nan_to_num() * tensor(1.0, -0.3)).square().sum()
    return [solution.ys.detach(), solution.status, *solution.stats.values(), *torch.autograd.grad(loss, [y0, p, times])]


@pytest.fixture
def threads():
    before = cpu._POOL.threads
    yield cpu.set_pool_size
    cpu.set_pool_size(before)


def company(size):
    """Rows of every kind: stiff, exploding, ordinary."""
    generator = torch.Generator().manual_seed(size)
    rates = 0.5 + 5 * torch.rand(size, generator=generator, dtype=DOUBLE)
    rates[0::5], rates[3::7] = 2000.0, -1.0
    p = torch.stack([rates, 0.1 * torch.rand(size, generator=generator, dtype=DOUBLE)], dim=-1)
    return 1.0 + torch.rand(size, 2, generator=generator, dtype=DOUBLE), p


@pytest.mark.parametrize("size", [3, 17, 64, 1000])
def test_a_row_alone_and_in_company(size, threads):
    threads(2)
    mine = tensor([1.2, 0.7]), tensor([3.0, 0.05])
    alone = run(*mine)
    assert alone[1].tolist() == [0]
    for position in {0, 1, size // 2, size - 1}:
        y0, p = company(size)
        y0[position], p[position] = mine[0][0], mine[1][0]
        together = run(y0, p)
        failed = together[1] != 0
        assert failed.any() or size == 3
        for one, many in zip(alone, together, strict=True):
            assert torch.equal(one[0], many[position])
        assert all((gradient[failed] == 0).all() for gradient in together[-3:])
        assert all(gradient.isfinite().all() for gradient in together[-3:])


def test_every_row_of_a_batch_is_itself():
    y0, p = company(40)
    together = run(y0, p)
    for i in range(40):
        for one, many in zip(run(y0[i : i + 1], p[i : i + 1]), together, strict=True):
            torch.testing.assert_close(one[0], many[i], rtol=0, atol=0, equal_nan=True)


def test_threads_do_not_matter(threads):
    y0, p = company(200)
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        results.append(run(y0, p))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [17, 64, 333])
def test_gradients_of_shared_parameters_do_not_depend_on_threads(size, threads):
    y0 = STARTS[torch.arange(size) % 3] * torch.linspace(0.8, 1.2, size, dtype=DOUBLE)[:, None]
    gradients = []
    for count in (1, 2, 5):
        threads(count)
        for _ in range(3):
            p, t0 = RATES[0].clone().requires_grad_(), torch.tensor(0.0, dtype=DOUBLE, requires_grad=True)
            ys = solve(y0=y0, p=p, times=TIMES[1:], t0=t0, rtol=1e-4).ys
            gradients.append(torch.cat([x.reshape(-1) for x in torch.autograd.grad(ys.square().sum(), [p, t0])]))
    assert all(torch.equal(gradients[0], other) for other in gradients)
    separate = RATES[0].repeat(size, 1).requires_grad_()
    ys = solve(y0=y0, p=separate, times=TIMES[1:], t0=0.0, rtol=1e-4).ys
    by_row = torch.autograd.grad(ys.square().sum(), separate)[0]
    torch.testing.assert_close(gradients[0][:4], by_row.sum(0), rtol=1e-12, atol=0)
