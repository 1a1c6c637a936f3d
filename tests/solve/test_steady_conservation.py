# SPDX-License-Identifier: Apache-2.0
"""Steady states of networks that conserve something: totals, their gradients, and refusals that name them."""

import numpy as np
import pytest
import torch
from ode_fields import DOUBLE, ENGINES, central_difference, tensor
from scipy.optimize import brentq
from torch.func import grad, hessian, jacrev, vmap
from torch.testing import assert_close

import pyro_latentde as lde
from pyro_latentde.errors import SolveError
from pyro_latentde.solve.steady.conservation import conserved_directions
from pyro_latentde.solve.steady.newton import is_regular

GUESS = tensor(1.0, 1.0)
KINETICS = tensor(1.0, 0.5, 0.3, 0.2)
ENZYME = tensor(1.0, 0.5, 0.1, 0.05)
TOTALS = [[1, 0, 1, 1], [0, 1, 1, 0]]


def brew(t, y, p):
    a, b = y
    return torch.stack([p[0] - a - p[1] * a * b + 0.1 * t, p[1] * a * b + p[2] - b * (1 + b)])


def catalysis(t, y, k):
    """S + E <-> C -> P + E, P -> S: S + C + P and E + C are conserved."""
    s, e, c, p = y
    bind, loose, make, back = k[0] * s * e, k[1] * c, k[2] * c, k[3] * p
    return torch.stack([loose - bind + back, loose + make - bind, bind - loose - make, make - back])


def epidemic(t, y, p):
    s, i, r = y
    return torch.stack([-p[0] * s * i, p[0] * s * i - p[1] * i, p[1] * i])


def state(p, engine="fused", f=brew, guess=GUESS, **keywords):
    return lde.steady_state_solve(f, guess, p, engine=engine, **keywords).y


@pytest.mark.parametrize("engine", ENGINES)
def test_conserved_totals_and_their_gradients(engine):
    """A <-> B: A = T k2 / (k1 + k2)."""

    def exchange(t, y, k):
        flow = k[0] * y[0] - k[1] * y[1]
        return torch.stack([-flow, flow])

    guess, k = tensor(2.0, 1.0).requires_grad_(), tensor(0.5, 0.25).requires_grad_()
    y = lde.steady_state_solve(exchange, guess, k, conserved=[1, 1], engine=engine).y
    assert_close(y.detach(), tensor(1.0, 2.0))
    gg, gk = torch.autograd.grad(y[0], (guess, k))
    assert_close(gg, tensor(1 / 3, 1 / 3))
    assert_close(gk, tensor(-3 * 0.25, 3 * 0.5) / 0.75**2)


def test_an_enzyme_against_central_differences_and_a_trajectory():
    def first(x, **keywords):
        return (
            state(x[4:], f=catalysis, guess=x[:4], conserved=TOTALS, **keywords) * tensor(1.0, 2.0, -1.0, 0.5)
        ).sum()

    x = torch.cat([ENZYME, KINETICS])
    assert_close(grad(first)(x), central_difference(first, x), rtol=1e-8, atol=1e-9)
    assert_close(vmap(grad(first))(x.expand(2, -1)), grad(first)(x).expand(2, -1), rtol=1e-11, atol=1e-12)
    assert_close(hessian(first)(x)[0], central_difference(lambda x: grad(first)(x)[0], x), rtol=1e-7, atol=1e-8)
    late = lde.odesolve(catalysis, ENZYME, tensor(0.0, 300.0), KINETICS, rtol=1e-11, atol=1e-13).ys[-1]
    y = state(KINETICS, f=catalysis, guess=ENZYME, conserved=TOTALS)
    assert_close(y, late, rtol=1e-9, atol=0)
    assert_close(tensor(*TOTALS) @ y, tensor(*TOTALS) @ ENZYME, rtol=1e-14, atol=0)
    assert_close(state(KINETICS, f=catalysis, guess=ENZYME), late, rtol=1e-7, atol=0)  # by integration alone
    stable = state(KINETICS, f=catalysis, guess=ENZYME, conserved=TOTALS, stable=True)
    assert_close(stable, late, rtol=1e-9, atol=0)


def test_gradients_without_declared_totals_are_refused_with_the_totals():
    k = KINETICS.clone().requires_grad_()
    with pytest.raises(
        SolveError, match=r"conserves y\[0\] \+ y\[2\] \+ y\[3\], y\[1\] \+ y\[2\].*conserved=\[\[1, 0, 1, 1\]"
    ):
        state(k, f=catalysis, guess=ENZYME)
    with pytest.raises(SolveError, match=r"conserves y\[1\] \+ y\[2\]"):
        state(k, f=catalysis, guess=ENZYME, conserved=TOTALS[0])
    with pytest.raises(SolveError, match="singular at the steady state"):
        vmap(grad(lambda k: state(k, f=catalysis, guess=ENZYME, on_failure="nan").sum()))(KINETICS.expand(2, -1))


def test_the_end_of_an_epidemic_has_a_value_but_no_gradient():
    """s = s0 exp(-R0 (1 - s)): the steady states fill a line, and the way decides."""
    start, p = tensor(0.99, 0.01, 0.0), tensor(2.0, 1.0)
    size = brentq(lambda s: s - 0.99 * np.exp(-2 * (1 - s)), 1e-6, 0.5, xtol=1e-14)
    found = lde.steady_state_solve(epidemic, start, p)
    assert_close(found.y, tensor(size, 0.0, 1 - size), rtol=1e-6, atol=1e-6)
    with pytest.raises(SolveError, match=r"conserves y\[0\] \+ y\[1\] \+ y\[2\].*Even then 1 direction.*late time"):
        state(p.clone().requires_grad_(), f=epidemic, guess=start)
    with pytest.raises(SolveError, match="singular Jacobian.*late time"):
        state(p.clone().requires_grad_(), f=epidemic, guess=start, conserved=[1, 1, 1])
    failed = lde.steady_state_solve(epidemic, start, p.requires_grad_(), conserved=[1, 1, 1], on_failure="nan")
    assert failed.status == lde.Status.SINGULAR
    assert torch.equal(torch.autograd.grad(failed.y.sum(), p)[0], torch.zeros(2, dtype=DOUBLE))


def test_a_quantity_conserved_at_some_parameters_only_fails_those_rows():
    """Without decay, A + B stays; with it nothing does, so that there is nothing to declare."""

    def field(t, y, p):
        return torch.stack([y[1] - y[0], y[0] - y[1] - p["decay"] * y[1] + p["source"]])

    decay = tensor(0.5, 0.0, 2.0).requires_grad_()
    p = {"decay": decay, "source": decay.detach() * 3}
    found = lde.steady_state_solve(field, tensor(1.0, 2.0), p, on_failure="nan")
    assert found.status.tolist() == [lde.Status.OK, lde.Status.SINGULAR, lde.Status.OK]
    assert_close(found.y[[0, 2]], torch.full((2, 2), 3.0).to(found.y))
    (bar,) = torch.autograd.grad(found.y[[0, 2]].sum(), decay)
    assert_close(bar, tensor(-2 * 3 / 0.5, 0.0, -2 * 3 / 2.0))  # y = source / decay


def test_conserved_by_name():
    def field(t, y):
        return {"on": y["off"] - 2 * y["on"], "off": 2 * y["on"] - y["off"]}

    guess = {"on": tensor(3.0)[0], "off": tensor(0.0)[0]}
    for told in ({"on": 1, "off": 1}, [{"on": 1, "off": 1}], tensor([1.0, 1.0])):
        assert_close(lde.steady_state_solve(field, guess, conserved=told).y["off"], tensor(2.0)[0])


def test_directions_are_found_in_numbers():
    jacobian = jacrev(lambda y: catalysis(0, y, KINETICS))(state(KINETICS, f=catalysis, guess=ENZYME, conserved=TOTALS))
    torch.manual_seed(0)
    slopes = torch.stack([catalysis(0, y, KINETICS) for y in torch.rand(10, 4, dtype=DOUBLE)])
    laws, more = conserved_directions(jacobian.numpy(), slopes.numpy(), np.zeros((0, 4)))
    np.testing.assert_allclose(laws, TOTALS, atol=1e-12)
    assert more == 0
    laws, _ = conserved_directions(jacobian.numpy(), slopes.numpy(), np.array([[1.0, 1.0, 2.0, 1.0]]))
    assert len(laws) == 1
    np.testing.assert_allclose(slopes.numpy() @ laws[0], 0, atol=1e-12)


def test_a_regular_matrix_is_one_in_any_units():
    torch.manual_seed(0)
    regular = torch.randn(50, 4, 4, dtype=DOUBLE)
    singular = regular.clone()
    singular[:, 3] = singular[:, 0] - 2 * singular[:, 1]
    left, right = 10 ** (16 * torch.rand(2, 50, 4, dtype=DOUBLE) - 8)
    for matrix, expected in ((regular, True), (singular, False)):
        assert (is_regular(left[:, :, None] * matrix * right[:, None]) == expected).all()
    assert not is_regular(torch.zeros(1, 2, 2)).any() and not is_regular(torch.full((1, 2, 2), torch.nan)).any()
