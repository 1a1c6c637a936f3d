# SPDX-License-Identifier: Apache-2.0
"""Figures of a training run, from its log."""

from __future__ import annotations

import math
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from pyro_latentde.analysis.drawing import BLUE, GREY, INK, VERMILION, new_figure
from pyro_latentde.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["training_curves"]

# title of each panel -> its columns with their labels
_PANELS = {
    "ELBO (nat)": {"elbo": "training", "heldout_elbo": "held-out"},
    "reconstruction (nat)": {"reconstruction": "training"},
    "KL (nat)": {"kl": "training"},
    "learning rate": {"learning_rate": "learning rate"},
}


def training_curves(log: str | PathLike[str] | pd.DataFrame) -> Figure:
    """ELBO of training and held-out series, reconstruction, KL and learning rate against the step.

    Noisy curves are pale, their running means over a fiftieth of the run dark. The first tenth of the steps does not
    set the vertical limits: where it lies far off, a note with arrows says how far.

    Args:
        log: path of the CSV file, or its table. Columns: step; of elbo, heldout_elbo, reconstruction, kl (nat),
            learning_rate and kl_weight those that there are; skipped, the number of updates skipped so far. Empty cells
            are no points, as between the evaluations of held-out series.

    Returns:
        The figure.

    Raises:
        DataError: no file, no column step, or none to draw.

    Example:
        >>> import pandas as pd
        >>> figure = training_curves(pd.DataFrame({"step": [0, 1, 2], "elbo": [-900.0, -40.0, -30.0]}))
        >>> [ax.get_title() for ax in figure.axes]
        ['ELBO (nat)']
    """
    table = _read(log)
    panels = {title: _present(table, columns) for title, columns in _PANELS.items()}
    panels = {title: columns for title, columns in panels.items() if columns}
    if not panels:
        wanted = [name for columns in _PANELS.values() for name in columns]
        raise DataError(f"nothing to draw: expected some of the columns {wanted}, got {list(table.columns)}")
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    figure, axes = new_figure(down, across, width=4.3 * across, height=2.5)
    for ax in axes.ravel()[len(panels) :]:
        ax.remove()
    for ax, (title, columns) in zip(axes.ravel(), panels.items(), strict=False):
        for name, label in columns.items():
            _draw(ax, table["step"].to_numpy(float), table[name].to_numpy(float), name, label)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("step", fontsize=9)
        if title == "learning rate":
            _rate_axis(ax, table["learning_rate"])
        else:
            _limit(ax, table["step"].to_numpy(float), [table[name].to_numpy(float) for name in columns])
        if title == "KL (nat)" and _present(table, {"kl_weight": ""}):
            _draw_weight(ax, table)
        elif len(columns) > 1:
            ax.legend(frameon=False, fontsize=8, loc="lower right")
    _note_skipped(figure, table)
    return figure


def _read(log: str | PathLike[str] | pd.DataFrame) -> pd.DataFrame:
    import pandas as pd  # slow to import, and not needed by a fit

    if not isinstance(log, pd.DataFrame):
        try:
            log = pd.read_csv(log, comment="#")
        except (FileNotFoundError, pd.errors.EmptyDataError) as error:
            raise DataError(f"no log to read at '{log}' ({error}); expected the CSV file of a training run") from None
    if "step" not in log.columns or not len(log):
        raise DataError(
            f"expected a table with a column step and some rows, got {len(log)} rows of {list(log.columns)}"
        )
    return log


def _present(table: pd.DataFrame, columns: dict[str, str]) -> dict[str, str]:
    return {
        name: label
        for name, label in columns.items()
        if name in table.columns and np.isfinite(table[name].to_numpy(float)).any()
    }


def _draw(ax: Axes, steps: np.ndarray, values: np.ndarray, name: str, label: str) -> None:
    good = np.isfinite(values)
    steps, values = steps[good], values[good]
    if name == "heldout_elbo":
        ax.plot(steps, values, "o-", color=VERMILION, ms=2.5, lw=1.2, label=label, zorder=3)
        return
    if name == "learning_rate" or len(values) < 100:
        ax.plot(steps, values, color=BLUE, lw=1.4, label=label)
        return
    width = max(3, len(values) // 50)
    ax.plot(steps, values, color=BLUE, lw=0.6, alpha=0.35)
    smooth = np.convolve(values, np.full(width, 1 / width), mode="valid")
    ax.plot(steps[width // 2 :][: len(smooth)], smooth, color=BLUE, lw=1.4, label=label)


def _limit(ax: Axes, steps: np.ndarray, curves: list[np.ndarray]) -> None:
    """Limits from the run after its first tenth, outliers aside; a note of what lies outside."""
    late = steps >= steps.min() + 0.1 * (steps.max() - steps.min())
    kept = np.concatenate([curve[late & np.isfinite(curve)] for curve in curves])
    everything = np.concatenate([curve[np.isfinite(curve)] for curve in curves])
    if not len(kept):
        return
    low, high = np.quantile(kept, [0.005, 0.995])
    margin = 0.15 * ((high - low) or max(abs(high), 1.0))
    low, high = low - margin, high + margin
    # A curve that fits into twice the room is shown whole.
    if everything.max() - everything.min() <= 2.0 * (high - low):
        return
    ax.set_ylim(low, high)
    # above the axes, at both sides of the title: inside, notes would lie on the curves
    if everything.min() < low:
        ax.set_title(f"↓ {everything.min():.3g}", loc="left", fontsize=8, color=INK)
    if everything.max() > high:
        ax.set_title(f"↑ {everything.max():.3g}", loc="right", fontsize=8, color=INK)


def _rate_axis(ax: Axes, rates: pd.Series) -> None:
    known = rates.dropna()
    if (known > 0).all() and known.max() > 20 * known.min():
        ax.set_yscale("log")
    else:
        ax.set_ylim(0, 1.1 * known.max() or 1.0)
        ax.ticklabel_format(axis="y", scilimits=(-2, 4))


def _draw_weight(ax: Axes, table: pd.DataFrame) -> None:
    """The weight of the KL has its own axis, at the right."""
    twin = ax.twinx()
    twin.plot(table["step"], table["kl_weight"], "--", color=GREY, lw=1.2)
    twin.set_ylim(0, 1.1 * max(1.0, table["kl_weight"].max()))
    twin.set_ylabel("weight in the ELBO", fontsize=8, color=GREY)
    twin.tick_params(labelsize=8, colors=GREY)
    twin.spines[["top", "left"]].set_visible(False)


def _note_skipped(figure: Figure, table: pd.DataFrame) -> None:
    count = int(table["skipped"].max()) if "skipped" in table.columns and table["skipped"].notna().any() else 0
    if count:
        figure.supxlabel(f"{count} updates skipped", fontsize=8, color=VERMILION, x=0.99, ha="right")
