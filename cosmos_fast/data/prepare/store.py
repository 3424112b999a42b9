"""Captions on disk, found by URL or name: built in one pass over the tables, read at random by many processes.

`captions.bin` holds the records one after the other, `captions.npy` the 64-bit hashes of their names in order, and
where each record begins. Building it takes some 60 bytes of memory a row; reading it, what the page cache likes.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_fast.data.prepare.layouts import Record
from cosmos_fast.utils.files import fsync_path, replacing, write_atomic

_RECORDS = "captions.bin"
_INDEX = "captions.npy"
_MADE_OF = "captions.json"
_LENGTHS = struct.Struct("<II")  # bytes of the name, bytes of the record


class CaptionStore:
    """name (URL or key) -> the json of its captions. Cheap to hand to another process: files are opened when read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index: np.ndarray | None = None
        self._file = -1

    def find(self, name: str) -> bytes | None:
        """The record of a name, the first one where the tables have several; None if there is none."""
        index = self._open()
        wanted = _hash(name)
        for row in range(int(np.searchsorted(index[0], np.uint64(wanted))), index.shape[1]):
            if int(index[0, row]) != wanted:
                break
            found, record = self._read(int(index[1, row]))
            if found == name:  # another name may have the same hash
                return record
        return None

    def example(self) -> str | None:
        """A name that is in the store, for messages."""
        index = self._open()
        return self._read(int(index[1].min()))[0] if index.shape[1] else None

    def close(self) -> None:
        """Close the files; find() opens them again."""
        if self._file >= 0:
            os.close(self._file)
        self._index, self._file = None, -1

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "_index": None, "_file": -1}

    def _open(self) -> np.ndarray:
        if self._index is None:
            self._index = np.load(self.folder / _INDEX, mmap_mode="r", allow_pickle=False).view(np.ndarray)
            self._file = os.open(self.folder / _RECORDS, os.O_RDONLY | os.O_CLOEXEC)
        return self._index

    def _read(self, offset: int) -> tuple[str, bytes]:
        name_bytes, record_bytes = _LENGTHS.unpack(os.pread(self._file, _LENGTHS.size, offset))
        data = os.pread(self._file, name_bytes + record_bytes, offset + _LENGTHS.size)
        return data[:name_bytes].decode("utf-8", "replace"), data[name_bytes:]


def build_store(
    folder: Path, records: Iterable[tuple[str, Record]], made_of: Mapping[str, Any]
) -> tuple[CaptionStore, int]:
    """Write the store of these (name, record) pairs; returns it and the number of rows whose name was there before.

    made_of: what is_built() will be asked for. The index is renamed into place last, so a store with an index is whole.
    Raises OSError.
    """
    remove_store(folder)
    write_atomic(folder / _MADE_OF, json.dumps(made_of))
    hashes, offsets, offset = array("Q"), array("Q"), 0
    with (folder / _RECORDS).open("wb") as out:
        for name, record in records:
            name_bytes = name.encode("utf-8", "replace")
            data = json.dumps(record, default=lambda other: None).encode()  # parquet may hold bytes and dates
            out.write(_LENGTHS.pack(len(name_bytes), len(data)) + name_bytes + data)
            hashes.append(_hash(name))
            offsets.append(offset)
            offset += _LENGTHS.size + len(name_bytes) + len(data)
    columns = np.array([hashes, offsets], dtype=np.uint64)
    index = columns[:, np.argsort(columns[0], kind="stable")]  # stable: the first row of a name comes first
    with replacing(folder / _INDEX) as file:
        fsync_path(folder / _RECORDS)
        np.save(file, index)
    repeated = int((np.diff(index[0]) == 0).sum()) if index.shape[1] else 0
    return CaptionStore(folder), repeated


def is_built(folder: Path, made_of: Mapping[str, Any]) -> bool:
    """Whether a whole store of exactly that lies there."""
    try:
        return (folder / _INDEX).exists() and json.loads((folder / _MADE_OF).read_bytes()) == made_of
    except (OSError, ValueError):
        return False


def remove_store(folder: Path) -> None:
    """Delete the store's files, the index first."""
    for name in (_INDEX, _RECORDS, _MADE_OF):
        (folder / name).unlink(missing_ok=True)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest(), "little")
