# SPDX-License-Identifier: Apache-2.0
"""The record of draws: shapes, selection, the table."""

import conjugate_model as conjugate
import numpy as np
import pytest
import torch

from pyro_latentde.errors import ShapeError
from pyro_latentde.posterior import Posterior


def test_unequal_leading_dimensions_are_refused():
    with pytest.raises(ShapeError, match=r"\(2, 5\) as 'a' does; got shape \(2, 4\) for 'lp'"):
        Posterior(samples={"a": torch.zeros(2, 5)}, stats={"lp": torch.zeros(2, 4)})
    with pytest.raises(ShapeError, match="at least one"):
        Posterior(samples={})


def test_draws_and_select_keep_the_order():
    p = Posterior(samples={"a": torch.arange(24).reshape(2, 4, 3), "b": torch.arange(8).reshape(2, 4)})
    assert torch.equal(p.draws()["b"], torch.arange(8))
    one = p.select(["b"], chains=[1], draws=slice(None, None, 2))
    assert list(one.samples) == ["b"] and one["b"].tolist() == [[4, 6]]
    assert p.thin(4)["b"].tolist() == [[0, 3], [4, 7]]
    with pytest.raises(ShapeError, match="'c'"):
        p.select(["c"])


def test_repr_is_short_and_tells_divergences():
    p = conjugate.posterior(conjugate.data(), chains=2, draws=50)
    assert repr(p) == "Posterior(nuts, 2 chains x 50 draws, 15 divergences: mu)"


def test_summary_against_numpy_and_known_law():
    y = conjugate.data()
    p = conjugate.posterior(y)
    table, flat = p.summary(probs=(0.1, 0.5)), p["mu"].flatten().numpy()
    row = table.loc["mu"]
    assert row["mean"] == pytest.approx(flat.mean()) and row["sd"] == pytest.approx(flat.std(ddof=1))
    assert row["q10%"] == pytest.approx(np.quantile(flat, 0.1))
    # 4000 independent draws: effective sizes near 4000, R-hat near 1
    assert abs(row["r_hat"] - 1) < 0.005 and 3000 < row["ess_bulk"] < 5200 and 3000 < row["ess_tail"] < 5200


def test_summary_sees_chains_that_disagree():
    samples = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)) + torch.tensor([[0.0], [3.0]])
    assert Posterior(samples={"x": samples}).summary().loc["x", "r_hat"] > 1.5


def test_independent_draws_get_no_chain_diagnostics():
    p = Posterior(samples={"x": torch.randn(1, 100, 2)}, attrs={"inference": "svi"})
    table = p.summary()
    assert "r_hat" not in table and list(table.index) == ["x[0]", "x[1]"]
