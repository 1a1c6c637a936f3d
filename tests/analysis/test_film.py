# SPDX-License-Identifier: Apache-2.0
"""Films: every frame at its place, the forecast marked, and a GIF that others can read."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from pyro_latentde.analysis import animation, film_strip
from pyro_latentde.analysis.drawing import GREY, VERMILION
from pyro_latentde.errors import DataError, LatentDEError, ShapeError

TIMES = torch.arange(20) * 0.05
FRAME = (6, 4)


@pytest.fixture
def video():
    return torch.rand(20, 24, generator=torch.Generator().manual_seed(1))


def test_strip_draws_every_chosen_frame_once(video):
    pair = {"observed": video, "model": video.reshape(20, 6, 4)}
    figure = film_strip(pair, FRAME, TIMES, every=6, mark=0.3, time_label="time (s)")
    assert [ax.get_ylabel() for ax in figure.axes] == ["observed", "model"]
    for ax in figure.axes:
        assert len(ax.images) == 4
        for image, number in zip(ax.images, (0, 6, 12, 18), strict=True):
            assert np.array_equal(image.get_array(), video[number].reshape(6, 4).numpy())
            assert image.get_clim() == (0.0, 1.0) and image.origin == "upper"
        left, right, bottom, top = ax.images[0].get_extent()
        assert (top - bottom) / (right - left) == pytest.approx(6 / 4)
    bottom = figure.axes[-1]
    assert bottom.get_xlabel() == "time (s)"
    assert [label.get_text() for label in bottom.get_xticklabels()] == ["0", "0.3", "0.6", "0.9"]
    assert not plt.get_fignums(), "pyplot keeps the figure"


def test_strip_marks_the_forecast(video):
    # .05 * 6 in float32 is more than .3: frame 6 is the last observed all the same
    figure = film_strip({"model": video}, FRAME, TIMES, every=6, mark=0.3)
    (ax,) = figure.axes
    assert [to_hex(box.get_edgecolor()).upper() for box in ax.patches] == [GREY, GREY, VERMILION, VERMILION]
    assert [line.get_xdata()[0] for line in ax.get_lines()] == [1.5]
    assert [text.get_text() for text in ax.texts] == ["forecast"]
    plain = film_strip({"model": video}, FRAME, every=6).axes[0]
    assert not plain.get_lines() and not plain.texts and plain.get_xlabel() == "frame"


def test_strip_chooses_at_most_twelve_frames_and_keeps_labels_apart(video):
    assert len(film_strip({"model": video}, FRAME).axes[0].images) == 10
    long = torch.rand(200, 24)
    figure = film_strip({"model": long, "a long name of a model": long}, FRAME, torch.arange(200) * 1.25, every=4)
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in figure.axes[-1].get_xticklabels()]
    assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False))
    width = figure.bbox.width
    assert all(0 <= ax.get_tightbbox().x0 and ax.get_tightbbox().x1 <= width for ax in figure.axes)


def test_differences_have_a_signed_scale_and_nan_frames_are_blank(video):
    missing = video.clone()
    missing[:10] = torch.nan
    figure = film_strip({"difference": video - 0.5, "forecast": missing}, FRAME, every=5)
    signed, blank = figure.axes
    assert signed.images[0].get_clim() == (-1.0, 1.0) and signed.images[0].get_cmap().name == "RdBu_r"
    assert len(signed.images) == 4 and len(blank.images) == 2
    other = film_strip({"error": video}, FRAME, signed=["error"]).axes[0]
    assert other.images[0].get_clim() == (-1.0, 1.0)


def test_gif_has_every_frame_for_its_time(tmp_path, video):
    path = animation(
        {"observed": video, "model": video}, FRAME, tmp_path / "new" / "film.gif", TIMES, fps=20, mark=0.45
    )
    with Image.open(path) as film:
        assert film.format == "GIF" and film.n_frames == 20 and film.info["loop"] == 0
        pictures, durations = [], []
        for number in range(film.n_frames):
            film.seek(number)
            durations.append(film.info["duration"])
            pictures.append(np.asarray(film.convert("RGB")).astype(int))
    assert durations == [50] * 20
    # orange on the borders shows forecast time: the same few orange pixels are in the bar of every picture
    orange = [(abs(p - np.array([0xD5, 0x5E, 0x00])).sum(-1) < 30).sum() for p in pictures]
    assert min(orange[10:]) > max(orange[:10]) + 500


def test_gif_shows_the_frames_themselves(tmp_path):
    flashes = torch.zeros(3, 24)
    flashes[1] = 1.0
    path = animation({"model": flashes}, FRAME, tmp_path / "film.gif", fps=10)
    bright = []
    with Image.open(path) as film:
        for number in range(3):
            film.seek(number)
            assert film.info["duration"] == 100
            width, height = film.size
            bright.append(np.asarray(film.convert("L"))[height // 2 - 20 : height // 2, width // 2].mean())
    assert bright == pytest.approx([0, 255, 0], abs=8)


@pytest.mark.parametrize(
    ("rows", "frame", "options", "error", "message"),
    [
        ({"GOKU": torch.rand(5, 1024)}, (28, 28), {}, ShapeError, r"28 x 28 has 784 values, got 1024.*\(32, 32\)\?"),
        ({"GOKU": torch.rand(2, 5, 24)}, FRAME, {}, ShapeError, r"row 'GOKU'.*values\[0\]"),
        ({"a": torch.rand(5, 24), "b": torch.rand(4, 24)}, FRAME, {}, ShapeError, "'a': 5, 'b': 4"),
        ({"a": torch.zeros(5, 24, dtype=torch.uint8)}, FRAME, {}, DataError, "divide bytes by 255"),
        ({}, FRAME, {}, DataError, "no video"),
        ({"a": torch.rand(5, 24)}, (24,), {}, ShapeError, r"expected \(height, width\)"),
        ({"a": torch.rand(5, 24)}, FRAME, {"times": TIMES}, ShapeError, r"\(20,\); expected \(5,\)"),
        ({"a": torch.rand(2, 24)}, FRAME, {"times": [1.0, 0.0]}, DataError, "decrease"),
        ({"a": torch.rand(5, 24)}, FRAME, {"every": 0}, LatentDEError, "every = 0"),
    ],
)
def test_bad_videos_are_refused(rows, frame, options, error, message):
    with pytest.raises(error, match=message):
        film_strip(rows, frame, **options)


def test_bad_animations_are_refused(tmp_path, video):
    with pytest.raises(LatentDEError, match=r"ends in \.gif"):
        animation({"a": video}, FRAME, tmp_path / "film.mp4")
    with pytest.raises(LatentDEError, match="fps = 60"):
        animation({"a": video}, FRAME, tmp_path / "film.gif", fps=60)
    with pytest.raises(LatentDEError, match="two times"):
        animation({"a": video[:1]}, FRAME, tmp_path / "film.gif")
    assert not list(tmp_path.iterdir())
