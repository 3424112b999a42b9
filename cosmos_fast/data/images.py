"""Pixels: decode with PIL under caps, cut and resize the views a sample's numbers ask for, the evaluation transform.

Images are decoded as stored: PIL does not apply the EXIF orientation, and neither did the original. Animations give
their first frame; alpha is dropped.
"""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from cosmos_fast.data import faults, jpeg
from cosmos_fast.data.augment import ViewNumbers
from cosmos_fast.data.faults import Repair, SampleFault

MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's CLIP
STD = (0.26862954, 0.26130258, 0.27577711)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")  # other decoders stay closed to untrusted bytes
MAX_PIXELS = 50_000_000


def decode(
    data: bytes,
    max_pixels: int = MAX_PIXELS,
    repairs: list[Repair] | None = None,
    formats: tuple[str, ...] = FORMATS,
) -> Image.Image:
    """An RGB image; what had to be mended is appended to `repairs`. formats: PIL's names of what is decoded.

    Raises SampleFault: empty, not an image, over the pixel cap (known before decoding), or broken.
    """
    if not data:
        raise SampleFault(faults.EMPTY_MEMBER, "image")
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise SampleFault(faults.TOO_MANY_PIXELS, str(error)) from error
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise SampleFault(faults.NOT_AN_IMAGE, f"it begins with {data[:16]!r}") from error
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
        whole = jpeg.with_end_marker(data)
        if whole is None:
            raise SampleFault(faults.BROKEN_IMAGE, str(error)) from error
        if repairs is not None:
            repairs.append(Repair(faults.MENDED_IMAGE, "only the end marker was missing"))
        return decode(whole, max_pixels, formats=formats)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit grey; convert() would clip it to white
        levels = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without PIL's warning
    return image.convert("RGB")


def to_pixels(image: Image.Image) -> torch.Tensor:
    """uint8 [3, H, W], a view of memory in H, W, 3 order: the layout torch resizes fastest."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def crop_and_resize(pixels: torch.Tensor, view: ViewNumbers) -> torch.Tensor:
    """The box of a view, resized to [3, size, size] uint8, bicubic with antialiasing."""
    return cut_box(pixels, view.box, view.size)


def cut_box(pixels: torch.Tensor, box: tuple[int, int, int, int], size: int) -> torch.Tensor:
    """The same of a box: left, top, right, bottom.

    torch's 8-bit kernel: within one level of PIL's crop().resize(), four times as fast.
    """
    left, top, right, bottom = box
    cut = pixels[None, :, top:bottom, left:right]
    return F.interpolate(cut, (size, size), mode="bicubic", antialias=True)[0]


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image -> float32 [3, H, W], normalised."""
    return normalize(to_pixels(image))


def normalize(pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 [..., 3, H, W] in 0..255 -> `dtype`, rounded once, with the mean and deviation of CLIP, same device."""
    mean, std = _statistics(pixels.device)
    if pixels.is_cuda:
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).div_(std).to(dtype)
    images = torch.empty(pixels.shape, dtype=dtype)
    size = pixels.shape[-3:]
    for image, crop in zip(images.view(-1, *size), pixels.reshape(-1, *size), strict=True):
        image.copy_(crop.to(torch.float32).sub_(mean).div_(std))  # one by one they stay in the cache: half the time
    return images


def denormalize(images: torch.Tensor) -> torch.Tensor:
    """The reverse, for pictures: float [..., 3, H, W] -> uint8."""
    mean, std = _statistics(images.device)
    return (images.float() * std + mean).round().clamp(0, 255).to(torch.uint8)


def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std) on the 0..255 scale, [3, 1, 1]."""
    scaled = 255 * torch.tensor([MEAN, STD], dtype=torch.float32, device=device).view(2, 3, 1, 1)
    return scaled[0], scaled[1]


def eval_crop(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size` (bicubic), then the central square.

    Of an image so thin that all of it would be over the pixel cap, only the square is resized.
    """
    width, height = image.size
    if width <= height:
        across, down = size, max(size, int(size * height / width))
    else:
        across, down = max(size, int(size * width / height)), size
    left, top = round((across - size) / 2), round((down - size) / 2)
    if across * down <= MAX_PIXELS:
        resized = image.resize((across, down), Image.Resampling.BICUBIC)
        return resized.crop((left, top, left + size, top + size))
    # Not for every image: PIL may take its two passes in another order and clip between them, some levels away.
    x, y = width / across, height / down
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def eval_transform(data: bytes, image_size: int, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Bytes of an image file -> float32 [3, image_size, image_size], normalised. Raises SampleFault like decode()."""
    return to_tensor(eval_crop(decode(data, max_pixels), image_size))
