# SPDX-License-Identifier: Apache-2.0
"""Where the decoder of coupled oscillators begins, against the matrix by which they were mixed."""

import torch

from pyro_latentde.models.systems import stuart_landau
from pyro_latentde.train.registry import RECIPES


def test_the_decoder_begins_in_planes_that_turn_as_the_oscillators_do():
    recipe = RECIPES["goku-stuart-landau"]
    for seed in range(4):  # of planes that turn at random, all would with a probability below one in a thousand
        split = recipe.data(recipe.quick.changed(train=60, heldout=2, test=2), seed)
        decoder = recipe.pair(split).model.decoder
        lift = stuart_landau.lift(torch.eye(6, dtype=torch.float64)).T
        mix = torch.linalg.lstsq(lift, decoder.weight.detach().double()).solution  # true states of the decoder's
        turn = torch.zeros(6, 6, dtype=torch.float64)
        turn[:3, 3:], turn[3:, :3] = -torch.eye(3), torch.eye(3)  # x towards y
        turned = torch.linalg.solve(mix, turn @ mix)
        assert torch.linalg.cond(mix) < 3
        # a mixture of whole oscillators commutes with turning all of them
        assert (turned - turn).abs().max() < 0.15
