"""Pictures of a report, as PNG or JPEG bytes: heat maps and class maps over images. Pure functions on pixels."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence

import matplotlib
import matplotlib.colors
import numpy as np
from PIL import Image

from cosmos_fast.evaluate.report.theme import CLASS_COLOURS

SIDE = 224  # pixels of the longer side: sharp at twice the size it is shown at on small screens


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def enlarge(image: Image.Image, side: int = SIDE, smooth: bool = True) -> Image.Image:
    """Longer side to `side`; `smooth=False` keeps the pixels visible."""
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)


def heat_overlay(image: Image.Image, map_01: np.ndarray, side: int = SIDE) -> Image.Image:
    """A 0-1 map [h, w] over the greyed image: the stronger the map, the more opaque and bright its colour."""
    picture = enlarge(image, side)
    heat = Image.fromarray(map_01.astype(np.float32), mode="F").resize(picture.size, Image.Resampling.BICUBIC)
    strength = np.asarray(heat).clip(0, 1)[..., None]
    colours = matplotlib.colormaps["inferno"](strength[..., 0])[..., :3] * 255
    grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    opacity = 0.35 + 0.5 * strength
    return Image.fromarray((grey * (1 - opacity) + colours * opacity).round().astype(np.uint8))


def class_overlay(image: Image.Image, labels_HW: np.ndarray, colours: Sequence[str], side: int = SIDE) -> Image.Image:
    """A class map over the greyed image: class c >= 1 in colours[c - 1] (hex), background (0) left grey."""
    picture = enlarge(image, side)
    labels = np.asarray(Image.fromarray(labels_HW.astype(np.uint8)).resize(picture.size, Image.Resampling.NEAREST))
    grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32) * 0.75 + 50
    painted = np.array([(0, 0, 0), *map(rgb, colours)], dtype=np.float32)[labels]
    opacity = np.where(labels > 0, 0.72, 0.0)[..., None]
    return Image.fromarray((grey * (1 - opacity) + painted * opacity).round().clip(0, 255).astype(np.uint8))


def class_colours(names: Sequence[str]) -> list[str]:
    """A hex colour a class: the one it is named after, else one of the palette, which repeats."""
    palette = itertools.cycle(CLASS_COLOURS)
    return [
        matplotlib.colors.to_hex(name) if matplotlib.colors.is_color_like(name) else next(palette) for name in names
    ]


def rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
