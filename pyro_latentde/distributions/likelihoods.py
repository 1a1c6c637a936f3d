# SPDX-License-Identifier: Apache-2.0
"""Likelihoods: what a decoder puts out, as a distribution of each observed value.

Each is a module that maps outputs (..., T, K) to a distribution of batch shape (..., T, D), for `lde.observe`, and has
a `mean` of the same outputs. K = D but for `Categorical`.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from pyro_latentde.distributions.observation_laws import (
    BernoulliLaw,
    CategoricalLaw,
    ContinuousBernoulliLaw,
    PoissonLaw,
)
from pyro_latentde.distributions.shared_scale_normal import SharedScaleNormal
from pyro_latentde.errors import LatentDEError, ShapeError

__all__ = ["Bernoulli", "Categorical", "ContinuousBernoulli", "Gaussian", "Laplace", "Likelihood", "Poisson"]


class Likelihood(PyroModule):
    """A law of each observed value, given the outputs of a decoder.

    Attributes:
        outputs_per_value: outputs that the decoder must have for each observed value.
    """

    outputs_per_value = 1

    def forward(self, outputs: Tensor) -> dist.Distribution:
        """Outputs (..., T, K) to a distribution of batch shape (..., T, D)."""
        raise NotImplementedError

    def mean(self, outputs: Tensor) -> Tensor:
        """Expected values (..., T, D) for outputs (..., T, K)."""
        return self.forward(outputs).mean


# Adam moves each parameter by about the learning rate. At a network's 1e-3 an sd would need thousands of steps to
# follow the errors of a model that learns, and would weigh the values too little all the while.
_PACE = 10.0


class _LocationScale(Likelihood):
    """A law whose location is the output, and whose scale is fixed, learned, or has a prior."""

    def __init__(self, sd: float | str | dist.Distribution, start: float, values: int | None) -> None:
        super().__init__()
        self.learned = isinstance(sd, str)
        self.per_value = self.learned and values is not None
        if isinstance(sd, torch.distributions.Distribution):
            if len(sd.event_shape) > 1 or sd.batch_shape:
                raise ShapeError(
                    f"{type(self).__name__}: the prior of sd has batch shape {tuple(sd.batch_shape)}, event shape "
                    f"{tuple(sd.event_shape)}; expected a scalar, or one sd per value, .to_event(1)."
                )
            self.per_value = len(sd.event_shape) == 1
            self.sd = PyroSample(sd)
        elif self.learned:
            if sd != "learned":
                raise LatentDEError(f"{type(self).__name__}: sd = {sd!r}; expected a number, 'learned', or a prior.")
            self._check_positive("start", start)
            shape = (values,) if self.per_value else ()
            self.slow_log_sd = nn.Parameter(torch.full(shape, math.log(start) / _PACE))
        else:
            self._check_positive("sd", sd)
            self.sd = float(sd)

    def _check_positive(self, what: str, number: float) -> None:
        if not 0 < number < math.inf:
            raise LatentDEError(f"{type(self).__name__}: {what} = {number}; expected a positive number.")

    @property
    def log_sd(self) -> Tensor:
        """Logarithm of a learned sd."""
        return _PACE * self.slow_log_sd

    def scale(self) -> Tensor | float:
        """The scale, to be broadcast against outputs (..., T, D)."""
        sd = self.log_sd.exp() if self.learned else self.sd
        if isinstance(sd, float):
            return sd
        # a sampled scale may have batch dimensions, left of time: series in a plate, chains, particles
        return sd.unsqueeze(-2) if self.per_value else sd[..., None, None]

    def mean(self, outputs: Tensor) -> Tensor:
        """The outputs themselves."""
        return _wide(outputs)


class Gaussian(_LocationScale):
    r"""Normal around the output: :math:`v \sim N(x, \sigma^2)`.

    Args:
        sd: standard deviation in units of the values: a number; ``"learned"``, a parameter, positive by its logarithm;
            or a prior (a scalar distribution, or one over D values with ``.to_event(1)``), drawn as site ``sd`` of the
            module where it is called: read ``likelihood.sd`` outside a plate for one draw for all its rows.
        start: where a learned sd begins.
        values: D, for one learned sd per value; None for one of all.

    Raises:
        LatentDEError: an sd that is not positive.

    Example:
        >>> import torch
        >>> from pyro_latentde.distributions.likelihoods import Gaussian
        >>> Gaussian(sd="learned", start=0.5)(torch.zeros(4, 10, 3)).batch_shape
        torch.Size([4, 10, 3])
    """

    def __init__(
        self, sd: float | str | dist.Distribution = 0.1, *, start: float = 0.1, values: int | None = None
    ) -> None:
        super().__init__(sd, start, values)

    def forward(self, outputs: Tensor) -> dist.Distribution:
        """Outputs (..., T, D) to normals of batch shape (..., T, D)."""
        return SharedScaleNormal(_wide(outputs), self.scale())


class Laplace(_LocationScale):
    r"""Laplace around the output, which outliers pull less: :math:`p(v) \propto e^{-\sqrt{2} |v - x| / \sigma}`.

    Args:
        sd: standard deviation (root two times the scale of the law) in units of the values, as for `Gaussian`.
        start: where a learned sd begins.
        values: D, for one learned sd per value; None for one of all.

    Example:
        >>> import torch
        >>> from pyro_latentde.distributions.likelihoods import Laplace
        >>> Laplace(sd=2.0)(torch.zeros(10, 3)).stddev[0].round()
        tensor([2., 2., 2.])
    """

    def __init__(
        self, sd: float | str | dist.Distribution = 0.1, *, start: float = 0.1, values: int | None = None
    ) -> None:
        super().__init__(sd, start, values)

    def forward(self, outputs: Tensor) -> dist.Distribution:
        """Outputs (..., T, D) to Laplace laws of batch shape (..., T, D)."""
        return dist.Laplace(_wide(outputs), self.scale() / math.sqrt(2))


class Bernoulli(Likelihood):
    """Values 0 or 1, from logits. Grey values between them have a density under `ContinuousBernoulli`.

    Example:
        >>> import torch
        >>> from pyro_latentde.distributions.likelihoods import Bernoulli
        >>> Bernoulli().mean(torch.zeros(10, 3))[0]
        tensor([0.5000, 0.5000, 0.5000])
    """

    def forward(self, outputs: Tensor) -> dist.Distribution:
        """Logits (..., T, D) to laws of batch shape (..., T, D)."""
        return BernoulliLaw(_wide(outputs))


class ContinuousBernoulli(Likelihood):
    """Values in [0, 1], such as grey pixels, from logits.

    References:
        Loaiza-Ganem, G. and Cunningham, J. P. (2019). The continuous Bernoulli: fixing a pervasive error in
        variational autoencoders. NeurIPS 32.

    Example:
        >>> import torch
        >>> from pyro_latentde.distributions.likelihoods import ContinuousBernoulli
        >>> ContinuousBernoulli()(torch.zeros(10, 3)).log_prob(torch.full((10, 3), 0.3)).exp()[0]
        tensor([1., 1., 1.])
    """

    def forward(self, outputs: Tensor) -> dist.Distribution:
        """Logits (..., T, D) to laws of batch shape (..., T, D)."""
        return ContinuousBernoulliLaw(_wide(outputs))


class Poisson(Likelihood):
    """Counts, from the logarithms of their expected values.

    Example:
        >>> import torch
        >>> from pyro_latentde.distributions.likelihoods import Poisson
        >>> Poisson().mean(torch.zeros(10, 1))[0]
        tensor([1.])
    """

    def forward(self, outputs: Tensor) -> dist.Distribution:
        """Log-rates (..., T, D) to laws of batch shape (..., T, D)."""
        return PoissonLaw(_wide(outputs))


class Categorical(Likelihood):
    """Class numbers 0, ..., C - 1, from C logits for each value, side by side.

    Args:
        classes: C.

    Raises:
        LatentDEError: fewer than two classes.

    Example:
        >>> import torch
        >>> from pyro_latentde.distributions.likelihoods import Categorical
        >>> likelihood = Categorical(4)
        >>> likelihood(torch.zeros(10, 2 * 4)).batch_shape, likelihood.mean(torch.zeros(10, 2 * 4)).shape
        (torch.Size([10, 2]), torch.Size([10, 2, 4]))
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        if classes < 2:
            raise LatentDEError(f"Categorical: classes = {classes}; expected at least 2.")
        self.classes = self.outputs_per_value = classes

    def forward(self, outputs: Tensor) -> dist.Distribution:
        """Logits (..., T, D C) to laws of batch shape (..., T, D)."""
        if outputs.shape[-1] % self.classes:
            raise ShapeError(
                f"Categorical({self.classes}): expected outputs (..., D x {self.classes}), one logit per value and "
                f"class, got {tuple(outputs.shape)}. Give the decoder out_features = D * outputs_per_value."
            )
        return CategoricalLaw(_wide(outputs).unflatten(-1, (-1, self.classes)))

    def mean(self, outputs: Tensor) -> Tensor:
        """Class probabilities (..., T, D, C): class numbers have no meaningful average."""
        return self.forward(outputs).probs


def _wide(outputs: Tensor) -> Tensor:
    """A log-density summed over pixels wants more digits than autocast leaves."""
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
