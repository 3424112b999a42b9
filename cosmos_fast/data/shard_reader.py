"""Reading a shard from front to back by its headers: what is between them is skipped where that saves anything."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Protocol

from cosmos_fast.data.storage import RemoteShard, Shard, Storage

_READ_BYTES = 128 << 10  # of a remote shard at a time: to ask again for less takes longer than to read on


class ShardReader(Protocol):
    """Bytes of one shard. name: for messages. size: bytes."""

    name: str
    size: int

    def read(self, start: int, size: int) -> bytes:
        """Up to `size` bytes from byte `start`. Raises OSError, StorageError."""


class FileReader:
    """A shard on a disk, or in the cache."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.name = name
        self.size = os.fstat(fd).st_size

    def read(self, start: int, size: int) -> bytes:
        """See ShardReader."""
        return os.pread(self._fd, size, start)


class RangeReader:
    """A remote shard that can be read in parts; headers that lie close together come with one request."""

    def __init__(self, shard: RemoteShard, storage: Storage) -> None:
        assert shard.facts.size is not None
        self.name = shard.name
        self.size = shard.facts.size
        self._shard, self._storage = shard, storage
        self._start, self._held = 0, b""

    def read(self, start: int, size: int) -> bytes:
        """See ShardReader."""
        if start < self._start or start + size > self._start + len(self._held):
            self._start, self._held = start, self._storage.read(self._shard, start, max(size, _READ_BYTES))
        return self._held[start - self._start : start - self._start + size]


@contextlib.contextmanager
def open_shard(shard: Shard, storage: Storage) -> Iterator[ShardReader]:
    """The reader of a shard. Raises OSError, StorageError."""
    if isinstance(shard, RemoteShard):
        if shard.facts.ranged:
            yield RangeReader(shard, storage)
            return
        fd = storage.open_whole(shard)
    else:
        fd = os.open(shard, os.O_RDONLY)
    try:
        yield FileReader(fd, shard.name)
    finally:
        os.close(fd)
