"""Pixels: what is accepted and refused, resizing and recolouring against PIL, the evaluation transform."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.original_input import recolor as pil_view
from cosmos_fast.config import ViewsConfig
from cosmos_fast.data import faults, rng
from cosmos_fast.data.augment import ViewNumbers, draw_views
from cosmos_fast.data.faults import SampleFault
from cosmos_fast.data.images import (
    MEAN,
    STD,
    crop_and_resize,
    decode,
    denormalize,
    eval_transform,
    normalize,
    to_pixels,
)
from cosmos_fast.data.recolor import color_numbers, recolor_
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


# --- cutting and recolouring, against PIL


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


def recolored(image: Image.Image, view: ViewNumbers) -> np.ndarray:
    pixels = to_pixels(image)[None].contiguous()
    return recolor_(pixels, color_numbers([view]))[0].permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.0, 0.6, 0.8371, 1.0, 1.2113, 1.4])
def test_blends_equal_pil(operation: str, factor: float) -> None:
    view = replace(PLAIN, jitter=((operation, factor),))
    assert np.array_equal(recolored(textured(48), view), np.asarray(pil_view(textured(48), view)))


@pytest.mark.parametrize("turns", [-0.5, -0.1, -0.033, 0.0, 0.02, 0.1, 0.5])
def test_hue_follows_pil(turns: float) -> None:
    view = replace(PLAIN, jitter=(("hue", turns),))
    difference = np.abs(recolored(textured(48), view) - np.asarray(pil_view(textured(48), view)))
    assert difference.mean() < 0.02
    assert (difference > 2).mean() < 0.001  # a hue on the edge of two 8-bit steps falls to the other side


def test_hue_leaves_greys_and_primaries_in_place() -> None:
    greys = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2))
    view = replace(PLAIN, jitter=(("hue", 0.1),))
    assert np.array_equal(recolored(greys, view), np.asarray(greys))
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 0, 0], [7, 7, 9]], np.uint8)
    image = Image.fromarray(colours.reshape(2, 3, 3))
    assert np.abs(recolored(image, view) - np.asarray(pil_view(image, view))).max() <= 1


@pytest.mark.parametrize("radius", [0.1, 0.33, 0.77, 1.2, 1.41, 1.4143, 1.7, 1.999])
@pytest.mark.parametrize("size", [24, 65])
def test_blur_follows_pil_up_to_the_border(radius: float, size: int) -> None:
    view = replace(PLAIN, blur_radius=radius)
    difference = np.abs(recolored(textured(size), view) - np.asarray(pil_view(textured(size), view)))
    assert difference.max() <= 2
    assert difference.mean() < 0.2


def test_grey_solarise_and_flip_equal_pil() -> None:
    for view in (
        replace(PLAIN, gray=True),
        replace(PLAIN, solarize_threshold=128),
        replace(PLAIN, flip=True),
        replace(PLAIN, gray=True, solarize_threshold=200, flip=True),
    ):
        assert np.array_equal(recolored(textured(33), view), np.asarray(pil_view(textured(33), view)))


def drawn_views(count: int, size: int) -> list[ViewNumbers]:
    crop = ViewsConfig(local_solarize_p=0.3, local_image_size=size).crops(size)[-1]
    return [draw_views([crop], 60, 60, rng.generator(0, rng.CROPS, item=i))[0] for i in range(count)]


def test_whole_views_follow_pil() -> None:
    """Order of the operations: jitter in its drawn order, grey, blur, solarise, flip."""
    for number, view in enumerate(drawn_views(60, 32)):
        view = replace(view, solarize_threshold=None)  # it turns a level's difference at the threshold into 127
        image = textured(32, seed=number)
        difference = np.abs(recolored(image, view) - np.asarray(pil_view(image, view)))
        assert difference.mean() < 0.6, view
        assert (difference > 4).mean() < 0.01, view


@pytest.mark.parametrize("chunk_values", [1, 3 * 32 * 32 * 7, 1 << 30])
def test_a_crop_does_not_depend_on_its_batch(chunk_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    views = drawn_views(40, 32)
    pixels = torch.stack([to_pixels(textured(32, seed=n)) for n in range(40)]).contiguous()
    alone = torch.cat([recolor_(pixels[n : n + 1].clone(), color_numbers([views[n]])) for n in range(40)])
    monkeypatch.setattr("cosmos_fast.data.recolor._CHUNK_VALUES", chunk_values)
    assert torch.equal(recolor_(pixels.clone(), color_numbers(views)), alone)
    assert not torch.equal(pixels, alone)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recolouring_on_a_gpu_equals_the_cpu() -> None:
    views = drawn_views(64, 48)
    pixels = torch.stack([to_pixels(textured(48, seed=n)) for n in range(64)]).contiguous()
    on_gpu = recolor_(pixels.cuda(), color_numbers(views)).cpu().int()
    difference = (on_gpu - recolor_(pixels, color_numbers(views)).int()).abs()
    assert (difference > 0).float().mean() < 0.01


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


def test_eval_transform_refuses_like_decode() -> None:
    with pytest.raises(SampleFault):
        eval_transform(b"no image", 32)
