# SPDX-License-Identifier: Apache-2.0
"""Why a vector field cannot be called on one row, and what would work: tried out, not guessed."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pyro_latentde.errors import GradientPathError, ShapeError, SolveError

__all__ = ["ambiguity", "check_result", "misfit"]

Ranks = tuple[int, ...]
Trial = Callable[[bool, Tensor | None, Sequence[Tensor]], bool]


def misfit(
    names: Sequence[str],
    leaves: Sequence[Tensor],
    y0: Tensor,
    misses: Sequence[tuple[Ranks, Any]],
    works: Trial,
) -> Exception:
    """The error for a field that no reading of its parameters satisfies.

    Args:
        names: Names of the parameters.
        leaves: The parameters, ``(*batch, *event)``.
        y0: ``(*batch, D)``.
        misses: Per reading (event ranks of the parameters), what the field returned or raised.
        works: ``works(exchanged, y0, leaves)``: whether the field, with t and y exchanged or not, takes these.
    """
    ranks, best = next((m for m in misses if isinstance(m[1], Tensor)), misses[0])
    if isinstance(best, (GradientPathError, SolveError)):
        return best
    hint = _hint(names, leaves, y0, works)
    if isinstance(best, ShapeError):
        return ShapeError(f"{best}{hint}") if hint else best
    size = y0.shape[-1]
    given = [f"{n} of shape {tuple(x.shape[x.ndim - r :])}" for n, x, r in zip(names, leaves, ranks, strict=True)]
    told = ", ".join(given) if given else "no parameters (params=None)"
    called = f"called on one row as f(t, y, p) with t of shape (), y of shape ({size},), {told}"
    if isinstance(best, Tensor):
        return ShapeError(f"the vector field, {called}, returned shape {tuple(best.shape)}, expected ({size},).{hint}")
    problem = ShapeError(f"the vector field, {called}, raised {type(best).__name__}: {best}.{hint}")
    problem.__cause__ = best
    return problem


def _hint(names: Sequence[str], leaves: Sequence[Tensor], y0: Tensor, works: Trial) -> str:
    """What makes the field work: its arguments exchanged, or one tensor transposed."""
    if works(True, y0, leaves):
        return " With the first two arguments exchanged it does: a field is called as f(t, y, p), time first."
    if y0.ndim == 2 and works(False, y0.transpose(0, 1), leaves):
        return f" Did you mean y0.transpose(0, 1), of shape {tuple(y0.shape)[::-1]}? Batch dimensions come first."
    for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        turned = [x.transpose(0, 1) if k == i else x for k, x in enumerate(leaves)] if leaf.ndim == 2 else None
        if turned is not None and works(False, y0, turned):
            shape = tuple(leaf.shape)[::-1]
            return f" Did you mean {name}.transpose(0, 1), of shape {shape}? Batch dimensions come first."
    return ""


def check_result(out: Tensor, y0: Tensor) -> None:
    """Raise :class:`ShapeError` if dy/dt has another dtype or device than the state."""
    if out.dtype != y0.dtype:
        raise ShapeError(
            f"the vector field returned {out.dtype} for a state of {y0.dtype}: make y0, the parameters and the "
            f"constants in the field the same dtype, for example {y0.dtype}."
        )
    if out.device != y0.device:
        raise ShapeError(
            f"the vector field returned a tensor on {out.device} for a state on {y0.device}: make constants in the "
            "field with device=y.device."
        )


def ambiguity(names: Sequence[str], leaves: Sequence[Tensor], fits: Sequence[Ranks]) -> ShapeError:
    """The error for parameters whose dimensions can be read in several ways."""
    undecided = [i for i in range(len(names)) if len({ranks[i] for ranks in fits}) > 1]
    told = ", ".join(f"{names[i]} of shape {tuple(leaves[i].shape)}" for i in undecided)
    example = ", ".join(f"{names[i]!r}: {fits[0][i]}" for i in undecided)
    return ShapeError(
        f"the dimensions of {told} can be read as batch or as part of one row; the field runs either way. "
        f"Say how many trailing dimensions belong to one row, for example event_dims={{{example}}}."
    )
