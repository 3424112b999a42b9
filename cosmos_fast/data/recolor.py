"""The colours that the numbers of views ask for, as a table; what applies it is `recolor_` of ops/recolor.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cosmos_fast.data.augment import JITTER_OPS, ViewNumbers
from cosmos_fast.ops.recolor import recolor_ as recolor_
from cosmos_fast.ops.recolor_numbers import NO_SOLARIZE
from cosmos_fast.ops.recolor_numbers import ColorNumbers as ColorNumbers

_NO_JITTER = ("none", 0.0)
_NUMBER = {"none": -1, **{operation: number for number, operation in enumerate(JITTER_OPS)}}


def color_numbers(views: Sequence[ViewNumbers]) -> ColorNumbers:
    """The table of these crops."""
    slots = len(JITTER_OPS)
    jitters = [[*view.jitter, *[_NO_JITTER] * (slots - len(view.jitter))] for view in views]
    thresholds = [NO_SOLARIZE if view.solarize_threshold is None else view.solarize_threshold for view in views]
    return ColorNumbers(
        order=np.array([[_NUMBER[operation] for operation, _ in jitter] for jitter in jitters]),
        amount=np.array([[amount for _, amount in jitter] for jitter in jitters], dtype=np.float32),
        gray=np.array([view.gray for view in views]),
        blur_radius=np.array([view.blur_radius for view in views], dtype=np.float32),
        solarize_threshold=np.array(thresholds, dtype=np.float32),
        flip=np.array([view.flip for view in views]),
    )
