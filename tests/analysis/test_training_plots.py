# SPDX-License-Identifier: Apache-2.0
"""Training curves: every column that is there, from a file or a table, not hidden by the first steps."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from pyro_latentde.analysis import training_curves
from pyro_latentde.errors import DataError

STEPS = np.arange(1000)


@pytest.fixture
def log():
    noise = np.random.default_rng(0).normal(size=1000)
    elbo = -1e6 * np.exp(-STEPS / 8) - 300 * np.exp(-STEPS / 300) - 50 + 5 * noise
    kl = 20 * (1 - np.exp(-STEPS / 200))
    return pd.DataFrame(
        {
            "step": STEPS,
            "elbo": elbo,
            "reconstruction": elbo + kl,
            "kl": kl,
            "heldout_elbo": np.where(STEPS % 100 == 99, elbo - 9, np.nan),
            "learning_rate": 1e-3 * 0.99**STEPS,
            "kl_weight": np.minimum(1, STEPS / 500),
            "skipped": np.minimum(STEPS // 300, 2),
        }
    )


def curves(ax):
    return {line.get_label(): line for line in ax.get_lines()}


def test_every_panel_with_its_curves(log):
    figure = training_curves(log)
    elbo, reconstruction, kl, rate, weight = figure.axes
    titles = ["ELBO (nat)", "reconstruction (nat)", "KL (nat)", "learning rate"]
    assert [ax.get_title() for ax in figure.axes[:4]] == titles
    assert all(ax.get_xlabel() == "step" for ax in figure.axes[:4])
    assert np.array_equal(elbo.get_lines()[0].get_ydata(), log["elbo"])
    heldout = curves(elbo)["held-out"]
    assert heldout.get_xdata().tolist() == list(range(99, 1000, 100))
    assert np.array_equal(heldout.get_ydata(), log["heldout_elbo"].dropna())
    smooth = curves(elbo)["training"].get_xydata()
    assert smooth[500, 1] == pytest.approx(log["elbo"][500:520].mean()) and smooth[500, 0] == 510
    assert np.array_equal(weight.get_lines()[0].get_ydata(), log["kl_weight"])
    assert rate.get_yscale() == "log" and np.array_equal(rate.get_lines()[0].get_ydata(), log["learning_rate"])
    assert figure.get_supxlabel() == "2 updates skipped"
    assert not plt.get_fignums(), "pyplot keeps the figure"


def test_first_steps_hide_nothing_and_are_said(log):
    elbo, _, kl = training_curves(log).axes[:3]
    low, high = elbo.get_ylim()
    assert -1000 < low < log["elbo"][100:].quantile(0.01) and log["elbo"][100:].quantile(0.99) < high < 0
    assert elbo.get_title(loc="left") == f"↓ {log['elbo'].min():.3g}"
    assert kl.get_ylim()[0] <= 0 and not kl.get_title(loc="left"), "a mild curve is shown whole"


def test_csv_and_missing_columns(tmp_path, log):
    path = tmp_path / "log.csv"
    path.write_text("# seed 0\n" + log[["step", "elbo"]][:60].to_csv(index=False))
    figure = training_curves(path)
    (ax,) = figure.axes
    assert np.allclose(ax.get_lines()[0].get_ydata(), log["elbo"][:60]) and len(ax.get_lines()) == 1
    assert figure.get_supxlabel() == ""
    empty = log.assign(heldout_elbo=np.nan, learning_rate=1e-3)[["step", "elbo", "heldout_elbo", "learning_rate"]]
    elbo, rate = training_curves(empty).axes
    assert "held-out" not in curves(elbo) and rate.get_yscale() == "linear"


def test_skipped_updates_leave_no_gap(log):
    log.loc[500, ["elbo", "reconstruction", "kl"]] = [np.nan, np.inf, np.nan]
    elbo, reconstruction = training_curves(log).axes[:2]
    for ax in (elbo, reconstruction):
        assert len(ax.get_lines()[0].get_xdata()) == 999 and np.isfinite(ax.get_ylim()).all()
        assert np.isfinite(curves(ax)["training"].get_ydata()).all()


def test_bad_logs_are_refused(tmp_path):
    with pytest.raises(DataError, match="no log to read"):
        training_curves(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match="no log to read"):
        training_curves(tmp_path / "empty.csv")
    with pytest.raises(DataError, match="column step"):
        training_curves(pd.DataFrame({"elbo": [1.0]}))
    with pytest.raises(DataError, match="nothing to draw.*'loss'"):
        training_curves(pd.DataFrame({"step": [0], "loss": [1.0]}))
