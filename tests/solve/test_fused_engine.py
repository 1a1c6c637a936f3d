# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels against the torch engine, SciPy and the order of every method; times, dtypes and shapes."""

import numpy as np
import pytest
import torch
from ode_fields import DOUBLE, ENGINES, RATES, STARTS, prey_predator, scipy_solution, solve, tensor

import pyro_latentde as lde
from pyro_latentde.errors import DataError, SolveError
from pyro_latentde.solve.methods.catalog import METHODS

ADAPTIVE = [name for name, method in METHODS.items() if method.adaptive]
FIXED = [name for name, method in METHODS.items() if method.stiff is None]
IMPLICIT = [name for name, method in METHODS.items() if method.kind == "implicit"]
CHEAP = {"method": "midpoint", "step_size": 0.05}


def same_counts(a, b):
    return all(torch.equal(a.stats[name], b.stats[name]) for name in ("n_accepted", "n_rejected", "n_evals"))


def exact_rows(times, t0=None):
    return torch.stack([scipy_solution(prey_predator, y, times, p, t0) for y, p in zip(STARTS, RATES, strict=True)])


@pytest.mark.parametrize("name", IMPLICIT)
def test_adaptive_engines_with_newtons_method_agree_to_tolerance(name):
    tolerance = {"trbdf2": 1e-5, "kvaerno3": 1e-6}.get(name, 1e-8)
    for times in (torch.linspace(0, 4, 9, dtype=DOUBLE), torch.linspace(0, -2, 7, dtype=DOUBLE)):
        fused, plain = (solve(e, times=times, method=name, rtol=tolerance, atol=tolerance) for e in ENGINES)
        # other Jacobians, other steps; each is off by up to forty tolerances
        torch.testing.assert_close(fused.ys, plain.ys, rtol=40 * tolerance, atol=40 * tolerance)
        assert (fused.stats["n_accepted"] - plain.stats["n_accepted"]).abs().max() <= 3


@pytest.mark.parametrize("name", [name for name in ADAPTIVE if name not in IMPLICIT])
def test_adaptive_engines_take_the_same_steps(name):
    tolerance = {"heun": 1e-3, "bosh3": 1e-5}.get(name, 1e-7)
    for times in (torch.linspace(0, 4, 9, dtype=DOUBLE), torch.linspace(0, -2, 7, dtype=DOUBLE)):
        fused, plain = (solve(e, times=times, method=name, rtol=tolerance, atol=tolerance) for e in ENGINES)
        torch.testing.assert_close(fused.ys, plain.ys, rtol=1e-8, atol=1e-9)
        assert same_counts(fused, plain)
        torch.testing.assert_close(fused.steps, plain.steps, rtol=1e-6, atol=1e-9)
        assert torch.equal(fused.ys[:, 0], STARTS)


@pytest.mark.parametrize("name", FIXED)
def test_fixed_step_engines_agree(name):
    # not a multiple of the step, outputs between steps, one row backward
    times = torch.stack([torch.linspace(a, b, 6, dtype=DOUBLE) for a, b in ((0, 1.03), (0.5, 2.1), (1, -0.2))])
    fused, plain = (solve(e, times=times, method=name, step_size=0.07) for e in ENGINES)
    torch.testing.assert_close(fused.ys, plain.ys, rtol=1e-12, atol=1e-13)
    assert same_counts(fused, plain) or name in IMPLICIT
    assert fused.stats["n_accepted"].tolist() == [15, 23, 18]
    torch.testing.assert_close(fused.steps, plain.steps, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_replayed_steps_give_the_solution_again(name):
    settings = {"step_size": 0.1} if name not in ADAPTIVE else {"rtol": 1e-4}
    first = solve(method=name, **settings)
    for engine in ENGINES:
        again = solve(engine, replay=first)
        assert again.method == name
        exact = 1e-11 if name not in IMPLICIT else 1e-4  # given steps are solved down to rounding
        torch.testing.assert_close(again.ys, first.ys, rtol=exact, atol=0.1 * exact)
        assert torch.equal(again.stats["n_accepted"], first.stats["n_accepted"])
        assert (again.stats["n_rejected"] == 0).all()
    if name not in IMPLICIT:
        assert same_counts(solve("torch", replay=first), solve("fused", replay=first))


@pytest.mark.parametrize("name", ["tsit5", "dopri5", "dopri8"])
def test_agrees_with_scipy(name):
    times = torch.linspace(0, 4, 9, dtype=DOUBLE)
    error = (solve(times=times, method=name, rtol=1e-11, atol=1e-12).ys - exact_rows(times)).abs().max()
    assert error < 2e-9


@pytest.mark.parametrize("name", FIXED)
def test_fixed_steps_converge_with_the_methods_order_at_and_between_steps(name):
    order = METHODS[name].order
    steps = {8: 10, 5: 20, 4: 60}.get(order, 300)
    # an output in the middle of a step is in the middle of one of a third of the size, too
    between = ((torch.tensor([0.25, 0.5, 0.75], dtype=DOUBLE) * steps).round() + 0.5) * 2.0 / steps
    times = torch.cat([torch.zeros(1, dtype=DOUBLE), between, torch.full((1,), 2.0, dtype=DOUBLE)])
    truth = exact_rows(times)
    errors = []
    for step_size in (2.0 / steps, 2.0 / (3 * steps)):
        gap = (solve(times=times, method=name, step_size=step_size).ys - truth).abs()
        errors.append([gap[:, 1:-1].norm().item(), gap[:, -1].norm().item()])
    observed = np.log(np.array(errors[0]) / np.array(errors[1])) / np.log(3.0)
    assert (observed > order - 0.5).all() and (observed < order + 1.5).all(), observed


def test_max_steps_of_a_fixed_grid_keeps_what_was_reached():
    times = torch.linspace(0, 4, 9, dtype=DOUBLE)
    full = solve(times=times, method="rk4", step_size=0.1)
    for engine in ENGINES:
        cut = solve(engine, times=times, method="rk4", step_size=0.1, max_steps=25, on_failure="nan")
        assert cut.status.tolist() == [lde.Status.MAX_STEPS] * 3
        assert cut.stats["n_accepted"].tolist() == [25] * 3
        torch.testing.assert_close(cut.ys[:, :6], full.ys[:, :6], rtol=1e-13, atol=0)
        assert cut.ys[:, 6:].isnan().all()


def test_replay_reaches_a_little_beyond_its_last_step_and_no_further():
    short = solve(times=tensor(0.0, 1.0, 2.0), rtol=1e-6)
    end = float(short.steps[0][short.steps[0] != 0][-1])
    for engine in ENGINES:
        near = solve(engine, times=tensor(0.0, 2.0, 2.0 + 0.5e-4 * end), replay=short)
        assert (near.status == 0).all()
        moved = (near.ys[0, 2] - near.ys[0, 1]) / (0.5e-4 * end)
        slope = prey_predator(torch.tensor(2.0, dtype=DOUBLE), near.ys[0, 1], RATES[0])
        torch.testing.assert_close(moved, slope, rtol=1e-3, atol=1e-3)
        far = solve(engine, times=tensor(0.0, 2.0, 2.5), replay=short, on_failure="nan")
        assert far.status.tolist() == [lde.Status.MAX_STEPS] * 3
        assert far.ys[:, :2].isfinite().all() and far.ys[:, 2].isnan().all()


def test_replay_ignores_max_steps():
    first = solve(rtol=1e-8)
    assert (first.stats["n_accepted"] > 10).all()
    assert (solve(replay=first, max_steps=3).status == 0).all()


# ---- times -----------------------------------------------------------------------------------------------------


def test_unsorted_times_come_back_in_the_order_given():
    ordered = torch.linspace(0, 4, 9, dtype=DOUBLE)
    shuffle = torch.tensor([4, 0, 8, 2, 1, 7, 3, 6, 5])
    reference = solve(times=ordered)
    mixed = solve(times=ordered[shuffle], t0=0.0)
    assert torch.equal(mixed.ys, reference.ys[:, shuffle])
    with pytest.raises(DataError, match="t0="):
        solve(times=ordered[shuffle])


def test_times_on_both_sides_of_t0_are_two_solves():
    times = tensor(-1.0, 0.4, -0.3, 2.0, 0.5)
    solution = solve(times=times, t0=0.5)
    ahead, back = solve(times=tensor(0.5, 2.0), t0=0.5), solve(times=tensor(0.4, -0.3, -1.0), t0=0.5)
    assert torch.equal(solution.ys[:, [4, 3]], ahead.ys)
    assert torch.equal(solution.ys[:, [1, 2, 0]], back.ys)
    assert torch.equal(solution.ys[:, 4], STARTS)
    assert torch.equal(solution.stats["n_accepted"], ahead.stats["n_accepted"] + back.stats["n_accepted"])


def test_repeated_times_are_replicates_and_ragged_rows_repeat_their_last():
    times = tensor([0.0, 1.0, 1.0, 2.0, 3.0], [0.0, 0.5, 1.5, 1.5, 1.5], [0.0, 0.0, 1.0, 2.0, 2.0])
    ys = solve(times=times).ys
    assert torch.equal(ys[0, 1], ys[0, 2])
    assert torch.equal(ys[1, 2], ys[1, 3]) and torch.equal(ys[1, 2], ys[1, 4])
    assert torch.equal(ys[2, 0], STARTS[2]) and torch.equal(ys[2, 1], STARTS[2])
    alone = solve(y0=STARTS[1], p=RATES[1], times=times[1, :3])
    assert torch.equal(alone.ys, ys[1, :3])


@pytest.mark.parametrize("engine", ENGINES)
def test_all_times_at_the_start(engine):
    solution = solve(engine, times=tensor(1.0, 1.0))
    assert torch.equal(solution.ys, STARTS[:, None].expand(3, 2, 2))
    assert solution.stats["n_accepted"].tolist() == [0, 0, 0]
    assert solution.stats["n_evals"].tolist() == [1, 1, 1]


def test_times_and_starts_of_each_row():
    times = tensor([0.0, 1.0, 2.0], [1.0, 0.5, -1.0], [2.0, 3.0, 4.0])
    solution = solve(times=times, rtol=1e-10, atol=1e-12)
    for i in range(3):
        exact = scipy_solution(prey_predator, STARTS[i], times[i], RATES[i])
        torch.testing.assert_close(solution.ys[i], exact, rtol=1e-8, atol=1e-8)
    later = solve(times=times[:, 1:], t0=times[:, 0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(later.ys, solution.ys[:, 1:], rtol=1e-12, atol=0)


def test_at_interpolates_and_differentiates():
    rates = RATES.clone().requires_grad_()
    solution = solve(p=rates, rtol=1e-9, atol=1e-11)
    truth = exact_rows(tensor(0.0, 1.23, 3.3))
    one, two = solution.at(1.23), solution.at(tensor(1.23, 3.3))
    assert one.shape == (3, 2) and two.shape == (3, 2, 2)
    torch.testing.assert_close(two, truth[:, 1:], rtol=1e-6, atol=1e-7)
    assert torch.equal(one, two[:, 0])
    direct = solve(p=rates, times=tensor(0.0, 1.23, 3.3, 4.0), rtol=1e-9, atol=1e-11).ys[:, 1:3]
    torch.testing.assert_close(
        torch.autograd.grad(two.sum(), rates)[0], torch.autograd.grad(direct.sum(), rates)[0], rtol=1e-12, atol=0
    )
    assert torch.equal(solution.at(solution.times), solution.ys)
    for outside in (4.5, -0.1):
        with pytest.raises(SolveError, match="outside the solved span"):
            solution.at(outside)


# ---- dtypes and shapes -----------------------------------------------------------------------------------------


def test_float32_in_is_float32_out():
    y0, rates = STARTS.float().requires_grad_(), RATES.float().requires_grad_()
    solution = solve(y0=y0, p=rates, times=torch.linspace(0, 4, 9))
    assert solution.ys.dtype == torch.float32
    torch.testing.assert_close(solution.ys, solve().ys.float(), rtol=3e-3, atol=3e-3)
    solution.ys.sum().backward()
    assert y0.grad.dtype == rates.grad.dtype == torch.float32
    plain = solve("torch", y0=y0, p=rates, times=torch.linspace(0, 4, 9))
    expected = torch.autograd.grad(plain.ys.sum(), [y0, rates])
    torch.testing.assert_close([y0.grad, rates.grad], list(expected), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3), (2, 0)])
def test_batch_shapes(batch):
    rates = RATES[0].expand(*batch, 4).clone().requires_grad_()
    solution = solve(y0=STARTS[0], p=rates, times=tensor(0.0, 1.0, 2.0), **CHEAP)
    assert solution.ys.shape == (*batch, 3, 2)
    assert solution.status.shape == batch and solution.status.dtype == torch.int64
    assert all(count.shape == batch for count in solution.stats.values())
    solution.ys.sum().backward()
    assert rates.grad.shape == (*batch, 4) and rates.grad.isfinite().all()
    if solution.ys.numel():
        single = solve(y0=STARTS[0], p=RATES[0], times=tensor(0.0, 1.0, 2.0), **CHEAP).ys
        assert torch.equal(solution.ys, single.expand(*batch, 3, 2))


def test_leading_dimensions_broadcast():
    rates = RATES[:2, None].expand(2, 3, 4)
    solution = solve(p=rates, times=tensor(0.0, 1.0), **CHEAP)
    assert solution.ys.shape == (2, 3, 2, 2)
    for i in range(2):
        for j in range(3):
            alone = solve(y0=STARTS[j], p=RATES[i], times=tensor(0.0, 1.0), **CHEAP).ys
            assert torch.equal(solution.ys[i, j], alone)


def test_tolerances_below_the_dtypes_resolution_are_a_warning():
    with pytest.warns(UserWarning, match="below what torch.float32 resolves"):
        solve(y0=STARTS.float(), p=RATES.float(), times=torch.linspace(0, 1, 3), rtol=1e-9, on_failure="nan")


def test_engine_torch_is_chosen_where_a_field_cannot_be_compiled_and_says_why():
    def branching(t, y, k):
        return -k * y if y.sum() > 0 else k * y

    y0 = torch.ones(1, dtype=DOUBLE)
    solution = lde.odesolve(branching, y0, tensor(0.0, 1.0), torch.tensor(0.5, dtype=DOUBLE))
    assert solution.engine == "torch" and "torch.where" in solution.reason
    torch.testing.assert_close(solution.ys[-1, 0], torch.exp(tensor(-0.5))[0], rtol=1e-6, atol=0)
    with pytest.raises(SolveError, match='engine="fused" cannot solve this.*torch.where'):
        lde.odesolve(branching, y0, tensor(0.0, 1.0), torch.tensor(0.5, dtype=DOUBLE), engine="fused")
