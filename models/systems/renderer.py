# SPDX-License-Identifier: Apache-2.0
r"""Pictures of rods: line segments with round ends and a smooth edge.

A pixel at distance d from a segment has the value

.. math::
    \tfrac12 \Bigl[\operatorname{erf} \frac{w - d}{\sqrt 2 s} + \operatorname{erf} \frac{w + d}{\sqrt 2 s}\Bigr],

a bar of half-width w seen through a Gaussian blur of width s: 1 within, 0 outside. It is a smooth function of
the rod's ends, so that a picture moves with the state by less than a pixel. Several rods a, b join as
1 - (1 - a)(1 - b).
"""

import math

import torch
from torch import Tensor

__all__ = ["draw_rods"]

HALF_WIDTH = 1.2  # w, pixels
BLUR = 0.6  # s, pixels
CHUNK = 256  # pictures at a time: the working set of one chunk stays in the cache


def draw_rods(joints: Tensor, frame: tuple[int, int], *, half_width: float = HALF_WIDTH, blur: float = BLUR) -> Tensor:
    """Pictures of chains of rods.

    Args:
        joints: (*batch, K, 2), the K joints of K - 1 rods as (column, row) in pixels. The middle of the pixel at
            the top left is (0.5, 0.5), and rows run downwards.
        frame: height and width in pixels.
        half_width: half the width of a rod, pixels.
        blur: width of the edge, pixels.

    Returns:
        (*batch, height * width), float32 in [0, 1], row by row.

    Example:
        >>> import torch
        >>> from pyro_latentde.models.systems.renderer import draw_rods
        >>> bar = torch.tensor([[4.0, 2.0], [4.0, 6.0]])
        >>> [round(x, 2) for x in draw_rods(bar, (8, 8)).reshape(8, 8)[4].tolist()]
        [0.0, 0.02, 0.31, 0.88, 0.88, 0.31, 0.02, 0.0]
    """
    chains = joints.reshape(-1, *joints.shape[-2:])
    pictures = torch.empty(len(chains), frame[0] * frame[1], device=joints.device)
    for part, page in zip(chains.split(CHUNK), pictures.split(CHUNK), strict=True):
        page.copy_(_draw(part.float(), frame, half_width, blur))
    return pictures.reshape(*joints.shape[:-2], -1)


def _draw(joints: Tensor, frame: tuple[int, int], half_width: float, blur: float) -> Tensor:
    height, width = frame
    down, across = (torch.arange(size, device=joints.device) + 0.5 for size in (height, width))
    pixels = torch.stack([across.repeat(height), down.repeat_interleave(width)])  # (2, P)
    paper = 1.0
    for a, b in zip(joints.unbind(1)[:-1], joints.unbind(1)[1:], strict=True):
        paper = paper * (1.0 - _bar(_distance(pixels, a, b), half_width, blur))
    return 1.0 - paper


def _distance(pixels: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Of each pixel (2, P) from the segments a to b, both (B, 2): (B, P)."""
    rod = b - a
    x, y = pixels[0] - a[:, :1], pixels[1] - a[:, 1:]
    along = (x * rod[:, :1] + y * rod[:, 1:]) / rod.square().sum(-1, keepdim=True).clamp_min(1e-12)
    along = along.clamp(0.0, 1.0)
    return torch.hypot(x - along * rod[:, :1], y - along * rod[:, 1:])


def _bar(distance: Tensor, half_width: float, blur: float) -> Tensor:
    scale = math.sqrt(2.0) * blur
    return 0.5 * (torch.erf((half_width - distance) / scale) + torch.erf((half_width + distance) / scale))
