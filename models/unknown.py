# SPDX-License-Identifier: Apache-2.0
"""Known physics with an unknown part: a small network added to some equations, with a prior that keeps it small."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn

from pyro_latentde.errors import ShapeError

__all__ = ["Hybrid", "draw_weights", "missing_force", "sampled_weights_"]


class Hybrid(PyroModule):
    r"""The vector field :math:`\dot z = f(t, z, \theta) + s\,B\,u(z)`.

    The network u adds to the chosen equations only (B): where the known part is a definition, such as velocity, nothing
    is missing. Its weights have normal priors and its size s a half-Cauchy one, so that the unknown part is shrunk
    towards nothing unless the data ask for it (the regularised form of a horseshoe with one global scale).

    Args:
        known: the field f(t, z, p) of one row.
        network: u, (S,) -> (len(into),).
        into: positions of the equations it adds to, negative ones from the end; all by default.
        scale: scale of the half-Cauchy prior of s, in units of dz/dt.
        bayesian: sample the weights (sites ``field.network...``); else they are parameters, and s is 1.

    Raises:
        ShapeError: in a call, for equations that are not there or come twice, or a network of another size.

    References:
        Carvalho, Polson and Scott, "The horseshoe estimator for sparse signals", Biometrika 97, 2010.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> field = Hybrid(lambda t, z, p: torch.stack([z[1], -p["k"] * z[0]]), net, into=[1])
        >>> field(torch.tensor(0.0), torch.ones(2), {"k": torch.tensor(3.0)}).shape
        torch.Size([2])
    """

    def __init__(
        self,
        known: Callable[[Tensor, Tensor, Any], Tensor],
        network: nn.Module,
        into: Sequence[int] | None = None,
        *,
        scale: float = 1.0,
        bayesian: bool = True,
    ) -> None:
        super().__init__()
        self.known, self.into, self.bayesian = known, None if into is None else tuple(into), bayesian
        to_pyro_module_(network)
        self.network = network
        if bayesian:
            sampled_weights_(network)
            self.register_buffer("prior_scale", torch.tensor(float(scale)), persistent=False)
            self.scale = PyroSample(_size_prior)

    def forward(self, t: Tensor, z: Tensor, p: Any = None) -> Tensor:
        """dz/dt of one row, (S,)."""
        return self.known(t, z, p) + self._spread(self.force(z), z)

    def force(self, z: Tensor) -> Tensor:
        """What the unknown part adds, (..., len(into)), at states (..., S)."""
        force = self.network(z)
        return self.scale * force if self.bayesian else force

    def _spread(self, force: Tensor, z: Tensor) -> Tensor:
        size = z.shape[-1]
        into = self._equations(size)
        if force.shape[-1] != len(into):
            raise ShapeError(f"the unknown part gives {force.shape[-1]} numbers for {len(into)} equations")
        zero = torch.zeros_like(z[0])
        return torch.stack([force[into.index(i)] if i in into else zero for i in range(size)])

    def _equations(self, size: int) -> list[int]:
        """Positions in 0, ..., S - 1."""
        given = range(size) if self.into is None else self.into
        into = [i + size if i < 0 else i for i in given]
        if len(set(into)) < len(into) or not all(0 <= i < size for i in into):
            raise ShapeError(
                f"into = {self.into}; expected different positions among {size} equations, in {-size}, ..., {size - 1}"
            )
        return into


def missing_force(model: PyroModule, draws: Mapping[str, Tensor], z: Tensor) -> Tensor:
    """What the unknown part of a fitted model's field adds at given states, in every draw of its weights.

    Args:
        model: a model with a :class:`Hybrid` as its ``field``.
        draws: draws of the weights by site name, (S, ...), as ``fit.encode(series)`` gives them.
        z: states, (M, S).

    Returns:
        (S, M, K), K equations, in units of dz/dt.

    Example:
        >>> import torch, pyro
        >>> model = pyro.nn.PyroModule()
        >>> model.field = Hybrid(lambda t, z, p: -z, torch.nn.Linear(1, 1))
        >>> sites = {"field.scale": (), "field.network.weight": (1, 1), "field.network.bias": (1,)}
        >>> draws = {name: torch.ones(5, *shape) for name, shape in sites.items()}
        >>> missing_force(model, draws, torch.tensor([[0.0], [2.0]]))[0].flatten().tolist()
        [1.0, 3.0]
    """

    def force() -> Tensor:
        with model._pyro_context:  # sampled weights are sites inside a call of their module only
            return model.field.force(z)

    with torch.no_grad():
        num = len(next(iter(draws.values())))
        one = [poutine.condition(force, {name: value[i] for name, value in draws.items()})() for i in range(num)]
    return torch.stack(one)


def draw_weights(module: nn.Module) -> list[str]:
    """Draw every ``PyroSample`` weight below a module, once for this call of the model; returns their names.

    Called outside the plate of series: weights belong to all of them.
    """
    names = []
    for prefix, part in module.named_modules():
        if isinstance(part, PyroModule):
            for name in part._pyro_samples:
                getattr(part, name)
                names.append(f"{prefix}.{name}" if prefix else name)
    return names


def sampled_weights_(network: nn.Module, sd: float = 1.0) -> None:
    """Give weights of a PyroModule the prior N(0, sd^2 / fan-in) and biases N(0, sd^2), in place."""
    for module in network.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            spread = sd / math.sqrt(value.shape[-1]) if value.dim() > 1 else sd
            # without parameters a module would not know where it was moved to
            module.register_buffer("weights_like", value.new_zeros(()), persistent=False)
            setattr(module, name, PyroSample(partial(_weight_prior, shape=value.shape, sd=spread)))


def _weight_prior(module: nn.Module, *, shape: torch.Size, sd: float) -> dist.Distribution:
    return dist.Normal(module.weights_like.new_zeros(shape), sd).to_event(len(shape))


def _size_prior(field: Hybrid) -> dist.Distribution:
    return dist.HalfCauchy(field.prior_scale)
