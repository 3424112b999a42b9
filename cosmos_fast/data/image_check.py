"""The step before a decoder that one broken file kills: what it is handed is an image, whole, and of a known size.

Plain JPEGs pass as they are after a walk over their markers, 0.1 ms. Everything else (PNG, WebP, CMYK, a missing end
marker, ...) is decoded here, by PIL exactly as data/images.py does, and handed on as a PNM file.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cosmos_fast.data import faults, jpeg
from cosmos_fast.data.faults import Repair, SampleFault
from cosmos_fast.data.images import decode


class CheckedImage(NamedTuple):
    """data: a plain JPEG, or a binary PPM (P6, 8 bits). width, height: pixels, of the image inside, as decoded.

    repairs: what was mended, for the account; empty for a good file.
    """

    data: bytes
    width: int
    height: int
    repairs: tuple[Repair, ...] = ()


def checked_image(data: bytes, max_pixels: int) -> CheckedImage:
    """An image that a strict decoder takes, with the pixels that images.decode() gives.

    Raises SampleFault as images.decode() does: empty, not an image, over the pixel cap, broken.
    """
    plain = jpeg.read_plain(data)
    if plain is not None:
        if plain.width * plain.height > max_pixels:
            raise SampleFault(faults.TOO_MANY_PIXELS, f"{plain.width} x {plain.height}, the cap is {max_pixels}")
        return CheckedImage(data[: plain.end], plain.width, plain.height)
    repairs: list[Repair] = []
    image = decode(data, max_pixels, repairs)
    head = b"P6\n%d %d\n255\n" % image.size
    return CheckedImage(head + np.asarray(image).tobytes(), image.width, image.height, tuple(repairs))
