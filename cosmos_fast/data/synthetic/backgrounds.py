"""Backgrounds of synthetic scenes: one function a name, which gives float32 [height, width, 3] in 0..255.

Noise comes from square tiles made once a process from fixed seeds and cropped at random: drawing them per picture would
cost more than everything else together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from cosmos_fast.data.synthetic.vocabulary import COLOURS

FloatImage = npt.NDArray[np.float32]

TILE = 640  # px; pictures are at most 512 px wide
_TONES = (
    (206, 206, 202), (232, 217, 188), (240, 214, 214), (205, 228, 210), (216, 208, 234), (196, 212, 230),
    (150, 152, 158), (120, 108, 96), (98, 112, 124), (172, 160, 142),
)  # fmt: skip
_MIN_CONTRAST = 105.0  # RGB distance between a tone and the objects' colours


def draw_background(rng: np.random.Generator, name: str, width: int, height: int, colours: set[str]) -> FloatImage:
    """Draw background `name`; plain tones keep away from the objects' `colours`."""
    if name in ("plain", "gradient"):
        return _shaded(rng, name, width, height, colours)
    return _DRAWERS[name](rng, width, height)


def _shaded(rng: np.random.Generator, name: str, width: int, height: int, colours: set[str]) -> FloatImage:
    tones = _tones_apart(colours)
    first = tones[int(rng.integers(len(tones)))]
    second = first * rng.uniform(0.86, 0.94)
    if name == "gradient":
        second = tones[int(rng.integers(len(tones)))]
        if np.abs(first - second).max() < 40:  # the same or nearly: shade towards dark or light instead
            second = np.clip(first * (0.55 if first.mean() > 140 else 1.6), 0, 255)
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    reach = abs(cos) + abs(sin)
    x, y = _axes(width, height)
    # 0 in one corner, 1 in the opposite one
    share = x * np.float32(cos / reach / width) + y * np.float32(sin / reach / height)
    share += np.float32(0.5 - 0.5 * (cos + sin) / reach)
    return first + (second - first) * share[..., None] + 3 * _crop(rng, _fine_noise(), width, height)[..., None]


def _tones_apart(colours: set[str]) -> list[FloatImage]:
    """Tones that every object colour stands out from; the one that does best if there is none."""
    distances = [min(math.dist(tone, COLOURS[colour]) for colour in colours) for tone in _TONES]
    apart = [tone for tone, distance in zip(_TONES, distances, strict=True) if distance >= _MIN_CONTRAST]
    return [np.array(tone, dtype=np.float32) for tone in apart or [_TONES[distances.index(max(distances))]]]


def _grass(rng: np.random.Generator, width: int, height: int) -> FloatImage:
    picture = _crop(rng, _grass_tile(), width, height)
    patches = _crop(rng, _smooth_noise(), width, height)[..., None]
    return picture * (np.float32(rng.uniform(0.85, 1.1)) + 0.12 * patches)


def _water(rng: np.random.Generator, width: int, height: int) -> FloatImage:
    x, y = _axes(width, height)
    period = rng.uniform(0.09, 0.14) * min(width, height)
    bend = 1.3 * _crop(rng, _smooth_noise(), width, height)
    sway = np.sin(x * np.float32(2 * np.pi / (period * rng.uniform(2.2, 3.5))) + np.float32(rng.uniform(0, 6)))
    wave = np.sin(y * np.float32(2 * np.pi / period) + 1.1 * sway + bend)
    crest = np.clip(wave - 0.72, 0, 1) * 3.0
    base = np.array((58, 122, 176), dtype=np.float32) * np.float32(rng.uniform(0.85, 1.12))
    return (
        base
        + wave[..., None] * np.array((12, 16, 16), np.float32)
        + crest[..., None] * np.array((75, 65, 52), np.float32)
    )


def _bricks(rng: np.random.Generator, width: int, height: int) -> FloatImage:
    x, y = _axes(width, height)
    tall = rng.uniform(0.085, 0.12) * min(width, height)
    long = tall * rng.uniform(2.1, 2.6)
    offset = np.float32(rng.uniform(0, 1))
    down = (y / np.float32(tall) + offset) % 1
    row = np.floor(y / np.float32(tall) + offset)
    shifted = x / np.float32(long) + 0.5 * (row % 2) + offset
    column = np.floor(shifted)
    seam = max(0.09, 1.2 / tall)
    mortar = (down < seam) | ((shifted - column) < seam * tall / long)
    shades: FloatImage = rng.uniform(0.8, 1.12, size=(16, 16)).astype(np.float32)
    shade = shades[row.astype(np.int32) % 16, column.astype(np.int32) % 16]
    clay = np.array((172, 96, 74), dtype=np.float32) * np.float32(rng.uniform(0.85, 1.08))
    grain = 7 * _crop(rng, _fine_noise(), width, height)[..., None]
    return np.where(mortar[..., None], np.array((205, 198, 186), np.float32), clay * shade[..., None]) + grain


def _night_sky(rng: np.random.Generator, width: int, height: int) -> FloatImage:
    _, y = _axes(width, height)
    top, low = np.array((12, 14, 42), np.float32), np.array((44, 38, 88), np.float32)
    picture: FloatImage = (
        top + (low - top) * (y * np.float32(1 / height))[..., None] + np.zeros((height, width, 3), np.float32)
    )
    picture += 10 * _crop(rng, _smooth_noise(), width, height)[..., None]
    count = int(width * height * rng.uniform(0.0035, 0.006))
    xs, ys = rng.integers(1, width - 1, count), rng.integers(1, height - 1, count)
    light = rng.uniform(60, 215, count).astype(np.float32)
    picture[ys, xs] += light[:, None]
    big = light > 165
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        picture[ys[big] + dy, xs[big] + dx] += 0.45 * light[big, None]
    return picture


def _sand(rng: np.random.Generator, width: int, height: int) -> FloatImage:
    x, y = _axes(width, height)
    period = rng.uniform(0.12, 0.2) * min(width, height)
    tilt = rng.uniform(-0.5, 0.5)
    ripple = np.sin(
        (y + np.float32(tilt) * x) * np.float32(2 * np.pi / period) + 2.4 * _crop(rng, _smooth_noise(), width, height)
    )
    base = np.array((214, 184, 138), dtype=np.float32) * np.float32(rng.uniform(0.9, 1.04))
    return base + (7 * ripple + 13 * _crop(rng, _fine_noise(), width, height))[..., None]


def _wood(rng: np.random.Generator, width: int, height: int) -> FloatImage:
    upright = rng.random() < 0.5
    if upright:
        width, height = height, width
    _, y = _axes(width, height)
    plank = rng.uniform(0.2, 0.28) * min(width, height)
    across = y / np.float32(plank) + np.float32(rng.uniform(0, 1))
    number = np.floor(across).astype(np.int32)
    shades = rng.uniform(0.82, 1.1, 16).astype(np.float32)[number % 16]
    # Grain: smooth noise stretched along the plank, with another stretch of it for every plank.
    grain = _crop(rng, _streaks(), width, height)
    rings = np.sin(grain * 5 + number * 2.1)
    seam = (across - number) < max(0.05, 1.0 / plank)
    brown = np.array((168, 122, 78), dtype=np.float32) * np.float32(rng.uniform(0.8, 1.12))
    picture = (brown * (shades + 0.07 * rings)[..., None]) * np.where(seam, np.float32(0.55), np.float32(1))[..., None]
    return picture.transpose(1, 0, 2) if upright else picture


_DRAWERS: dict[str, Callable[[np.random.Generator, int, int], FloatImage]] = {
    "grass": _grass, "water": _water, "bricks": _bricks, "night sky": _night_sky, "sand": _sand, "wood": _wood,
}  # fmt: skip


def _axes(width: int, height: int) -> tuple[FloatImage, FloatImage]:
    """x [1, width] and y [height, 1]."""
    return np.arange(width, dtype=np.float32)[None], np.arange(height, dtype=np.float32)[:, None]


def _crop(rng: np.random.Generator, tile: FloatImage, width: int, height: int) -> FloatImage:
    left, top = int(rng.integers(TILE - width + 1)), int(rng.integers(TILE - height + 1))
    return tile[top : top + height, left : left + width]


def _tile_rng(number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=number))


@functools.cache
def _fine_noise() -> FloatImage:
    """Grain, mean 0, standard deviation 1."""
    return _tile_rng(1).standard_normal((TILE, TILE)).astype(np.float32)


@functools.cache
def _smooth_noise() -> FloatImage:
    """Blobs of 20-40 px, mean 0, standard deviation 1."""
    return _resized_noise(2, (TILE // 28, TILE // 28))


@functools.cache
def _streaks() -> FloatImage:
    """Horizontal streaks, mean 0, standard deviation 1."""
    return _resized_noise(3, (TILE // 64, TILE // 7))


def _resized_noise(number: int, size: tuple[int, int]) -> FloatImage:
    small = Image.fromarray(_tile_rng(number).standard_normal(size[::-1]).astype(np.float32))
    noise = np.asarray(small.resize((TILE, TILE), Image.Resampling.BICUBIC))
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)


@functools.cache
def _grass_tile() -> FloatImage:
    """Blades of grass, float32 [TILE, TILE, 3]."""
    rng = _tile_rng(4)
    tile = Image.new("RGB", (TILE, TILE), (62, 112, 44))
    draw = ImageDraw.Draw(tile)
    count = 26000
    xs, ys = rng.integers(-4, TILE + 4, count), rng.integers(0, TILE + 14, count)
    leans, lengths, shades = rng.uniform(-3, 3, count), rng.uniform(5, 13, count), rng.uniform(0.62, 1.3, count)
    for x, y, lean, length, shade in zip(xs, ys, leans, lengths, shades, strict=True):
        fill = (int(84 * shade), int(138 * shade), int(56 * shade))
        draw.line((x, y, x + lean, y - length), fill=fill)
    return np.asarray(tile.filter(ImageFilter.GaussianBlur(0.5))).astype(np.float32)
