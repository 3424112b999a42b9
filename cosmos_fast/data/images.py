"""Pixels with PIL: decode under caps, cut the views a sample's numbers ask for, and the evaluation transform.

Images are decoded as stored: PIL does not apply the EXIF orientation, and neither did the original. Animations give
their first frame; alpha is dropped.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageFilter

from cosmos_fast.data import faults
from cosmos_fast.data.augment import ViewNumbers
from cosmos_fast.data.faults import SampleFault

MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's CLIP
STD = (0.26862954, 0.26130258, 0.27577711)
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF")  # other decoders stay closed to untrusted bytes
_MAX_PIXELS = 50_000_000


def decode(data: bytes, max_pixels: int = _MAX_PIXELS) -> Image.Image:
    """An RGB image. Raises SampleFault: empty, not an image, over the pixel cap (known before decoding), or broken."""
    if not data:
        raise SampleFault(faults.EMPTY_MEMBER, "image")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise SampleFault(faults.TOO_MANY_PIXELS, str(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they stumble on
        raise SampleFault(faults.NOT_AN_IMAGE, str(error)) from error
    if image.width * image.height > max_pixels:
        raise SampleFault(faults.TOO_MANY_PIXELS, f"{image.width} x {image.height}, the cap is {max_pixels}")
    try:
        image.load()
        return _to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:
        raise SampleFault(faults.BROKEN_IMAGE, str(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit grey; convert() would clip it to white
        levels = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without PIL's warning
    return image.convert("RGB")


def cut_view(image: Image.Image, view: ViewNumbers) -> np.ndarray:
    """One view of an RGB image: uint8 [size, size, 3]."""
    crop = image.crop(view.box).resize((view.size, view.size), Image.Resampling.BICUBIC)
    for operation, amount in view.jitter:
        crop = _JITTER[operation](crop, amount)
    if view.gray:
        crop = crop.convert("L")  # the three channels stay equal from here on: work on one
    if view.blur_radius > 0:
        crop = crop.filter(ImageFilter.GaussianBlur(view.blur_radius))
    if view.solarize_threshold is not None:
        levels = np.arange(256)
        crop = _map_levels(crop, np.where(levels < view.solarize_threshold, levels, 255 - levels))
    pixels = np.asarray(crop)
    if view.flip:
        pixels = pixels[:, ::-1]
    return np.broadcast_to(pixels[:, :, None], (view.size, view.size, 3)) if view.gray else pixels


def _map_levels(image: Image.Image, table: np.ndarray) -> Image.Image:
    return image.point(table.tolist() * len(image.getbands()))


def _blend_table(level: int, factor: float) -> np.ndarray:
    """What Image.blend(constant image of `level`, image, factor) does to each of the 256 levels (float32, cut off)."""
    levels = np.arange(256, dtype=np.float32)
    return (level + np.float32(factor) * (levels - level)).clip(0, 255).astype(np.uint8)


def _brightness(image: Image.Image, factor: float) -> Image.Image:
    return _map_levels(image, _blend_table(0, factor))


def _contrast(image: Image.Image, factor: float) -> Image.Image:
    """Away from the mean grey of the image, rounded."""
    histogram = np.asarray(image.convert("L").histogram(), dtype=np.float64)
    mean = int(histogram @ np.arange(256) / histogram.sum() + 0.5)
    return _map_levels(image, _blend_table(mean, factor))


def _saturation(image: Image.Image, factor: float) -> Image.Image:
    return Image.blend(image.convert("L").convert("RGB"), image, factor)


def _hue(image: Image.Image, turns: float) -> Image.Image:
    """Shift the hue of HSV by a share of the full circle."""
    shift = int(turns * 255)
    levels = np.arange(256)
    table = np.concatenate([(levels + shift) % 256, levels, levels])
    return image.convert("HSV").point(table.tolist()).convert("RGB")


_JITTER = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "hue": _hue}


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image -> float32 [3, H, W], normalised."""
    return normalize(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 3, H, W] in 0..255 -> float32 with the mean and deviation of CLIP, on the same device."""
    mean, std = _statistics(pixels.device)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).div_(std)


def denormalize(images: torch.Tensor) -> torch.Tensor:
    """The reverse, for pictures: float [..., 3, H, W] -> uint8."""
    mean, std = _statistics(images.device)
    return (images.float() * std + mean).round().clamp(0, 255).to(torch.uint8)


def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std) on the 0..255 scale, [3, 1, 1]."""
    scaled = 255 * torch.tensor([MEAN, STD], dtype=torch.float32, device=device).view(2, 3, 1, 1)
    return scaled[0], scaled[1]


def eval_crop(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size` (bicubic), then the central square."""
    width, height = image.size
    if width <= height:
        resized = image.resize((size, max(size, int(size * height / width))), Image.Resampling.BICUBIC)
    else:
        resized = image.resize((max(size, int(size * width / height)), size), Image.Resampling.BICUBIC)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    return resized.crop((left, top, left + size, top + size))


def eval_transform(data: bytes, image_size: int, max_pixels: int = _MAX_PIXELS) -> torch.Tensor:
    """Bytes of an image file -> float32 [3, image_size, image_size], normalised. Raises SampleFault like decode()."""
    return to_tensor(eval_crop(decode(data, max_pixels), image_size))
