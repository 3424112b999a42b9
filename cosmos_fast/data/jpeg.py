"""What the markers of a JPEG file say, read without decoding: its size, whether it is whole, whether it is plain.

Plain is what any decoder takes without complaint: baseline or progressive Huffman coding, 8 bits, grey or YCbCr, sound
tables, an end marker. A decoder that fails for good on an odd file is handed plain ones only. Names follow ITU T.81.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

_START, _END = b"\xff\xd8", b"\xff\xd9"
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; all others are lossless, arithmetic or hierarchical
_HUFFMAN, _QUANTIZATION, _SCAN, _RESTART, _ADOBE, _JFIF, _EOI = 0xC4, 0xDB, 0xDA, 0xDD, 0xEE, 0xE0, 0xD9
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in coded data: neither a stuffed byte nor a restart marker
_MAX_SIDE = 65_500  # libjpeg's, a little below what the format could say
_LUMA_SAMPLING = (0x11, 0x21, 0x12, 0x22, 0x41)  # horizontal and vertical factor, a nibble each; chroma has 0x11
# What follows a cut, for the question whether any pixel depended on it; no 0xff, which would begin a marker.
_FILLERS = (b"\x55" * 64, b"\xa7\x13\x5e\x90" * 16)
_TAIL_BYTES = 16  # some blocks of pixels, or of nothing where a file was filled up with zeros


class _OddJpegError(Exception):
    """The file is not plain, or not whole."""


@dataclass(frozen=True)
class PlainJpeg:
    """width, height: pixels. end: bytes up to and with the end marker; what lies behind it is no part of the image."""

    width: int
    height: int
    progressive: bool
    end: int


def is_jpeg(data: bytes) -> bool:
    """By its first bytes; names lie."""
    return data.startswith(_START)


def read_plain(data: bytes) -> PlainJpeg | None:
    """Walk all markers of a file, about 0.1 ms; None for a file that is not plain, not whole, or no JPEG."""
    if not is_jpeg(data):
        return None
    try:
        return _Walk(data).run()
    except (_OddJpegError, IndexError):
        return None


def with_end_marker(data: bytes) -> bytes | None:
    """The file with the end marker it lacks, if nothing else of it is missing; else None.

    Decoders fill what is missing with grey and say nothing. So the file is decoded with different bytes in place of
    what was cut off: where all of it is there, they change no pixel, and its last bytes do. Progressive files
    always have something to fill.
    """
    if not is_jpeg(data):
        return None
    body = data.rstrip(b"\xff")  # the first half of the marker
    try:
        plain = _Walk(body + _END).run()
        if plain.end <= len(body):  # its own end marker is there: something else is wrong
            return None
        if plain.progressive:
            return None
        whole = _pixels(body + _END)
        if any(not np.array_equal(_pixels(body + filler + _END), whole) for filler in _FILLERS):
            return None
        if np.array_equal(_pixels(body[:-_TAIL_BYTES] + _END), whole):
            return None
    except (_OddJpegError, IndexError, OSError, ValueError, SyntaxError):
        return None
    return body + _END


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data), formats=("JPEG",)))


class _Walk:
    """Reads segment after segment and checks what libjpeg would stop at."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 2
        self.frame: bytes | None = None  # body of the frame header
        self.progressive = False
        self.components: dict[int, int] = {}  # id -> its quantization table
        self.quantization: set[int] = set()
        self.huffman: set[int] = set()  # class << 4 | number
        self.jfif = False
        self.adobe_transform: int | None = None
        self.scanned: set[int] = set()  # ids of the components that stood in a scan

    def run(self) -> PlainJpeg:
        while True:
            kind = self._next_marker()
            if kind == _EOI:
                _require(self.frame is not None and self.scanned == set(self.components))
                assert self.frame is not None
                height, width = int.from_bytes(self.frame[1:3], "big"), int.from_bytes(self.frame[3:5], "big")
                return PlainJpeg(width, height, self.progressive, self.position)
            self._segment(kind, self._body())
            if kind == _SCAN:
                found = _MARKER.search(self.data, self.position)
                _require(found is not None)
                assert found is not None
                self.position = found.start()

    def _next_marker(self) -> int:
        data = self.data
        _require(data[self.position] == 0xFF)
        while data[self.position] == 0xFF:  # fill bytes
            self.position += 1
        self.position += 1
        return data[self.position - 1]

    def _body(self) -> bytes:
        length = int.from_bytes(self.data[self.position : self.position + 2], "big")
        body = self.data[self.position + 2 : self.position + length]
        _require(length >= 2 and len(body) == length - 2)
        self.position += length
        return body

    def _segment(self, kind: int, body: bytes) -> None:
        if kind in _FRAMES:
            self._start_frame(kind, body)
        elif kind == _HUFFMAN:
            self._huffman_tables(body)
        elif kind == _QUANTIZATION:
            self._quantization_tables(body)
        elif kind == _SCAN:
            self._start_scan(body)
        elif kind == _RESTART:
            _require(len(body) == 2)
        elif kind == _JFIF:
            self.jfif = self.jfif or body.startswith(b"JFIF\0")
        elif kind == _ADOBE:
            if body.startswith(b"Adobe") and len(body) >= 12:
                self.adobe_transform = body[11]
        else:
            _require(0xE0 <= kind <= 0xEF or kind == 0xFE)  # notes of applications, and comments

    def _start_frame(self, kind: int, body: bytes) -> None:
        _require(self.frame is None and len(body) >= 9 and body[0] == 8)
        count = body[5]
        height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
        _require(count in (1, 3) and len(body) == 6 + 3 * count)
        _require(0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE)
        rows = [body[6 + 3 * i : 9 + 3 * i] for i in range(count)]
        self.components = {row[0]: row[2] for row in rows}
        _require(len(self.components) == count and rows[0][1] in _LUMA_SAMPLING)
        _require(all(row[1] == 0x11 for row in rows[1:]) and all(row[2] < 4 for row in rows))
        self.frame, self.progressive = body, kind == 0xC2

    def _quantization_tables(self, body: bytes) -> None:
        while body:
            wide, number = body[0] >> 4, body[0] & 15
            size = 1 + 64 * (1 + wide)
            _require(wide <= 1 and number < 4 and len(body) >= size)
            self.quantization.add(number)
            body = body[size:]

    def _huffman_tables(self, body: bytes) -> None:
        while body:
            counts = body[1:17]
            total = sum(counts)
            _require(body[0] >> 4 <= 1 and body[0] & 15 < 4 and len(counts) == 16)
            _require(total <= 256 and len(body) >= 17 + total)
            code = 0
            for length, count in enumerate(counts, start=1):  # codes of one length after the other, none all ones
                code += count
                _require(count == 0 or code < 1 << length)
                code <<= 1
            if body[0] >> 4 == 0:
                _require(all(symbol <= 15 for symbol in body[17 : 17 + total]))  # bits of a difference
            self.huffman.add(body[0])
            body = body[17 + total :]

    def _start_scan(self, body: bytes) -> None:
        _require(self.frame is not None and len(body) >= 6 and len(body) == 4 + 2 * body[0])
        self._check_colours()
        rows = [(body[1 + 2 * i], body[2 + 2 * i]) for i in range(body[0])]
        ids = [row[0] for row in rows]
        _require(len(set(ids)) == len(ids) and all(name in self.components for name in ids))
        _require(all(self.components[name] in self.quantization for name in ids))
        first, last, high, low = body[-3], body[-2], body[-1] >> 4, body[-1] & 15
        if self.progressive:
            _require((last == 0) if first == 0 else (first <= last < 64 and len(ids) == 1))
            _require(low <= 13 and (high == 0 or high == low + 1))
        else:
            _require((first, last, high, low) == (0, 63, 0, 0))
        for _, tables in rows:
            if first == 0 and high == 0:
                _require(tables >> 4 in self.huffman)
            if last > 0:
                _require(0x10 | tables & 15 in self.huffman)
        self.scanned.update(ids)

    def _check_colours(self) -> None:
        """Three components are YCbCr, and no decoder can think otherwise."""
        if len(self.components) == 3:
            _require(self.adobe_transform in (None, 1))
            _require(self.jfif or self.adobe_transform == 1 or list(self.components) == [1, 2, 3])


def _require(holds: bool) -> None:
    if not holds:
        raise _OddJpegError
