# SPDX-License-Identifier: Apache-2.0
"""The renderer: against a picture of many small pixels, and smooth in the angle."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch

from pyro_latentde.models.systems.renderer import BLUR, HALF_WIDTH, draw_rods

SIZE = 28


def rod(theta, length=10.0):
    """(*batch, 2, 2): from the middle, at an angle from below."""
    middle = torch.full((*theta.shape, 2), SIZE / 2, dtype=theta.dtype)
    return torch.stack([middle, middle + length * torch.stack([theta.sin(), theta.cos()], -1)], dim=-2)


def test_a_rod_is_a_blurred_bar():
    """Drawn hard on pixels of 1/16 and blurred by SciPy; only at the round ends our profile differs, by under 0.12."""
    fine, (x0, y0), (x1, y1) = 16, (14.0, 14.0), rod(torch.tensor(0.7)).tolist()[1]
    grid = (np.arange(SIZE * fine) + 0.5) / fine
    x, y = np.meshgrid(grid - x0, grid - y0)
    along = np.clip((x * (x1 - x0) + y * (y1 - y0)) / 100.0, 0.0, 1.0)
    distance = np.hypot(x - along * (x1 - x0), y - along * (y1 - y0))
    hard = (distance < HALF_WIDTH).astype(float)
    blurred = scipy.ndimage.gaussian_filter(hard, BLUR * fine)
    middles = blurred.reshape(SIZE, fine, SIZE, fine)[
        :, fine // 2 - 1 : fine // 2 + 1, :, fine // 2 - 1 : fine // 2 + 1
    ]
    expected = middles.mean((1, 3))
    drawn = draw_rods(rod(torch.tensor(0.7)), (SIZE, SIZE)).reshape(SIZE, SIZE).numpy()
    centre = np.arange(SIZE) + 0.5
    across, down = np.meshgrid(centre - x0, centre - y0)
    inner = np.abs((across * (x1 - x0) + down * (y1 - y0)) / 100.0 - 0.5) < 0.3
    assert np.abs(drawn - expected)[inner].max() < 0.01
    assert np.abs(drawn - expected).max() < 0.12


def test_ink_does_not_depend_on_the_angle():
    theta = torch.linspace(-math.pi, math.pi, 721, dtype=torch.float64)
    ink = draw_rods(rod(theta), (SIZE, SIZE)).double().sum(-1)
    assert (ink.max() - ink.min()) / ink.mean() < 2e-3
    # a bar of this width, with its two half discs
    assert ink.mean().item() == pytest.approx(10 * 2 * HALF_WIDTH + math.pi * HALF_WIDTH**2, rel=0.05)


def test_pixels_move_smoothly_with_the_angle():
    """A tenth of a degree moves the tip by 0.02 pixels: no pixel jumps, and the changes change little."""
    theta = torch.deg2rad(torch.arange(-60.0, 60.0, 0.1, dtype=torch.float64))
    pictures = draw_rods(rod(theta), (SIZE, SIZE)).double()
    first, second = pictures.diff(dim=0), pictures.diff(n=2, dim=0)
    assert first.abs().max() < 0.02
    assert second.abs().max() < 0.1 * first.abs().max()
    assert (first.abs().sum(-1) > 0.05).all()  # and every step is to be seen


def test_position_of_a_rod():
    """The centre of mass of the ink is the middle of the rod."""
    theta = torch.linspace(-3, 3, 50, dtype=torch.float64)
    pictures = draw_rods(rod(theta), (SIZE, SIZE)).double().reshape(-1, SIZE, SIZE)
    centre, ink = torch.arange(SIZE) + 0.5, pictures.sum((1, 2))
    across, down = (pictures.sum(1) * centre).sum(-1) / ink, (pictures.sum(2) * centre).sum(-1) / ink
    torch.testing.assert_close(torch.stack([across, down], -1), rod(theta).mean(-2), atol=0.01, rtol=0)


def test_shapes_batches_and_range():
    joints = torch.rand(3, 500, 3, 2, generator=torch.Generator().manual_seed(0)) * 20
    pictures = draw_rods(joints, (16, 20))
    assert pictures.shape == (3, 500, 320) and pictures.dtype == torch.float32
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert torch.equal(draw_rods(joints[1, 7], (16, 20)), pictures[1, 7])
    both = 1 - (1 - draw_rods(joints[..., :2, :], (16, 20))) * (1 - draw_rods(joints[..., 1:, :], (16, 20)))
    torch.testing.assert_close(pictures, both)


def test_a_rod_without_length_is_a_dot():
    dot = draw_rods(torch.full((2, 2), 4.5), (9, 9)).reshape(9, 9)
    assert dot.isfinite().all() and torch.equal(dot, dot.T) and dot[4, 4] == dot.max()
