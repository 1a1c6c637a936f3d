# SPDX-License-Identifier: Apache-2.0
"""``steady_state_solve``: where a vector field is zero, with gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyro_latentde.errors import DataError, ShapeError, SolveError
from pyro_latentde.solve.choices import not_among
from pyro_latentde.solve.engines import choose_engine, fused_function, torch_function
from pyro_latentde.solve.failure import steady_failure_message
from pyro_latentde.solve.lift import is_wrapped, peek
from pyro_latentde.solve.problem import Problem, pose
from pyro_latentde.solve.row_function import apply
from pyro_latentde.solve.settings import SolveSettings
from pyro_latentde.solve.solution import Status
from pyro_latentde.solve.steady.conservation import read_conserved, told_directions
from pyro_latentde.solve.steady.newton import Tolerance
from pyro_latentde.solve.steady.rows import IntegrateRows, SteadyControl, SteadyRows
from pyro_latentde.solve.torch_engine.linearised_field import linearised_field
from pyro_latentde.solve.vector_field import BoundField

__all__ = ["STEADY_ENGINES", "SteadyState", "steady_state_solve"]

STEADY_ENGINES = ("auto", "fused", "torch")
TOLERANCES = {torch.float64: (1e-8, 1e-10), torch.float32: (1e-4, 1e-6)}


@dataclass(frozen=True)
class SteadyState:
    """The steady state of every row and how it was found.

    Args:
        y: States, ``(*batch, D)``, or the structure of the guess; NaN where a row failed.
        status: :class:`Status` of every row, ``(*batch,)`` int64.
        iterations: Newton iterations of every row, ``(*batch,)``.
        n_steps: Integration steps of every row, 0 where Newton's method alone was enough, ``(*batch,)``.
        settings: ``method``, ``engine``, ``rtol`` and ``atol``.
        shape_of_state: How one row's state is laid out as a vector.

    Example:
        >>> import torch, pyro_latentde as lde
        >>> found = lde.steady_state_solve(lambda t, y, k: k - y, torch.zeros(1), torch.tensor([1.0, 2.0]))
        >>> found.y.shape, found.ok.tolist(), found.n_steps.tolist()
        (torch.Size([2, 1]), [True, True], [0, 0])
    """

    y: Any
    status: Tensor
    iterations: Tensor
    n_steps: Tensor
    settings: dict[str, Any]
    shape_of_state: Any = field(repr=False)

    @property
    def ok(self) -> Tensor:
        """Which rows have a steady state, ``(*batch,)`` bool."""
        return self.status == Status.OK


def steady_state_solve(
    f: Callable | BoundField,
    y_guess: Any,
    params: Any = None,
    *,
    t: Any = 0.0,
    rtol: float | None = None,
    atol: float | None = None,
    max_iterations: int = 50,
    conserved: Any = None,
    stable: bool = False,
    event_dims: dict[str, int] | None = None,
    method: str | None = None,
    engine: str = "auto",
    max_steps: int = 10_000,
    on_failure: str = "raise",
) -> SteadyState:
    r"""Find y with :math:`f(t, y, p) = 0` for every row of a batch, t fixed.

    It is the steady state that Newton's method, damped, reaches from ``y_guess``, stable or not. A row in which that
    fails follows its trajectory, y' = f(t, y, p) from ``y_guess``, over longer and longer spans until Newton's method
    finds the stable state it goes to; with ``stable=True`` all rows do. Gradients are those of the implicit function
    theorem,

    .. math:: \frac{dy}{dp} = -\left(\frac{\partial f}{\partial y}\right)^{-1} \frac{\partial f}{\partial p},

    to any order, and are zero to ``y_guess``, on which the state does not depend. Where quantities are conserved
    (closed reaction networks: the total of each element), it does: say which, with ``conserved=``.

    Args:
        f: ``f(t, y, p)`` for one row, as for :func:`~pyro_latentde.odesolve`; captured tensors and module weights
            get gradients.
        y_guess: Where to begin, ``(*batch, D)``, or a dict or named tuple of ``(*batch,)`` scalars.
        params: Tensor, float, or dict, list, tuple or named tuple of these; leading dimensions are batch.
        t: Time at which the field is held, ``()`` or ``(*batch,)``.
        rtol: Relative size of a last Newton correction, and tolerance of an integration; 1e-8 for float64, 1e-4 for
            float32. Another correction follows the last one, so that errors are far smaller.
        atol: Likewise absolute, in units of y; 1e-10 for float64, 1e-6 for float32.
        max_iterations: Most Newton iterations of a row before it is integrated.
        conserved: W, ``(C, D)``: linear functionals with W f = 0, held at their values at ``y_guess``; rows of numbers,
            or dicts from names of states (``[{"S": 1, "SE": 1}]``) where states have names.
        stable: Take the steady state that the trajectory from ``y_guess`` settles in, which is stable, instead of the
            one that Newton's method reaches; where there are several they may differ.
        event_dims: As for :func:`~pyro_latentde.odesolve`.
        method: Of the integration, any with an error estimate; ``"auto"`` by default.
        engine: ``"auto"``, ``"fused"`` (a traced field, integration by one compiled kernel) or ``"torch"``.
        max_steps: Most integration steps of a row.
        on_failure: ``"raise"``, or ``"nan"``: failed rows are NaN with a status.

    Returns:
        The :class:`SteadyState`; failed rows have zero gradients and never touch their neighbours.

    Raises:
        SolveError: If rows fail (``on_failure="raise"``), for settings that cannot be met, for ``conserved=`` that is
            not conserved, and for gradients of states that a conserved quantity not declared leaves open.
        ShapeError: For shapes, dtypes or devices that do not fit.
        DataError: For a time that is not finite.

    References:
        Deuflhard, "Newton Methods for Nonlinear Problems", Springer 2004.

    Example:
        >>> import torch, pyro_latentde as lde
        >>> p = {"growth": torch.tensor(0.8, requires_grad=True), "room": torch.tensor(5.0)}
        >>> rest = lde.steady_state_solve(
        ...     lambda t, y, p: p["growth"] * y * (1 - y / p["room"]) - 0.2 * y, torch.tensor([4.0]), p
        ... )
        >>> round(rest.y.item(), 4)  # room (1 - 0.2 / growth)
        3.75
        >>> rest.y.sum().backward()
        >>> round(p["growth"].grad.item(), 4)  # room 0.2 / growth^2
        1.5625
    """
    problem = _posed(f, y_guess, params, t, event_dims)
    if engine not in STEADY_ENGINES:
        raise SolveError(not_among("engine", engine, STEADY_ENGINES))
    if not isinstance(max_iterations, Integral) or isinstance(max_iterations, bool) or max_iterations < 1:
        raise SolveError(f"max_iterations = {max_iterations!r}; expected a whole number of at least 1.")
    dtype = problem.tensors[0].dtype
    usual = TOLERANCES[dtype]
    rtol, atol = usual[0] if rtol is None else rtol, usual[1] if atol is None else atol
    settings = SolveSettings.checked(method or "auto", rtol, atol, None, "discrete", max_steps, on_failure, None, dtype)
    engine, _ = choose_engine(problem, engine, "discrete", settings.method)
    names = _names(problem)
    function = SteadyRows(
        linearised_field(problem, engine),
        problem.leaves,
        SteadyControl(Tolerance(rtol, atol), max_iterations, max_steps, stable, _differentiated(problem)),
        read_conserved(conserved, names),
        _integrator(problem, settings, engine),
        lambda laws, more, row: _told(laws, more, names, row, problem),
    )
    tensors, shared = (problem.tensors[0], *problem.tensors[3:]), (problem.shared[0], *problem.shared[3:])
    y, report = apply(function, problem.rows, shared, *tensors)
    seen = peek(report) if on_failure == "raise" else None
    if seen is not None and np.count_nonzero(seen[:, 0]):
        raise SolveError(steady_failure_message(problem, seen[:, 0]))
    y, report = y.reshape(*problem.batch, y.shape[-1]), report.reshape(*problem.batch, 3)
    told = {"method": settings.method, "engine": engine, "rtol": rtol, "atol": atol}
    state = problem.info.state
    return SteadyState(state.unflatten(y), *report.unbind(-1), settings=told, shape_of_state=state)


def _posed(f: Callable | BoundField, y_guess: Any, params: Any, t: Any, event_dims: dict[str, int] | None) -> Problem:
    """The field with its time held, at the guess."""
    if not callable(f) and not isinstance(f, BoundField):
        raise ShapeError(f"the vector field must be callable as f(t, y, p); got {type(f).__name__}.")
    leaf = next((x for x in torch.utils._pytree.tree_leaves(y_guess) if isinstance(x, Tensor)), None)
    like = {} if leaf is None or not leaf.dtype.is_floating_point else {"dtype": leaf.dtype, "device": leaf.device}
    try:
        t = torch.as_tensor(t, **like)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"t of type {type(t).__name__} cannot be read as a time; expected a number: {error}."
        ) from error
    seen = peek(t)
    if seen is not None and not np.isfinite(seen).all():
        raise DataError(f"t = {seen.tolist()}; the time at which the field is held must be finite.")
    try:
        return pose(_held_at(f, t), y_guess, t.new_zeros(1), params, None, event_dims)[0]
    except (ShapeError, DataError) as error:
        told = str(error).split(" Are y0 and times exchanged?")[0]
        error.args = (told.replace("y0", "y_guess"),)
        raise


def _held_at(f: Callable | BoundField, t: Tensor) -> BoundField:
    """A field that always sees the time t, which may have a gradient and a batch."""
    inner = f if isinstance(f, BoundField) else BoundField(f, (), (), (), f)
    return replace(
        inner,
        f=_frozen(inner.f, t),
        tensors=(t, *inner.tensors),
        event_dims=(0, *inner.event_dims),
        names=("t", *inner.names),
        held=_frozen(inner.held, t),
    )


def _frozen(f: Callable, t: Tensor) -> Callable:
    def frozen(_: Tensor, *state_and_parameters: Any) -> Any:
        return f(t, *state_and_parameters)

    frozen.__wrapped__ = f.forward if isinstance(f, torch.nn.Module) else f  # what its signature is read from
    return frozen


def _names(problem: Problem) -> Sequence[str]:
    state = problem.info.state
    return state.coordinates or [f"y[{i}]" for i in range(state.size)]


def _differentiated(problem: Problem) -> bool:
    """Whether somebody may ask for a gradient."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in problem.tensors):
        return True
    return forward_ad._current_level >= 0 or any(is_wrapped(x) for x in problem.tensors)


def _integrator(problem: Problem, settings: SolveSettings, engine: str) -> IntegrateRows:
    """Solves from 0 over the span of each row; compiled when it is first needed."""

    def integrate(
        shared: Sequence[bool], leaves: Sequence[Tensor], y: Tensor, spans: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if engine == "fused":
            function = fused_function(problem, settings, False)
        else:
            function = torch_function(problem, settings)
        own = [x if one else x[rows] for x, one in zip(leaves, shared, strict=True)]
        inputs = [y, spans[:, None], spans.new_zeros(()), *own]
        ys, report = function.run(len(y), (False, False, True, *shared), inputs)
        return ys[:, -1], report[:, 0].clone(), report[:, 1] + report[:, 2]

    return integrate


def _told(laws: np.ndarray, more: int, names: Sequence[str], row: int, problem: Problem) -> str:
    """Why a state has no gradient, and what would give it one."""
    rows = [[int(x) if x == int(x) else round(float(x), 6) for x in law] for law in laws]
    where = f" (first: row {row} of {problem.rows})" if problem.batch else ""
    even_so = (
        f" Even then {more} direction(s) remain in which steady states lie side by side; if there is no further "
        "functional, the state depends on the way to it: take lde.ode to a late time."
        if more
        else ""
    )
    return (
        f"df/dy is singular at the steady state{where}, because the field conserves {told_directions(laws, names)}. "
        "Which steady state it is, the values of these at y_guess decide, and a gradient needs to know. Try: "
        f"conserved={rows}, which holds them there, with gradients to y_guess through them.{even_so}"
    )
