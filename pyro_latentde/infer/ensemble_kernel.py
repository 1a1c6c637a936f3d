# SPDX-License-Identifier: Apache-2.0
"""Hamiltonian trajectories of many chains at once, all of the same number of steps.

Chains come in G groups of C. The chains of a group share step size, trajectory length and metric, and what tunes
them; groups know nothing of each other. One posterior is one group; many small posteriors of one model, as
simulation-based calibration needs them, are many groups in one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Density", "Points", "Scale", "Transition", "transition"]

# u (R, d) -> log-density (R,), gradient (R, d), did a solve fail (R,), number of solver steps (R,)
Density = Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]

MAX_ENERGY_ERROR = 1000.0


@dataclass(frozen=True)
class Points:
    """Where the chains are.

    Args:
        q: positions (G, C, d).
        lp: log-densities (G, C).
        grad: their gradients (G, C, d).
    """

    q: Tensor
    lp: Tensor
    grad: Tensor

    @classmethod
    def at(cls, density: Density, q: Tensor) -> Points:
        """Evaluate the density at positions (G, C, d)."""
        lp, grad, _, _ = _evaluate(density, q)
        return cls(q, lp, grad)

    def where(self, mask: Tensor, other: Points) -> Points:
        """These points where the mask (G, C) is true, the others elsewhere."""
        wide = mask.unsqueeze(-1)
        return Points(
            torch.where(wide, self.q, other.q),
            torch.where(mask, self.lp, other.lp),
            torch.where(wide, self.grad, other.grad),
        )


class Scale:
    r"""Square root L of the inverse metric of each group, :math:`M^{-1} = L L^\top`.

    In the coordinates :math:`x = L^{-1} q` the kinetic energy is :math:`|w|^2 / 2` and steps are equally long in all
    directions.

    Args:
        root: (G, d, d) lower triangular, or (G, d) for a diagonal metric.

    Example:
        >>> Scale(torch.tensor([[2.0, 1.0]])).whiten(torch.tensor([[[4.0, 4.0]]]))
        tensor([[[2., 4.]]])
    """

    def __init__(self, root: Tensor) -> None:
        self.root = root
        self.dense = root.dim() == 3

    def velocity(self, w: Tensor) -> Tensor:
        """L w for momenta w (G, C, d) of the white coordinates."""
        return w @ self.root.mT if self.dense else w * self.root.unsqueeze(-2)

    def force(self, grad: Tensor) -> Tensor:
        """Gradient in the white coordinates, L^T grad."""
        return grad @ self.root if self.dense else grad * self.root.unsqueeze(-2)

    def whiten(self, q: Tensor) -> Tensor:
        """White coordinates of positions (G, C, d)."""
        if not self.dense:
            return q / self.root.unsqueeze(-2)
        return torch.linalg.solve_triangular(self.root, q.mT, upper=False).mT


@dataclass(frozen=True)
class Transition:
    """One iteration of all chains.

    Args:
        points: where the chains are now.
        end: where the trajectories ended.
        momentum: white momenta there (G, C, d).
        accept: probability of accepting the end (G, C).
        energy: energy of the trajectory's start (G, C).
        diverging: whether the energy error was hopeless (G, C).
        failed: failed solves on the way (G, C).
        ode_steps: solver steps on the way (G, C).
    """

    points: Points
    end: Points
    momentum: Tensor
    accept: Tensor
    energy: Tensor
    diverging: Tensor
    failed: Tensor
    ode_steps: Tensor


def transition(
    density: Density, start: Points, noise: Tensor, uniform: Tensor, scale: Scale, step: Tensor, num_steps: list[int]
) -> Transition:
    """Integrate a trajectory from every chain and accept or reject its end.

    A failed solve on the way is a plateau without a gradient, which the leapfrog crosses reversibly; only a
    trajectory that ends in one is rejected.

    Args:
        density: log-density and gradient of all rows.
        start: where the chains are.
        noise: standard normal (G, C, d), the white momenta.
        uniform: uniform on (0, 1), (G, C).
        scale: of the groups.
        step: step sizes (G,).
        num_steps: leapfrog steps of each group, at least 1.

    Returns:
        The transition.

    References:
        Neal (2011), MCMC using Hamiltonian dynamics.

    Example:
        >>> def density(u):
        ...     return -0.5 * (u**2).sum(-1), -u, torch.zeros(len(u), dtype=torch.bool), torch.zeros(len(u))
        >>> start = Points.at(density, torch.zeros(1, 3, 2))
        >>> noise, uniform = torch.ones(1, 3, 2), torch.full((1, 3), 0.5)
        >>> done = transition(density, start, noise, uniform, Scale(torch.ones(1, 2)), torch.tensor([0.1]), [5])
        >>> [round(x, 2) for x in done.points.q[0, 0].tolist()]  # sin(.5)
        [0.48, 0.48]
    """
    step, steps = step[:, None, None], torch.tensor(num_steps, device=noise.device)[:, None]
    points, w = start, noise
    failed = torch.zeros_like(start.lp, dtype=torch.int64)
    ode_steps = torch.zeros_like(failed)
    for i in range(max(num_steps)):
        half = w + 0.5 * step * scale.force(points.grad)
        q = points.q + step * scale.velocity(half)
        lp, grad, bad, solver = _evaluate(density, q)
        there = Points(q, lp, grad)
        w_there = half + 0.5 * step * scale.force(grad)
        if i < min(num_steps):  # no group has ended: nothing to hold back
            points, w = there, w_there
            failed, ode_steps = failed + bad, ode_steps + solver
        else:
            going = (i < steps).expand_as(lp)
            points, w = there.where(going, points), torch.where(going.unsqueeze(-1), w_there, w)
            failed, ode_steps = failed + bad * going, ode_steps + solver * going
    energy = 0.5 * noise.square().sum(-1) - start.lp
    error = 0.5 * w.square().sum(-1) - points.lp - energy
    error = error.nan_to_num(nan=torch.inf)  # far out momenta overflow
    accept = torch.exp(-error).clamp(max=1.0)
    return Transition(
        points=points.where(uniform < accept, start),
        end=points,
        momentum=w,
        accept=accept,
        energy=energy,
        diverging=error > MAX_ENERGY_ERROR,
        failed=failed,
        ode_steps=ode_steps,
    )


def _evaluate(density: Density, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lp, grad, failed, steps = density(q.flatten(0, 1))
    shape = q.shape[:2]
    return lp.view(shape), grad.view(q.shape), failed.view(shape), steps.view(shape)
