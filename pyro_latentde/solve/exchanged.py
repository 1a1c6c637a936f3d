# SPDX-License-Identifier: Apache-2.0
"""Whether the initial state and the times of a solve look exchanged."""

from typing import Any

import numpy as np
from torch import Tensor

from pyro_latentde.solve.lift import peek

__all__ = ["exchange_hint"]


def exchange_hint(y0: Any, times: Any) -> str:
    """A question, where the state rises as times do and the times do not, or are fewer.

    Args:
        y0: What was given as initial state, of any kind.
        times: What was given as times.

    Returns:
        A sentence to add to an error, or nothing.

    Example:
        >>> exchange_hint([0.0, 1.0, 2.0], [30.0, 4.0])
        ' Are y0 and times exchanged? The state comes first: (f, y0, times).'
    """
    state, moments = _numbers(y0), _numbers(times)
    if state is None or not _rises(state):
        return ""
    structured = moments is None and isinstance(times, (dict, tuple))
    if structured or (moments is not None and (not _rises(moments) or moments.shape[-1] < state.shape[-1])):
        return " Are y0 and times exchanged? The state comes first: (f, y0, times)."
    return ""


def _numbers(value: Any) -> np.ndarray | None:
    """With at least one dimension; None where there are none, or none can be looked at."""
    if not isinstance(value, (Tensor, list, tuple, np.ndarray)):
        return None
    try:
        array = np.asarray(peek(value) if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return array if array.ndim and array.dtype.kind in "iuf" else None


def _rises(values: np.ndarray) -> bool:
    return values.shape[-1] > 1 and bool((np.diff(values, axis=-1) > 0).all())
