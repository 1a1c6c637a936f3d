# SPDX-License-Identifier: Apache-2.0
"""Multiple shooting as a probabilistic model: a long trajectory in segments, each with a start of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_latentde.sites.ode_site import solve_at_site

__all__ = ["Shooting"]


class Shooting:
    r"""Segments of ``length`` times, each solved from its own start s_j:

    .. math:: p(s_1, \dots, s_{J-1} \mid z_0) = \prod_j N(s_j \mid \phi(s_{j-1}), \sigma^2),\quad s_0 = z_0,

    where :math:`\phi` solves to the end of a segment. Short solves make a smooth loss where a long one is chaotic, and
    all segments are solved at once. Since the factor is a prior density and no penalty, the ELBO stays a lower bound,
    of the model in which the state moves by :math:`N(0, \sigma^2)` between segments.

    The starts are the site "shots", (J - 1, S); the factor is the observed site "continuity".

    Args:
        length: number of observation times in a segment.
        sd: sd :math:`\sigma` of the jump between segments, in units of the state; a number or (S,).

    Raises:
        ValueError: a length below 1, or an sd that is not positive.

    References:
        Hegde, Yildiz, Lahdesmaki, Kaski and Heinonen, "Variational multiple shooting for Bayesian ODEs with Gaussian
        processes", UAI 2022. Iakovlev et al., "Latent neural ODEs with sparse Bayesian multiple shooting", ICLR 2023.

    Example:
        >>> Shooting(10, 0.01).stations(35)
        [10, 20, 30]
    """

    def __init__(self, length: int, sd: float | Tensor) -> None:
        if length < 1:
            raise ValueError(f"length = {length}; a segment has at least 1 time")
        if not bool((torch.as_tensor(sd) > 0).all()):
            raise ValueError(f"sd = {sd}; the sd of the jumps between segments must be positive")
        self.length, self.sd = length, sd

    def stations(self, num_times: int) -> list[int]:
        """Positions of the starts after the first."""
        return list(range(self.length, num_times, self.length))

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
    ) -> Tensor:
        """The trajectory, continuous up to the jumps; records the sites ``name``, shots and continuity.

        Args:
            name: name of the trajectory's site.
            f: vector field.
            z0: (N, S).
            times: (N, T), which have the starts of the segments among them.
            params: parameters of the field, per series (N,) or shared.
            states: names of the S states.
            settings: of the solve.
            at: (N, T'), other times to solve at; what lies after the last segment continues it.

        Returns:
            (N, T, S), or (N, T', S).
        """
        stations = self.stations(times.shape[-1])
        first = z0.unsqueeze(-2)
        shots = first[..., :0, :]
        if stations:
            guess = first.expand(*z0.shape[:-1], len(stations), z0.shape[-1])
            shots = pyro.sample("shots", _Flat(guess).to_event(2))
        begin = times[..., [0, *stations]]  # (N, J)
        end = torch.cat([begin[..., 1:], times[..., -1:]], dim=-1)
        grid = _within(times, begin, end, self.length) if at is None else _clamped(at, begin, end)
        starts = torch.cat([first, shots], dim=-2)  # (N, J, S)
        ys = solve_at_site(name, f, starts, grid, _per_segment(params), t0=begin, **settings).ys
        if stations:
            arrived = ys[..., :-1, -1, :]
            sd = torch.as_tensor(self.sd, dtype=ys.dtype, device=ys.device)
            pyro.sample("continuity", dist.Normal(arrived, sd).to_event(2), obs=shots, infer={"prior": True})
        if at is None:
            z = ys[..., :-1, :].flatten(-3, -2)[..., : times.shape[-1], :]
        else:
            segment = (at.unsqueeze(-1) >= begin.unsqueeze(-2)).sum(-1).clamp(min=1) - 1  # (N, T')
            z = torch.take_along_dim(ys[..., :-1, :], segment[..., None, :, None], dim=-3).squeeze(-3)
        return _record(name, z, times if at is None else at, states)


def _record(name: str, z: Tensor, times: Tensor, states: Any) -> Tensor:
    """The same site that ``lde.ode`` makes, with the jumps in it."""
    return pyro.sample(
        name,
        dist.Delta(z, event_dim=2).mask(False),
        obs=z,
        infer={"_deterministic": True, "lde_ode": {"times": times, "states": states, "status": None}},
    )


def _within(times: Tensor, begin: Tensor, end: Tensor, length: int) -> Tensor:
    """Each segment's own times and then its end, (N, J, L + 1); the last segment may be shorter and repeats its end."""
    last = times.shape[-1] - 1
    index = torch.arange(begin.shape[-1] * length, device=times.device).clamp(max=last)
    return torch.cat([times[..., index].unflatten(-1, (-1, length)), end.unsqueeze(-1)], dim=-1)


def _clamped(at: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """All times for every segment, moved into it, and then its end, (N, J, T' + 1); the last segment has no end."""
    open_end = end.clone()
    open_end[..., -1] = torch.maximum(end[..., -1], at.amax(-1))
    inside = torch.minimum(torch.maximum(at.unsqueeze(-2), begin.unsqueeze(-1)), open_end.unsqueeze(-1))
    return torch.cat([inside, open_end.unsqueeze(-1)], dim=-1)


def _per_segment(params: Any) -> Any:
    """Parameters per series (N, ...) get a dimension of segments; scalars stay."""
    if isinstance(params, dict):
        return {name: _per_segment(value) for name, value in params.items()}
    return params.unsqueeze(-1) if isinstance(params, Tensor) and params.dim() else params


class _Flat(dist.TorchDistribution):
    """No prior opinion: log-density 0, since the continuity factor holds the whole prior; draws are a given guess."""

    support = dist.constraints.real
    has_rsample = True
    arg_constraints = {}  # noqa: RUF012

    def __init__(self, guess: Tensor) -> None:
        self.guess = guess
        super().__init__(guess.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Flat:
        return _Flat(self.guess.expand(batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.guess.expand(torch.Size(sample_shape) + self.guess.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return value.new_zeros(torch.broadcast_shapes(value.shape, self.guess.shape))
