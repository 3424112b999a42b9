"""The check before a strict decoder: plain JPEGs pass unchanged, all else is decoded, nothing broken slips through."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from cosmos_fast.data import faults, jpeg
from cosmos_fast.data.faults import SampleFault
from cosmos_fast.data.image_check import checked_image
from cosmos_fast.data.images import decode
from tests.fault_table import IMAGES, MAX_PIXELS, encoded, scene

SCAN = b"\xff\xda\x00\x0c\x03\x01\x00\x02\x11\x03\x11\x00\x3f\x00"
PLAIN = {
    "4:2:0": encoded(scene(), "JPEG"),
    "4:2:2": encoded(scene(), "JPEG", subsampling=1),
    "4:4:4": encoded(scene(), "JPEG", subsampling=0),
    "grey": encoded(scene().convert("L"), "JPEG"),
    "progressive": encoded(scene(), "JPEG", progressive=True),
    "progressive grey": encoded(scene().convert("L"), "JPEG", progressive=True),
    "optimised tables": encoded(scene(), "JPEG", optimize=True),
    "restart markers": encoded(scene().resize((160, 160)), "JPEG", restart_marker_blocks=3),
    "comment and profile": encoded(scene(), "JPEG", comment=b"\xff\xd9 not the end", icc_profile=b"\xff\xda" * 40),
}


def crowded(data: bytes) -> bytes:
    """Three codes of one bit each in the first Huffman table."""
    counts = data.index(b"\xff\xc4") + 5
    moved = data[counts + 2] - 3  # from those of three bits
    assert data[counts] == 0
    assert moved >= 0
    return data[:counts] + bytes([3, data[counts + 1], moved]) + data[counts + 3 :]


ODD = {
    "cmyk": encoded(scene().convert("CMYK"), "JPEG"),
    "rgb, not ycbcr": encoded(scene(), "JPEG", keep_rgb=True),
    "png": encoded(scene(), "PNG"),
    "webp": encoded(scene(), "WEBP"),
    "12 bits": PLAIN["4:2:0"].replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
    "arithmetic coding": PLAIN["4:2:0"].replace(b"\xff\xc0\x00\x11", b"\xff\xc9\x00\x11"),
    "lossless": PLAIN["4:2:0"].replace(b"\xff\xc0\x00\x11", b"\xff\xc3\x00\x11"),
    "garbage between segments": PLAIN["4:2:0"].replace(b"\xff\xc4", b"\x07\x07\xff\xc4", 1),
    "too many codes of a length": crowded(PLAIN["4:2:0"]),
    "scan of one component": PLAIN["4:2:0"].replace(SCAN, b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"),
}


def decoded(data: bytes) -> Image.Image | str:
    """The image, or the cause why there is none."""
    try:
        return decode(data, MAX_PIXELS)
    except SampleFault as fault:
        return fault.cause


@pytest.mark.parametrize("name", PLAIN)
def test_plain_jpegs_pass_as_they_are(name: str) -> None:
    data = PLAIN[name]
    checked = checked_image(data, MAX_PIXELS)
    assert checked.data == data
    assert (checked.width, checked.height) == Image.open(io.BytesIO(data)).size
    assert checked.repairs == ()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("tail", [b"\0" * 70, b"\n", b"<html>", encoded(scene(3), "JPEG")])
def test_what_lies_behind_the_end_is_cut_off(name: str, tail: bytes) -> None:
    assert checked_image(PLAIN[name] + tail, MAX_PIXELS).data == PLAIN[name]


@pytest.mark.parametrize("name", ODD)
def test_everything_else_is_handed_on_with_the_pixels_that_pil_gives(name: str) -> None:
    expected = decoded(ODD[name])
    if isinstance(expected, str):  # libjpeg's releases differ in what they know
        with pytest.raises(SampleFault) as fault:
            checked_image(ODD[name], MAX_PIXELS)
        assert fault.value.cause == expected
        return
    checked = checked_image(ODD[name], MAX_PIXELS)
    assert checked.data.startswith(b"P6")
    image = Image.open(io.BytesIO(checked.data))
    assert image.mode == "RGB"
    assert (checked.width, checked.height) == image.size == expected.size
    assert np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize("name", IMAGES)
def test_same_verdict_as_the_decoder(name: str) -> None:
    """Both loaders replace the same samples, for the same cause."""
    data = next((data for member, data in IMAGES[name].members.items() if not member.endswith("json")), b"")
    cause = IMAGES[name].cause
    if cause == faults.TOO_MANY_BYTES:
        pytest.skip("found before the image is read")
    if cause is None:
        checked = checked_image(data, MAX_PIXELS)
        assert Image.open(io.BytesIO(checked.data)).size == (checked.width, checked.height)
        assert decode(data, MAX_PIXELS).size == (checked.width, checked.height)
        assert [repair.cause for repair in checked.repairs] == list(IMAGES[name].repairs)
        return
    for check in (checked_image, decode):
        with pytest.raises(SampleFault) as fault:
            check(data, MAX_PIXELS)
        assert fault.value.cause == cause


def test_pixel_cap_is_inclusive() -> None:
    data = PLAIN["4:2:0"]
    pixels = scene().width * scene().height
    assert checked_image(data, pixels).data == data
    with pytest.raises(SampleFault, match="over the pixel cap"):
        checked_image(data, pixels - 1)


@pytest.mark.parametrize("marker", [b"\xff\xc4", b"\xff\xdb"])
@pytest.mark.parametrize("number", range(4))
def test_a_jpeg_without_one_of_its_tables_is_not_plain(marker: bytes, number: int) -> None:
    data = PLAIN["4:2:0"]
    starts = [at for at in range(len(data)) if data.startswith(marker, at)]
    assert len(starts) == (4 if marker == b"\xff\xc4" else 2)
    at = starts[number % len(starts)]
    without = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    assert jpeg.read_plain(without) is None


# --- the missing end marker


@pytest.mark.parametrize("name", ["4:2:0", "4:2:2", "4:4:4", "grey", "optimised tables", "restart markers"])
def test_a_jpeg_that_lacks_the_end_marker_only_is_mended(name: str) -> None:
    data = PLAIN[name]
    for cut in (data[:-2], data[:-1]):
        repairs: list[faults.Repair] = []
        mended = decode(cut, MAX_PIXELS, repairs)
        assert [repair.cause for repair in repairs] == [faults.MENDED_IMAGE]
        assert np.array_equal(np.asarray(mended), np.asarray(decode(data)))


@pytest.mark.parametrize("name", PLAIN)
def test_a_jpeg_that_lacks_pixels_is_not(name: str) -> None:
    data = PLAIN[name]
    start = data.rindex(b"\xff\xda")
    for lost in (12, 40, 90):
        if len(data) - lost > start + 20:
            assert jpeg.with_end_marker(data[:-lost]) is None, lost
    assert jpeg.with_end_marker(data) is None  # nothing is missing


def test_a_jpeg_that_was_filled_up_with_zeros_is_not() -> None:
    """They decode to pixels, so nothing seems to be missing at the end."""
    data = PLAIN["4:4:4"]
    assert jpeg.with_end_marker(data[: len(data) // 2] + bytes(20_000)) is None


def test_a_progressive_jpeg_is_not_mended() -> None:
    """A cut one is whole, only coarse: no filler shows what is missing."""
    assert jpeg.with_end_marker(PLAIN["progressive"][:-2]) is None


# --- damage of any kind


def damaged(count: int) -> Iterator[bytes]:
    """Plain JPEGs with bytes changed, cut out, put in or cut off, most of them in the headers."""
    numbers = np.random.default_rng(7)
    files = list(PLAIN.values())
    for _ in range(count):
        data = bytearray(files[int(numbers.integers(len(files)))])
        reach = len(data) if numbers.random() < 0.3 else min(len(data), 700)
        for _ in range(int(numbers.integers(1, 4))):
            at = int(numbers.integers(2, reach))
            kind = numbers.random()
            if kind < 0.6:
                data[at : at + 1] = bytes([int(numbers.integers(256))])
            elif kind < 0.75:
                del data[at : at + int(numbers.integers(1, 30))]
            elif kind < 0.9:
                data[at:at] = numbers.bytes(int(numbers.integers(1, 10)))
            else:
                del data[at:]
        yield bytes(data)


def test_whatever_passes_for_plain_can_be_decoded() -> None:
    """A strict decoder must never see a file that libjpeg gives up on."""
    passed = 0
    for data in damaged(1500):
        plain = jpeg.read_plain(data)
        if plain is None or plain.width * plain.height > MAX_PIXELS:
            continue
        passed += 1
        image = decode(data[: plain.end])
        assert image.size == (plain.width, plain.height)
    assert passed > 200  # else nothing was tried


def test_the_check_never_fails_in_another_way() -> None:
    for data in damaged(400):
        try:
            checked = checked_image(data, MAX_PIXELS)
        except SampleFault:
            continue
        image = Image.open(io.BytesIO(checked.data))
        image.load()
        assert image.size == (checked.width, checked.height)
