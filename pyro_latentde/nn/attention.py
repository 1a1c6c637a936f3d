# SPDX-License-Identifier: Apache-2.0
"""Temporal attention with relative encodings of continuous time."""

import math

import torch
from torch import Tensor, nn

from pyro_latentde.nn._series import SeriesEncoder

__all__ = ["AttentionEncoder", "TimeAttention"]

SLOWEST, FASTEST = 0.1, 10.0  # rates at the start, in radians per unit of the encoder's clock


class TimeAttention(nn.Module):
    r"""Attention in which times matter through their differences only.

    .. math::
        y_i = W \sum_j a_{ij} R(t_j - t_i) v_j, \quad
        a_{ij} \propto \exp\!\big(q_i^T R(t_j - t_i) k_j / \sqrt d - \lambda |t_j - t_i|\big)

    R(t) rotates pairs of numbers by the angles ω t. The rates ω start spread evenly in their logarithm
    over 0.1 ... 10, the decay rates λ > 0 (one per head) at 0.1; both are learned. A row without any key
    gives 0.

    Args:
        hidden: H, size of a state.
        heads: parts that attend by themselves; each has an even number of at least H / heads numbers.

    References:
        Su, J. et al. (2024). RoFormer: enhanced transformer with rotary position embedding. Neurocomputing 568.
        Iakovlev, V., Yildiz, C., Heinonen, M. and Lahdesmaki, H. (2023). Latent neural ODEs with sparse Bayesian
        multiple shooting. ICLR.

    Example:
        >>> import torch
        >>> from pyro_latentde.nn.attention import TimeAttention
        >>> allowed = torch.ones(5, 7, 7, dtype=torch.bool)
        >>> TimeAttention(16, heads=4)(torch.randn(5, 7, 16), torch.rand(5, 7), allowed).shape
        torch.Size([5, 7, 16])
    """

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads, self.pairs = heads, math.ceil(hidden / (2 * heads))
        width = 2 * self.pairs * heads
        # A bias of the keys would add the same to all logits of a query, and cancel.
        self.query, self.key = nn.Linear(hidden, width), nn.Linear(hidden, width, bias=False)
        self.value, self.join = nn.Linear(hidden, width), nn.Linear(width, hidden)
        spread = torch.linspace(math.log(SLOWEST), math.log(FASTEST), heads * self.pairs)
        self.log_rate = nn.Parameter(spread.view(self.pairs, heads).T.contiguous())  # each head slow and fast ones
        self.log_decay = nn.Parameter(torch.full((heads,), math.log(0.1)))

    def forward(self, x: Tensor, times: Tensor, allowed: Tensor) -> Tensor:
        """States (N, T, H) at times (N, T), and allowed (N, T, T), True where i may look at j -> (N, T, H)."""
        angle = times[:, None, :, None] * self.log_rate.exp()[:, None]  # (N, heads, T, pairs)
        q, k, v = (_turn(self._split(part(x)), angle) for part in (self.query, self.key, self.value))
        distance = (times[:, None, :] - times[:, :, None]).abs()[:, None]
        logits = q @ k.mT / math.sqrt(q.shape[-1]) - self.log_decay.exp()[:, None, None] * distance
        allowed = allowed[:, None]
        # The lowest number instead of -inf: a row that may look nowhere has a softmax without NaN, then zeroed.
        weights = torch.softmax(logits.masked_fill(~allowed, torch.finfo(logits.dtype).min), dim=-1) * allowed
        seen = _turn(weights @ v, -angle)
        return self.join(seen.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """(N, T, heads * d) -> (N, heads, T, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class AttentionEncoder(SeriesEncoder):
    r"""Layers of attention from every time to the observations from it on.

    .. math::
        x^0 = W [x, m] + b, \quad u = x^l + \mathrm{attention}(\mathrm{norm}(x^l), t), \quad
        x^{l+1} = u + \mathrm{net}(\mathrm{norm}(u)), \quad \mathrm{states} = \mathrm{norm}(x^L)

    Attention sees differences of times only, in units of `time_scale`, as rotations with learned rates (see
    `TimeAttention`). Times with nothing observed ask, but are never looked at. Memory grows with the square of the
    number of times. Affine maps start by torch's own rule.

    Args:
        in_features: F, values per time.
        hidden: H, size of a state.
        heads: attention heads of a layer.
        layers: layers of attention, each with a network of one hidden layer of 2 H units (GELU).
        time_scale: one unit of the encoder's clock, in units of the times. Rates start at 0.1 ... 10 radians per unit.

    Raises:
        ShapeError: in `forward` and `states`, shapes, dtypes or devices do not fit.

    References:
        Vaswani, A. et al. (2017). Attention is all you need. NeurIPS.
        Iakovlev, V., Yildiz, C., Heinonen, M. and Lahdesmaki, H. (2023). Latent neural ODEs with sparse Bayesian
        multiple shooting. ICLR.

    Example:
        >>> import torch
        >>> from pyro_latentde.nn import AttentionEncoder
        >>> encoder = AttentionEncoder(3, 16)
        >>> times, values = torch.rand(8, 20).sort(dim=1).values, torch.randn(8, 20, 3)
        >>> encoder.states(times, values, torch.rand(8, 20, 3) < 0.5).shape
        torch.Size([8, 20, 16])
    """

    def __init__(
        self, in_features: int, hidden: int, *, heads: int = 4, layers: int = 2, time_scale: float = 1.0
    ) -> None:
        super().__init__(in_features, hidden, time_scale)
        self.embed = nn.Linear(2 * in_features, hidden)
        self.layers = nn.ModuleList(_Layer(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)

    def _states(self, times: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        allowed = mask.any(dim=-1)[:, None, :]
        allowed = allowed & torch.ones(allowed.shape[-1], allowed.shape[-1], device=mask.device).triu().bool()
        # Differences are all that matters, and of small numbers they keep more digits.
        times = (times - times[:, :1]).to(values.dtype)
        x = self.embed(torch.cat([values, mask.to(values.dtype)], dim=-1))
        for layer in self.layers:
            x = layer(x, times, allowed)
        return self.norm(x)


class _Layer(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.before_attention, self.attention = nn.LayerNorm(hidden), TimeAttention(hidden, heads)
        self.before_net = nn.LayerNorm(hidden)
        self.net = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))

    def forward(self, x: Tensor, times: Tensor, allowed: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x), times, allowed)
        return x + self.net(self.before_net(x))


def _turn(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate the pairs (first half, second half) of x (..., 2 P) by angles (..., P)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
