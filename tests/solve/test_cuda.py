# SPDX-License-Identifier: Apache-2.0
"""Kernels on CUDA against those on the CPU: in Numba's simulator, or with --run-gpu on the device.

The simulator runs the same source without contracting products and sums, so that numbers agree to rounding.
"""

import numpy as np
import pytest
import torch
from ode_fields import DOUBLE, RATES, STARTS, prey_predator, tensor
from stiff_problems import ROBER

import pyro_latentde as lde
from pyro_latentde.errors import SolveError
from pyro_latentde.solve import engines
from pyro_latentde.solve.fused.cuda import device as cuda_device
from pyro_latentde.solve.fused.cuda import kernel as cuda
from pyro_latentde.solve.fused.cuda import source as cuda_source
from pyro_latentde.solve.fused.cuda.device import simulated
from pyro_latentde.solve.methods.catalog import SYMPLECTIC
from pyro_latentde.solve.solution import Status

TIMES = torch.linspace(0, 1, 4, dtype=DOUBLE)
LOOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture
def places(monkeypatch, pytestconfig):
    """Where to solve, by name: ``"cpu"``, and ``"device"``, which the simulator stands for."""
    real = pytestconfig.getoption("--run-gpu")
    assert real != simulated()
    here = {"name": "cpu"}
    if not real:
        monkeypatch.setattr(engines, "on_device", lambda y0: here["name"] == "device")

    def go(name):
        here["name"] = name
        return "cuda" if real and name == "device" else "cpu"

    return go


def close(a, b):
    """Sums of rounding errors, and on the device contracted products too."""
    torch.testing.assert_close(a, b, rtol=1e-12 if simulated() else 1e-9, atol=1e-12 if simulated() else 1e-9)


def solved(places, name, f=prey_predator, y0=STARTS, times=TIMES, p=RATES, t0=0.0, **settings):
    """Outputs, counts and the gradients of a sum of sines by y0, times, t0 and the parameters."""
    where = places(name)
    inputs = [torch.as_tensor(x, dtype=DOUBLE).clone().to(where).requires_grad_() for x in (y0, times, t0)]
    ps = [x.clone().to(where).requires_grad_() for x in ([p] if torch.is_tensor(p) else p)]
    solution = lde.odesolve(
        f, inputs[0], inputs[1], ps[0] if torch.is_tensor(p) else tuple(ps), t0=inputs[2], engine="fused",
        on_failure="nan", **settings,
    )  # fmt: skip
    assert solution.ys.device.type == where
    ok = solution.ok.reshape(-1, 1, 1)
    torch.where(ok, solution.ys.reshape(len(ok), *solution.ys.shape[-2:]), 0.0).sin().sum().backward()
    gradients = [x.grad.cpu() for x in (*inputs, *ps)]
    return solution.ys.detach().cpu(), torch.stack([solution.status, *solution.counts.unbind(-1)]).cpu(), gradients


def agree(places, **problem):
    """The two places agree; returns what the CPU found."""
    (ys, counts, gradients), (ys_, counts_, gradients_) = (solved(places, x, **problem) for x in ("cpu", "device"))
    assert torch.equal(counts, counts_)
    close(ys_.nan_to_num(7.0), ys.nan_to_num(7.0))
    scale = max(float(g.abs().max()) for g in gradients)
    for g, g_ in zip(gradients, gradients_, strict=True):
        close(g_ / scale, g / scale)
    return ys, counts, gradients


@pytest.mark.parametrize("method", ["tsit5", "dopri8", "heun"])
def test_adaptive_steps(places, method):
    settings = {} if method != "heun" else LOOSE
    _, counts, _ = agree(places, method=method, **settings)
    assert len(set(counts[1].tolist())) > 1  # rows take their own steps


def test_fixed_steps(places):
    _, counts, _ = agree(places, method="rk4", step_size=0.11)
    assert counts[1].tolist() == [10, 10, 10]


@pytest.mark.parametrize("method", SYMPLECTIC)
def test_symplectic_steps(places, method):
    def pendulum(t, y, p):
        return torch.stack([y[1] + 0.1 * torch.sin(t), -p[0] * torch.sin(y[0])])

    _, counts, _ = agree(places, f=pendulum, p=RATES[:, :1], method=method, step_size=0.2)
    assert (counts[1] > 1).all()


def test_backwards_and_alone(places):
    agree(places, y0=STARTS[0], times=tensor(0.7, 0.3, 0.3, 0.0), t0=1.0, p=RATES[0])


@pytest.mark.parametrize("method", ["kvaerno5", "kvaerno3", "trbdf2"])
def test_implicit_steps(places, method):
    agree(places, method=method, **LOOSE)


def test_switching_and_replay(places):
    """Robertson's problem becomes stiff; the device's steps are taken again on both sides."""
    problem = {"f": ROBER.f, "y0": tensor(1.0, 0.0, 0.0), "times": tensor(0.0, 0.1, 3.0), "p": tensor(*ROBER.p)}
    agree(places, method="auto", **problem, rtol=1e-4, atol=1e-9)
    where = places("device")
    moved = {k: v.to(where) if torch.is_tensor(v) else v for k, v in problem.items()}
    solution = lde.odesolve(moved["f"], moved["y0"], moved["times"], moved["p"], method="auto", rtol=1e-4, atol=1e-9)
    kinds = solution.implicit
    assert 0 < int(kinds.sum()) < kinds.numel()
    assert solution.engine == "fused"
    again = lde.odesolve(moved["f"], moved["y0"], moved["times"], moved["p"], replay=solution)
    # replayed stages are solved down to rounding, adaptive ones to a part of the tolerance
    torch.testing.assert_close(again.ys, solution.ys, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(again.steps, solution.steps, rtol=0, atol=0)


def test_replay_of_explicit_steps(places):
    first = lde.odesolve(prey_predator, STARTS, TIMES, RATES)
    agree(places, replay=first)


def decaying(t, y, p):
    rate, matrix = p
    return -rate * y + torch.tanh(matrix @ y)


SHARED = tensor([0.2, -0.4], [0.7, 0.1])


@pytest.mark.parametrize("near", [256, 0])
def test_shared_and_own_parameters(places, near, monkeypatch):
    """A rate for each row, a matrix for all; a row's gradient near the thread, or in the buffer of all rows."""
    monkeypatch.setattr(cuda_source, "NEAR", near)
    agree(places, f=decaying, p=(tensor(0.5, 1.0, 2.0), SHARED))


def test_gradients_in_parts(places, monkeypatch):
    """Many parameters: rows are summed part by part."""
    monkeypatch.setattr(cuda, "MANY", 10)
    _, _, gradients = agree(places, f=decaying, p=(tensor(0.5, 1.0, 2.0), SHARED))
    assert gradients[-1].shape == (2, 2) and bool((gradients[-1] != 0).all())


def test_no_parameters_and_no_rows(places):
    where = places("device")
    none = lde.odesolve(lambda t, y: -y, torch.ones(0, 2, dtype=DOUBLE, device=where), TIMES.to(where))
    assert none.ys.shape == (0, 4, 2) and none.engine == "fused" and "thread" in none.reason
    y0 = torch.ones(2, dtype=DOUBLE, device=where, requires_grad=True)
    one = lde.odesolve(lambda t, y: -y, y0, TIMES.to(where), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(one.ys[:, 0].detach().cpu(), torch.exp(-TIMES), rtol=1e-7, atol=1e-9)
    one.ys[-1].sum().backward()
    torch.testing.assert_close(y0.grad.cpu(), torch.exp(tensor(-1.0, -1.0)), rtol=1e-6, atol=0)


def blowing_up(t, y, p):
    return p * y * y


def test_failed_rows_are_data(places):
    """One row blows up at t = 1/2: NaN from there, no gradient; neighbours are what they are alone, bit for bit."""
    p = tensor(0.5, 2.0, -1.0)
    problem = {"f": blowing_up, "max_steps": 60, "event_dims": {"p": 0}}
    ys, counts, gradients = agree(places, y0=tensor([1.0], [1.0], [1.0]), p=p, **problem)
    assert counts[0].tolist() == [Status.OK, counts[0, 1], Status.OK] and counts[0, 1] != Status.OK
    assert ys[1, 2:].isnan().all() and ys[1, :2].isfinite().all()
    assert gradients[0][1] == 0 and gradients[3][1] == 0 and gradients[3][0] != 0
    batch = solved(places, "device", y0=tensor([1.0], [1.0], [1.0]), p=p, **problem)
    alone = solved(places, "device", y0=tensor([1.0]), p=p[2:], **problem)
    assert torch.equal(batch[0][2:], alone[0]) and torch.equal(batch[2][3][2:], alone[2][3])


def root(t, y, p):
    return -p * torch.sqrt(y)


def test_gradient_that_is_not_finite(places, caplog):
    """y = 0 solves y' = -sqrt(y), whose slope is infinite there: no gradient for that row, which is told."""
    where = places("device")
    y0 = torch.tensor([[1.0], [0.0]], dtype=DOUBLE, device=where, requires_grad=True)
    p = torch.tensor(1.0, dtype=DOUBLE, device=where, requires_grad=True)
    solution = lde.odesolve(root, y0, tensor(0.0, 1.0).to(where), p, **LOOSE)
    solution.ys[:, -1].sum().backward()
    assert solution.status.tolist() == [Status.OK, Status.NON_FINITE_GRADIENT]
    torch.testing.assert_close(y0.grad.cpu(), tensor([0.5], [0.0]), rtol=1e-3, atol=0)  # (1 - t / (2 sqrt(y0)))
    torch.testing.assert_close(p.grad.cpu(), tensor(-0.5)[0], rtol=1e-3, atol=0)
    assert "1 of 2 rows" in caplog.text


def test_rows_without_room_are_solved_again(places):
    """Records with too little room for any row, for some, and for all: the same bits."""
    kernel_of = engines.fused_function
    found = []
    for room in (1, 9, 100):
        places("device")
        lde.clear_cache()

        def small(problem, settings, keep, room=room):
            function = kernel_of(problem, settings, keep)
            function.kernel.room = room
            return function

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pyro_latentde.solve.integrate.fused_function", small)
            found.append(solved(places, "device"))
    for ys, counts, gradients in found[1:]:
        assert torch.equal(ys, found[0][0]) and torch.equal(counts, found[0][1])
        assert all(torch.equal(a, b) for a, b in zip(gradients, found[0][2], strict=True))


def test_rows_that_do_not_fit_into_a_budget(places):
    """Nothing kept, solved again one by one in the backward pass: the same bits."""
    plain = solved(places, "device")
    steps = int(plain[1][1].max())
    for budget in (2 * 32 * (steps + 3), 2 * 32 * 2 * (steps + 3)):
        ys, counts, gradients = solved(places, "device", memory_budget=budget)
        assert torch.equal(ys, plain[0]) and torch.equal(counts, plain[1])
        for a, b in zip(gradients, plain[2], strict=True):
            close(a, b)
    with pytest.raises(SolveError, match="memory_budget = .*too small.*on this device: expected at least"):
        solved(places, "device", memory_budget=100)


def test_forward_sensitivities(places):
    agree(places, gradient="forward", f=decaying, p=(tensor(0.5, 1.0, 2.0), SHARED))


def transforms(where):
    """Forward mode, mapped gradients and second derivatives of one small solve."""
    p, y0, times = RATES[0].to(where), STARTS[0].to(where), TIMES[:2].to(where)

    def end(p, y0):
        return lde.odesolve(prey_predator, y0, times, p, method="bosh3", rtol=1e-3, atol=1e-4).ys[-1]

    def loss(p):
        return end(p, y0).square().sum()

    _, forward = torch.func.jvp(end, (p, y0), (torch.ones_like(p), torch.ones_like(y0)))
    mapped = torch.func.vmap(torch.func.grad(loss))(RATES[:2].to(where))
    return [x.cpu() for x in (forward, mapped, torch.func.hessian(loss)(p), torch.func.jacrev(end)(p, y0))]


def test_transforms(places):
    for a, b in zip(transforms(places("cpu")), transforms(places("device")), strict=True):
        close(b, a)


def test_make_fx(places):
    from torch.fx.experimental.proxy_tensor import make_fx

    where = places("device")
    times, y0 = TIMES[:2].to(where), STARTS[0].to(where)

    def loss(p):
        return lde.odesolve(prey_predator, y0, times, p, method="bosh3", **LOOSE).ys.square().sum()

    p, other = RATES[0].to(where), RATES[1].to(where)
    traced = make_fx(torch.func.grad(loss))(p)
    close(traced(other), torch.func.grad(loss)(other))


def test_float32(places):
    """Explicit methods compute in float32, implicit ones in float64; both give float32, near what float64 gives."""
    for method, real in (("tsit5", torch.float32), ("trbdf2", torch.float64)):
        where = places("device")
        p = RATES.float().to(where).requires_grad_()
        y0, times = STARTS.float().to(where), TIMES.float().to(where)
        solution = lde.odesolve(prey_predator, y0, times, p, method=method, rtol=1e-4, atol=1e-6)
        solution.ys.sum().backward()
        assert solution.ys.dtype == p.grad.dtype == torch.float32
        assert solution.ys.grad_fn.function.kernel.real == real
        exact = RATES.clone().requires_grad_()
        reference = lde.odesolve(prey_predator, STARTS, TIMES, exact, engine="torch", rtol=1e-9, atol=1e-11)
        reference.ys.sum().backward()
        torch.testing.assert_close(solution.ys.detach().cpu(), reference.ys.detach().float(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(p.grad.cpu(), exact.grad.float(), rtol=0, atol=2e-2)


def test_whole_steps_in_float32(places):
    """1 / 0.001 is not quite 1000 in float32; the steps are 1000 all the same, and time does not drift."""
    where = places("device")
    y0 = torch.ones(1, device=where)
    times = torch.tensor([0.0, 1.0], device=where)
    solution = lde.odesolve(lambda t, y: -y, y0, times, method="euler", step_size=0.005)
    assert solution.counts[0] == 200
    assert abs(float(solution.ys[-1]) - 0.995**200) < 1e-5


def switched(t, y, p):
    return torch.where(t > p[2], p[1], p[0]) * y


@pytest.mark.parametrize("method", ["tsit5", "auto"])
def test_steps_that_end_at_jumps(places, method):
    """The field jumps at a parameter, which has a gradient; e^(a s + b (1 - s)) for rates a and b."""
    found, steps = [], []
    for name in ("cpu", "device"):
        where = places(name)
        p = tensor(-1.0, 0.5, 0.4).to(where).requires_grad_()
        y0, times = torch.ones(1, dtype=DOUBLE, device=where), TIMES.to(where)
        solution = lde.odesolve(switched, y0, times, p, jumps=p[2:], method=method, engine="fused", rtol=1e-8)
        (gradient,) = torch.autograd.grad(solution.ys[-1, 0], p)

        def last(p, y0=y0, times=times):
            return lde.odesolve(switched, y0, times, p, jumps=p[2:], method=method, rtol=1e-8).ys[-1, 0]

        _, turn = torch.func.jvp(last, (p.detach(),), (torch.ones_like(p),))
        steps.append(solution.steps.cpu())
        found.append([x.detach().cpu() for x in (solution.ys, gradient, turn)])
    # sizes follow error estimates, in which much cancels; states and gradients do not
    torch.testing.assert_close(*steps, rtol=1e-4, atol=0)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)
    end = torch.exp(tensor(-0.4 + 0.5 * 0.6))
    torch.testing.assert_close(found[1][1], end * tensor(0.4, 0.6, -1.5), rtol=1e-6, atol=0)


def test_the_same_bits_again(places):
    first, second = (solved(places, "device", f=decaying, p=(tensor(0.5, 1.0, 2.0), SHARED)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))


def test_what_is_missing_is_told(monkeypatch, caplog):
    """Tensors on a device that no kernel can be compiled for are solved by the torch engine, which is told why."""
    cuda_device.obstacle.cache_clear()
    monkeypatch.setattr(cuda_device.importlib.util, "find_spec", lambda name: None)
    reason = engines._no_kernel_on_device(torch.empty(0, device="meta"))
    cuda_device.obstacle.cache_clear()
    assert "numba is not installed" in reason and "pip install" in reason and "on meta" in reason
    assert "torch engine" in caplog.text


def on_gpu():
    return {"y0": STARTS.cuda(), "times": TIMES.cuda(), "p": RATES.cuda()}


@pytest.mark.gpu
def test_engine_of_tensors_on_a_device():
    problem = on_gpu()
    solution = lde.odesolve(prey_predator, problem["y0"], problem["times"], problem["p"])
    assert solution.engine == "fused" and solution.ys.is_cuda and solution.status.is_cuda
    assert "all solved" in str(solution)


@pytest.mark.gpu
def test_streams_are_respected():
    """On a stream of its own a solve waits for what was queued before it there, and not for the default stream."""
    problem = on_gpu()
    right = lde.odesolve(prey_predator, problem["y0"], problem["times"], problem["p"]).ys
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        y0 = torch.full_like(problem["y0"], torch.nan)
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        y0.copy_(problem["y0"], non_blocking=True)
        p = problem["p"].clone().requires_grad_()
        ys = lde.odesolve(prey_predator, y0, problem["times"], p, on_failure="nan").ys
        ys.sum().backward()
    stream.synchronize()
    torch.testing.assert_close(ys.detach(), right, rtol=0, atol=0)
    assert p.grad.isfinite().all() and bool((p.grad != 0).any())


@pytest.mark.gpu
def test_gradcheck_on_the_device():
    problem = on_gpu()
    first = lde.odesolve(prey_predator, problem["y0"], problem["times"], problem["p"], rtol=1e-9, atol=1e-11)
    inputs = [problem[x].requires_grad_() for x in ("y0", "p")]

    def again(y0, p):
        return lde.odesolve(prey_predator, y0, problem["times"], p, replay=first).ys

    assert torch.autograd.gradcheck(again, inputs, eps=1e-6, atol=1e-6, rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_rows_on_the_device(dtype):
    """Ten thousand rows of different lengths beside the CPU's."""
    rates = torch.linspace(0.5, 3.0, 10_000, dtype=dtype)
    y0, times = torch.ones(10_000, 2, dtype=dtype), torch.linspace(0, 2, 5, dtype=dtype)

    def field(t, y, p):
        return torch.stack([y[1], -p * p * torch.sin(y[0])])

    found = []
    for where in ("cpu", "cuda"):
        p = rates.to(where).requires_grad_()
        ys = lde.odesolve(field, y0.to(where), times.to(where), p, rtol=1e-5, atol=1e-7).ys
        ys.square().sum().backward()
        found.append((ys.detach().cpu(), p.grad.cpu()))
    tolerance = 1e-9 if dtype == torch.float64 else 2e-3
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * float(np.abs(a.numpy()).max()))
