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
