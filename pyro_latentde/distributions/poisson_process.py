# SPDX-License-Identifier: Apache-2.0
"""Laws of event times: inhomogeneous Poisson processes."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_latentde.errors import SolveError

__all__ = ["GridPoissonProcess", "PoissonProcess"]


class PoissonProcess(dist.TorchDistribution):
    r"""Density of given event times, from the intensity at each and its integral over the time watched.

    .. math:: \log p(t_1, \dots, t_n) = \sum_i \log \lambda(t_i) - \int_a^b \lambda(t) dt

    A value is the event times that `log_intensity` belongs to. It cannot draw others, as the intensity is not known
    between them; `GridPoissonProcess` can.

    Args:
        log_intensity: (*batch_shape, E), logarithm of events per unit of time at each event; finite.
        integral: (*batch_shape), expected number of events.
        mask: (*batch_shape, E), bool, False where a row has no more events; by default there are E events.

    References:
        Daley, D. J. and Vere-Jones, D. (2003). An Introduction to the Theory of Point Processes I, 2nd ed., Springer,
        section 7.1.

    Example:
        >>> import torch
        >>> from pyro_latentde.distributions import PoissonProcess
        >>> three_events = torch.tensor([0.3, 0.9, 2.5])
        >>> law = PoissonProcess(torch.full((3,), 2.0).log(), torch.tensor(2.0 * 3.0))
        >>> law.log_prob(three_events)  # 3 log 2 - 6
        tensor(-3.9206)
    """

    arg_constraints = {"log_intensity": constraints.real_vector, "integral": constraints.nonnegative}
    support = constraints.real_vector

    def __init__(
        self, log_intensity: Tensor, integral: Tensor, mask: Tensor | None = None, *, validate_args: bool | None = None
    ) -> None:
        mask = torch.ones_like(log_intensity, dtype=torch.bool) if mask is None else mask
        batch = torch.broadcast_shapes(log_intensity.shape[:-1], integral.shape, mask.shape[:-1])
        self.log_intensity, self.mask_of_events = (x.expand(*batch, -1) for x in (log_intensity, mask))
        self.integral = integral.expand(batch)
        super().__init__(batch, log_intensity.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: PoissonProcess | None = None) -> PoissonProcess:
        """The same law with a larger batch shape."""
        new = self._get_checked_instance(PoissonProcess, _instance)
        shape = torch.Size(batch_shape)
        new.log_intensity, new.mask_of_events = (
            x.expand(*shape, -1) for x in (self.log_intensity, self.mask_of_events)
        )
        new.integral = self.integral.expand(shape)
        super(PoissonProcess, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of the event times, in units of one event per unit of time each."""
        lead = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        total = torch.where(self.mask_of_events, self.log_intensity, 0.0).sum(-1) - self.integral
        return total.expand(lead)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 (torch's signature)
        """Not possible."""
        raise NotImplementedError("PoissonProcess knows its intensity at given events only; GridPoissonProcess draws.")

    sample = rsample


class GridPoissonProcess(dist.TorchDistribution):
    r"""Poisson process from its cumulative intensity on a grid, constant between the points.

    .. math:: \Lambda(t_k) = \Gamma_k, \quad \Gamma_k = \sum_{j \le k} \epsilon_j, \quad \epsilon_j \sim Exp(1)

    A value is (E,) sorted event times, followed by ``inf``: there is no more event.

    Args:
        grid: (..., G), increasing times, from the start to the end.
        cumulative: (..., G), expected number of events up to each, not decreasing, zero first.
        max_events: E, room for events in a row.

    Raises:
        SolveError: in drawing, more events than there is room for.

    References:
        Cinlar, E. (1975). Introduction to Stochastic Processes, Prentice-Hall: events by inversion.

    Example:
        >>> import torch
        >>> from pyro_latentde.distributions import GridPoissonProcess
        >>> grid = torch.linspace(0.0, 3.0, 4)
        >>> law = GridPoissonProcess(grid, 2.0 * grid, max_events=50)
        >>> law.sample((1000,)).isfinite().sum(-1).float().mean().round()
        tensor(6.)
    """

    arg_constraints = {"grid": constraints.real_vector, "cumulative": constraints.real_vector}
    support = constraints.real_vector

    def __init__(
        self, grid: Tensor, cumulative: Tensor, max_events: int = 1000, *, validate_args: bool | None = None
    ) -> None:
        shape = torch.broadcast_shapes(grid.shape, cumulative.shape)
        self.grid, self.cumulative, self.max_events = grid.expand(shape), cumulative.expand(shape), max_events
        super().__init__(shape[:-1], torch.Size([max_events]), validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: GridPoissonProcess | None = None) -> GridPoissonProcess:
        """The same law with a larger batch shape."""
        new = self._get_checked_instance(GridPoissonProcess, _instance)
        shape = torch.Size(batch_shape)
        new.grid, new.cumulative = (x.expand(*shape, -1) for x in (self.grid, self.cumulative))
        new.max_events = self.max_events
        super(GridPoissonProcess, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of event times (..., E) under the intensity that is constant between grid points."""
        there = value.isfinite()
        grid, cumulative, last = self._at(value.shape[:-1])
        right = torch.searchsorted(grid, torch.where(there, value, grid[..., -1:]).contiguous()).clamp(1, last)
        rise = cumulative.gather(-1, right) - cumulative.gather(-1, right - 1)
        width = grid.gather(-1, right) - grid.gather(-1, right - 1)
        return torch.where(there, (rise / width).log(), 0.0).sum(-1) - cumulative[..., -1]

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 (torch's signature)
        """Draws (*sample_shape, *batch_shape, E)."""
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            grid, cumulative, last = self._at(shape[:-1])
            waits = torch.empty(shape, dtype=grid.dtype, device=grid.device).exponential_()
            reached = waits.cumsum(-1)
            if bool((reached[..., -1] < cumulative[..., -1]).any()):
                raise SolveError(
                    f"a draw has more events than max_events = {self.max_events} (up to "
                    f"{cumulative[..., -1].max().item():.4g} are expected in a row): give a larger max_events."
                )
            right = torch.searchsorted(cumulative, reached).clamp(1, last)
            low, high = cumulative.gather(-1, right - 1), cumulative.gather(-1, right)
            share = ((reached - low) / (high - low).clamp(min=torch.finfo(grid.dtype).tiny)).clamp(0.0, 1.0)
            left = grid.gather(-1, right - 1)
            times = left + share * (grid.gather(-1, right) - left)
            return torch.where(reached <= cumulative[..., -1:], times, torch.inf)

    @property
    def mean_count(self) -> Tensor:
        """Expected number of events, (*batch_shape)."""
        return self.cumulative[..., -1]

    def _at(self, lead: torch.Size) -> tuple[Tensor, Tensor, int]:
        lead = torch.broadcast_shapes(lead, self.batch_shape)
        grid, cumulative = (x.expand(*lead, -1).contiguous() for x in (self.grid, self.cumulative))
        return grid, cumulative, grid.shape[-1] - 1
