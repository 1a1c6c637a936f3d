# SPDX-License-Identifier: Apache-2.0
"""When a row had better change between explicit and implicit steps, and back.

Stability bounds explicit steps at h times the fastest decay = 3.3, but at tight tolerances the stiff part of the error
holds them far below, down to 0.5, where accuracy holds those of smooth problems too. So hints that the decay matters
only say when to try: the row takes an implicit step five times as large. If it passes, implicit steps earn their price;
if not, the row goes on as before, and with more patience.

References:
    Hairer, Wanner, Solving Ordinary Differential Equations II, 2nd ed., Springer 1996, IV.2.
    Shampine, Type-insensitive ODE codes based on implicit A-stable formulas, Math. Comp. 36 (1981) 499.
"""

from typing import Any

import torch
from torch import Tensor

from pyro_latentde.solve.methods.catalog import Method
from pyro_latentde.solve.torch_engine.trial import Trial, rms

__all__ = [
    "BOUND",
    "CALM",
    "HINT",
    "LEAP",
    "LEAST",
    "MOST",
    "SERENE",
    "STRONG",
    "change_rows",
    "lost_leaps",
    "switches",
]

BOUND = 3.0  # step times decay rate from which on stability bounds an explicit step, and a hint is strong
HINT = 0.5  # from which on it is a weak one
STRONG = 4  # weak hints that a strong one is worth; a step without a hint takes as many away
LEAST, MOST = 32, 256  # weak hints until a leap is tried; twice as many after each that failed
LEAP = 5.0  # the first implicit step in units of the explicit one, about what it costs more
CALM = 2.0  # below it an explicit step of this size would be stable
SERENE = 2  # such implicit steps, one after the other, until the row is explicit again


def switches(method: Method, trial: Trial, s: Any, h: Tensor, control: tuple[float, float], accept: Tensor) -> Tensor:
    """Rows that change after this step, ``(R,)``; counts the hints of the rows ``s`` where they accept it.

    An explicit step says how fast the fastest decay is by two stages at the same time, |f(Y7) - f(Y6)| / |Y7 - Y6|, an
    implicit one by a norm of the Jacobian. Differences are weighed as in the error test, since the stiff states may be
    the small ones.
    """
    rtol, atol = control
    scale = atol + rtol * torch.maximum(s.y.abs(), trial.y_new.abs())
    k, width = trial.k, h.to(s.y.dtype)[:, None]
    sixth = s.y + width * sum(a * stage for a, stage in zip(method.a[5], k[:5], strict=True))
    bend, apart = rms((k[6] - k[5]) / scale).to(h), rms((trial.y_new - sixth) / scale).to(h)
    pressed, calm = h.abs() * bend, torch.zeros_like(accept)
    if trial.implicit is not None:
        calm = h.abs() * trial.implicit.jacobian.abs().sum(2).amax(1).to(h) < CALM
    weight = torch.where(pressed > BOUND * apart, STRONG, torch.where(pressed > HINT * apart, 1, -STRONG))
    counted = torch.where(s.stiff, torch.where(calm, s.hints + 1, 0), (s.hints + weight).clamp(min=0))
    s.hints = torch.where(accept, counted, s.hints)
    landed = accept & (s.former != 0)
    s.patience, s.former = torch.where(landed, LEAST, s.patience), torch.where(landed, 0.0, s.former)
    return accept & (s.hints >= torch.where(s.stiff, SERENE, s.patience))


def change_rows(s: Any, change: Tensor) -> None:
    """Rows change; those that become implicit leap."""
    s.stiff, s.hints = s.stiff ^ change, torch.where(change, 0, s.hints)
    leaping = change & s.stiff
    s.former, s.h = torch.where(leaping, s.h, s.former), torch.where(leaping, LEAP * s.h, s.h)


def lost_leaps(s: Any, refused: Tensor) -> Tensor:
    """Rows whose leap failed, ``(R,)``; they are explicit again, with the step that they would have taken."""
    lost = refused & (s.former != 0)
    s.h, s.former = torch.where(lost, s.former, s.h), torch.where(lost, 0.0, s.former)
    s.stiff, s.patience = s.stiff & ~lost, torch.where(lost, (2 * s.patience).clamp(max=MOST), s.patience)
    return lost
