# SPDX-License-Identifier: Apache-2.0
"""PyTorch operators on arrays of symbolic scalars: shapes and views are NumPy's, arithmetic becomes graph nodes.

NumPy views alias as PyTorch's do, so fields written in place (``dy[0] = ...``) need nothing special. Each module of
this folder enters its operators in one table, :data:`MIRRORS`.
"""

from pyro_latentde.solve.fused.mirrors import (
    creation,
    elementwise,
    indexing,
    products,
    reductions,
    refusals,
    views,
)
from pyro_latentde.solve.fused.mirrors.symbols import MIRRORS, Sym, constant_sym

__all__ = [
    "MIRRORS",
    "Sym",
    "constant_sym",
    "creation",
    "elementwise",
    "indexing",
    "products",
    "reductions",
    "refusals",
    "views",
]
