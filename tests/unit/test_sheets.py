"""Sheets of pictures: words that fit, shades, letters without a drawing, heat over an image, names of files."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from cosmos_fast.evaluate.pictures import album, drawing
from cosmos_fast.evaluate.report import pictures


def test_lines_fit_and_long_words_are_cut() -> None:
    lines = drawing.wrapped("a " + "w" * 300 + " and more words than one line holds", 200)
    assert max(drawing.font(drawing.TEXT).getlength(line) for line in lines) <= 200
    assert "".join(lines).replace(" ", "") == "a" + "w" * 300 + "andmorewordsthanonelineholds"
    assert drawing.wrapped("", 50) == [""]
    long = drawing.text_block("word " * 400, 120, most=3)
    assert long.height == drawing.text_block("word\u00a0word " * 3, 50, most=3).height


def test_words_are_the_darker_the_more_attended() -> None:
    block = drawing.shaded_words([drawing.Shade("aaa", 0.0), drawing.Shade("bbb", 1.0)], 300)
    pixels = np.asarray(block).astype(int).sum(axis=2)
    first = drawing.font(drawing.TEXT).getlength("aaa")
    assert pixels[2, 8] == 3 * 255
    assert pixels[2, round(first) + 30] < 3 * 200


def last_ink(block: Image.Image) -> int:
    """The column right of all that is drawn."""
    return int(np.flatnonzero((np.asarray(block) < 128).any(axis=(0, 2)))[-1]) + 1


def test_a_word_longer_than_a_line_is_cut_and_keeps_its_shade() -> None:
    long = drawing.shaded_words([drawing.Shade("a", 0.0), drawing.Shade("红" * 100, 1.0)], 200)
    short = drawing.shaded_words([drawing.Shade("a", 0.0)], 200)
    assert long.width == 200
    assert long.height > 5 * short.height
    assert last_ink(long) < 200  # a margin at the edge, where a word that goes on has none
    ground = np.asarray(long)[:, 2].astype(int).sum(axis=1)
    assert (ground[short.height :] < 3 * 200).mean() > 0.5


def test_what_does_not_fit_ends_in_an_ellipsis_inside_its_box() -> None:
    face = drawing.font(drawing.TEXT)
    assert drawing._shortened("short", 100, face) == "short"
    for text in ("w" * 300, "w" * 300 + " …"):
        line = drawing._shortened(text, 100, face)
        assert line.endswith("w …")
        assert 80 < face.getlength(line) <= 100
    assert last_ink(drawing.text_block("w" * 300, 100, most=2)) <= 100
    marks = [np.asarray(drawing.legend([name], ["#ff0000"], 100)) for name in ("w" * 300, "w" * 200)]
    assert np.array_equal(*marks)
    assert last_ink(Image.fromarray(marks[0])) <= 100


def test_letters_that_the_font_lacks_are_known() -> None:
    assert drawing.undrawn("Straße, “naïve” – Ελληνικά, Кириллица … ✓ ✗ ⟨start⟩ \n\u200d") == ""
    assert drawing.undrawn("a 红 สุ न 🐶 红") == "".join(sorted("红สุन🐶"))


@pytest.mark.parametrize(
    ("key", "stem"),
    [("a/b/dog 1.jpg", "dog_1"), ("../..", "picture"), ("é" * 80, "picture"), ("x" * 90 + ".png", "x" * 40)],
)
def test_names_of_files_are_plain(key, stem) -> None:
    assert album.file_stem(key) == stem


def test_heat_is_brightest_where_the_map_is() -> None:
    """The overlay of a map with one peak."""
    grid = np.zeros((4, 4), dtype=np.float32)
    grid[1, 2] = 1
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    pixels = np.asarray(pictures.heat_overlay(grey, grid, 64)).astype(int).sum(axis=2)
    row, column = np.unravel_index(pixels.argmax(), pixels.shape)
    assert 16 <= row < 32 <= column < 48
    assert Image.open(io.BytesIO(pictures.png(grey))).size == (64, 64)
