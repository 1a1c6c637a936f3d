# SPDX-License-Identifier: Apache-2.0
"""Videos side by side: a strip of frames for the page, an animated GIF for the screen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyro_latentde.analysis.drawing import GREY, INK, VERMILION, new_figure
from pyro_latentde.errors import DataError, LatentDEError, ShapeError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["animation", "film_strip"]

_MAX_FRAMES = 12  # of a strip whose frames were not chosen: more are too small for a page


def film_strip(
    rows: Mapping[str, Tensor],
    frame: tuple[int, ...],
    times: Tensor | Sequence[float] | None = None,
    *,
    every: int | None = None,
    mark: float | None = None,
    signed: Sequence[str] = ("difference",),
    time_label: str | None = None,
) -> Figure:
    """One row of frames for each video, the same times below each other.

    Args:
        rows: label -> video, (T, D) or (T, height, width), in [0, 1]; what is beyond is drawn as 0 or 1. Frames that
            are NaN altogether are left blank.
        frame: (height, width); D = height * width, row by row, as in ``series.frame``.
        times: (T,), of the frames; None to count them from 0.
        every: draw every so-manieth frame, from the first on; by default as many as give at most twelve.
        mark: time of the last observation, in the unit of `times`. Frames after it have an orange border, and a line
            is before them.
        signed: labels of rows that are differences, in [-1, 1]: blue below 0, white at 0, red above.
        time_label: label of the time axis with its unit, such as ``"time (s)"``.

    Returns:
        The figure.

    Raises:
        ShapeError: a video does not fit the frame, the others or the times.
        DataError: there is no video, whole numbers instead of [0, 1], or times that decrease.

    Example:
        >>> import torch
        >>> video = torch.rand(20, 784)
        >>> figure = film_strip({"observed": video, "again": video}, (28, 28), every=5, mark=9)
        >>> [len(ax.images) for ax in figure.axes]
        [4, 4]
    """
    videos, (height, width) = _as_videos(rows, frame)
    instants, label = _as_times(times, len(next(iter(videos.values()))), time_label)
    if every is None:
        every = math.ceil(len(instants) / _MAX_FRAMES)
    if every < 1:
        raise LatentDEError(
            f"every = {every}; expected a whole number of at least 1, such as 5 for frames 0, 5, 10, ..."
        )
    shown = np.arange(0, len(instants), every)
    ahead = _is_ahead(instants, mark)[shown]
    slot = float(np.clip(9.0 / len(shown), 0.24, 1.0))  # inches
    names = 0.075 * max(map(len, videos))
    figure, axes = new_figure(
        len(videos), 1, width=slot * len(shown) + names + 0.3, height=slot * height / width + 0.06, sharex=True
    )
    figure.get_layout_engine().set(h_pad=0.02, hspace=0.0)
    for ax, (name, video) in zip(axes[:, 0], videos.items(), strict=True):
        for place, number in enumerate(shown):
            if not np.isnan(video[number]).all():
                where = (place - 0.47, place + 0.47, 0.0, 0.94 * height / width)
                image = ax.imshow(video[number], extent=where, **_colours(name in signed))
                _outline(ax, image.get_extent(), VERMILION if ahead[place] else GREY)
        ax.set(xlim=(-0.5, len(shown) - 0.5), ylim=(-0.03, 0.94 * height / width + 0.03), yticks=[], facecolor="none")
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        ax.spines[:].set_visible(False)
        ax.tick_params(bottom=False, labelbottom=ax is axes[-1, 0])
        if ahead.any():
            ax.axvline(_first(ahead) - 0.5, color=VERMILION, lw=1.8, clip_on=False, zorder=4)
    if ahead.any():
        top = axes[0, 0]
        where = top.get_xaxis_transform()
        top.text(_first(ahead) - 0.45, 1.02, "forecast", transform=where, color=VERMILION, fontsize=8, va="bottom")
    labelled = np.arange(0, len(shown), math.ceil(0.42 / slot))  # so that numbers do not run into each other
    axes[-1, 0].set_xticks(labelled, [f"{instants[shown[place]]:.4g}" for place in labelled])
    axes[-1, 0].set_xlabel(label, fontsize=9)
    return figure


def animation(
    rows: Mapping[str, Tensor],
    frame: tuple[int, ...],
    path: str | PathLike[str],
    times: Tensor | Sequence[float] | None = None,
    *,
    fps: float = 20.0,
    mark: float | None = None,
    signed: Sequence[str] = ("difference",),
    time_label: str | None = None,
) -> Path:
    """Videos side by side as an animated GIF, above a bar of time.

    Args:
        rows: label -> video, (T, D) or (T, height, width), in [0, 1], T at least 2.
        frame: (height, width); D = height * width, row by row.
        path: of the file to write, ``.gif``; folders are made.
        times: (T,), of the frames; None to count them from 0.
        fps: frames in a second, at most 50. A GIF holds hundredths of a second: 30 become 33.
        mark: time of the last observation, in the unit of `times`. After it the borders are orange, as is the bar.
        signed: labels of rows that are differences, in [-1, 1].
        time_label: label of the bar with its unit, such as ``"time (s)"``.

    Returns:
        The path.

    Raises:
        ShapeError: a video does not fit the frame, the others or the times.
        DataError: there is no video, whole numbers instead of [0, 1], or times that decrease.
        LatentDEError: another ending than ``.gif``, fewer than two frames, or an impossible `fps`.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = animation({"observed": torch.rand(3, 784)}, (28, 28), f"{folder}/film.gif", mark=1)
        >>> path.name
        'film.gif'
    """
    videos, _ = _as_videos(rows, frame)
    instants, label = _as_times(times, len(next(iter(videos.values()))), time_label)
    path = Path(path)
    if path.suffix.lower() != ".gif":
        raise LatentDEError(f"an animation is written as a GIF; expected a path that ends in .gif, got '{path}'")
    if len(instants) < 2 or instants[0] == instants[-1]:
        raise LatentDEError(f"an animation needs frames of two times at least, got {len(instants)} frame(s)")
    if not 0 < fps <= 50:
        raise LatentDEError(f"fps = {fps}; expected more than 0 and at most 50, the fastest that viewers show as it is")
    pictures = _draw_each(videos, instants, _is_ahead(instants, mark), signed, label)
    first = next(pictures)
    path.parent.mkdir(parents=True, exist_ok=True)
    first.save(path, save_all=True, append_images=pictures, duration=10 * round(100 / fps), loop=0)
    return path


def _draw_each(
    videos: dict[str, np.ndarray], times: np.ndarray, ahead: np.ndarray, signed: Sequence[str], label: str
) -> Iterator[Image]:
    """The pictures of an animation, one by one: all of them would fill the memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    _, height, width = next(iter(videos.values())).shape
    tall = 2.1 * height / width
    figure = Figure(figsize=(2.1 * len(videos) + 0.3, tall + 1.0), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, len(videos), height_ratios=(tall, 0.1))
    panels = [figure.add_subplot(grid[0, i]) for i in range(len(videos))]
    images = []
    for ax, (name, video) in zip(panels, videos.items(), strict=True):
        images.append(ax.imshow(video[0], **_colours(name in signed)))
        ax.set(xticks=[], yticks=[])
        ax.set_title(name, fontsize=10)
        ax.spines[:].set_linewidth(2.5)
    bar = figure.add_subplot(grid[1, :])
    bar.set(xlim=(times[0], times[-1]), yticks=[])
    bar.set_xlabel(label, fontsize=9)
    bar.tick_params(labelsize=8)
    bar.spines[:].set_visible(False)
    start = times[_first(ahead)] if ahead.any() else times[-1]
    bar.axvspan(times[0], start, color=GREY, alpha=0.5, lw=0)
    bar.axvspan(start, times[-1], color=VERMILION, alpha=0.5, lw=0)
    if ahead.any():
        bar.text(
            times[-1], 1.1, "forecast", transform=bar.get_xaxis_transform(), color=VERMILION, fontsize=8, ha="right"
        )
    now = bar.axvline(times[0], color=INK, lw=4, clip_on=False)
    canvas.draw()
    figure.set_layout_engine("none")  # laid out once; nothing moves from picture to picture
    for number, time in enumerate(times):
        for ax, image, video in zip(panels, images, videos.values(), strict=True):
            image.set_data(np.ma.masked_invalid(video[number]))
            ax.spines[:].set_color(VERMILION if ahead[number] else GREY)
        now.set_xdata([time, time])
        canvas.draw()
        yield Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _as_videos(rows: Mapping[str, Tensor], frame: tuple[int, ...]) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
    """Every video as (T, height, width)."""
    frame = tuple(frame)
    if len(frame) != 2 or not all(isinstance(size, int) and size > 0 for size in frame):
        raise ShapeError(f"frame = {frame}; expected (height, width) of a grey picture, such as (28, 28)")
    if not rows:
        raise DataError('no video to draw: expected rows such as {"observed": series.values[0]}')
    videos = {name: _as_video(name, values, frame) for name, values in rows.items()}
    lengths = {name: len(video) for name, video in videos.items()}
    if len(set(lengths.values())) > 1:
        raise ShapeError(
            f"videos have different numbers of frames, {lengths}; fill what is missing with NaN, or cut the longer ones"
        )
    return videos, frame


def _as_video(name: str, values: Any, frame: tuple[int, int]) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    shape, (height, width) = array.shape, frame
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"row '{name}': expected floating numbers in [0, 1], got {array.dtype}; divide bytes by 255.0")
    if array.ndim not in (2, 3) or not len(array) or (array.ndim == 3 and shape[1:] != frame):
        raise ShapeError(
            f"row '{name}': expected one video, (T, {height * width}) or (T, {height}, {width}), got {shape}; take one "
            "of several series (values[0]) and the mean of draws"
        )
    if array.ndim == 2 and shape[1] != height * width:
        side = math.isqrt(shape[1])
        hint = f"; is the frame ({side}, {side})?" if side * side == shape[1] else ""
        raise ShapeError(
            f"row '{name}': a frame of {height} x {width} has {height * width} values, got {shape[1]} in {shape}{hint}"
        )
    return array.reshape(-1, height, width)


def _as_times(times: Any, length: int, label: str | None) -> tuple[np.ndarray, str]:
    if times is None:
        return np.arange(length), label or "frame"
    array = times.detach().cpu().numpy() if isinstance(times, Tensor) else np.asarray(times)
    if array.shape != (length,):
        raise ShapeError(f"times have shape {array.shape}; expected ({length},), those of one series (series.times[0])")
    if not np.isfinite(array).all() or (np.diff(array) < 0).any():
        raise DataError("times are not finite or decrease; expected those of the frames, in order")
    return array, label or "time"


def _is_ahead(times: np.ndarray, mark: float | None) -> np.ndarray:
    """(T,), True for what is forecast. Times in float32 may lie a rounding error behind the mark."""
    if mark is None:
        return np.zeros(len(times), bool)
    return times > mark + 1e-6 * max(1.0, abs(mark))


def _first(ahead: np.ndarray) -> int:
    return int(ahead.argmax())


def _colours(signed: bool) -> dict[str, Any]:
    if signed:
        return {"cmap": "RdBu_r", "vmin": -1.0, "vmax": 1.0}
    return {"cmap": "gray", "vmin": 0.0, "vmax": 1.0}


def _outline(ax: Any, extent: tuple[float, ...], colour: str) -> None:
    from matplotlib.patches import Rectangle

    left, right, bottom, top = extent
    ax.add_patch(Rectangle((left, bottom), right - left, top - bottom, fill=False, ec=colour, lw=1.2, clip_on=False))
