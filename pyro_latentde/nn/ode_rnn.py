# SPDX-License-Identifier: Apache-2.0
"""ODE-RNN: a recurrent network whose state follows a differential equation between observations."""

import torch
from torch import Tensor, nn

from pyro_latentde.errors import SolveError
from pyro_latentde.nn._series import SeriesEncoder, read
from pyro_latentde.nn.mlp import MLP
from pyro_latentde.solve.methods.catalog import get_method
from pyro_latentde.solve.torch_engine.runge_kutta import main_stages

__all__ = ["GatedUnit", "ODERNNEncoder"]


class GatedUnit(nn.Module):
    r"""A GRU cell whose gates and candidate are networks with one hidden layer.

    .. math:: (z, r) = \sigma(g([x, h])), \quad n = \tanh(c([x, r \odot h])), \quad h' = (1 - z) \odot n + z \odot h

    Args:
        in_features: F, inputs x.
        hidden: H, size of the state.
        units: width of the hidden tanh layers of g and c.

    References:
        Rubanova, Y., Chen, R. T. Q. and Duvenaud, D. (2019). Latent ODEs for irregularly-sampled time series. NeurIPS.

    Example:
        >>> import torch
        >>> from pyro_latentde.nn.ode_rnn import GatedUnit
        >>> GatedUnit(3, 8, units=100)(torch.randn(5, 3), torch.zeros(5, 8)).shape
        torch.Size([5, 8])
    """

    def __init__(self, in_features: int, hidden: int, units: int) -> None:
        super().__init__()
        self.gates = MLP(in_features + hidden, 2 * hidden, (units,), "tanh", "sigmoid")
        self.candidate = MLP(in_features + hidden, hidden, (units,), "tanh", "tanh")

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Inputs (N, F) and state (N, H) -> new state (N, H)."""
        z, r = self.gates(torch.cat([x, h], dim=-1)).chunk(2, dim=-1)
        n = self.candidate(torch.cat([x, r * h], dim=-1))
        return n + z * (h - n)


class ODERNNEncoder(SeriesEncoder):
    r"""State that evolves from each observation to the one before it, and is updated there.

    .. math::
        \frac{dh}{ds} = f(h), \quad h(s_{k-1}) = h_{k-1}, \quad h_k = \mathrm{unit}([x_k, m_k], h(s_k)), \quad h_0 = 0

    s runs backwards in time, in units of `time_scale`. f is a tanh network with `layers` hidden layers. Every gap, of
    every length and also of length zero, is crossed by the same number of Runge-Kutta steps of this package's solver,
    all rows at once: the rows need not agree about their times. If nothing was observed at the first time, the state
    evolves up to there. All weights start by torch's own rule.

    Args:
        in_features: F, values per time.
        hidden: H, size of the state.
        units: width of the hidden layers of f.
        layers: hidden layers of f.
        gru_units: width of the hidden layer of the unit's gates; None makes the unit an ordinary GRU cell.
        method: any Runge-Kutta method of `odesolve`.
        steps: steps per gap; with a method of order p the error falls as steps^-p.
        time_scale: one unit of the encoder's clock, in units of the times. Gaps of many units need more steps.

    Raises:
        SolveError: an unknown method, or no step.
        ShapeError: in `forward` and `states`, shapes, dtypes or devices do not fit.

    References:
        Rubanova, Y., Chen, R. T. Q. and Duvenaud, D. (2019). Latent ODEs for irregularly-sampled time series. NeurIPS.

    Example:
        >>> import torch
        >>> from pyro_latentde.nn import ODERNNEncoder
        >>> encoder = ODERNNEncoder(3, 16, time_scale=0.1)
        >>> times, values = torch.rand(8, 20).sort(dim=1).values, torch.randn(8, 20, 3)
        >>> encoder(times, values, torch.rand(8, 20, 3) < 0.5).shape
        torch.Size([8, 16])
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        *,
        units: int = 100,
        layers: int = 1,
        gru_units: int | None = 100,
        method: str = "rk4",
        steps: int = 1,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__(in_features, hidden, time_scale)
        if steps < 1:
            raise SolveError(f"ODERNNEncoder: expected at least one step per gap, got steps={steps}.")
        self.method, self.steps = method, steps
        if get_method(method).kind not in ("explicit", "switching"):
            raise SolveError(f"ODERNNEncoder: expected an explicit Runge-Kutta method such as rk4, got {method!r}.")
        self.field = MLP(hidden, hidden, (units,) * layers, "tanh")
        inputs = 2 * in_features
        self.unit = nn.GRUCell(inputs, hidden) if gru_units is None else GatedUnit(inputs, hidden, gru_units)

    def _evolve(self, h: Tensor, gap: Tensor) -> Tensor:
        """States (N, H) after gaps (N,), differentiable.

        These are the steps that `odesolve` takes with a fixed step size. Its machinery of row-wise step control and
        replay costs ten times as much as one step of a small network, and nothing of it is needed here.
        """
        method, zero, step = get_method(self.method), torch.zeros_like(gap), gap / self.steps

        def field(_: Tensor, y: Tensor) -> Tensor:
            return self.field(y)

        for _ in range(self.steps):
            h = main_stages(field, method, zero, h, step, field(zero, h))[1]
        return h

    def _states(self, times: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        reading = read(times, values, mask)
        inputs = torch.cat([reading.values, reading.mask.to(values.dtype)], dim=-1)
        observed = reading.mask.any(dim=-1, keepdim=True)
        h, states = values.new_zeros(len(values), self.out_features), []
        for k in range(inputs.shape[1]):
            before = h if k == 0 else self._evolve(h, reading.gaps[:, k])
            h = torch.where(observed[:, k], self.unit(inputs[:, k], before), before)
            states.append(h)
        return reading.spread(torch.stack(states, dim=1))
