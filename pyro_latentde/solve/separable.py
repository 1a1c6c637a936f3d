# SPDX-License-Identifier: Apache-2.0
"""Whether a field is that of a separable Hamiltonian, y = (q, p): dq/dt depends on p alone and dp/dt on q alone.

What depends on what is read off the traced graph; where a field cannot be traced, off its Jacobian at the first start.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_latentde.errors import ShapeError, SolveError
from pyro_latentde.solve.lift import Lift, in_fresh_thread
from pyro_latentde.solve.methods.catalog import SYMPLECTIC
from pyro_latentde.solve.problem import Problem
from pyro_latentde.solve.vector_field import row_of

__all__ = ["require_separable"]


def require_separable(problem: Problem, method: str) -> None:
    """Refuse a field that a symplectic method cannot solve; other methods solve any.

    Raises:
        ShapeError: For an odd number of states.
        SolveError: Where a derivative depends on its own half of the states, or steps must end at doses, jumps, knots.
    """
    if method not in SYMPLECTIC:
        return
    if problem.stops is not None:
        raise SolveError(
            f"method {method!r} takes equal steps through one smooth motion, and no doses, jumps or inputs with knots; "
            "expected another method, for example tsit5."
        )
    kernels, size = problem.info.kernels, problem.info.state.size
    if problem.info.state.logs is not None:
        raise SolveError(f"method {method!r} keeps the structure of q and p, their logarithms have none: no positive=.")
    if size % 2:
        raise ShapeError(
            f"method {method!r} solves y = (q, p), all positions and then all momenta: expected an even number of "
            f"states, got {size}."
        )
    if "needs" not in kernels:
        kernels["needs"] = _needs(problem)
    obstacle = _obstacle(kernels["needs"], _names(problem))
    if obstacle:
        raise SolveError(f"method {method!r} needs a separable system, y = (q, p) with {obstacle}")


def _names(problem: Problem) -> Sequence[str]:
    state = problem.info.state
    return state.coordinates or [f"y[{i}]" for i in range(state.size)]


def _obstacle(needs: list[set[int]], names: Sequence[str]) -> str:
    """Which derivatives depend on what they must not, and what to do; empty if none does."""
    half = len(names) // 2
    wrong = []
    for i, found in enumerate(needs):
        own = sorted(j for j in found if (j < half) == (i < half))
        if own:
            wrong.append(f"d({names[i]})/dt depends on {', '.join(names[j] for j in own)}")
    if not wrong:
        return ""
    positions, momenta = ", ".join(names[:half]), ", ".join(names[half:])
    more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
    return (
        f"dq/dt depending on p alone and dp/dt on q alone; here q = ({positions}), p = ({momenta}), and "
        f"{', '.join(wrong[:2])}{more}. {_advice(needs, names)}"
    )


def _advice(needs: list[set[int]], names: Sequence[str]) -> str:
    split = _two_sides(needs)
    if split is None or len(split[0]) != len(split[1]):
        return 'Friction, or a force that depends on velocities? Try "dopri8" with a small rtol.'
    q, p = ([names[i] for i in side] for side in split)
    return f"In another order it would do: positions ({', '.join(q)}), then momenta ({', '.join(p)})."


def _two_sides(needs: list[set[int]]) -> tuple[list[int], list[int]] | None:
    """States on two sides such that each depends on the other side alone, the first of each group on the first."""
    linked: list[set[int]] = [set() for _ in needs]
    for i, found in enumerate(needs):
        for j in found:
            linked[i].add(j)
            linked[j].add(i)
    side: dict[int, int] = {}
    for start in range(len(needs)):
        waiting = [start] if start not in side else []
        side.setdefault(start, 0)
        while waiting:
            i = waiting.pop()
            waiting += [j for j in linked[i] if j not in side]
            for j in linked[i]:
                if side.setdefault(j, 1 - side[i]) == side[i]:
                    return None
    return [i for i in sorted(side) if side[i] == 0], [i for i in sorted(side) if side[i] == 1]


def _needs(problem: Problem) -> list[set[int]]:
    """Per derivative, the states it depends on."""
    from pyro_latentde.solve.engines import traced
    from pyro_latentde.solve.fused.graph import reachable

    trace = traced(problem)
    if isinstance(trace, str):
        return in_fresh_thread(lambda: _needs_here(problem))
    return [{node.args[0] for node in reachable([out]) if node.op == "y"} for out in trace.outputs]


def _needs_here(problem: Problem) -> list[set[int]]:
    """Where the Jacobian of one row at its start is not zero."""
    pairs = zip(problem.tensors, problem.shared, strict=True)
    y, _, t, *leaves = [row_of(x, x.ndim if shared else x.ndim - 1) for x, shared in pairs]
    own = problem.own
    exchanged = {id(x): leaf for x, leaf in zip(problem.originals, leaves[own:], strict=True)}
    y.requires_grad_()
    with torch.enable_grad(), Lift([t, y, *leaves], exchanged) as lift:
        out = lift.adopt(problem.info.call(problem.f, t, y, leaves[:own]))
    return [_touched(out[i], y) for i in range(len(out))]


def _touched(value: Tensor, y: Tensor) -> set[int]:
    if not value.requires_grad:
        return set()
    (slope,) = torch.autograd.grad(value, y, retain_graph=True, allow_unused=True)
    return set() if slope is None else set(slope.nonzero()[:, 0].tolist())
