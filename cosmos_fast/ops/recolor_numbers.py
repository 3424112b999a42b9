"""What is to be done to the colours of crops: a table on the host, one row a crop."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

JITTER_OPS = ("brightness", "contrast", "saturation", "hue")
NO_SOLARIZE = 256


class ColorNumbers(NamedTuple):
    """One row a crop, on the host: which crops an operation is for is never asked of a GPU.

    order: int64 [N, 4], numbers of JITTER_OPS in the order to apply, -1 for none. amount: float32 [N, 4], beside
    `order`: factors around 1, for hue a shift in turns. gray, flip: bool [N]. blur_radius: float32 [N], pixels, 0 for
    none. solarize_threshold: float32 [N], NO_SOLARIZE for none.
    """

    order: np.ndarray
    amount: np.ndarray
    gray: np.ndarray
    blur_radius: np.ndarray
    solarize_threshold: np.ndarray
    flip: np.ndarray
