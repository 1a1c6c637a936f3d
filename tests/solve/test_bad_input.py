# SPDX-License-Identifier: Apache-2.0
"""Bad input: each mistake has its own error, which says what was expected, what came, where, and what to try."""

import re
import warnings

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import pyro_latentde as lde
from pyro_latentde.errors import DataError, ShapeError, SolveError

NAN, INF = float("nan"), float("inf")
F64, F32 = torch.float64, torch.float32
TIMES = torch.linspace(0.0, 1.0, 4, dtype=F64)
START = torch.ones(2, dtype=F64)
ONE = torch.tensor(1.0, dtype=F64)


def decay(t, y, k):
    return -k * y


def free(t, y):
    return -y


def two_states(t, y, p):
    """Unlike an elementwise field this one tells which dimension is the state."""
    return torch.stack([-p[0] * y[0], p[1] * y[1]])


def ones(*shape, dtype=F64, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


def solve(f=decay, y0=START, times=TIMES, params=ONE, **keywords):
    keywords.setdefault("engine", "torch")
    if f is decay:
        keywords.setdefault("event_dims", {"p": 0})
    return lde.odesolve(f, y0, times, None if f is free else params, **keywords)


def fails(kind, message, *args, **keywords):
    with pytest.raises(kind, match=message) as caught:
        solve(*args, **keywords)
    assert type(caught.value) is kind
    return str(caught.value)


# --- times ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (torch.tensor([0.0, 1.0, NAN]), r"times\[2\] is nan; times must be finite.*[Mm]ask missing"),
        (torch.tensor([0.0, INF]), r"times\[1\] is inf"),
        ([0.0, -INF, 1.0], r"times\[1\] is -inf"),
        (["monday"], "times of type list cannot be read as numbers; expected a tensor"),
        (None, "times of type NoneType cannot be read as numbers"),
    ],
)
def test_times_that_are_not_finite_numbers(times, message):
    fails(DataError, message, times=times)


def test_the_position_of_a_bad_time_in_a_batch_is_told():
    times = torch.tensor([[0.0, 1.0], [0.0, NAN]])
    fails(DataError, r"times\[1, 1\] is nan", free, y0=ones(2, 2), times=times)
    fails(DataError, "t0 is nan", t0=NAN)


@pytest.mark.parametrize(
    ("kind", "y0", "times", "message"),
    [
        (ShapeError, TIMES, ones(2), r"returned shape \(2,\), expected \(4,\)"),
        (ShapeError, TIMES, torch.tensor([1.0, 2.0]), r"returned shape \(2,\), expected \(4,\)"),
        (ShapeError, TIMES.expand(3, 4), ones(3, 2), r"returned shape \(2,\), expected \(4,\)"),
        (DataError, TIMES, torch.tensor([2.0, 1.0, 3.0]), "times are not sorted"),
        (DataError, TIMES[:3], torch.tensor([2.0, 1.0, 3.0]), "times are not sorted"),
        (ShapeError, [0.0, 1.0, 2.0], torch.tensor([3.0, 1.0]), "y0 is of type list"),
        (ShapeError, torch.arange(4), torch.tensor([3.0, 1.0]), "y0 has dtype torch.int64"),
        (DataError, TIMES, {"u": ONE}, "times of type dict cannot be read"),
    ],
)
def test_an_initial_state_and_times_that_are_exchanged(kind, y0, times, message):
    fails(kind, message + ".* Are y0 and times exchanged", two_states, y0=y0, times=times, params=ones(2))


def test_other_mistakes_do_not_ask_whether_state_and_times_are_exchanged():
    assert "exchanged" not in fails(DataError, "not sorted", times=[0.0, 2.0, 1.0])
    rising = torch.tensor([1.0, 2.0], dtype=F64)
    assert "exchanged" not in fails(ShapeError, "returned shape", lambda t, y: y[0], y0=rising, params=None)


@pytest.mark.parametrize("times", [[0.0, 2.0, 1.0], [2.0, 0.0, 1.0], [[0.0, 1.0, 2.0], [0.0, 2.0, 1.0]]])
def test_unsorted_times_need_a_start(times):
    fails(DataError, "times are not sorted.*give t0=", times=times)
    expected = torch.exp(-torch.tensor(times, dtype=F64))[..., None] * START
    assert_close(solve(times=times, t0=0.0).ys, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("times", [[], torch.zeros(3, 0), 1.0])
def test_no_times(times):
    fails(ShapeError, r"times has shape \(.*expected \(T,\) or \(\*batch, T\) with T at least 1", times=times)


# --- shapes --------------------------------------------------------------------------------------------------------


def test_a_transposed_tensor_is_named():
    times = torch.linspace(0, 1, 5, dtype=F64)[:, None].expand(5, 3)
    message = r"do not broadcast: y0: batch \(3,\), times: batch \(5,\).*Did you mean times.transpose\(0, 1\)"
    fails(ShapeError, message + r", of shape \(3, 5\)", y0=ones(3, 2), times=times, params=ones(3))
    fails(ShapeError, r"Did you mean y0.transpose\(0, 1\), of shape \(5, 2\)", two_states, ones(2, 5), params=ones(2))
    fails(ShapeError, r"Did you mean p.transpose\(0, 1\), of shape \(5, 2\)", two_states, ones(5, 2), params=ones(2, 5))
    assert solve(two_states, ones(5, 2), params=ones(5, 2)).ys.shape == (5, 4, 2)


def test_batches_that_do_not_match_are_all_told():
    params, ranks = {"a": ones(4), "b": ones(5)}, {"a": 0, "b": 0}
    message = r"y0: batch \(5,\), a: batch \(4,\), b: batch \(5,\)"
    fails(ShapeError, message, lambda t, y, p: -p["a"] * p["b"] * y, ones(5, 2), params=params, event_dims=ranks)


def test_ambiguous_parameters_ask_for_event_dims():
    message = r"the dimensions of {} of shape \(2,\) can be read as batch or .* event_dims={{'{}': 1}}"
    fails(ShapeError, message.format("p", "p"), y0=ones(2, 2), params=ones(2), event_dims=None)
    by_name = {"f": lambda t, y, p: -p["k"] * y, "y0": ones(2, 2), "params": {"k": torch.tensor([1.0, 2.0], dtype=F64)}}
    fails(ShapeError, message.format("k", "k"), **by_name)
    as_row, as_batch = (solve(**by_name, event_dims={"k": r}).ys[:, -1] for r in (1, 0))
    assert_close(as_row, as_batch.T, rtol=1e-6, atol=1e-8)
    assert not torch.equal(as_row, as_batch)


@pytest.mark.parametrize(
    ("event_dims", "message"),
    [
        ({"rate": 0}, r"event_dims names \['rate'\]; expected names of parameters or states: \['k'\]"),
        ({"k": 2}, r"event_dims\['k'\] = 2, but k has 0 dimensions"),
        ({"k": -1}, r"event_dims\['k'\] = -1, but k has 0 dimensions"),
        (1, 'event_dims = 1; expected a dict by name, {"k": 1}'),
    ],
)
def test_event_dims_that_make_no_sense(event_dims, message):
    fails(ShapeError, message, lambda t, y, p: -p["k"] * y, params={"k": ONE}, event_dims=event_dims)


# --- the state -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float16])
def test_the_dtype_of_the_state(dtype):
    fails(ShapeError, f"y0 has dtype {dtype}; expected torch.float64 or torch.float32", y0=ones(2, dtype=dtype))
    fails(ShapeError, rf"y0\['u'\] has dtype {dtype}", lambda t, y: y, {"u": ones(dtype=dtype)}, params=None)


@pytest.mark.parametrize(
    ("y0", "message"),
    [
        (ONE, r"y0 has no dimension; expected \(\*batch, D\).*y0.reshape\(1\)"),
        (1.0, r"y0 is of type float; expected a tensor \(\*batch, D\)"),
        ([1.0, 2.0], r"y0 is of type list; .*torch.tensor\(\[1.0, 2.0\]\)"),
        (np.ones(2), "y0 is of type ndarray"),
        ((1.0, 2.0), r"one tensor per state, torch.tensor\(1.0\); got {0: float, 1: float}"),
        ({"u": 1.0, "v": ONE}, "got {u: float, v: Tensor}"),
        (torch.ones(3, 0), r"y0 has shape \(3, 0\); expected .* at least one state"),
        ({"u": ONE, "v": ONE.float()}, r"u is torch.float64 on cpu, v is torch.float32.*y0\['v'\].to\(y0\['u'\]\)"),
        ({"u": ones(2), "v": ones(3)}, r"do not broadcast: y0\['u'\]: batch \(2,\), y0\['v'\]: batch \(3,\)"),
    ],
)
def test_what_a_state_is(y0, message):
    fails(ShapeError, message, lambda t, y: y, y0, params=None)


def test_nan_in_the_state_names_row_and_state():
    y0 = torch.tensor([[1.0, 1.0], [1.0, NAN], [NAN, 1.0]], dtype=F64)
    message = r"2 of 3 trajectories failed: non-finite state in 2. First: row \[1\].*y0 \[1, nan\].*"
    fails(SolveError, message + r"make the initial state finite, y0\[1\] is nan", y0=y0)
    solution = solve(y0=y0, on_failure="nan")
    assert solution.status.tolist() == [lde.Status.OK, lde.Status.NON_FINITE, lde.Status.NON_FINITE]
    assert solution.ys[0].isfinite().all() and solution.ys[1:].isnan().any(-1).all()
    named = {"u": ones(2), "v": torch.tensor([1.0, NAN], dtype=F64)}
    fails(SolveError, "v is nan in this row", lambda t, y: {"u": -y["u"], "v": -y["v"]}, named, params=None)


def test_nan_in_a_parameter_is_named():
    params = {"a": ONE, "rate": torch.tensor([1.0, NAN], dtype=F64)}
    message = r"First: row \[1\].*parameters {a: 1, rate: nan}.*make the parameters finite, rate is not"
    ranks = {"a": 0, "rate": 0}
    fails(SolveError, message, lambda t, y, p: -p["a"] * p["rate"] * y, START, params=params, event_dims=ranks)


def test_a_failure_tells_how_many_why_where_and_what_to_try():
    rates = torch.tensor([[1.0, 1e5, 1.0], [1.0, 1.0, 2e5]], dtype=F64)
    text = fails(SolveError, "2 of 6 trajectories failed", y0=ones(2, 3, 2), params=rates, max_steps=40)
    assert r"max_steps reached in 2. First: row [0, 1], failed after t=0" in text
    assert "parameters {p: 1e+05}" in text and "Try: raise max_steps" in text and 'on_failure="nan"' in text


# --- the field -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    [lambda y, t: -y, lambda y, t: torch.stack([-y[0], y[1]]), lambda y, t: -y[0] * y],
    ids=["like t", "index", "both"],
)
def test_the_order_of_arguments(field):
    message = r"With the first two arguments exchanged it does: a field is called as f\(t, y, p\), time first"
    fails(ShapeError, message, field, params=None)
    fails(ShapeError, message, lambda y, t, p: p * field(y, t))


@pytest.mark.parametrize("field", [lambda y: -y, lambda t, y, p, q: -y, lambda: None])
def test_a_field_with_too_few_or_too_many_arguments(field):
    fails(
        ShapeError,
        r"called as f\(t, y, p\) \(or f\(t, y\) without parameters\); got a callable with the arguments",
        field,
    )


def test_what_is_no_field():
    fails(ShapeError, r"must be callable as f\(t, y, p\); got float", 3.0)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (lambda t, y: y[0], r"returned shape \(\), expected \(2,\)"),
        (lambda t, y: torch.cat([y, y]), r"returned shape \(4,\), expected \(2,\)"),
        (lambda t, y: [y[0], y[1]], r"returned a list of 2; expected a tensor of shape \(2,\).*torch.stack"),
        (lambda t, y: None, r"returned NoneType; expected a tensor of shape \(2,\)"),
        (lambda t, y: 0.0, "returned float; expected a tensor"),
        (lambda t, y: y.float(), "returned torch.float32 for a state of torch.float64.*the same dtype"),
        (lambda t, y: torch.zeros(2, dtype=torch.int64), "returned torch.int64 for a state of torch.float64"),
        (lambda t, y: ones(2, device="meta"), "returned a tensor on meta for a state on cpu.*device=y.device"),
        (
            lambda t, y: y @ ones(3, 3),
            r"called on one row .* y of shape \(2,\).*raised RuntimeError: .*cannot be multiplied",
        ),
    ],
)
def test_what_a_field_returns(field, message):
    fails(ShapeError, message, field, params=None)


def test_dtypes_and_devices_of_parameters():
    fails(
        ShapeError,
        "returned torch.float64 for a state of torch.float32",
        y0=ones(2, dtype=F32),
        params=ones(2),
        event_dims={"p": 1},
    )
    fails(ShapeError, r"parameter p is on meta, y0 on cpu: p.to\('cpu'\)", params=ones(device="meta"))


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda y: {"u": -y["u"]}, r"{'u': \(\)}"),
        (lambda y: {"u": -y["u"], "w": -y["v"]}, r"{'u': \(\), 'w': \(\)}"),
        (lambda y: {"u": -y["u"], "v": torch.stack([y["v"]])}, r"{'u': \(\), 'v': \(1,\)}"),
        (lambda y: torch.stack([y["u"], y["v"]]), r"\(2,\)"),
        (lambda y: {"u": -y["u"], "v": 0.0}, r"{'u': \(\), 'v': 'float'}"),
    ],
)
def test_a_structured_state_with_another_structure_back(returned, got):
    message = f"another structure than the state's: got {got}, expected " + r"{'u': \(\), 'v': \(\)}"
    fails(ShapeError, message, lambda t, y: returned(y), {"u": ONE, "v": ONE}, params=None)


def test_parameters_a_field_cannot_take_or_does_not_get():
    with pytest.raises(ShapeError, match=r"parameters were given, but the vector field takes only \(t, y\)"):
        lde.odesolve(free, START, TIMES, ONE)
    fails(ShapeError, r"no parameters \(params=None\), raised TypeError", lambda t, y, p: -p * y, params=None)
    fails(ShapeError, r"rate of shape \(\), raised KeyError: 'k'", lambda t, y, p: -p["k"] * y, params={"rate": ONE})
    message = r"reads \['k'\] of a tensor of shape \(\): names need params \(or y0\) as a dict, {'k': ...}"
    fails(ShapeError, message, lambda t, y, p: -p["k"] * y)


def test_a_default_of_a_third_argument_stays_without_parameters():
    k = torch.tensor(2.0, dtype=F64)

    def field(t, y, k=k):
        return -k * y

    assert_close(solve(field, params=None).ys[-1], torch.exp(-k) * START, rtol=1e-5, atol=1e-7)
    assert_close(solve(field, params=ONE, event_dims={"p": 0}).ys[-1], torch.exp(-ONE) * START, rtol=1e-5, atol=1e-7)


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"method": "tsit"}, "method: expected one of tsit5, .*; got 'tsit'. Did you mean 'tsit5'"),
        ({"method": "RK4", "step_size": 0.1}, "method: expected one of"),
        ({"engine": "numba"}, "engine: expected one of auto, fused, torch, torchdiffeq; got 'numba'"),
        ({"engine": "fusd"}, "Did you mean 'fused'"),
        ({"gradient": "ajoint"}, "gradient: .*; got 'ajoint'. Did you mean 'adjoint'"),
        ({"gradient": "adjoint", "engine": "fused"}, 'gradient="adjoint" is computed by engine="torchdiffeq"'),
        ({"on_failure": "ignore"}, "on_failure: expected one of raise, nan; got 'ignore'"),
        ({"method": "rk4"}, "method 'rk4' has no error estimate: give step_size="),
        ({"step_size": 0}, "step_size = 0; expected a positive number"),
        ({"step_size": -0.1}, "step_size = -0.1; expected a positive number"),
        ({"rtol": -1}, "rtol = -1; expected a positive number"),
        ({"rtol": NAN}, "rtol = nan; expected a positive number"),
        ({"rtol": "1e-3"}, "rtol = '1e-3'; expected a number"),
        ({"atol": INF}, "atol = inf; expected a positive number"),
        ({"rtol": torch.tensor(1e-3)}, "rtol is a tensor; expected a number: .* not parameters"),
        ({"atol": torch.ones(2)}, "atol is a tensor"),
        ({"rtol": 0, "atol": 0}, "rtol and atol are both 0"),
        ({"max_steps": 0}, "max_steps = 0; expected a whole number"),
        ({"max_steps": 1e4}, "max_steps = 10000.0; expected a whole number"),
        ({"replay": torch.ones(3)}, "replay= expects the Solution .*; got Tensor"),
    ],
)
def test_settings_that_cannot_be_met(keywords, message):
    fails(SolveError, message, **keywords)


@pytest.mark.parametrize(
    ("dtype", "rtol", "hint"), [(F64, 1e-17, "rtol>=2e-15"), (F32, 1e-8, r"use y0.double\(\), or")]
)
def test_a_tolerance_below_the_resolution_is_a_warning(dtype, rtol, hint):
    with pytest.warns(UserWarning, match=f"rtol={rtol:g} is below what {dtype} resolves.*{hint}"):
        solve(free, y0=ones(2, dtype=dtype), rtol=rtol, max_steps=5, on_failure="nan")


def test_replay_of_another_batch():
    other = solve()
    message = r"replay= is a solution of batch shape \(\); this problem's is \(3,\).*the same batch"
    fails(ShapeError, message, y0=ones(3, 2), replay=other)


def test_times_outside_what_was_solved():
    with pytest.raises(SolveError, match=r"outside the solved span \[0, 1\]; got \[5.0\]"):
        solve().at(5.0)


# --- the fused engine ----------------------------------------------------------------------------------------------


def branching(t, y):
    return -y if y[0] > -1.0 else y


def noisy(t, y):
    return -y + 0.0 * torch.rand(2, dtype=F64)


def spectral(t, y):
    return -torch.fft.ifft(torch.fft.fft(y)).real


def leaving(t, y):
    return -y * float(y.detach().numpy()[0]) ** 0


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        (branching, "takes a branch on one .*torch.where"),
        (noisy, "calls the random operator rand: a vector field must be a function"),
        (spectral, "operator _fft_r2c has no scalar form"),
        (leaving, r"calls Tensor.numpy\(\), which leaves PyTorch"),
    ],
)
def test_what_cannot_be_compiled_is_told_and_solved_by_the_torch_engine(field, reason):
    fails(
        SolveError,
        f'engine="fused" cannot solve this: .*{reason}.*engine="torch" can',
        field,
        params=None,
        engine="fused",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve(field, params=None, engine="auto")
    assert solution.engine == "torch"
    assert re.search(reason, solution.reason)
    assert_close(solution.ys, torch.exp(-TIMES)[:, None] * START, rtol=1e-5, atol=1e-7)
