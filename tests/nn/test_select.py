# SPDX-License-Identifier: Apache-2.0
"""Networks of some of the values."""

import pytest
import torch

from pyro_latentde.errors import LatentDEError, ShapeError
from pyro_latentde.nn import MLP, Select


def test_other_values_do_not_matter():
    torch.manual_seed(0)
    net = MLP(2, 3)
    select, x = Select(net, [2, 0], 3), torch.randn(5, 4, 3)
    torch.testing.assert_close(select(x), net(torch.stack([x[..., 2], x[..., 0]], dim=-1)))
    assert (select.in_features, select.out_features) == (3, 3)


def test_columns_that_do_not_fit_are_explained():
    with pytest.raises(LatentDEError, match=r"columns \(3, 0\) of 3 values"):
        Select(MLP(2, 3), [3, 0], 3)
    with pytest.raises(LatentDEError, match="reads 2"):
        Select(MLP(2, 3), [0], 3)
    with pytest.raises(ShapeError, match=r"expected \(\.\.\., 3\), got \(4, 2\)"):
        Select(MLP(1, 3), [0], 3)(torch.zeros(4, 2))
