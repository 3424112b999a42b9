"""Writes MATLAB files of level 5 as MATLAB does: variables compressed, whole numbers stored in the smallest type."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

_CLASSES = {"f8": 6, "f4": 7, "i1": 8, "u1": 9, "i2": 10, "u2": 11, "i4": 12, "u4": 13}
_TYPES = {"i1": 1, "u1": 2, "i2": 3, "u2": 4, "i4": 5, "u4": 6, "f4": 7, "f8": 9}


def element(kind: int, data: bytes) -> bytes:
    if 0 < len(data) <= 4:
        return struct.pack("<HH", kind, len(data)) + data.ljust(4, b"\0")
    return struct.pack("<II", kind, len(data)) + data + b"\0" * (-len(data) % 8)


def head(kind: int, shape: tuple[int, ...], name: str) -> bytes:
    flags = element(6, struct.pack("<II", kind, 0))
    return flags + element(5, struct.pack(f"<{len(shape)}i", *shape)) + element(1, name.encode())


def matrix(value: Any, name: str = "") -> bytes:
    """numbers -> [1, 1]; arrays of two axes; text; lists -> a cell, or a struct array where they hold dictionaries."""
    if isinstance(value, str):
        # MATLAB keeps UTF-16 code units.
        body = head(4, (1, len(value)), name) + element(4, value.encode("utf-16-le"))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        width = 32
        fields = list(value[0])
        body = head(2, (1, len(value)), name) + element(5, struct.pack("<i", width))
        body += element(1, b"".join(field.encode().ljust(width, b"\0") for field in fields))
        body += b"".join(matrix(row[field]) for row in value for field in fields)
    elif isinstance(value, list):
        body = head(1, (1, len(value)), name) + b"".join(map(matrix, value))
    else:
        array = np.atleast_2d(np.asarray(value))
        kind = _CLASSES[array.dtype.str[1:]]
        whole = array.size and array.dtype == np.float64 and (array == array.astype(np.uint8)).all()
        stored = array.astype(np.uint8) if whole else array
        body = head(kind, array.shape, name) + element(_TYPES[stored.dtype.str[1:]], stored.tobytes(order="F"))
    return struct.pack("<II", 14, len(body)) + body


def write_mat(path: Path, compress: bool = True, **variables: Any) -> Path:
    parts = [matrix(value, name) for name, value in variables.items()]
    if compress:
        packed = [zlib.compress(part) for part in parts]
        parts = [struct.pack("<II", 15, len(part)) + part for part in packed]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM" + b"".join(parts))
    return path
