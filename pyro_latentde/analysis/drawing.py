# SPDX-License-Identifier: Apache-2.0
"""What all figures share: colours, axes, legends, labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BLUE", "GREY", "INK", "VERMILION", "Units", "add_legend", "new_figure", "with_unit"]

# Okabe and Ito's colours, told apart by colour-blind readers too; grey for what came before the data.
BLUE, VERMILION, GREY, INK = "#0072B2", "#D55E00", "#9A9A9A", "#222222"

Units = Mapping[str, str] | Sequence[str] | str | None


def new_figure(
    rows: int, columns: int, *, width: float, height: float, sharex: bool = False
) -> tuple[Figure, np.ndarray]:
    """A figure of rows times columns of axes, ``height`` inches each row; pyplot does not keep it."""
    import matplotlib.pyplot as plt  # slow to import, and not needed by a fit

    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width, height * rows + 0.5),
        squeeze=False,
        sharex=sharex,
        layout="constrained",
    )
    # The figure belongs to the caller: pyplot forgets it, so notebooks show it once and no memory is kept.
    plt.close(figure)
    for ax in axes.ravel():
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8, which="both")
    return figure, axes


def add_legend(figure: Figure, ax: Axes, columns: int = 4) -> None:
    """One legend above all axes."""
    handles, labels = ax.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    for line in legend.get_lines():
        line.set_alpha(1.0)


def with_unit(name: str, units: Units, index: int, key: str | None = None, between: str = " ") -> str:
    """Label of an axis with its unit in brackets."""
    if isinstance(units, Mapping):
        unit = units.get(key or name, "")
    elif isinstance(units, str) or units is None:
        unit = units or ""
    else:
        unit = units[index]
    return f"{name}{between}({unit})" if unit else name
