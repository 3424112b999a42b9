"""The augmentation numbers of a sample: drawn here on the host, applied by whoever cuts and recolours the pixels.

Every view draws the same count of uniform numbers whether it uses them or not, so a view's crop does not depend on the
settings of the views before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cosmos_fast.config import CropConfig
from cosmos_fast.ops.recolor_numbers import JITTER_OPS

_TRIES = 10
_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
# A row of numbers: 2 a try (area, ratio), 2 for the place, flip, jitter, grey, blur, radius, solarise, 4 strengths,
# 4 that order the jitter.
_PLACE = 2 * _TRIES
_FLIP, _JITTER, _GRAY, _BLUR, _RADIUS, _SOLARIZE = range(_PLACE + 2, _PLACE + 8)
_STRENGTH = _SOLARIZE + 1
_ORDER = _STRENGTH + len(JITTER_OPS)
NUMBERS_A_VIEW = _ORDER + len(JITTER_OPS)


@dataclass(frozen=True)
class ViewNumbers:
    """One image view, decided.

    box: left, top, right, bottom in source pixels. size: side of the crop, pixels. jitter: (operation, amount) in the
    order to apply: factors around 1, for hue a shift in turns. blur_radius: pixels, 0 for none. solarize_threshold:
    8-bit level, None for none. flip comes last here; it commutes with everything before it.
    """

    box: tuple[int, int, int, int]
    size: int
    flip: bool
    jitter: tuple[tuple[str, float], ...]
    gray: bool
    blur_radius: float
    solarize_threshold: int | None


def draw_views(crops: Sequence[CropConfig], width: int, height: int, numbers: np.random.Generator) -> list[ViewNumbers]:
    """The numbers of all views of one image of `width` x `height` pixels."""
    rows = numbers.random((len(crops), NUMBERS_A_VIEW)).tolist()
    return [_view(crop, width, height, row) for crop, row in zip(crops, rows, strict=True)]


def _view(crop: CropConfig, width: int, height: int, u: list[float]) -> ViewNumbers:
    low, high = crop.blur_radius
    return ViewNumbers(
        box=_crop_box(crop.scale, width, height, u),
        size=crop.size,
        flip=u[_FLIP] < crop.flip_p,
        jitter=_jitter(crop.jitter, u) if u[_JITTER] < crop.jitter_p else (),
        gray=u[_GRAY] < crop.gray_p,
        blur_radius=low + (high - low) * u[_RADIUS] if u[_BLUR] < crop.blur_p else 0.0,
        solarize_threshold=crop.solarize_threshold if u[_SOLARIZE] < crop.solarize_p else None,
    )


def _crop_box(scale: tuple[float, float], width: int, height: int, u: list[float]) -> tuple[int, int, int, int]:
    """Random resized crop: ten tries at a share of the area and a log-uniform aspect, else the central crop."""
    for attempt in range(_TRIES):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * u[2 * attempt])
        ratio = math.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * u[2 * attempt + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int((width - w + 1) * u[_PLACE]), int((height - h + 1) * u[_PLACE + 1])
            return left, top, left + w, top + h
    narrowest, widest = math.exp(_LOG_RATIO[0]), math.exp(_LOG_RATIO[1])
    if width / height < narrowest:
        w, h = width, max(1, round(width / narrowest))
    elif width / height > widest:
        w, h = max(1, round(height * widest)), height
    else:
        w, h = width, height
    w, h = min(w, width), min(h, height)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _jitter(strengths: tuple[float, float, float, float], u: list[float]) -> tuple[tuple[str, float], ...]:
    """Factors U(1 - s, 1 + s), hue U(-s, s), in random order; operations of strength 0 are left out."""
    order = sorted(range(len(JITTER_OPS)), key=lambda op: u[_ORDER + op])
    amounts = [(2 * u[_STRENGTH + op] - 1) * strengths[op] + (JITTER_OPS[op] != "hue") for op in order]
    return tuple((JITTER_OPS[op], amount) for op, amount in zip(order, amounts, strict=True) if strengths[op] > 0)
