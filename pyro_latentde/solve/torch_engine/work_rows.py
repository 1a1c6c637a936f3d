# SPDX-License-Identifier: Apache-2.0
"""Where the rows of an adaptive solve are."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pyro_latentde.solve.torch_engine.switching import LEAST

__all__ = ["WorkRows"]


@dataclass
class WorkRows:
    """The rows being integrated, one entry per row in every field; ``live`` is False once a row has ended.

    ``hints``, ``patience`` and ``former`` are those of ``switching.py``, ``stop`` is the number of the stop ahead,
    ``kind`` how the next step is taken (``step_record.py``), ``cursor`` the number of outputs that are written.
    """

    row: Tensor
    live: Tensor
    t: Tensor
    y: Tensor
    h: Tensor
    k1: Tensor
    error: Tensor
    rejected: Tensor
    broken: Tensor
    stiff: Tensor
    hints: Tensor
    patience: Tensor
    former: Tensor
    kind: Tensor
    cursor: Tensor
    times: Tensor
    direction: Tensor
    stop: Tensor

    @classmethod
    def at(cls, y0: Tensor, times: Tensor, t0: Tensor, stop: Tensor) -> "WorkRows":
        """All rows at their starts."""
        span, row, one = times[:, -1] - t0, torch.arange(len(y0), device=y0.device), torch.ones_like(t0)
        flag, zero = torch.zeros_like(row, dtype=torch.bool), torch.zeros_like(row)
        direction, cursor = torch.where(span < 0, -1.0, 1.0).to(times), (times == t0[:, None]).sum(1)
        kind = torch.full_like(t0, 2.0)  # a first stage that is f(t, y)
        changing = flag, zero, torch.full_like(row, LEAST), torch.zeros_like(t0)
        return cls(row, flag, t0, y0, span, y0, one, flag, flag, *changing, kind, cursor, times, direction, stop)

    def take(self, keep: Tensor) -> "WorkRows":
        return WorkRows(*(getattr(self, field.name)[keep] for field in fields(self)))
