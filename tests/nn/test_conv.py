# SPDX-License-Identifier: Apache-2.0
"""Convolutional encoder and decoder: sizes, order of pixels, what they can see."""

import copy

import pytest
import torch

from pyro_latentde.errors import ShapeError
from pyro_latentde.nn import ConvDecoder, ConvEncoder

FRAMES = [(28, 28), (32, 32), (7, 13), (1, 5), (3, 9, 10)]


@pytest.mark.parametrize("frame", FRAMES)
def test_any_frame_there_and_back(frame):
    torch.manual_seed(0)
    encoder, decoder = ConvEncoder(frame, 6, channels=(4, 8)), ConvDecoder(6, frame, channels=(8, 4), output="sigmoid")
    size = torch.Size(frame).numel()
    x = torch.rand(2, 5, size, requires_grad=True)
    code = encoder(x)
    picture = decoder(code)
    assert code.shape == (2, 5, 6) and picture.shape == (2, 5, size)
    assert (encoder.in_features, encoder.out_features, decoder.in_features, decoder.out_features) == (size, 6, 6, size)
    picture.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in (*encoder.parameters(), *decoder.parameters()))
    assert (0 < picture).all() and (picture < 1).all()


def test_frames_are_encoded_one_by_one():
    torch.manual_seed(0)
    encoder, decoder = ConvEncoder((9, 8), 4).double(), ConvDecoder(4, (9, 8)).double()
    x = torch.rand(3, 2, 72, dtype=torch.float64)
    torch.testing.assert_close(encoder(x)[1, 1], encoder(x[1, 1]))
    torch.testing.assert_close(decoder(encoder(x))[1, 1], decoder(encoder(x[1, 1])))


@pytest.mark.parametrize("frame", [(28, 28), (9, 7)])
def test_every_pixel_is_seen_and_drawn(frame):
    torch.manual_seed(0)
    encoder, decoder = ConvEncoder(frame, 8), ConvDecoder(8, frame)
    x = torch.rand(64, encoder.in_features, requires_grad=True)
    encoder(x).square().sum().backward()
    assert (x.grad.abs().amax(0) > 0).all()
    assert (decoder(torch.randn(64, 8)).std(0) > 0).all()


def test_pixels_come_row_by_row():
    """A picture shifted down by 8 rows shifts the last feature map by one row."""
    torch.manual_seed(0)
    encoder = copy.deepcopy(ConvEncoder((32, 16), 1)).double()
    maps = encoder.net[:-2]  # before flattening
    picture = torch.zeros(32, 16, dtype=torch.float64)
    picture[9:12, 5:9] = torch.rand(3, 4, dtype=torch.float64)
    shifted = picture.roll(8, dims=0)
    background = maps(torch.zeros(1, 1, 32, 16, dtype=torch.float64))
    here, there = (maps(p.flatten().view(1, *encoder.picture)) - background for p in (picture, shifted))
    torch.testing.assert_close(there[0, :, 1:], here[0, :, :-1])
    assert here.abs().max() > 0


def test_wrong_pictures_are_explained():
    encoder, decoder = ConvEncoder((28, 28), 4), ConvDecoder(4, (28, 28))
    match = (
        r"pictures \(28, 28\), row by row as \(\.\.\., 784\); got \(5, 1024\): image size that does not match the enc"
    )
    with pytest.raises(ShapeError, match=match):
        encoder(torch.zeros(5, 1024))
    with pytest.raises(ShapeError, match="image size"):
        encoder(torch.zeros(5, 28, 28))
    with pytest.raises(ShapeError, match="weights torch.float32"):
        encoder(torch.zeros(5, 784, dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"expected \(\.\.\., 4\), got \(5, 3\)"):
        decoder(torch.zeros(5, 3))
    for make in (lambda: ConvEncoder((784,), 4), lambda: ConvDecoder(4, (28, 0))):
        with pytest.raises(ShapeError, match=r"frame \(height, width\)"):
            make()
