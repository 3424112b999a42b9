"""MATLAB's level 5 files (.mat of versions 5 to 7): numbers, text, cells and structs, which is what data sets ship.

A reader of our own, since scipy would be a dependency of 35 MB for five small files, and since these files come from
anywhere: every length is checked against the bytes that are there, what is compressed is bounded, and the kinds that
mean something to MATLAB only (functions, objects) are refused.
Format: "MAT-File Format", The MathWorks, level 5.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

_HEADER = 128
_MAX_BYTES = 256 * 2**20  # of all variables, unpacked
_MAX_DEPTH = 16
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _CHAR = 1, 2, 4
_NUMERIC_CLASSES = range(6, 16)
_COMPLEX = 0x0800
# Type numbers of stored values; text is stored as any of them, or as UTF-8, -16 or -32.
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXT = {16: "utf-8", 17: "utf-16", 18: "utf-32"}


def read_mat(path: Path) -> dict[str, Any]:
    """Variable -> its value: an array with the stored shape (numbers), a str (text of a row), or for cells and structs
    a flat list, column by column, of values or of dictionaries.

    Raises OSError, and ValueError where it is no such file, broken or of a kind that is not read.
    """
    data = path.read_bytes()
    if data[:8] == b"MATLAB 7" or data[:4] == b"\x89HDF":
        raise ValueError("it is of MATLAB 7.3 (HDF5); only versions 5 to 7 are read")
    if len(data) < _HEADER or data[126:128] not in (b"IM", b"MI"):
        raise ValueError("it is no MATLAB file")
    reader = _Reader("<" if data[126:128] == b"IM" else ">")
    variables: dict[str, Any] = {}
    room = _MAX_BYTES
    try:
        for kind, body in reader.elements(memoryview(data)[_HEADER:]):
            if kind == _COMPRESSED:
                unpacked = _inflate(body, room)
                room -= len(unpacked)
                ((kind, body),) = reader.elements(unpacked)
            if kind != _MATRIX:
                raise ValueError(f"an element of type {kind} stands alone")
            name, value = reader.matrix(body, 0)
            variables[name] = value
    except (struct.error, zlib.error, UnicodeDecodeError, IndexError) as error:
        raise ValueError(f"it is broken: {error}") from None
    return variables


def _inflate(body: memoryview, room: int) -> memoryview:
    engine = zlib.decompressobj()
    data = engine.decompress(body, room + 1)
    if len(data) > room:
        raise ValueError("it unpacks to too much")
    if not engine.eof:
        raise ValueError("it is cut off")
    return memoryview(data)


class _Reader:
    """order: byte order, "<" or ">"."""

    def __init__(self, order: str) -> None:
        self.order = order

    def elements(self, data: memoryview) -> list[tuple[int, memoryview]]:
        """(type, contents) of the elements that fill some bytes."""
        found, at = [], 0
        while at < len(data):
            kind, size = struct.unpack_from(self.order + "II", data, at)
            if kind >> 16:  # short form: size and type share four bytes, the contents are in the next four
                kind, size, at, step = kind & 0xFFFF, kind >> 16, at + 4, 4
            else:
                at += 8
                # Elements start on multiples of eight, save for what is compressed and what follows it.
                step = size if kind == _COMPRESSED else -(-size // 8) * 8
            if at + size > len(data) or (step == 4 and size > 4):
                raise ValueError("it is cut off or broken")
            found.append((kind, data[at : at + size]))
            at += step
        return found

    def matrix(self, body: memoryview, depth: int) -> tuple[str, Any]:
        """(name, value) of a matrix element's contents."""
        if depth > _MAX_DEPTH:
            raise ValueError("cells and structs are nested too deep")
        if not len(body):  # an empty cell
            return "", np.zeros((0, 0))
        parts = self.elements(body)
        flags = struct.unpack(self.order + "II", parts[0][1])[0]
        shape = self.numbers(*parts[1]).tolist()
        if any(size < 0 for size in shape) or len(shape) < 2:
            raise ValueError("it is broken: a matrix of no shape")
        name = bytes(parts[2][1]).decode("ascii")
        kind, rest, count = flags & 0xFF, parts[3:], int(np.prod(shape, dtype=object))
        if flags & _COMPLEX:
            raise ValueError(f"{name or 'a value'} is complex")
        if kind in _NUMERIC_CLASSES:
            values = self.numbers(*rest[0])
            if len(values) != count:
                raise ValueError(f"{name or 'a value'} has {len(values)} numbers for a shape of {count}")
            return name, values.reshape(shape, order="F")
        if kind == _CHAR:
            return name, self.text(*rest[0]) if count else ""
        if kind == _CELL:
            return name, self.cells(rest, count, depth)
        if kind == _STRUCT:
            return name, self.structs(rest, count, depth)
        raise ValueError(f"{name or 'a value'} is of a kind that is not read ({kind})")

    def numbers(self, kind: int, body: memoryview) -> np.ndarray:
        if kind not in _TYPES:
            raise ValueError(f"it is broken: numbers of type {kind}")
        return np.frombuffer(body, self.order + _TYPES[kind])

    def text(self, kind: int, body: memoryview) -> str:
        if kind in _TEXT:
            coding = _TEXT[kind] + ("" if kind == 16 else "-le" if self.order == "<" else "-be")
            return bytes(body).decode(coding)
        return "".join(map(chr, self.numbers(kind, body).astype(np.uint16).tolist()))

    def cells(self, parts: list[tuple[int, memoryview]], count: int, depth: int) -> list[Any]:
        if len(parts) != count or any(kind != _MATRIX for kind, _ in parts):
            raise ValueError(f"it is broken: {len(parts)} values for {count} places")
        return [self.matrix(body, depth + 1)[1] for _, body in parts]

    def structs(self, parts: list[tuple[int, memoryview]], count: int, depth: int) -> list[dict[str, Any]]:
        width = int(self.numbers(*parts[0])[0])
        packed = bytes(parts[1][1])
        if width < 1 or len(packed) % width:
            raise ValueError("it is broken: names of fields")
        fields = [packed[at : at + width].split(b"\0")[0].decode("ascii") for at in range(0, len(packed), width)]
        values = self.cells(parts[2:], count * len(fields), depth)
        steps = range(0, len(values), len(fields)) if fields else ()
        return [dict(zip(fields, values[at : at + len(fields)], strict=True)) for at in steps]
