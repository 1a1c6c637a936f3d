# SPDX-License-Identifier: Apache-2.0
"""GOKU-nets: a known differential equation with unknown parameters behind pictures or other raw observations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
from torch import Tensor, nn

from pyro_latentde.data.series import Series
from pyro_latentde.distributions.likelihoods import Gaussian
from pyro_latentde.errors import LatentDEError
from pyro_latentde.guides.series_guide import SeriesGuide
from pyro_latentde.models.guide_parts import shared_guide
from pyro_latentde.models.latents import Latent, Prior
from pyro_latentde.models.series_model import SeriesModel, state_size
from pyro_latentde.models.shooting import Shooting
from pyro_latentde.models.unknown import Hybrid
from pyro_latentde.nn import LearnedUnit, RecurrentEncoder, ResidualMLP, Select, Standardized, start_at

__all__ = ["GOKU", "Guide", "Model"]


class Model(SeriesModel):
    r"""The generative side: :math:`z_0 \sim p(z_0),\ \theta \sim p(\theta),\ \dot z = f(t, z, \theta)`, a decoder.

    Args:
        field: the known vector field f(t, z, p) of one row; p holds theta's entries and the shared parameters by name.
        z0: prior of the start: a distribution of event shape (S,), scalar ones by name, or a :class:`.Latent`.
        theta: prior of the parameters of each series, in physical units: scalar distributions by name, a function of
            the shared sites that returns them (a population), or a :class:`.Latent` with a code and a head.
        decoder: network (..., S) -> (..., K).
        likelihood: outputs (..., T, K) -> distribution of the values (..., T, D).
        unknown: network (S,) -> (len(into),) for what f does not know; None for nothing.
        into: the equations that the unknown part adds to; all by default.
        unknown_scale: scale of the shrinkage prior of the unknown part, in units of dz/dt.
        shared: priors of parameters that all series share, by name.
        states: names of the states.
        shooting: multiple shooting.
        settings: of the solve, as for :func:`~pyro_latentde.odesolve`.

    References:
        Linial, Ravid, Eytan and Shalit, "Generative ODE modeling with known unknowns", CHIL 2021, arXiv:2003.10775.
    """

    def __init__(
        self,
        field: Callable,
        z0: Prior | Latent,
        theta: Prior | Latent | None,
        decoder: nn.Module,
        likelihood: Callable[[Tensor], dist.Distribution],
        *,
        unknown: nn.Module | None = None,
        into: Sequence[int] | None = None,
        unknown_scale: float = 1.0,
        shared: Mapping[str, dist.Distribution] | None = None,
        states: Sequence[str] | None = None,
        shooting: Shooting | None = None,
        **settings: Any,
    ) -> None:
        z0 = z0 if isinstance(z0, Latent) else Latent(z0)
        theta = theta if theta is None or isinstance(theta, Latent) else Latent(theta)
        super().__init__(
            field if unknown is None else Hybrid(field, unknown, into, scale=unknown_scale),
            z0,
            decoder,
            likelihood,
            theta=theta,
            shared=shared,
            states=states,
            shooting=shooting,
            **settings,
        )


class Guide(SeriesGuide):
    """The amortized side: a frame network, a backward recurrent encoder for z0, a bidirectional one for theta.

    Args:
        model: the model, for its sites.
        values: number D of values (pixels) at each time; or the series to be trained on, by whose mean and spread the
            default network of frames then standardizes what it reads, see :class:`.Standardized`.
        frames: network (..., D) -> (..., F) of one frame; by default the published residual network with F = 32.
        width: of the default network of frames.
        encoders: a series encoder for all sites or one per site; by default recurrent networks of two layers.
        hidden: width of the default encoders.
        head: ``"normal"``, ``"full_rank"`` or ``"flow"``.
        structured: whether theta's posterior depends on the draw of z0.
        time_scale: unit of time for the default encoders.
        covariates: number of the series' covariates.
        unit: the decoder's :class:`.LearnedUnit`, in which the guide then measures the states, too.
    """

    def __init__(
        self,
        model: Model,
        values: int | Series,
        *,
        frames: nn.Module | None = None,
        width: int = 200,
        encoders: nn.Module | Mapping[str, nn.Module] | None = None,
        hidden: int = 16,
        head: str = "full_rank",
        structured: bool = True,
        time_scale: float = 1.0,
        covariates: int = 0,
        unit: LearnedUnit | None = None,
    ) -> None:
        if frames is None:
            frames = ResidualMLP(_count(values), 32, width, output="relu")
            frames = frames if isinstance(values, int) else Standardized.of(values, frames)
        priors = model.local_priors()
        if encoders is None:
            size, options = frames.out_features, {"layers": 2, "time_scale": time_scale}
            encoders = {
                name: RecurrentEncoder(size, hidden, cell="lstm", bidirectional=True, **options)
                if name.startswith("theta")
                else RecurrentEncoder(size, hidden, cell="lstm", **options)
                for name in priors
            }
        stations = {} if model.shooting is None else {"shots": model.shooting.stations}
        super().__init__(
            priors,
            encoders,
            frames=frames,
            head=head,
            structured=structured,
            shared=shared_guide(model),
            stations=stations,
            covariates=covariates,
            units={} if unit is None else dict.fromkeys(("z0", *stations), unit),
        )


class GOKU(nn.Module):
    """A GOKU-net: ``model`` and ``guide`` with sensible defaults, to be fitted by ``infer.fit_svi``.

    Args:
        field: the known vector field f(t, z, p).
        z0: prior of the start.
        theta: prior of the parameters of each series.
        values: number D of values (pixels) at each time; better the series to be trained on: the default networks then
            begin at their mean, and learn much faster.
        visible: names of the states that an observation shows, such as angles but not their rates, for the default
            decoder; all by default.
        decoder: network (..., S) -> (..., D); by default the published residual network with a sigmoid, for pixels.
        learn_unit: whether the default decoder and the guide share one learned unit of the states, as a nonlinear field
            determines it, see :class:`.LearnedUnit`; without, the size of unseen states is found slowly, if at all. Of
            your own decoder, make ``d = nn.LearnedUnit(net)`` and give ``decoder=d, guide={"unit": d}``.
        width: of the default networks.
        likelihood: by default normal with one learned sd.
        guide: keywords of :class:`Guide`.
        options: further keywords of :class:`Model`: ``unknown=``, ``shared=``, ``shooting=``, solver settings.

    Raises:
        LatentDEError: ``visible`` names no state, or there are no names; a unit is to be learned of states that cannot
            be any number, or that a head makes of a code.

    Example:
        >>> import torch, pyro.distributions as dist, pyro_latentde as lde
        >>> def pendulum(t, z, p):
        ...     return torch.stack([z[1], -10.0 / p["length"] * z[0].sin()])
        >>> start = dist.Normal(torch.zeros(2), 0.5).to_event(1)
        >>> videos = lde.Series.from_tensors(torch.linspace(0, 1, 5), torch.rand(8, 5, 16))
        >>> names = {"states": ("angle", "rate"), "visible": ["angle"]}
        >>> goku = GOKU(pendulum, start, {"length": dist.Uniform(1.0, 2.0)}, values=videos, **names)
        >>> fit = lde.infer.fit_svi(goku.model, goku.guide, videos, num_steps=2, batch_size=4, progress=False)
        >>> len(fit.losses)
        2
    """

    def __init__(
        self,
        field: Callable,
        z0: Prior | Latent,
        theta: Prior | Latent | None,
        *,
        values: int | Series,
        visible: Sequence[str] | None = None,
        decoder: nn.Module | None = None,
        learn_unit: bool = False,
        width: int = 200,
        likelihood: Callable[[Tensor], dist.Distribution] | None = None,
        guide: Mapping[str, Any] | None = None,
        states: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        z0 = z0 if isinstance(z0, Latent) else Latent(z0)
        likelihood = Gaussian(sd="learned") if likelihood is None else likelihood
        guide = {"width": width, **(guide or {})}
        if decoder is None:
            decoder, unit = _decoder(z0, values, width, visible, states, options.get("shared"), learn_unit)
            guide = {"unit": unit, **guide}
        elif visible is not None or learn_unit:
            given, wrapper = ("visible", "Select") if visible is not None else ("learn_unit", "LearnedUnit")
            raise LatentDEError(f"GOKU: {given}= is for the default decoder; put your own into nn.{wrapper} instead")
        self.model = Model(field, z0, theta, decoder, likelihood, states=states, **options)
        self.guide = Guide(self.model, values, **guide)


def _decoder(
    z0: Latent,
    values: int | Series,
    width: int,
    visible: Sequence[str] | None,
    states: Sequence[str] | None,
    shared: Mapping[str, dist.Distribution] | None,
    learn_unit: bool,
) -> tuple[nn.Module, LearnedUnit | None]:
    """The published network, which reads visible states in the units of their prior, and begins at the mean."""
    size = state_size(z0, shared)
    columns = list(range(size)) if visible is None else _columns(visible, states)
    net: nn.Module = ResidualMLP(len(columns), _count(values), width, output="sigmoid")
    if not isinstance(values, int):
        net = start_at(net, values.mean_values())
    net = unit = LearnedUnit(net) if learn_unit else net
    moments = z0.moments()
    if moments is not None:
        net = Standardized(net, moments[0][columns], moments[1][columns])
    return net if visible is None else Select(net, columns, size), unit if learn_unit else None


def _count(values: int | Series) -> int:
    return values if isinstance(values, int) else values.num_values


def _columns(visible: Sequence[str], states: Sequence[str] | None) -> list[int]:
    known = list(states or ())
    if not visible or not set(visible) <= set(known):
        raise LatentDEError(f"GOKU: visible = {tuple(visible)}; expected some of states = {tuple(known)}")
    return [known.index(name) for name in visible]
