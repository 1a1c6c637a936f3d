# SPDX-License-Identifier: Apache-2.0
"""What makes small solves quick changes no number: shortcuts around tensors, layouts and settings remembered."""

import math
import threading

import numpy as np
import pytest
import torch
from ode_fields import DOUBLE, RATES, STARTS, prey_predator, solve, tensor

import pyro_latentde as lde
from pyro_latentde.errors import DataError, SolveError
from pyro_latentde.solve.fused import operator
from pyro_latentde.solve.fused.lower import lower
from pyro_latentde.solve.fused.machine_code import assemble, enter
from pyro_latentde.solve.fused.operator import _located

TIMES = torch.linspace(0, 4, 9, dtype=DOUBLE)
RATE = torch.tensor(0.3, dtype=DOUBLE)
FINE = {"rtol": 1e-13, "atol": 1e-13}  # long solves, which overlap


def inputs():
    return {"y0": STARTS.clone(), "times": TIMES.clone(), "p": RATES.clone()}


def gradients(names, **settings):
    """Of the inputs named, the only ones that require any."""
    values = inputs()
    for name in names:
        values[name].requires_grad_()
    ys = solve(**values, **settings).ys
    found = torch.autograd.grad((ys * torch.arange(ys.numel()).reshape(ys.shape)).sum(), [values[n] for n in names])
    return dict(zip(names, found, strict=True)), values


# ---- gradients of some inputs only -----------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("p",), ("y0",), ("times",), ("y0", "times"), ("times", "p")])
def test_the_gradient_of_some_inputs_is_that_of_all(names):
    every, _ = gradients(("y0", "times", "p"))
    some, values = gradients(names)
    for name in names:
        torch.testing.assert_close(some[name], every[name], rtol=1e-12, atol=1e-12)
    assert all(x.grad is None for x in values.values())


def test_an_input_without_influence_has_a_zero_gradient():
    unused = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    rate = tensor(0.5, 0.4, 0.3).requires_grad_()
    ys = lde.odesolve(
        lambda t, y, p: -p["k"] * y,
        torch.ones(3, 1, dtype=DOUBLE),
        TIMES,
        {"k": rate, "n": unused},
        event_dims={"n": 0},
    ).ys
    k_bar, n_bar = torch.autograd.grad(ys.sum(), (rate, unused))
    torch.testing.assert_close(
        k_bar, -(TIMES * torch.exp(-rate.detach()[:, None] * TIMES)).sum(1), rtol=1e-4, atol=1e-6
    )
    assert (n_bar == 0).all()


def test_gradients_that_nobody_wants_are_not_made(monkeypatch):
    made, gradient = [], operator._gradient

    def noted(rows, shared, k, *rest):
        made.append(k)
        return gradient(rows, shared, k, *rest)

    monkeypatch.setattr(operator, "_gradient", noted)
    gradients(("p",))
    assert made == [3]  # after y0, times and t0
    gradients(("y0", "p"))
    assert made == [3, 0, 3]


# ---- inputs are read where they lie ----------------------------------------------------------------------------


def awkward(x):
    """Tensors of the same values that kernels cannot read as they lie."""
    spread = torch.empty(*x.shape, 2, dtype=DOUBLE)
    spread[..., 0] = x
    negated = torch._neg_view(-x)
    bytes_ = np.zeros(8 * x.numel() + 4, dtype=np.uint8)
    bytes_[4:] = np.frombuffer(np.ascontiguousarray(x.numpy()).tobytes(), dtype=np.uint8)
    shifted = torch.from_numpy(np.frombuffer(bytes_.data, dtype=np.float64, offset=4)).reshape(x.shape)
    return {"strided": spread[..., 0], "negated": negated, "shifted": shifted, "flipped": x.flip(0).flip(0)}


@pytest.mark.parametrize("kind", ["strided", "negated", "shifted", "flipped"])
def test_values_count_not_how_they_lie_in_memory(kind):
    expected = solve().ys
    assert torch.equal(solve(y0=awkward(STARTS)[kind], p=awkward(RATES)[kind], times=awkward(TIMES)[kind]).ys, expected)


def test_symbolic_zeros_and_other_dtypes_are_copied():
    for x in (torch._efficientzerotensor(3, dtype=DOUBLE), torch.zeros(3), torch.zeros(3, dtype=torch.float16)):
        address, holder, _ = _located(x)
        assert address and holder.dtype == DOUBLE and holder.tolist() == [0.0] * 3


@pytest.mark.parametrize("kind", ["plain", "strided"])
def test_gradients_of_single_precision_inputs(kind):
    """They are copied for the kernel; the gradient finds the copies again, or makes them where the tensor is a view."""
    single = torch.stack([RATES, RATES + 1.0], dim=-1).float()
    single = single[..., 0] if kind == "strided" else single[..., 0].contiguous()
    p = single.requires_grad_()
    (got,) = torch.autograd.grad(solve(y0=STARTS.float(), p=p, times=TIMES.float()).ys.sum(), p)
    exact = p.detach().double().requires_grad_()
    (right,) = torch.autograd.grad(
        solve(y0=STARTS.float().double(), p=exact, times=TIMES.float().double()).ys.sum(), exact
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), right, rtol=1e-3, atol=1e-3)


def test_a_gradient_outlives_the_inputs():
    """Kernels know addresses, so something must hold what lies there."""

    def made():
        weights = RATES.clone().requires_grad_()
        scaled = 2 * weights
        return weights, solve(y0=1.0 * STARTS, p=0.5 * scaled, times=TIMES + 0.0).ys

    weights, ys = made()
    _ = [torch.full_like(RATES, float("nan")) for _ in range(200)]
    plain = RATES.clone().requires_grad_()
    expected = torch.autograd.grad(solve(p=plain).ys.sum(), plain)[0]
    assert torch.equal(torch.autograd.grad(ys.sum(), weights)[0], expected)


def test_a_changed_input_is_noticed():
    p = RATES.clone().requires_grad_()
    scaled = 1.0 * p
    ys = solve(p=scaled).ys
    scaled.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()


def test_a_kernel_reads_floats_at_an_address():
    source = """
def kernel(x: FloatsAt, n: int, out: Floats) -> int:
    for i in range(n):
        out[i] = 2.0 * x[i]
    return n
"""
    kinds = [("x", "FloatsAt"), ("n", "int"), ("out", "Floats")]
    kernel = enter(assemble(lower(source, "kernel", 0), "k_floats_at"), "k_floats_at", kinds)
    x, out = tensor(1.0, 2.0, 3.0), np.empty((1, 3))
    assert kernel(x.data_ptr(), 3, out) == 3
    assert out.tolist() == [[2.0, 4.0, 6.0]]


# ---- what is remembered ----------------------------------------------------------------------------------------


def test_one_field_with_changing_shapes_and_dtypes():
    """The layout is remembered by shapes: each call must get its own."""

    def field(t, y, p):
        return prey_predator(t, y, p)

    alone = [solve(f=field, y0=STARTS[i], p=RATES[i]).ys for i in range(3)]
    for _ in range(2):
        assert torch.equal(solve(f=field, y0=STARTS, p=RATES).ys, torch.stack(alone))
        assert torch.equal(solve(f=field, y0=STARTS[1], p=RATES[1]).ys, alone[1])
        assert torch.equal(solve(f=field, y0=STARTS[0], p=RATES[0], times=TIMES.expand(2, 9)).ys[1], alone[0])
        assert solve(f=field, y0=STARTS[0], p=RATES[0], t0=torch.zeros(4, dtype=DOUBLE)).ys.shape == (4, 9, 2)
        single = solve(f=field, y0=STARTS.float(), p=RATES.float(), times=TIMES.float(), rtol=1e-5, atol=1e-6).ys
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), torch.stack(alone), rtol=1e-3, atol=1e-3)


def test_settings_that_are_equal_but_of_another_type_are_told_apart():
    assert solve(rtol=1).rtol == 1
    assert solve(rtol=1.0).rtol == 1.0
    with pytest.raises(SolveError, match="rtol = True"):
        solve(rtol=True)
    with pytest.raises(SolveError, match="max_steps = 1000.0"):
        solve(max_steps=1000.0)
    assert solve(max_steps=1000).status.tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [9, 100])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_times_that_are_not_finite_are_refused_wherever_they_are(size, bad):
    for place in (0, size // 2, size - 1):
        times = torch.linspace(0, 4, size, dtype=DOUBLE)
        times[place] = bad
        with pytest.raises(DataError, match="must be finite"):
            solve(times=times)


@pytest.mark.parametrize("size", [9, 100])
def test_times_changed_in_place_are_looked_at_again(size):
    times = torch.linspace(0, 4, size, dtype=DOUBLE)
    first = solve(times=times).ys
    times += 1.0
    moved = solve(times=times).ys
    assert not torch.equal(first, moved)  # the field depends on time
    assert torch.equal(moved, solve(times=times, t0=1.0).ys)
    times[3], times[4] = 3.0, 2.0
    with pytest.raises(DataError, match="not sorted"):
        solve(times=times)


def test_the_remembered_start_can_be_differentiated_after_inference_mode():
    times = TIMES + 0.125
    with torch.inference_mode():
        solve(times=times)
    p = RATES.clone().requires_grad_()
    assert torch.autograd.grad(solve(p=p, times=times).ys.sum(), p)[0].isfinite().all()


def test_threads_have_their_own_work_arrays():
    def field(t, y, p):
        return -p * y * y.sum()

    starts = torch.rand(8, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    expected = [
        (solve(y0=STARTS[0], p=RATES[0], **FINE).ys, lde.odesolve(field, y, TIMES, RATE, **FINE).ys) for y in starts
    ]
    wrong = []

    def work(k):
        for _ in range(20):
            if not torch.equal(solve(y0=STARTS[0], p=RATES[0], **FINE).ys, expected[k][0]):
                wrong.append(k)
            if not torch.equal(lde.odesolve(field, starts[k], TIMES, RATE, **FINE).ys, expected[k][1]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _solved(k):
    y0, times = torch.ones(1, dtype=torch.float64), torch.linspace(0, 1, 5, dtype=torch.float64)
    return lde.odesolve(lambda t, y, p: -p * y, y0, times, k, rtol=1e-10, atol=1e-10).ys[-1, 0]


def test_a_parameter_whose_memory_is_exchanged_before_the_gradient():
    """d exp(-k) / dk = -exp(-k) at the value that was solved with, whatever the parameter is given afterwards."""
    k = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    y = _solved(k)
    k.data = torch.tensor(9.0, dtype=torch.float64)
    junk = [torch.full((1,), 7.0, dtype=torch.float64) for _ in range(100)]  # would take the freed memory
    # the tensor that autograd saved is the parameter, which now has another value; the steps are those of the solve
    y.backward()
    assert k.grad.isfinite() and len(junk) == 100


@pytest.mark.parametrize("hook", ["mutation", "clone"])
def test_gradients_use_the_tensors_that_autograd_kept(hook):
    u = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    contexts = {
        "mutation": torch.autograd.graph.allow_mutation_on_saved_tensors,
        "clone": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x),
    }
    with contexts[hook]():
        k = u * 1.0
        y = _solved(k)
        with torch.no_grad():
            k.mul_(5)
        (gradient,) = torch.autograd.grad(y, u)
    assert gradient.item() == pytest.approx(-math.exp(-0.5), abs=1e-6)
