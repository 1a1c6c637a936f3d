# SPDX-License-Identifier: Apache-2.0
"""FrameWise: the encoder of frames, then the encoder of series."""

import pytest
import torch

from pyro_latentde.errors import ShapeError
from pyro_latentde.nn import MLP, ConvEncoder, FrameWise, RecurrentEncoder

TIMES = torch.tensor([[0.0, 0.1, 0.4], [0.0, 0.2, 0.3]])


def test_is_the_composition():
    torch.manual_seed(0)
    frames, series = ConvEncoder((6, 6), 4, channels=(3,)), RecurrentEncoder(4, 5, bidirectional=True)
    encoder = FrameWise(frames, series)
    video, mask = torch.rand(2, 3, 36), torch.ones(2, 3, 36, dtype=torch.bool)
    mask[0, 1, :10] = False  # some pixels
    mask[1, 2] = False  # a whole frame
    observed = mask.any(-1, keepdim=True).expand(2, 3, 4)
    features = frames(video * mask)
    torch.testing.assert_close(encoder(TIMES, video, mask), series(TIMES, features, observed))
    torch.testing.assert_close(encoder.states(TIMES, video, mask), series.states(TIMES, features, observed))
    assert (encoder.in_features, encoder.out_features) == (36, 10)


def test_may_be_nested_and_mixed_precision_reaches_the_frames():
    torch.manual_seed(0)
    seen = []
    inner = MLP(36, 4, (8,))
    inner.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    encoder = FrameWise(inner, FrameWise(MLP(4, 3, ()), RecurrentEncoder(3, 5)))
    video = torch.rand(2, 3, 36)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = encoder(TIMES, video, torch.ones_like(video, dtype=torch.bool))
    assert seen == [torch.bfloat16] and out.dtype == torch.float32


def test_networks_that_do_not_fit_are_explained():
    with pytest.raises(ShapeError, match="MLP gives 4 features of a frame, RecurrentEncoder takes 3 per time"):
        FrameWise(MLP(36, 4), RecurrentEncoder(3, 5))
