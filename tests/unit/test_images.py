"""Pixels: what is accepted and refused, resizing against PIL, the evaluation transform. Colours: test_recolor.py."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_fast.data import faults, images
from cosmos_fast.data.augment import ViewNumbers
from cosmos_fast.data.faults import SampleFault
from cosmos_fast.data.images import (
    MEAN,
    STD,
    crop_and_resize,
    decode,
    denormalize,
    eval_crop,
    eval_transform,
    normalize,
    to_pixels,
)
from cosmos_fast.evaluate.pixels import segmentation_view, short_side_view
from cosmos_fast.evaluate.segmentation import SegmentationProtocol
from cosmos_fast.utils.errors import UserError
from tests.shards import picture

PLAIN = ViewNumbers(
    box=(0, 0, 40, 32), size=32, flip=False, jitter=(), gray=False, blur_radius=0.0, solarize_threshold=None
)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, file_format, **options)
    return out.getvalue()


def textured(size: int, seed: int = 0) -> Image.Image:
    """Smooth colours plus noise: every operation has something to get wrong."""
    numbers = np.random.default_rng(seed)
    coarse = Image.fromarray(numbers.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((size, size), Image.BICUBIC)
    noisy = np.asarray(coarse).astype(int) + numbers.integers(-20, 21, (size, size, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


# --- decoding


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_formats_decode_to_rgb(file_format: str) -> None:
    image = decode(picture(3, file_format=file_format))
    assert image.mode == "RGB"
    assert image.size == (40, 32)


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("1", "PNG")],
)
def test_colour_modes_decode_to_the_rgb_that_pil_gives(mode: str, file_format: str) -> None:
    data = picture(3, file_format=file_format, mode=mode)
    assert Image.open(io.BytesIO(data)).mode == mode
    image = decode(data)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_16_bit_grey_keeps_its_shades() -> None:
    levels = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    image = np.asarray(decode(encoded(Image.fromarray(levels), "PNG")))
    assert np.array_equal(image[..., 0], levels >> 8)
    assert len(np.unique(image)) > 200


def test_palette_with_transparency(recwarn: pytest.WarningsRecorder) -> None:
    image = textured(16).quantize(8)
    data = encoded(image, "PNG", transparency=bytes(range(8)))
    assert np.array_equal(np.asarray(decode(data)), np.asarray(image.convert("RGB")))
    assert not recwarn


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(textured(20).resize((30, 20)), "JPEG", exif=exif)).size == (30, 20)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(file_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:])
    red, _, blue = np.asarray(decode(data))[8, 8]
    assert red > 200
    assert blue < 50


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


BROKEN = {
    "empty": (b"", faults.EMPTY_MEMBER),
    "text": (b"<html>404 not found</html>", faults.NOT_AN_IMAGE),
    "zeros": (b"\0" * 5000, faults.NOT_AN_IMAGE),
    "half a jpeg": (picture(1, 200, 200)[:3000], faults.BROKEN_IMAGE),
    "jpeg header": (picture(1)[:30], faults.NOT_AN_IMAGE),
    "half a png": (encoded(textured(100), "PNG")[:9000], faults.BROKEN_IMAGE),
    "png, damaged": (encoded(textured(100), "PNG")[:200] + b"\0" * 600, faults.BROKEN_IMAGE),
    "half a webp": (picture(1, file_format="WEBP")[:100], faults.NOT_AN_IMAGE),
    "bomb": (bomb(), faults.TOO_MANY_PIXELS),
    "tiff": (encoded(Image.new("RGB", (8, 8)), "TIFF"), faults.NOT_AN_IMAGE),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", faults.NOT_AN_IMAGE),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unusable_images_are_faults_by_cause(name: str) -> None:
    data, cause = BROKEN[name]
    with pytest.raises(SampleFault) as fault:
        decode(data)
    assert fault.value.cause == cause


def test_pixel_cap_is_inclusive_and_checked_before_decoding() -> None:
    data = picture(0)
    assert decode(data, max_pixels=40 * 32).size == (40, 32)
    with pytest.raises(SampleFault) as fault:
        decode(data[:650], max_pixels=40 * 32 - 1)  # cut short: decoding would fail with another cause
    assert fault.value.cause == faults.TOO_MANY_PIXELS


# --- cutting, against PIL


@pytest.mark.parametrize("size", [24, 96, 224])
@pytest.mark.parametrize("box", [(0, 0, 180, 140), (31, 17, 160, 120), (50, 60, 61, 75), (179, 139, 180, 140)])
def test_crop_and_resize_is_within_a_level_of_pil(size: int, box: tuple[int, int, int, int]) -> None:
    image = textured(180).crop((0, 0, 180, 140))
    cut = crop_and_resize(to_pixels(image), replace(PLAIN, box=box, size=size))
    expected = np.asarray(image.crop(box).resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(cut.permute(1, 2, 0).numpy() - expected)
    assert cut.shape == (3, size, size)
    assert cut.dtype == torch.uint8
    assert difference.max() <= 1
    assert difference.mean() < 0.05


# --- normalising and evaluation


def test_normalise_uses_the_statistics_of_clip_and_comes_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    images = normalize(pixels)
    assert images.dtype == torch.float32
    for channel in range(3):
        expected = (torch.arange(256) / 255 - MEAN[channel]) / STD[channel]
        assert torch.allclose(images[0, channel].flatten(), expected, atol=1e-6)
    assert torch.equal(denormalize(images), pixels)


@pytest.mark.parametrize(("width", "height"), [(100, 60), (60, 100), (64, 64), (31, 17), (300, 5)])
def test_eval_transform_resizes_the_short_side_and_cuts_the_centre(width: int, height: int) -> None:
    data = encoded(textured(300).crop((0, 0, width, height)), "PNG")
    size = 32
    image = Image.open(io.BytesIO(data))
    scale = size / min(width, height)
    resized = image.resize(
        (size, int(height * scale)) if width <= height else (int(width * scale), size), Image.Resampling.BICUBIC
    )
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    expected = torch.from_numpy(np.array(resized.crop((left, top, left + size, top + size)))).permute(2, 0, 1)
    assert torch.equal(denormalize(eval_transform(data, size)), expected)


@pytest.mark.parametrize("size", [(3, 60), (60, 3), (40, 41)])
def test_above_the_cap_only_the_square_is_resized(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    image = textured(60).resize((15, 15)).resize(size, Image.Resampling.BICUBIC)  # smooth: nothing to clip
    whole = np.asarray(eval_crop(image, 32)).astype(int)
    monkeypatch.setattr(images, "MAX_PIXELS", 1)
    square = np.asarray(eval_crop(image, 32))
    assert square.shape == (32, 32, 3)
    assert np.abs(whole - square).max() <= 3


def test_a_thin_image_takes_no_gigabytes() -> None:
    image = Image.new("RGB", (2, 3_000_000), (9, 9, 9))  # all of it at 48 px: 72 million lines
    image.paste((200, 100, 50), (0, 1_499_000, 2, 1_501_000))
    assert eval_crop(image, 48).getcolors() == [(48 * 48, (200, 100, 50))]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_an_image_too_thin_to_be_segmented_is_refused_by_name(interpolation: str) -> None:
    thin = Image.new("RGB", (100_000, 1))
    with pytest.raises(UserError, match=r"^set: 7\.jpg has 100000 x 1 pixels, 33600000 x 336 for .* cut it$"):
        segmentation_view(thin, 224, SegmentationProtocol(interpolation=interpolation), "set: 7.jpg")
    with pytest.raises(UserError, match=r"^7 has 100000 x 1 pixels"):
        short_side_view(thin, 336, "7")


def test_eval_transform_refuses_like_decode() -> None:
    with pytest.raises(SampleFault):
        eval_transform(b"no image", 32)
