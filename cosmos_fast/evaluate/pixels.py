"""Pieces of images as evaluation shows them to the model: resized, normalised, float32 [3, H, W]."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from cosmos_fast.data.images import MAX_PIXELS, normalize, to_pixels, to_tensor
from cosmos_fast.evaluate.segmentation import SegmentationProtocol, input_shape, resized_shape
from cosmos_fast.utils.errors import UserError


def short_side_view(image: Image.Image, short_side: int, name: str = "an image") -> Tensor:
    """The whole image with its short side at `short_side` pixels. UserError with its `name`: too thin for that."""
    height, width = resized_shape(image.height, image.width, short_side)
    _check_cap(name, image, height, width)
    return to_tensor(image.resize((width, height), Image.Resampling.BICUBIC))


def segmentation_view(
    image: Image.Image, window: int, protocol: SegmentationProtocol, name: str = "an image"
) -> Tensor:
    """The whole image as a protocol resizes it for a model of this window. UserError with its `name`: too thin.

    Bilinear is without antialiasing, as OpenCV does it: each pixel is a mean of four, in 8 bits.
    """
    height, width = input_shape(image.height, image.width, window, protocol)
    _check_cap(name, image, height, width)
    if protocol.interpolation == "bicubic":
        return to_tensor(image.resize((width, height), Image.Resampling.BICUBIC))
    pixels = to_pixels(image)[None].float()
    resized = functional.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False)
    return normalize(resized[0].round_().to(torch.uint8))


def _check_cap(name: str, image: Image.Image, height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise UserError(
            f"{name} has {image.width} x {image.height} pixels, {width} x {height} for segmentation, the cap is "
            f"{MAX_PIXELS}: leave it out, or cut it"
        )


def object_square(
    box: tuple[float, float, float, float], width: int, height: int, margin: float
) -> tuple[float, float, float, float]:
    """Square around a box with `margin` of its longer side on each side, moved (or shrunk) to lie inside the image."""
    x0, y0, x1, y1 = box
    side = min(max(x1 - x0, y1 - y0) * (1 + 2 * margin), width, height)
    left = min(max((x0 + x1 - side) / 2, 0.0), width - side)
    top = min(max((y0 + y1 - side) / 2, 0.0), height - side)
    return left, top, left + side, top + side


def object_view(image: Image.Image, box: tuple[float, float, float, float], size: int, margin: float) -> Tensor:
    """The square around one object, resized to `size`."""
    square = object_square(box, image.width, image.height, margin)
    return to_tensor(image.resize((size, size), Image.Resampling.BICUBIC, box=square))
