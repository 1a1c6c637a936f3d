# SPDX-License-Identifier: Apache-2.0
"""States and parameters as the user writes them, and as flat tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_flatten_with_path, tree_unflatten

from pyro_latentde.errors import ShapeError

__all__ = ["Parameters", "StateShape"]


@dataclass(frozen=True)
class StateShape:
    """How one row's state looks to the user: a vector ``(D,)`` (``spec`` None) or a structure of events.

    ``logs``: a ``LogStates``, where some coordinates are solved as logarithms.
    """

    spec: TreeSpec | None
    events: tuple[torch.Size, ...]
    names: tuple[str, ...]
    logs: Any = None

    @property
    def size(self) -> int:
        return sum(e.numel() for e in self.events)

    @property
    def coordinates(self) -> tuple[str, ...] | None:
        """Names of the D coordinates where the user's structure gives them: ``("u", "v[0]", "v[1]")``."""
        sizes = [(name, event.numel()) for name, event in zip(self.names, self.events, strict=False)]
        return tuple(n if size == 1 else f"{n}[{i}]" for n, size in sizes for i in range(size)) or None

    def unflatten(self, flat: Tensor) -> Any:
        """``(..., D)`` to the user's structure of ``(..., *event)``."""
        if self.spec is None:
            return flat
        parts = flat.split([e.numel() for e in self.events], dim=-1)
        lead = flat.shape[:-1]
        return tree_unflatten([p.reshape((*lead, *e)) for p, e in zip(parts, self.events, strict=True)], self.spec)

    def flatten_trajectory(self, ys: Any) -> Tensor:
        """The inverse of :meth:`unflatten`."""
        if self.spec is None:
            return ys
        leaves = tree_flatten(ys)[0]
        lead = leaves[0].ndim - len(self.events[0])
        return torch.cat(
            [x.reshape((*x.shape[:lead], e.numel())) for x, e in zip(leaves, self.events, strict=True)], dim=-1
        )

    def flatten(self, derivative: Any) -> Tensor:
        """The user's dy/dt of one row to ``(D,)``; raises :class:`ShapeError` where it does not match the state."""
        if self.spec is None:
            if isinstance(derivative, (tuple, list)):
                raise ShapeError(
                    f"the vector field returned a {type(derivative).__name__} of {len(derivative)}; expected a tensor "
                    f"of shape ({self.size},), one dy/dt per state. Return torch.stack([...])."
                )
            if not isinstance(derivative, Tensor):
                raise ShapeError(
                    f"the vector field returned {type(derivative).__name__}; expected a tensor of shape ({self.size},)."
                )
            return derivative
        leaves, spec = tree_flatten(derivative)
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in leaves]
        expected = [tuple(e) for e in self.events]
        if spec != self.spec or shapes != expected:
            raise ShapeError(
                f"the vector field returned another structure than the state's: got {tree_unflatten(shapes, spec)}, "
                f"expected "
                f"{tree_unflatten(expected, self.spec)} (shapes of dy/dt, one per state)."
            )
        return torch.cat([x.reshape(-1) for x in leaves])


@dataclass(slots=True)
class Parameters:
    """The user's parameters: floating tensors (and floats) are leaves with gradients, anything else is kept as it is.

    Args:
        names: Path of each leaf; a single tensor is called ``"p"``.
        leaves: Floating tensors, ``(*batch, *event)``.
        spec: The structure of everything.
        fixed: Everything else, by position.
        shape: What ``names`` and ``spec`` are known by, quicker to hash than they are.
    """

    names: tuple[str, ...]
    leaves: tuple[Tensor, ...]
    spec: TreeSpec
    fixed: tuple[tuple[int, Any], ...]
    shape: Any

    @staticmethod
    def paths(pairs: Sequence[tuple]) -> list[str]:
        def one(path: tuple) -> str:
            return ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)

        return [one(path) or "p" for path, _ in pairs]

    @classmethod
    def of(cls, params: Any, y0: Tensor) -> "Parameters":
        """Flatten; floats become tensors of the state's dtype, so that a new value needs no new kernel."""
        ordinary = _ordinary(params)
        if ordinary is not None:
            return ordinary
        pairs, spec = tree_flatten_with_path(params)
        names, leaves, fixed = [], [], []
        for i, (name, (_, value)) in enumerate(zip(cls.paths(pairs), pairs, strict=True)):
            if isinstance(value, (float, np.floating, np.ndarray)):
                value = torch.as_tensor(value, dtype=y0.dtype, device=y0.device)
            if isinstance(value, Tensor) and value.dtype.is_floating_point:
                names.append(name)
                leaves.append(value)
            else:
                fixed.append((i, value))
        return cls(tuple(names), tuple(leaves), spec, tuple(fixed), (tuple(names), spec))

    @property
    def given(self) -> bool:
        """Whether there are parameters at all."""
        return bool(self.leaves) or not (len(self.fixed) == 1 and self.fixed[0][1] is None)

    def blank(self) -> "Parameters":
        """Without the tensors, to keep."""
        return replace(self, leaves=())

    def rebuild(self, leaves: Sequence[Tensor]) -> Any:
        """The user's structure with other leaves."""
        values = list(leaves)
        for i, value in self.fixed:
            values.insert(i, value)
        return tree_unflatten(values, self.spec)


def _ordinary(params: Any) -> Parameters | None:
    """No parameters, one tensor, or a dict of tensors, flattened without walking, which takes long."""
    if params is None:
        return Parameters((), (), _spec(None), ((0, None),), None)
    if isinstance(params, Tensor):
        return Parameters(("p",), (params,), _spec(True), (), True) if params.dtype.is_floating_point else None
    if type(params) is not dict:
        return None
    for name, value in params.items():
        if not (isinstance(name, str) and isinstance(value, Tensor) and value.dtype.is_floating_point):
            return None
    names = tuple(params)
    return Parameters(names, tuple(params.values()), _spec(names), (), names)


@lru_cache(maxsize=1024)
def _spec(shape: tuple[str, ...] | bool | None) -> TreeSpec:
    return tree_flatten(dict.fromkeys(shape, 0) if isinstance(shape, tuple) else shape)[1]
