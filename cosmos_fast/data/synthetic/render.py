"""Draw a scene: RGB picture, instance mask and boxes. Shapes are drawn SUPERSAMPLE times too large, then averaged."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from cosmos_fast.data.synthetic.backgrounds import FloatImage, draw_background
from cosmos_fast.data.synthetic.scene import RENDER, Scene, SceneObject, SceneSettings, stream
from cosmos_fast.data.synthetic.vocabulary import COLOURS

SUPERSAMPLE = 3

Points = npt.NDArray[np.float64]  # [n, 2], x right, y down, inside the unit circle


@dataclass(frozen=True)
class Drawing:
    """A drawn scene.

    picture uint8 [height, width, 3]; mask uint8 [height, width], 0 for background, else the instance number;
    boxes (x0, y0, x1, y1) of each object's visible pixels, upper bounds exclusive; shares: how much of each is visible.
    """

    picture: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8]
    boxes: list[tuple[int, int, int, int]]
    shares: list[float]


def draw_scene(scene: Scene, settings: SceneSettings) -> Drawing:
    """Draw a scene; the same numbers for the same (seed, split, index)."""
    rng = stream(settings, scene.split, scene.index, RENDER)
    colours = {o.colour for o in scene.objects}
    background = draw_background(rng, scene.background, scene.width, scene.height, colours)
    # Channels first: numpy's inner loops then run over rows of pixels, not over three numbers.
    canvas = np.clip(background, 0, 255).transpose(2, 0, 1).astype(np.float32, order="C")
    mask = np.zeros((scene.height, scene.width), dtype=np.uint8)
    areas = [_paint(canvas, mask, item, rng) for item in scene.objects]
    boxes, shares = [], []
    for item, area in zip(scene.objects, areas, strict=True):
        visible = mask == item.instance
        columns, rows = np.flatnonzero(visible.any(0)), np.flatnonzero(visible.any(1))
        assert columns.size, f"object {item.instance} of scene {scene.key} is hidden"
        boxes.append((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
        shares.append(float(visible.sum()) / area)
    picture = np.ascontiguousarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0))
    return Drawing(picture, mask, boxes, shares)


def encode_jpeg(drawing: Drawing, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(drawing.picture).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def encode_mask(drawing: Drawing) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(drawing.mask).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def _paint(canvas: FloatImage, mask: npt.NDArray[np.uint8], item: SceneObject, rng: np.random.Generator) -> int:
    """Paint one object on canvas [3, height, width] and mask; returns its area in pixels before anything covers it."""
    height, width = mask.shape
    reach = int(item.radius * 1.2) + 3  # room for the shadow
    left, top = int(item.x) - reach, int(item.y) - reach
    side = 2 * reach + 1
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
    inside = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    here = (..., slice(y0, y1), slice(x0, x1))

    shape, edge, pattern = _layers(item, side, (item.x - left, item.y - top), rng)
    small = shape.reduce(SUPERSAMPLE)
    alpha, outline, weight = (_unit(layer)[inside] for layer in (small, edge.reduce(SUPERSAMPLE), pattern))
    shift = max(1, round(0.07 * item.radius))
    shadow = small.filter(ImageFilter.GaussianBlur(0.09 * item.radius + 0.5))
    shade = np.roll(np.asarray(shadow, dtype=np.float32), (shift, shift), (0, 1))[inside] * np.float32(0.42 / 255)

    first, second, dark = _tones(item.colour)
    fill = first + (second - first) * weight
    light = 1.07 - 0.16 * (np.arange(y0, y1, dtype=np.float32) - np.float32(item.y - item.radius)) / (2 * item.radius)
    fill *= light[:, None]
    np.minimum(fill, 255, out=fill)
    fill += (dark - fill) * outline

    patch = canvas[here]
    patch *= 1 - shade
    patch += (fill - patch) * alpha
    solid = alpha >= 0.5
    mask[here][solid] = item.instance
    return int(solid.sum())


def _unit(layer: Image.Image) -> FloatImage:
    """8 bits to 0..1."""
    return np.asarray(layer, dtype=np.float32) * np.float32(1 / 255)


def _tones(colour: str) -> tuple[FloatImage, FloatImage, FloatImage]:
    """Main tone, the texture's second tone (lighter, or darker for light colours) and the outline's tone; [3, 1, 1]."""
    red, green, blue = COLOURS[colour]
    main = np.array(COLOURS[colour], dtype=np.float32)[:, None, None]
    brightness = 0.299 * red + 0.587 * green + 0.114 * blue
    if colour == "white":
        return main, main * np.float32(0.74), main * np.float32(0.6)
    if colour == "black":
        return main, main + 72, main + 48
    if brightness > 150:
        return main, main * np.float32(0.62), main * np.float32(0.5)
    return main, main + (255 - main) * np.float32(0.5), main * np.float32(0.55)


def _layers(
    item: SceneObject, side: int, centre: tuple[float, float], rng: np.random.Generator
) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Shape and outline as 8-bit pictures of SUPERSAMPLE * side px; texture, averaged to `side` px."""
    size = SUPERSAMPLE * side
    turn = np.array([[np.cos(item.angle), np.sin(item.angle)], [-np.sin(item.angle), np.cos(item.angle)]])
    middle = (np.array(centre) + 0.5) * SUPERSAMPLE
    shape, edge = Image.new("L", (size, size)), Image.new("L", (size, size))
    shape_pen, edge_pen = ImageDraw.Draw(shape), ImageDraw.Draw(edge)
    line = max(round(SUPERSAMPLE * max(0.9, 0.07 * item.radius)) * 2, 2)  # half of it lies outside the shape
    for hole, contour in enumerate(_CONTOURS[item.shape]):
        corners = contour @ turn * (item.radius * SUPERSAMPLE) + middle
        points: list[float] = corners.ravel().tolist()
        shape_pen.polygon(points, fill=0 if hole else 255)
        edge_pen.line(points + points[:2], fill=255, width=line)
        if len(corners) < 20:  # lines leave notches at sharp corners
            for x, y in corners.tolist():
                edge_pen.ellipse((x - line / 2, y - line / 2, x + line / 2, y + line / 2), fill=255)
    return shape, edge, _texture(item, size, middle, rng)


def _texture(item: SceneObject, size: int, middle: Points, rng: np.random.Generator) -> Image.Image:
    """Where the second tone goes, 8-bit, drawn at `size` px and averaged."""
    if item.texture == "plain":
        return Image.new("L", (size // SUPERSAMPLE, size // SUPERSAMPLE))
    # u, v: position along the pattern's two axes in 1/256 of a period, so that its phase is a matter of bits.
    scale = {"striped": 256.0, "dotted": 282.0, "checkered": 160.0}[item.texture]
    scale /= max(SUPERSAMPLE * item.radius * 0.5, SUPERSAMPLE * 5.0)
    angle = rng.uniform(-0.35, 0.35) + (np.pi / 4 if item.texture == "striped" else 0)
    cos, sin = np.float32(np.cos(angle) * scale), np.float32(np.sin(angle) * scale)
    x = np.arange(size, dtype=np.float32) - np.float32(middle[0])
    y = np.arange(size, dtype=np.float32) - np.float32(middle[1])
    u = ((x * cos)[None] + (y * sin)[:, None]).astype(np.int16)
    if item.texture == "striped":
        return _binary((u & 128) == 0)
    v = ((y * cos)[:, None] - (x * sin)[None]).astype(np.int16)
    if item.texture == "checkered":
        return _binary(((u ^ v) & 128) == 0)
    u, v = (u & 255) - np.int16(128), (v & 255) - np.int16(128)
    return _binary(u * u + v * v < 5600)


def _binary(where: npt.NDArray[np.bool_]) -> Image.Image:
    return Image.fromarray(where.astype(np.uint8) * np.uint8(255)).reduce(SUPERSAMPLE)


def _arc(radius: float, start: float, stop: float, x: float = 0.0, y: float = 0.0, count: int = 48) -> Points:
    t = np.linspace(start, stop, count)
    return np.stack([x + radius * np.cos(t), y + radius * np.sin(t)], 1)


def _corners(count: int, radii: tuple[float, ...], start: float) -> Points:
    t = start + 2 * np.pi * np.arange(count) / count
    r = np.array([radii[i % len(radii)] for i in range(count)])
    return np.stack([r * np.cos(t), r * np.sin(t)], 1)


def _heart() -> Points:
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y + 2.5], 1) / 16.6


def _cross(arm: float = 0.3) -> Points:
    a, b = arm, 0.93
    quarter = [(a, -a), (b, -a), (b, a), (a, a)]
    points: list[tuple[float, float]] = []
    for _ in range(4):
        points += quarter
        quarter = [(-y, x) for x, y in quarter]
    return np.array(points)


def _crescent() -> Points:
    """The unit disc less a disc moved to the right."""
    move, radius = 0.45, 0.78
    x = (1 - radius**2 + move**2) / (2 * move)
    outer = float(np.arccos(x))
    inner = float(np.arccos((x - move) / radius))
    return np.concatenate([
        _arc(1, outer, 2 * np.pi - outer), _arc(radius, 2 * np.pi - inner, inner, x=move),
    ]) + np.array([0.12, 0])  # fmt: skip


# The outer contour, then the holes.
_CONTOURS: dict[str, list[Points]] = {
    "circle": [_corners(72, (0.92,), 0.0)],
    "square": [_corners(4, (1.08,), np.pi / 4)],
    "triangle": [_corners(3, (1.05,), -np.pi / 2) + np.array([0, 0.16])],
    "star": [_corners(10, (1.06, 0.46), -np.pi / 2) + np.array([0, 0.05])],
    "heart": [_heart()],
    "cross": [_cross()],
    "ring": [_corners(72, (0.96,), 0.0), _corners(64, (0.5,), 0.0)],
    "crescent": [_crescent()],
}
