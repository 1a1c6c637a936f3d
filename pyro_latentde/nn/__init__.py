# SPDX-License-Identifier: Apache-2.0
"""Networks in plain PyTorch: of frames and of series."""

from pyro_latentde.nn.attention import AttentionEncoder
from pyro_latentde.nn.conv import ConvDecoder, ConvEncoder
from pyro_latentde.nn.frames import FrameWise
from pyro_latentde.nn.gru_d import GRUDEncoder
from pyro_latentde.nn.learned_unit import LearnedUnit
from pyro_latentde.nn.least_squares import LeastSquares
from pyro_latentde.nn.mlp import MLP, ResidualMLP, start_at
from pyro_latentde.nn.ode_rnn import ODERNNEncoder
from pyro_latentde.nn.pooling import StatisticsPooling
from pyro_latentde.nn.principal_decoder import PrincipalDecoder
from pyro_latentde.nn.recurrent import RecurrentEncoder
from pyro_latentde.nn.select import Select
from pyro_latentde.nn.standardized import Standardized

__all__ = [
    "MLP",
    "AttentionEncoder",
    "ConvDecoder",
    "ConvEncoder",
    "FrameWise",
    "GRUDEncoder",
    "LearnedUnit",
    "LeastSquares",
    "ODERNNEncoder",
    "PrincipalDecoder",
    "RecurrentEncoder",
    "ResidualMLP",
    "Select",
    "Standardized",
    "StatisticsPooling",
    "start_at",
]
