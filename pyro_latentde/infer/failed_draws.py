# SPDX-License-Identifier: Apache-2.0
"""Draws that fail are data: what is left out is told, and one bad draw does not end a run before it begins."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_latentde.errors import SolveError
from pyro_latentde.posterior.model_sites import kind_of

__all__ = ["FAILURES", "retry_failed", "tell_failed"]

FAILURES = (torch.linalg.LinAlgError, SolveError)  # of single draws: the step is skipped, and the run goes on
_MOST_NAMED = 5
_TRIES = 10


def tell_failed(failed: Tensor, consequence: str) -> None:
    """Warn of draws that failed, once for all of them; silent when there are none.

    Args:
        failed: (S, N), bool, draws of N series.
        consequence: what becomes of them.
    """
    if not bool(failed.any()):
        return
    text = f"the solve of {int(failed.sum())} of {failed.numel()} draws failed, of {int(failed.any(0).sum())} series"
    lost = failed.all(0).nonzero().flatten().tolist()
    named = ", ".join(map(str, lost[:_MOST_NAMED])) + (", ..." if len(lost) > _MOST_NAMED else "")
    whole = f"; no draw is left of series {named}, whose results are NaN" if lost else ""
    warnings.warn(f"{text}: {consequence}{whole}", stacklevel=2)


def retry_failed(run: Callable[[int], None]) -> None:
    """Run model and guide once, at other draws if these fail.

    Args:
        run: called with the number of the try, from 0 on; draws anew each time.

    Raises:
        SolveError: all tries failed; the last one's reason, and the values of its sites.
        LinAlgError: likewise.
    """
    for attempt in range(_TRIES):
        seen = _Seen()
        try:
            with seen:
                return run(attempt)
        except FAILURES as error:
            reason = error
    drawn = ", ".join(f"{name}: {_short(value)}" for name, value in seen.values.items()) or "nothing was drawn before"
    raise type(reason)(f"{reason}\nBefore the first step, all of {_TRIES} draws failed. The last: {drawn}.") from reason


class _Seen(Messenger):
    """Values of the latent sites in the run inside, up to where it broke off."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if kind_of(msg) == "latent":
            self.values[msg["name"]] = msg["value"].detach()


def _short(value: Tensor) -> str:
    numbers = ", ".join(f"{x:.4g}" for x in value.flatten()[:_MOST_NAMED].tolist())
    rest = f", ... of shape {tuple(value.shape)}" if value.numel() > _MOST_NAMED else ""
    return f"[{numbers}{rest}]" if value.dim() else numbers
