"""Figures: names are shown verbatim, equal curves are all visible, files are reproducible."""

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.text import Text

from umv2 import files, pictures

NAMES = ["plain", "_underscore", "$x_$", r"$\frac$", "a/" * 200, "a" * 300, "two\nlines", "%s", ""]


def shown(text: Text) -> str:
    """Returns the text that matplotlib draws, without line breaks; fails if it is a formula."""
    drawn, is_formula = text._preprocess_math(text.get_text())  # type: ignore[attr-defined]  # as drawn
    assert not is_formula
    return drawn.replace("\n", "")


@pytest.mark.parametrize("count", [0, 1, 2, len(NAMES)])
@pytest.mark.parametrize("width", [5.0, 12.0])
def test_a_legend_is_below_the_axes_and_within_the_figure(width: float, count: int) -> None:
    figure = pictures.new(width, 6.0)
    axes = figure.subplots()
    for style in pictures.curve_styles(count):
        axes.plot([1, 2], [3, 4], **style)
    pictures.legend_below(figure, axes.lines, NAMES[:count])
    assert len(figure.legends) == bool(count)
    figure.savefig(io.BytesIO(), dpi=120)
    for legend in figure.legends:
        assert [shown(text) for text in legend.get_texts()] == [
            name.replace("\n", r"\n") for name in NAMES[:count]
        ]
        box = legend.get_window_extent()
        assert box.y1 <= axes.get_window_extent().y0
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1


@pytest.mark.parametrize("count", [2, 6, 10])
def test_each_of_several_equal_curves_is_visible(count: int, tmp_path: Path) -> None:
    figure = pictures.new(4.0, 3.0)
    axes = figure.subplots()
    for style in pictures.curve_styles(count):
        axes.plot([0, 1, 2, 3], [1, 2, 2, 1], **style)
    pictures.save(figure, tmp_path / "curves.png")
    picture = imread(tmp_path / "curves.png")[..., :3].reshape(-1, 3)
    colors = [to_rgb(line.get_color()) for line in axes.lines]
    assert len(set(colors)) == count
    for color in colors:
        assert (np.abs(picture - color) < 0.1).all(axis=1).sum() > 50


def test_a_figure_is_written_reproducibly(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        figure = pictures.new(3.0, 2.0)
        figure.subplots().plot([1, 2])
        pictures.save(figure, tmp_path / name)
    content = (tmp_path / "one.png").read_bytes()
    assert content == (tmp_path / "two.png").read_bytes()
    assert b"tEXt" not in content
    assert {path.name for path in tmp_path.iterdir()} == {"one.png", "two.png"}


def test_a_figure_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(files.FileError, match="file"):
        pictures.save(pictures.new(1.0, 1.0), tmp_path / "file" / "a.png")
