# SPDX-License-Identifier: Apache-2.0
"""Recurrent networks over irregular series."""

import torch
from torch import Tensor, nn

from pyro_latentde.errors import LatentDEError
from pyro_latentde.nn._series import SeriesEncoder, read
from pyro_latentde.solve.choices import not_among

__all__ = ["RecurrentEncoder"]

CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


class RecurrentEncoder(SeriesEncoder):
    r"""RNN, GRU or LSTM over the observations, read backwards in time.

    .. math:: h_k = \mathrm{cell}(h_{k-1}, [x_k, m_k, \Delta_k]), \quad h_0 = 0

    x are the values (0 where missing), m the mask, and Δ the gap to the observation read before, in units of
    `time_scale` (0 for the first). A bidirectional one has a second network that reads forwards: the encoding is
    its state after the last observation beside that of the first network at the start. Weights and biases start uniform
    in :math:`\pm 1 / \sqrt{H}`, torch's own rule.

    Args:
        in_features: F, values per time.
        hidden: H, size of the state of one direction.
        cell: ``"rnn"`` (tanh), ``"gru"`` or ``"lstm"``.
        layers: recurrent layers, each reading the states of the one before.
        bidirectional: read forwards as well; `out_features` is then 2 H.
        time_scale: one unit of the encoder's clock, in units of the times.

    Raises:
        LatentDEError: an unknown cell.
        ShapeError: in `forward` and `states`, shapes, dtypes or devices do not fit.

    References:
        Cho, K. et al. (2014). Learning phrase representations using RNN encoder-decoder. EMNLP.
        Hochreiter, S. and Schmidhuber, J. (1997). Long short-term memory. Neural Computation 9, 1735-1780.

    Example:
        >>> import torch
        >>> from pyro_latentde import Series
        >>> from pyro_latentde.nn import RecurrentEncoder
        >>> series = Series.from_tensors(torch.tensor([0.0, 0.4, 1.5]), torch.rand(8, 3, 2))
        >>> encoder = RecurrentEncoder(2, 16, cell="lstm", bidirectional=True)
        >>> encoder(series.times, series.values, series.mask).shape
        torch.Size([8, 32])
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        *,
        cell: str = "gru",
        layers: int = 1,
        bidirectional: bool = False,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__(in_features, hidden * (2 if bidirectional else 1), time_scale)
        if cell not in CELLS:
            raise LatentDEError(not_among("cell", cell, CELLS))
        inputs = 2 * in_features + 1
        directions = [True, False] if bidirectional else [True]
        self.directions = nn.ModuleDict(
            {_name(backward): CELLS[cell](inputs, hidden, layers, batch_first=True) for backward in directions}
        )

    def _states(self, times: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        states = []
        for name, network in self.directions.items():
            reading = read(times, values, mask, backward=name == _name(True))
            inputs = [reading.values, reading.mask.to(values.dtype), reading.gaps[..., None]]
            states.append(reading.spread(network(torch.cat(inputs, dim=-1))[0]))
        return torch.cat(states, dim=-1)

    def _encoding(self, states: Tensor) -> Tensor:
        hidden = states.shape[-1] // len(self.directions)
        return torch.cat([states[:, 0, :hidden], states[:, -1, hidden:]], dim=-1)


def _name(backward: bool) -> str:
    return "from_end" if backward else "from_start"
