# SPDX-License-Identifier: Apache-2.0
"""Multiple shooting as a probabilistic model: a long trajectory in segments, each with a start of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_latentde.errors import ShapeError
from pyro_latentde.guides.stations import have_data
from pyro_latentde.sites.ode_record import named_errors, record_trajectory
from pyro_latentde.sites.ode_site import solve_at_site
from pyro_latentde.sites.settings import extra_times, requested_times
from pyro_latentde.solve.integrate import odesolve
from pyro_latentde.solve.solution import Solution

__all__ = ["Shooting"]


class Shooting:
    r"""Segments of ``length`` times, each solved from its own start s_j:

    .. math:: p(s_1, \dots, s_{J-1} \mid z_0) = \prod_j N(s_j \mid \phi(s_{j-1}), \sigma^2),\quad s_0 = z_0,

    where :math:`\phi` solves to the end of a segment. Short solves make a smooth loss where a long one is chaotic, and
    all segments are solved at once. Since the factor is a prior density and no penalty, the ELBO stays a lower bound,
    of the model in which the state moves by :math:`N(0, \sigma^2)` between segments.

    In a Pyro model of your own it is an argument of ``lde.ode``. A long chaotic series says more of its first state
    than any sampler can walk along; of starts a short time apart each says a little. `infer.lengthen` finds them.

    The starts are the site "shots", (J - 1, S); the factor is the observed site "continuity". In the padding of shorter
    series there are no segments. Where starts are not given, they are drawn one after the other.

    Args:
        length: number of observation times in a segment.
        sd: sd :math:`\sigma` of the jump between segments, in units of the state; a number or (S,).
        parts: number of segments from each time to the next, for a length of 1; more where paths part much between
            two observations.

    Raises:
        ValueError: a length or parts below 1, parts of longer segments, or an sd that is not positive.

    References:
        Hegde, Yildiz, Lahdesmaki, Kaski and Heinonen, "Variational multiple shooting for Bayesian ODEs with Gaussian
        processes", UAI 2022. Iakovlev et al., "Latent neural ODEs with sparse Bayesian multiple shooting", ICLR 2023.

    Example:
        >>> Shooting(10, 0.01).stations(35)
        [10, 20, 30]
    """

    def __init__(self, length: int, sd: float | Tensor, parts: int = 1) -> None:
        if length < 1:
            raise ValueError(f"length = {length}; a segment has at least 1 time")
        if parts < 1 or (parts > 1 and length > 1):
            raise ValueError(
                f"length = {length}, parts = {parts}; expected parts of at least 1, and 1 of longer segments"
            )
        if not bool((torch.as_tensor(sd) > 0).all()):
            raise ValueError(f"sd = {sd}; the sd of the jumps between segments must be positive")
        self.length, self.sd, self.parts = length, sd, parts

    def stations(self, num_times: int) -> list[int]:
        """Positions of the starts after the first, among so many times."""
        return list(range(self.length, num_times, self.length))

    def starts(self, f: Callable, z0: Tensor, times: Tensor, params: Any = None, **settings: Any) -> Tensor:
        """Starts on trajectories without jumps, to go on with segments from draws of a model without them.

        Args:
            f: vector field.
            z0: (N, S), of N draws.
            times: (T,), the first is that of z0.
            params: parameters of the field, with N in front.
            **settings: of `odesolve`.

        Returns:
            (N, J - 1, S), values of the site "shots".

        Example:
            >>> Shooting(2, 0.1).starts(lambda t, y: -y, torch.ones(1, 1), torch.arange(4.0)).shape
            torch.Size([1, 1, 1])
        """
        grid = _subdivided(times, self.parts)
        return odesolve(f, z0, grid, params, **settings).ys[:, self.stations(len(grid))]

    def trajectory(
        self,
        name: str,
        f: Callable,
        z0: Tensor,
        times: Tensor,
        params: Any,
        states: Any,
        settings: dict[str, Any],
        at: Tensor | None = None,
        t0: Any = None,
    ) -> Tensor:
        """The trajectory, continuous up to the jumps; records the sites ``name``, shots and continuity.

        Args:
            name: name of the trajectory's site.
            f: vector field.
            z0: (N, S), or (S,) for all N.
            times: (N, T), which have the starts of the segments among them.
            params: parameters of the field, per series (N, ...) or shared.
            states: names of the S states.
            settings: of the solve, ``event_dims`` among them.
            at: (N, T'), other times to solve at; what lies before the first segment or after the last continues it.
            t0: time of z0; the first time by default.

        Returns:
            (N, T, S), or (N, T', S).

        Raises:
            ShapeError: z0 is no tensor.
        """
        if not isinstance(z0, Tensor):
            raise ShapeError(
                f"ode {name!r}: shooting needs the state as one tensor (..., S); y0 is a {type(z0).__name__}.\n"
                "Try: stack its parts, and take them apart in the vector field."
            )
        given, times = times, _subdivided(times, self.parts)
        stations = self.stations(times.shape[-1])
        begin, real = times[..., [0, *stations]], have_data(times, stations)  # (N, J), (N, J - 1)
        if t0 is not None:
            first = torch.as_tensor(t0).to(times).expand(begin.shape[:-1])
            begin = torch.cat([first.unsqueeze(-1), begin[..., 1:]], dim=-1)
        z0 = z0.expand(*torch.broadcast_shapes(z0.shape[:-1], begin.shape[:-1]), z0.shape[-1])
        sd = torch.as_tensor(self.sd, dtype=z0.dtype, device=z0.device)
        solve = partial(solve_at_site, name, f, **settings)
        each = _per_segment(params, settings.get("event_dims") or {})
        wanted = requested_times(name)
        # what is asked for at other times is the trajectory, and not its segments
        with named_errors(name), extra_times(times, sites=()):
            starts = z0.unsqueeze(-2)
            if stations:
                draw = partial(_draw, solve, begin, params, sd)
                shape = (*z0.shape[:-1], len(stations), z0.shape[-1])
                shots = pyro.sample("shots", _Starts(shape, draw, starts).to_event(2))
                starts = torch.cat([starts, shots], dim=-2)  # (N, J, S)

            def along(at: Tensor | None) -> tuple[Tensor, Solution]:
                own = _within(times, begin, real, self.length) if at is None else _clamped(at, times, begin, real)
                grid, index = own
                solution = solve(starts, grid, each, t0=begin)
                index = index.expand(*z0.shape[:-1], -1).unsqueeze(-1)  # particles
                return torch.take_along_dim(solution.ys.flatten(-3, -2), index, dim=-2), solution

            z, solution = along(at)
            if stations:
                jumps = dist.Normal(solution.ys[..., :-1, -1, :], sd).mask(real.unsqueeze(-1)).to_event(2)
                pyro.sample("continuity", jumps, obs=shots, infer={"prior": True})
            if wanted is not None:
                wanted[1][name] = along(wanted[0].to(times).expand(*times.shape[:-1], -1))[0]
            if at is None:
                z, at = z[..., :: self.parts, :], given
            return record_trajectory(name, z, _whole(solution, at), states)


def _subdivided(times: Tensor, parts: int) -> Tensor:
    """Times with parts - 1 others between each two."""
    share = torch.arange(parts, dtype=times.dtype, device=times.device) / parts
    between = times[..., :-1, None] + share * times.diff(dim=-1).unsqueeze(-1)
    return torch.cat([between.flatten(-2), times[..., -1:]], dim=-1)


def _draw(solve: Callable, begin: Tensor, params: Any, sd: Tensor, starts: Tensor) -> Tensor:
    """Starts from their prior, (N, J - 1, S), one after the other, behind the first one or more (N, K, S)."""
    starts = list(starts.unbind(-2))
    for j in range(len(starts) - 1, begin.shape[-1] - 1):
        arrived = solve(starts[-1], begin[..., j + 1 : j + 2], params, t0=begin[..., j]).ys[..., -1, :]
        starts.append(arrived + sd * torch.randn_like(arrived))
    return torch.stack(starts[1:], dim=-2)


def _whole(solution: Solution, times: Tensor) -> Solution:
    """The segments as one solve of each row: their worst status, and their steps together."""
    report = torch.cat([solution.status.amax(-1, keepdim=True), solution.counts.sum(-2)], dim=-1)
    return replace(solution, times=times, _report=report)


def _ends(times: Tensor, begin: Tensor) -> Tensor:
    return torch.cat([begin[..., 1:], times[..., -1:]], dim=-1)


def _within(times: Tensor, begin: Tensor, real: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Each segment's own times and then its end, (N, J, L + 1), and where the T times are in them, (N, T).

    The last segment may be shorter and repeats its end. Padding is where the last segment with data ends.
    """
    position = torch.arange(begin.shape[-1] * length, device=times.device)
    own = times[..., position.clamp(max=times.shape[-1] - 1)].unflatten(-1, (-1, length))
    position, last = position[: times.shape[-1]], real.sum(-1, keepdim=True)
    segment, slot = position // length, position % length
    slot = torch.where(segment > last, length, slot)
    index = torch.minimum(segment, last) * (length + 1) + slot
    return torch.cat([own, _ends(times, begin).unsqueeze(-1)], dim=-1), index


def _clamped(at: Tensor, times: Tensor, begin: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """All times for every segment, moved into it, and then its end, (N, J, T' + 1), and where to read each, (N, T').

    The first segment is open at its beginning, the last one with data at its end.
    """
    end, number = _ends(times, begin), torch.arange(begin.shape[-1], device=times.device)
    low = torch.where(number == 0, torch.minimum(begin, at.amin(-1, keepdim=True)), begin)
    high = torch.where(number == real.sum(-1, keepdim=True), torch.maximum(end, at.amax(-1, keepdim=True)), end)
    inside = torch.minimum(torch.maximum(at.unsqueeze(-2), low.unsqueeze(-1)), high.unsqueeze(-1))
    segment = ((at.unsqueeze(-1) >= begin[..., None, 1:]) & real.unsqueeze(-2)).sum(-1)
    index = segment * (at.shape[-1] + 1) + torch.arange(at.shape[-1], device=at.device)
    return torch.cat([inside, end.unsqueeze(-1)], dim=-1), index


def _per_segment(params: Any, ranks: dict[str, int], name: str = "p") -> Any:
    """Parameters per series get a dimension of segments, behind those of the batch; what has no batch stays."""
    if isinstance(params, dict):
        return {name: _per_segment(value, ranks, name) for name, value in params.items()}
    rank = ranks.get(name, 0)
    return params.unsqueeze(-1 - rank) if isinstance(params, Tensor) and params.dim() > rank else params


class _Starts(dist.TorchDistribution):
    """Log-density 0, since the continuity factor holds the whole prior; draws are the model's own."""

    support = dist.constraints.real
    has_rsample = True
    arg_constraints = {}  # noqa: RUF012

    def __init__(self, shape: tuple[int, ...], draw: Callable[[Tensor], Tensor], first: Tensor) -> None:
        self.draw, self.first = draw, first
        super().__init__(torch.Size(shape), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Starts:
        return _Starts(batch_shape, self.draw, self.first)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.draw(self.first).expand(torch.Size(sample_shape) + self.batch_shape)

    def continued(self, value: Tensor) -> Tensor:
        """All starts, the first of which are given."""
        return self.draw(torch.cat([self.first, value], dim=-2))

    def log_prob(self, value: Tensor) -> Tensor:
        return value.new_zeros(torch.broadcast_shapes(value.shape, self.batch_shape))
