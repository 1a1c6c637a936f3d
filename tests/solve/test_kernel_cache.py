# SPDX-License-Identifier: Apache-2.0
"""Fields are recognised without tracing: the same code compiles once, and nothing it sees is baked in by mistake."""

import ctypes
import functools
import math
import types

import numpy as np
import pytest
import torch
from ode_fields import DOUBLE, tensor
from torch import nn

import pyro_latentde as lde
from pyro_latentde.solve.fused import cpu
from pyro_latentde.solve.fused import trace as trace_module
from pyro_latentde.solve.fused.lower import slots

TIMES = tensor(0.0, 1.0)
Y0 = tensor(1.0, 2.0)
TWICE = 2.0


def run(f, p=None, **settings):
    """End state of two Euler steps: y (1 + .5 k)^2 for y' = k y."""
    settings = {"method": "euler", "step_size": 0.5, "engine": "fused", **settings}
    return lde.odesolve(f, Y0, TIMES, p, **settings).ys[-1]


def grown(rate):
    return Y0 * (1 + 0.5 * rate) ** 2


class Memory:
    """The numbers that lie at an address, as kernels see them."""

    def __init__(self, address):
        self.address = address

    def __getitem__(self, i):
        return ctypes.c_double.from_address(self.address + 8 * int(i)).value


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run in Python as they are written: what they compute is the same, and nothing is compiled."""
    seen = {"FloatsAt": Memory, "Floats": lambda x: x.reshape(-1), "Ints": lambda x: x.reshape(-1)}

    def load_kernel(source, name, small):
        names = {"math": math, "np": np, "Floats": None, "FloatsAt": None, "Ints": None}
        exec(source, names)
        views = [seen.get(kind, lambda x: x) for _, kind in slots(source, name)]
        return lambda *args: names[name](*(view(x) for view, x in zip(views, args, strict=True)))

    monkeypatch.setattr(cpu, "load_kernel", load_kernel)


@pytest.fixture
def work(monkeypatch, interpreted):
    """Counts of traces and of kernels made."""
    counts = {"traces": 0, "kernels": 0}
    trace_row, load_kernel = trace_module.trace_row, cpu.load_kernel

    def counted_trace(*args, **kwargs):
        counts["traces"] += 1
        return trace_row(*args, **kwargs)

    def counted_load(*args):
        counts["kernels"] += 1
        return load_kernel(*args)

    monkeypatch.setattr(trace_module, "trace_row", counted_trace)
    monkeypatch.setattr(cpu, "load_kernel", counted_load)
    return counts


# ---- one kernel ------------------------------------------------------------------------------------------------


def test_a_lambda_made_anew_compiles_once(work):
    for rate in (0.1, 0.2, 0.3):
        torch.testing.assert_close(run(lambda t, y, p: p * y, torch.tensor(rate, dtype=DOUBLE)), grown(rate))
    assert work == {"traces": 1, "kernels": 1}


def test_a_closure_over_a_tensor_made_anew_compiles_once(work):
    def model(rate):
        return run(lambda t, y: rate * y)

    for value in (0.1, 0.2, 0.3):
        rate = torch.tensor(value, dtype=DOUBLE, requires_grad=True)
        end = model(rate)
        torch.testing.assert_close(end, grown(value))
        (slope,) = torch.autograd.grad(end.sum(), rate)
        torch.testing.assert_close(slope, (Y0 * (1 + 0.5 * rate)).sum().detach())
    assert work == {"traces": 1, "kernels": 2}


def test_helpers_partials_methods_and_nested_functions_are_walked(work):
    class Rates:
        def __init__(self, rate):
            self.rate = rate

        def field(self, t, y):
            return self.rate * y

    def outer(rate):
        def helper(y):
            return rate * y

        return lambda t, y: helper(y)

    def bare(rate, t, y):
        return rate * y

    makers = [lambda k: Rates(k).field, outer, lambda k: functools.partial(bare, k)]
    for make in makers:
        for rate in (tensor(0.1), tensor(0.2), tensor(0.3)):
            torch.testing.assert_close(run(make(rate)), grown(rate))
    assert work["traces"] <= 5  # a method of a new object may be a new field; a function is not


def test_parameters_given_as_floats_need_no_new_kernel(work):
    for rate in (0.1, 0.25):
        torch.testing.assert_close(run(lambda t, y, p: p["k"] * y, {"k": rate}), grown(rate))
    assert work["traces"] == 1


# ---- another kernel --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("interpreted")
def test_a_changed_closure_float_changes_the_answer():
    for rate in (0.1, 0.2, 0.1):
        torch.testing.assert_close(run(lambda t, y, rate=rate: rate * y), grown(rate))

    def closed(rate):
        return lambda t, y: rate * y

    for rate in (0.1, 0.2, 0.1, -0.0):
        torch.testing.assert_close(run(closed(rate)), grown(rate))


@pytest.mark.usefixtures("interpreted")
def test_a_changed_global_changes_the_answer(monkeypatch):
    def f(t, y):
        return TWICE * y

    torch.testing.assert_close(run(f), grown(2.0))
    monkeypatch.setitem(globals(), "TWICE", 3.0)
    torch.testing.assert_close(run(f), grown(3.0))


@pytest.mark.usefixtures("interpreted")
def test_a_changed_dictionary_or_list_changes_the_answer():
    rates = {"k": 0.1, "more": [0.2, 0.3]}

    def f(t, y):
        return (rates["k"] + rates["more"][1]) * y

    torch.testing.assert_close(run(f), grown(0.4))
    rates["more"][1] = 0.5
    torch.testing.assert_close(run(f), grown(0.6))
    rates["k"] = tensor(0.0)
    torch.testing.assert_close(run(f), grown(0.5))


@pytest.mark.usefixtures("interpreted")
def test_a_changed_attribute_of_a_module_or_object_changes_the_answer():
    class Plain:
        rate = 0.1

        def __call__(self, t, y):
            return self.rate * y

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate, self.options = 0.1, {"scale": 1.0}

        def forward(self, t, y):
            return self.rate * self.options["scale"] * y

    for field in (Plain(), Module()):
        torch.testing.assert_close(run(field), grown(0.1))
        field.rate = 0.3
        torch.testing.assert_close(run(field), grown(0.3))
    field.options["scale"] = 2.0
    torch.testing.assert_close(run(field), grown(0.6))


@pytest.mark.usefixtures("interpreted")
def test_a_changed_class_attribute_changes_the_answer():
    class Plain:
        rate = 0.1

        def __call__(self, t, y):
            return self.rate * y

    for field in (Plain(), lambda t, y: Plain.rate * y):
        Plain.rate = 0.1
        torch.testing.assert_close(run(field), grown(0.1))
        Plain.rate = 0.2
        torch.testing.assert_close(run(field), grown(0.2))


@pytest.mark.usefixtures("interpreted")
def test_a_replaced_submodule_or_weight_changes_the_answer():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(tensor(0.1))

        def forward(self, t, y):
            return self.scale * y

    field = Module()
    torch.testing.assert_close(run(field), grown(0.1))
    with torch.no_grad():
        field.scale.fill_(0.2)
    torch.testing.assert_close(run(field), grown(0.2))
    field.scale = nn.Parameter(tensor(0.3))
    end = run(field)
    torch.testing.assert_close(end, grown(0.3))
    end.sum().backward()
    assert field.scale.grad is not None
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh()).double()
    f = lambda t, y: net(y)  # noqa: E731
    first = run(f)
    net[1] = nn.Identity()
    assert not torch.equal(run(f), first)


@pytest.mark.usefixtures("interpreted")
def test_a_changed_index_tensor_changes_the_answer():
    rates, index = tensor(0.1, 0.2, 0.3), torch.tensor([0, 1])

    def f(t, y):
        return rates[index] * y

    torch.testing.assert_close(run(f), grown(tensor(0.1, 0.2)))
    index[1] = 2
    torch.testing.assert_close(run(f), grown(tensor(0.1, 0.3)))


@pytest.mark.usefixtures("interpreted")
def test_a_large_changed_index_tensor_changes_the_answer():
    rates, index = tensor(0.1, 0.2, 0.3), torch.zeros(3000, dtype=torch.int64)

    def f(t, y):
        return rates[index[-2:]] * y

    torch.testing.assert_close(run(f), grown(0.1))
    index[-1] = 2
    torch.testing.assert_close(run(f), grown(tensor(0.1, 0.3)))


@pytest.mark.usefixtures("interpreted")
def test_a_changed_boolean_mask_changes_the_answer():
    mask = torch.tensor([True, False])

    def f(t, y):
        return torch.where(mask, 0.1, 0.2) * y

    torch.testing.assert_close(run(f), grown(tensor(0.1, 0.2)))
    mask.logical_not_()
    torch.testing.assert_close(run(f), grown(tensor(0.2, 0.1)))


@pytest.mark.usefixtures("interpreted")
def test_a_changed_numpy_array_changes_the_answer():
    import numpy as np

    rates = np.array([0.1, 0.2])

    def f(t, y):
        return torch.as_tensor(rates) * y

    torch.testing.assert_close(run(f), grown(tensor(0.1, 0.2)))
    rates[1] = 0.3
    torch.testing.assert_close(run(f), grown(tensor(0.1, 0.3)))


@pytest.mark.usefixtures("interpreted")
def test_aliasing_is_part_of_the_key():
    def make(a, b):
        return lambda t, y: (a + 2 * b) * y

    same = tensor(0.1, requires_grad=True)
    one, two = tensor(0.1, requires_grad=True), tensor(0.2, requires_grad=True)
    for a, b in ((same, same), (one, two), (same, same), (two, one)):
        end = run(make(a, b))
        torch.testing.assert_close(end, grown((a + 2 * b).detach()))
        bars = torch.autograd.grad(end.sum(), [a, b])
        slope = (Y0 * (1 + 0.5 * (a + 2 * b))).sum().detach()
        if a is b:
            torch.testing.assert_close(bars[0], 3 * slope.reshape(1))
        else:
            torch.testing.assert_close(bars, (slope.reshape(1), 2 * slope.reshape(1)))


@pytest.mark.usefixtures("interpreted")
def test_a_replaced_captured_tensor_is_read_anew():
    box = {"k": tensor(0.1)}

    def f(t, y):
        return box["k"] * y

    torch.testing.assert_close(run(f), grown(0.1))
    box["k"] = tensor(0.2)
    torch.testing.assert_close(run(f), grown(0.2))
    box["k"].mul_(2)
    torch.testing.assert_close(run(f), grown(0.4))
    box["k"] = torch.tensor(0.3, dtype=DOUBLE)  # another shape
    torch.testing.assert_close(run(f), grown(0.3))


@pytest.mark.usefixtures("interpreted")
def test_code_of_equal_text_but_other_constants_is_other_code():
    fields = [eval(f"lambda t, y: {rate} * y") for rate in (0.1, 0.2)]
    for f, rate in zip(fields, (0.1, 0.2), strict=True):
        torch.testing.assert_close(run(f), grown(rate))


@pytest.mark.usefixtures("interpreted")
def test_what_a_forward_method_reads_is_part_of_the_key(monkeypatch):
    class Module(nn.Module):
        offset = 0.0

        def forward(self, t, y):
            return (TWICE + self.half() + self.offset) * y

        def half(self):
            return TWICE / 2

    field = Module()
    torch.testing.assert_close(run(field), grown(3.0))
    monkeypatch.setitem(globals(), "TWICE", 1.0)
    torch.testing.assert_close(run(field), grown(1.5))
    Module.offset = 1.0
    torch.testing.assert_close(run(field), grown(2.5))
    handle = field.register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(run(field), grown(5.0))
    handle.remove()
    torch.testing.assert_close(run(field), grown(2.5))


@pytest.mark.usefixtures("interpreted")
def test_what_is_read_from_a_python_module_is_part_of_the_key(monkeypatch):
    settings = types.ModuleType("settings")
    settings.RATE, settings.unused = 0.1, 1.0
    monkeypatch.setitem(globals(), "settings", settings)

    f = types.FunctionType(compile("lambda t, y: settings.RATE * y", "<f>", "eval").co_consts[0], globals())
    torch.testing.assert_close(run(f), grown(0.1))
    settings.RATE = 0.2
    torch.testing.assert_close(run(f), grown(0.2))


@pytest.mark.usefixtures("interpreted")
def test_which_of_two_lists_is_repeated_is_part_of_the_key():
    first, second = [0.1], [0.2]

    def make(a, b, c):
        return lambda t, y: (a[0] + 10 * b[0] + 100 * c[0]) * y

    torch.testing.assert_close(run(make(first, second, first)), grown(12.1))
    torch.testing.assert_close(run(make(first, second, second)), grown(22.1))


@pytest.mark.usefixtures("interpreted")
def test_a_long_list_or_array_is_read_to_its_end():
    import numpy as np

    for rates in ([0.1] * 3000, np.full(3000, 0.1)):

        def f(t, y, rates=rates):
            return float(rates[-1]) * y

        torch.testing.assert_close(run(f), grown(0.1))
        rates[-1] = 0.2
        torch.testing.assert_close(run(f), grown(0.2))


@pytest.mark.usefixtures("interpreted")
def test_the_training_flag_of_a_module_is_part_of_the_key():
    class Module(nn.Module):
        def forward(self, t, y):
            return (0.1 if self.training else 0.2) * y

    field = Module()
    torch.testing.assert_close(run(field), grown(0.1))
    torch.testing.assert_close(run(field.eval()), grown(0.2))


@pytest.mark.usefixtures("interpreted")
def test_fields_are_forgotten_one_by_one_not_all_kept():
    from pyro_latentde.solve import vector_field

    for i in range(5):
        run(lambda t, y, i=i: 0.1 * (i + 1) * y, engine="torch")
    assert len(vector_field._FIELDS) <= vector_field._LIMIT
