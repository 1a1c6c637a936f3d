# SPDX-License-Identifier: Apache-2.0
"""The unit in which a decoder and a guide measure latent states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["LearnedUnit"]

# Adam moves a parameter by about the learning rate. A unit that is off by two is then right within 300 updates of 1e-3.
_PACE = 3.0


class LearnedUnit(nn.Module):
    r"""A decoder of states in a unit u > 0 that is learned,

    .. math:: y = \mathrm{net}(z / u)

    to be shared with the guide, whose states are :math:`z = \mu + \sigma u \epsilon` with :math:`\mu, \sigma` of the
    prior. What the net reads does not depend on u where the field is linear around μ: the gradient of the ELBO by u
    is that of the prior and of what is nonlinear in the field, such as the sine of an angle. That is all that tells
    how large an unseen state is. Without a unit of its own every weight of decoder and guide would have to change with
    it, and angles of pendulums came out 1.2 times too large, with wrong masses.

    Args:
        net: network (..., S) -> (..., D) with `in_features` and `out_features`.

    Example:
        >>> import torch
        >>> from pyro_latentde.nn import LearnedUnit, ResidualMLP
        >>> decoder = LearnedUnit(ResidualMLP(2, 784))
        >>> decoder(torch.randn(8, 10, 2)).shape, decoder.unit().item()
        (torch.Size([8, 10, 784]), 1.0)
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.in_features, self.out_features = net, net.in_features, net.out_features
        self.slow_log_unit = nn.Parameter(torch.zeros(()))

    def unit(self) -> Tensor:
        """u, a scalar."""
        return (_PACE * self.slow_log_unit).exp()

    def forward(self, z: Tensor) -> Tensor:
        """(..., S) -> (..., D)."""
        return self.net(z / self.unit())
