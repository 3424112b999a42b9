"""The cached index: one file of plain arrays with a JSON head, mapped into memory, valid for exact shard versions.

Layout: 8 magic bytes, length of the head (8 bytes, little endian), head, then the arrays, each aligned to 64 bytes.
The file may lie beside untrusted shards, so its head is checked before use and nothing in it is ever executed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_fast.data import storage
from cosmos_fast.data.faults import Fault
from cosmos_fast.data.storage import Shard
from cosmos_fast.utils.files import replacing

log = logging.getLogger(__name__)

VERSION = 1
FOLDER = ".cosmos_index"
DAMAGED = (ValueError, KeyError, TypeError, OverflowError, RecursionError)  # what reading a damaged file leads to
_MAGIC = b"COSMOSIX"
_ALIGN = 64
_DTYPES = {
    "sample_shard": np.uint32,
    "member_start": np.int64,
    "member_block": np.uint32,
    "member_size": np.uint32,
    "member_extension": np.uint16,
    "key_start": np.int64,
    "keys": np.uint8,
}


@dataclass(frozen=True)
class IndexTables:
    """Columns over N samples and M members.

    sample_shard [N]; member_start [N+1] into the member columns; member_block [M], first byte / 512; member_size [M],
    bytes; member_extension [M] into `extensions`; key_start [N+1] into `keys`, utf-8 bytes.
    """

    sample_shard: np.ndarray
    member_start: np.ndarray
    member_block: np.ndarray
    member_size: np.ndarray
    member_extension: np.ndarray
    key_start: np.ndarray
    keys: np.ndarray
    extensions: list[str]
    faults: list[Fault]

    def key(self, row: int) -> str:
        """The key of the sample in this row."""
        start, stop = self.key_start[row : row + 2]
        return bytes(self.keys[int(start) : int(stop)]).decode("utf-8", "replace")


def places(shards: Sequence[Shard]) -> list[Path]:
    """Where the index of these shards may lie: beside them, else in the user's cache."""
    names = "\n".join(storage.addresses(shards))
    digest = hashlib.sha256(names.encode(errors="surrogateescape"))  # a name may hold bytes that are no UTF-8
    name = f"{digest.hexdigest()[:24]}.idx"
    cache = Path(os.environ.get("COSMOS_CACHE_DIR") or Path.home() / ".cache" / "cosmos-fast")
    beside = storage.folder(shards[0])
    return [*([beside / FOLDER / name] if beside else []), cache / "index" / name]


def load(shards: Sequence[Shard], stamps: list[list[Any]]) -> tuple[Path | None, IndexTables | None]:
    """(file, tables) of a cache made of these versions of the shards, see stamp(), else (None, None)."""
    for path in places(shards):
        try:
            tables = read(path, stamps)
        except FileNotFoundError:
            continue
        except (OSError, *DAMAGED) as error:
            log.warning("index cache %s is unreadable (%s): building it again", path, error)
            continue
        if tables is not None:
            return path, tables
    return None, None


def save(shards: Sequence[Shard], stamps: list[list[Any]], tables: IndexTables) -> Path | None:
    """Write the cache; the place, or None when no place can be written (a warning says so).

    stamps: taken before the shards were scanned, so that one that changed meanwhile does not fit them.
    """
    for path in places(shards):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, stamps, tables)
        except OSError as error:
            log.debug("index cache not written to %s: %s", path, error)
            continue
        return path
    log.warning("the index of %s, ... cannot be cached: set COSMOS_CACHE_DIR to a writable folder", shards[0])
    return None


@contextlib.contextmanager
def exclusive(shards: Sequence[Shard]) -> Iterator[None]:
    """Hold the lock of this index if the file system offers one; going without costs a second scan, no harm."""
    with contextlib.ExitStack() as stack:
        for path in places(shards):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(path.with_suffix(".lock"), "w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:
                continue
            break
        yield


def stamp(shards: Sequence[Shard]) -> list[list[Any]]:
    """The version of each shard: name, bytes, modification time in ns or the server's tag."""
    return [storage.stamp(shard) for shard in shards]


def _write(path: Path, stamp: list[list[Any]], tables: IndexTables) -> None:
    head = {
        "version": VERSION,
        "shards": stamp,
        "extensions": tables.extensions,
        "faults": [[fault.cause, fault.where, fault.detail] for fault in tables.faults],
        "lengths": {name: len(getattr(tables, name)) for name in _DTYPES},
    }
    text = json.dumps(head).encode()
    with replacing(path) as out:
        out.write(_MAGIC + len(text).to_bytes(8, "little") + text)
        for name, dtype in _DTYPES.items():
            out.write(bytes(-out.tell() % _ALIGN))
            out.write(np.ascontiguousarray(getattr(tables, name), dtype=np.dtype(dtype).newbyteorder("<")).data)


def read(path: Path, stamps: list[list[Any]]) -> IndexTables | None:
    """The tables of a file; None if it is of other versions of the shards.

    Raises OSError, and DAMAGED for a file that is no index.
    """
    with open(path, "rb") as file:
        start = file.read(16)
        if start[:8] != _MAGIC:
            raise ValueError("not an index file")
        size = int.from_bytes(start[8:], "little")
        if size > path.stat().st_size:
            raise ValueError("cut short")
        head = json.loads(file.read(size))
    if head["version"] != VERSION or head["shards"] != stamps:
        return None
    columns: dict[str, np.ndarray] = {}
    offset = 16 + size
    for name, dtype in _DTYPES.items():
        offset += -offset % _ALIGN
        length = int(head["lengths"][name])
        columns[name] = _map(path, offset, length, np.dtype(dtype).newbyteorder("<"))
        offset += columns[name].nbytes
    _check(columns, head["extensions"], len(stamps))
    return IndexTables(**columns, extensions=head["extensions"], faults=[Fault(*row) for row in head["faults"]])


def _map(path: Path, offset: int, length: int, dtype: np.dtype) -> np.ndarray:
    if length == 0:
        return np.zeros(0, dtype)
    if offset + length * dtype.itemsize > path.stat().st_size:
        raise ValueError("cut short")
    # as a plain array: indexing a np.memmap costs microseconds a time
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(length,)).view(np.ndarray)


def _check(columns: dict[str, np.ndarray], extensions: list[str], shard_count: int) -> None:
    """Whatever a lookup will use as a position must lie inside its column."""
    samples, members = len(columns["sample_shard"]), len(columns["member_block"])
    if not (len(columns["member_start"]) == len(columns["key_start"]) == samples + 1):
        raise ValueError("columns of different length")
    if not (len(columns["member_size"]) == len(columns["member_extension"]) == members):
        raise ValueError("columns of different length")
    for name, end in (("member_start", members), ("key_start", len(columns["keys"]))):
        starts = columns[name]
        if starts[0] != 0 or starts[-1] != end or np.any(np.diff(starts) < 0):
            raise ValueError(f"{name} is not ascending")
    if samples and int(columns["sample_shard"].max()) >= shard_count:
        raise ValueError("a sample lies in no shard")
    if members and int(columns["member_extension"].max()) >= len(extensions):
        raise ValueError("a member has no extension")
    if not all(isinstance(extension, str) for extension in extensions):
        raise ValueError("an extension is no text")


assert {field.name for field in fields(IndexTables)} >= set(_DTYPES)
