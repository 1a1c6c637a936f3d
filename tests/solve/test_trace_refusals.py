# SPDX-License-Identifier: Apache-2.0
"""Vector fields that cannot be compiled: what they are told, and that no gradient is lost."""

import pytest
import torch
from ode_fields import DOUBLE, tensor

import pyro_latentde as lde
from pyro_latentde.errors import GradientPathError, SolveError
from pyro_latentde.solve.fused.trace import trace_row
from pyro_latentde.solve.lift import Untraceable


def refused(f, y0=None, params=None):
    y0 = tensor(1.0, 0.5) if y0 is None else y0
    with pytest.raises(SolveError, match="engine=.fused. cannot solve this") as error:
        lde.odesolve(f, y0, tensor(0.0, 0.1), params, engine="fused", method="euler", step_size=0.25)
    return str(error.value)


def test_refuses_random_fields():
    assert "random" in refused(lambda t, y: y + torch.randn(2, dtype=DOUBLE))
    assert "random" in refused(lambda t, y: torch.nn.functional.dropout(y, 0.5))


def test_refuses_blocks_without_gradient():
    def f(t, y):
        with torch.no_grad():
            scale = y.norm()
        return -scale * y

    assert "no_grad" in refused(f)


def test_refuses_branches_on_values():
    assert "torch.where" in refused(lambda t, y: y if t > 0.05 else -y)
    assert "torch.where" in refused(lambda t, y: y * float(y[0]))
    assert "numpy" in refused(lambda t, y: y * torch.from_numpy(y.numpy().copy()))
    assert "tolist" in refused(lambda t, y: y * y.tolist()[0])


def test_refuses_shapes_that_depend_on_values():
    assert "shape" in refused(lambda t, y: y * y[y > 0].sum())


def test_refuses_fields_too_large_for_scalars():
    a = torch.linspace(-0.5, 0.5, 90 * 90, dtype=DOUBLE).reshape(90, 90)

    def f(t, y):
        return torch.tanh(y[:, None] * a).sum(1)

    assert "scalar statements" in refused(f, a[0])


def test_refuses_operators_without_a_scalar_form():
    assert "linalg" in refused(lambda t, y: torch.linalg.eigvalsh(torch.outer(y, y)))


def test_a_tensor_seen_only_behind_a_branch_is_an_error_not_a_lost_gradient():
    hidden = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    late = []

    def f(t, y):
        late.append(0)
        return -y * hidden if len(late) > 40 else -y

    with pytest.raises((GradientPathError, SolveError)):
        lde.odesolve(f, tensor(1.0, 0.5), tensor(0.0, 5.0), engine="torch", method="euler", step_size=0.01)


def test_untraceable_reasons_name_the_operator():
    with pytest.raises(Untraceable, match="eig"):
        trace_row(
            lambda t, y, _: torch.linalg.eigvals(y.reshape(2, 2)).real, tensor(0.0)[0], tensor(0.1, 0.2, 0.3, 0.4), []
        )
