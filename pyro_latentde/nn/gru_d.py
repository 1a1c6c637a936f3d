# SPDX-License-Identifier: Apache-2.0
"""GRU-D: a recurrent network whose inputs and state decay while nothing is observed."""

import torch
from torch import Tensor, nn

from pyro_latentde.nn._checks import check_series
from pyro_latentde.nn._series import Reading, SeriesEncoder, read

__all__ = ["GRUDEncoder"]


class GRUDEncoder(SeriesEncoder):
    r"""GRU with trainable decay of missing inputs towards their means, and of the state towards zero.

    .. math::
        \gamma_x &= \exp(-\max(0, w_x \odot \delta_k + b_x)), \quad \gamma_h = \exp(-\max(0, W_h \delta_k + b_h)) \\
        \hat x_k &= m_k \odot x_k + (1 - m_k) \odot (\gamma_x \odot x' + (1 - \gamma_x) \odot \bar x) \\
        h_k &= \mathrm{GRU}(\gamma_h \odot h_{k-1}, [\hat x_k, m_k]), \quad h_0 = 0

    The series is read backwards in time: x' is the value of each feature read last, δ the time since then in units of
    `time_scale` (for a feature not read yet: since the first reading, and x' is the mean). The means are a buffer:
    zero until `set_means`. Decay rates start uniform in [0, 1] for the inputs and in [0, 1/F] for the state, with zero
    biases: rates that start negative would be cut off and never learn. The GRU starts by torch's own rule.

    Args:
        in_features: F, values per time.
        hidden: H, size of the state.
        time_scale: one unit of the encoder's clock, in units of the times.

    Raises:
        ShapeError: in `forward` and `states`, shapes, dtypes or devices do not fit.

    References:
        Che, Z., Purushotham, S., Cho, K., Sontag, D. and Liu, Y. (2018). Recurrent neural networks for multivariate
        time series with missing values. Scientific Reports 8, 6085.

    Example:
        >>> import torch
        >>> from pyro_latentde.nn import GRUDEncoder
        >>> encoder = GRUDEncoder(3, 16)
        >>> times, values = torch.rand(8, 20).sort(dim=1).values, torch.randn(8, 20, 3)
        >>> mask = torch.rand(8, 20, 3) < 0.5
        >>> encoder.set_means(values, mask)
        >>> encoder(times, values, mask).shape
        torch.Size([8, 16])
    """

    means: Tensor

    def __init__(self, in_features: int, hidden: int, *, time_scale: float = 1.0) -> None:
        super().__init__(in_features, hidden, time_scale)
        self.cell = nn.GRUCell(2 * in_features, hidden)
        self.input_rate = nn.Parameter(torch.rand(in_features))
        self.input_bias = nn.Parameter(torch.zeros(in_features))
        self.state_decay = nn.Linear(in_features, hidden)
        nn.init.uniform_(self.state_decay.weight, 0.0, 1.0 / in_features)
        nn.init.zeros_(self.state_decay.bias)
        self.register_buffer("means", torch.zeros(in_features))

    @torch.no_grad()
    def set_means(self, values: Tensor, mask: Tensor) -> None:
        """Take the means of what is observed in values (N, T, F); 0 for a feature that never is."""
        check_series(self, values[..., 0], values, mask)
        total = torch.where(mask, values, 0.0).sum(dim=(0, 1))
        self.means.copy_(total / mask.sum(dim=(0, 1)).clamp(min=1))

    def _states(self, times: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        reading = read(times, values, mask)
        last, since = self._before(reading)
        inputs = torch.where(reading.mask, reading.values, self._decayed(last, since))
        inputs = torch.cat([inputs, reading.mask.to(inputs.dtype)], dim=-1)
        kept = torch.exp(-torch.relu(self.state_decay(since)))
        h, states = torch.zeros_like(kept[:, 0]), []
        for x, keep in zip(inputs.unbind(1), kept.unbind(1), strict=True):
            h = self.cell(x, keep * h)
            states.append(h)
        return reading.spread(torch.stack(states, dim=1))

    def _decayed(self, last: Tensor, since: Tensor) -> Tensor:
        kept = torch.exp(-torch.relu(self.input_rate * since + self.input_bias))
        return kept * last + (1 - kept) * self.means

    def _before(self, reading: Reading) -> tuple[Tensor, Tensor]:
        """What was read of each feature before each reading, and the time since then; both (N, K, F)."""
        length, features = reading.mask.shape[1:]
        index = torch.arange(length, device=reading.mask.device)[:, None]
        seen = torch.where(reading.mask, index, -1).cummax(dim=1).values
        seen = torch.nn.functional.pad(seen[:, :-1], (0, 0, 1, 0), value=-1)
        at = seen.clamp(min=0)
        last = torch.where(seen >= 0, reading.values.gather(1, at), self.means)
        times = reading.times[..., None].expand(-1, -1, features)
        return last, (times.gather(1, at) - times).abs().to(last.dtype)
