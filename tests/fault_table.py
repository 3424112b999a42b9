"""What real downloads contain that is no plain JPEG with captions, and what becomes of each: one table for all tests.

A sample is either unusable, with the cause under which it is counted, or has the pixels of a plain picture.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from cosmos_fast.data import faults
from tests.shards import picture, record

MAX_PIXELS = 400_000  # limits that the table is made for
MAX_MEMBER_BYTES = 150_000
WIDTH, HEIGHT = 72, 56


@dataclass(frozen=True)
class Oddity:
    """members: of one sample with the key `odd`. cause: None for a usable one, which then looks like `like`, a PNG.

    repairs: what is counted although the sample is used. tolerance: mean difference from `like` in 8-bit levels.
    """

    members: Mapping[str, bytes]
    cause: str | None = None
    like: bytes = b""
    repairs: dict[str, int] = field(default_factory=dict)
    tolerance: float = 0.0


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, file_format, **options)
    return out.getvalue()


def scene(number: int = 5) -> Image.Image:
    """Smooth, colourful, not square, so that a rotation shows."""
    return Image.open(io.BytesIO(picture(number, WIDTH, HEIGHT, "PNG"))).convert("RGB")


def huge_png(side: int) -> bytes:
    """side x side black pixels in a few kilobytes: whole and sound, only large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)  # one bit a pixel
    rows = zlib.compress(bytes(side * (1 + side // 8)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    frame = jpeg.index(b"\xff\xc0")
    return jpeg[: frame + 5] + struct.pack(">HH", height, width) + jpeg[frame + 9 :]


def exif_rotated(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer would turn it by 90 degrees
    return encoded(image, "JPEG", quality=95, exif=exif)


def _with_image(data: bytes, extension: str = "jpg") -> dict[str, bytes]:
    return {f"odd.{extension}": data, "odd.json": record(0)}


def _unusable(data: bytes, cause: str, extension: str = "jpg") -> Oddity:
    return Oddity(_with_image(data, extension), cause)


def _usable(data: bytes, extension: str = "jpg", tolerance: float = 0.0, **repairs: int) -> Oddity:
    """Looks like its own first frame, by PIL."""
    first = Image.open(io.BytesIO(data))
    return Oddity(_with_image(data, extension), None, encoded(first.convert("RGB"), "PNG"), {}, tolerance)


def _bad_record(data: bytes, cause: str) -> Oddity:
    return Oddity({"odd.jpg": encoded(scene(), "JPEG"), "odd.json": data}, cause)


def _mended(jpeg: bytes) -> Oddity:
    whole = encoded(Image.open(io.BytesIO(jpeg)), "PNG")
    return Oddity(_with_image(jpeg[:-2]), None, whole, {faults.MENDED_IMAGE: 1}, 0.0)


def _sixteen_bits() -> Oddity:
    levels = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 16 % 65536).astype(np.uint16)
    grey = Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
    return Oddity(_with_image(encoded(Image.fromarray(levels), "PNG"), "png"), None, encoded(grey, "PNG"))


def _animated(file_format: str, extension: str) -> Oddity:
    frames = [scene(5), scene(6), scene(7)]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], duration=40, **options)
    return _usable(data, extension)


def _two_pictures(jpeg: bytes) -> bytes:
    """As cameras write them: a second JPEG behind the first."""
    return jpeg + encoded(scene(6), "JPEG")


_JPEG = encoded(scene(), "JPEG", quality=95)
_LARGE_JPEG = encoded(scene().resize((300, 240)), "JPEG")
_NOISE = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
_PROGRESSIVE = encoded(scene().resize((300, 240)), "JPEG", progressive=True)
_PNG = encoded(Image.fromarray(_NOISE), "PNG")
_JPEG_LEVELS = 2.0  # two decoders of the same JPEG, or a JPEG against its PNG

IMAGES: dict[str, Oddity] = {
    # broken
    "no bytes": _unusable(b"", faults.EMPTY_MEMBER),
    "half a jpeg": _unusable(_LARGE_JPEG[: len(_LARGE_JPEG) // 2], faults.BROKEN_IMAGE),
    "half a progressive jpeg": _unusable(_PROGRESSIVE[: len(_PROGRESSIVE) // 2], faults.BROKEN_IMAGE),
    "most of a jpeg": _unusable(_LARGE_JPEG[:-40], faults.BROKEN_IMAGE),
    "head of a jpeg": _unusable(_JPEG[:200], faults.NOT_AN_IMAGE),
    "half a png": _unusable(_PNG[: len(_PNG) // 2], faults.BROKEN_IMAGE, "png"),
    "half a webp": _unusable(encoded(scene(), "WEBP")[:400], faults.NOT_AN_IMAGE, "webp"),
    "png with a damaged middle": _unusable(_PNG[:9000] + bytes(900) + _PNG[9900:], faults.BROKEN_IMAGE, "png"),
    "zeros": _unusable(bytes(5000), faults.NOT_AN_IMAGE),
    "a web page": _unusable(b"<html>404 not found</html>", faults.NOT_AN_IMAGE),
    "a tiff": _unusable(encoded(scene(), "TIFF"), faults.NOT_AN_IMAGE),
    # too large
    "20,000 x 20,000 pixels, png": _unusable(huge_png(20_000), faults.TOO_MANY_PIXELS, "png"),
    "20,000 x 20,000 pixels, jpeg": _unusable(with_size(_JPEG, 20_000, 20_000), faults.TOO_MANY_PIXELS),
    "too many bytes": _unusable(bytes(MAX_MEMBER_BYTES + 1), faults.TOO_MANY_BYTES),
    # odd, but usable
    "jpeg": _usable(_JPEG, tolerance=_JPEG_LEVELS),
    "progressive jpeg": _usable(_PROGRESSIVE, tolerance=_JPEG_LEVELS),
    "jpeg with a second picture": _usable(_two_pictures(_JPEG), tolerance=_JPEG_LEVELS),
    "jpeg with zeros behind": _usable(_JPEG + bytes(300), tolerance=_JPEG_LEVELS),
    "jpeg without its end marker": _mended(_LARGE_JPEG),
    "cmyk jpeg": _usable(encoded(scene().convert("CMYK"), "JPEG", quality=95)),
    "grey jpeg": _usable(encoded(scene().convert("L"), "JPEG", quality=95), tolerance=_JPEG_LEVELS),
    "exif-rotated jpeg": _usable(exif_rotated(scene()), tolerance=_JPEG_LEVELS),
    "grey png": _usable(encoded(scene().convert("L"), "PNG"), "png"),
    "16-bit png": _sixteen_bits(),
    "png with alpha": _usable(encoded(scene().convert("RGBA"), "PNG"), "png"),
    "png with a palette": _usable(encoded(scene().quantize(16), "PNG"), "png"),
    "black and white png": _usable(encoded(scene().convert("1"), "PNG"), "png"),
    "webp": _usable(encoded(scene(), "WEBP", lossless=True), "webp"),
    "animated webp": _animated("WEBP", "webp"),
    "animated png": _animated("PNG", "png"),
    "animated gif called jpg": _animated("GIF", "jpg"),
    "png called jpg": _usable(encoded(scene(), "PNG"), "jpg"),
    "webp called jpeg": _usable(encoded(scene(), "WEBP", lossless=True), "jpeg"),
    "jpeg called png": _usable(_JPEG, "png", _JPEG_LEVELS),
    "one pixel": _usable(encoded(Image.new("RGB", (1, 1), (200, 30, 90)), "JPEG"), tolerance=_JPEG_LEVELS),
}

RECORDS: dict[str, Oddity] = {
    "no image": Oddity({"odd.json": record(0), "odd.txt": b"x"}, faults.MISSING_IMAGE),
    "a mask only": Oddity({"odd.mask.png": _PNG, "odd.json": record(0)}, faults.MISSING_IMAGE),
    "no json": Oddity({"odd.jpg": _JPEG}, faults.MISSING_RECORD),
    "empty json": _bad_record(b"", faults.EMPTY_MEMBER),
    "half a json": _bad_record(record(0)[:60], faults.BAD_JSON),
    "json of another kind": _bad_record(b"[]", faults.BAD_JSON),
    "json nested too deep": _bad_record(b"[" * 100_000, faults.BAD_JSON),
    "not utf-8": _bad_record(b'{"raw_caption": ["\xff\xfe"]}', faults.BAD_JSON),
    "captions of the wrong type": _bad_record(b'{"raw_caption": 7}', faults.BAD_JSON),
    "no caption": _bad_record(b"{}", faults.NO_CAPTION),
    "empty caption": _bad_record(json.dumps({"raw_caption": [" "]}).encode(), faults.NO_CAPTION),
}

ODDITIES = {**IMAGES, **RECORDS}
