"""Random access to the samples of tar shards: where each member lies, and its bytes on request.

A sample is the members that share a key: the name up to the first dot of its last part. The rest of the name,
lower-cased, is the member's extension: `jpg`, `json`, `mask.png`. Members are read with pread and never leave memory.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cosmos_fast.config import SourceConfig
from cosmos_fast.data import faults, index_file
from cosmos_fast.data.faults import Fault, SampleFault
from cosmos_fast.data.index_build import build_tables
from cosmos_fast.data.index_file import IndexTables
from cosmos_fast.data.sources import find_shards
from cosmos_fast.utils.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
RECORD_EXTENSION = "json"
_OPEN_SHARDS = 128  # a process; CC12M alone has 2,176 shards, and 1,024 open files are a common limit


@dataclass(frozen=True)
class MemberPlace:
    """Where a member lies: shard number, first byte, size in bytes."""

    shard: int
    offset: int
    size: int


class Index:
    """The samples of one source, in shard order. Cheap to copy to another process; files are opened when read."""

    def __init__(self, source: SourceConfig, shards: list[Path], tables: IndexTables, cache: Path | None) -> None:
        self.source = source
        self.shards = shards
        self.cache = cache  # the file the tables were read from or written to
        self.tables = tables
        self._files: OrderedDict[int, int] = OrderedDict()  # shard number -> descriptor, least recently used first
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self.tables.sample_shard)

    @property
    def faults(self) -> list[Fault]:
        """What was wrong with the shards when they were indexed."""
        return self.tables.faults

    def key(self, i: int) -> str:
        """The sample's key, as webdataset has it; unique in a shard, not always in a source."""
        start, stop = self.tables.key_start[i : i + 2]
        return bytes(self.tables.keys[int(start) : int(stop)]).decode("utf-8", "replace")

    def name(self, i: int) -> str:
        """`shard.tar:key`, for messages."""
        return f"{self.shards[int(self.tables.sample_shard[i])].name}:{self.key(i)}"

    def members(self, i: int) -> dict[str, MemberPlace]:
        """Extension -> place, without reading."""
        tables = self.tables
        shard = int(tables.sample_shard[i])
        start, stop = (int(edge) for edge in tables.member_start[i : i + 2])
        return {
            tables.extensions[int(tables.member_extension[m])]: MemberPlace(
                shard, int(tables.member_block[m]) * 512, int(tables.member_size[m])
            )
            for m in range(start, stop)
        }

    def read(
        self, i: int, *, max_bytes: int | None = None, only: Callable[[str], bool] | None = None
    ) -> dict[str, bytes]:
        """Extension -> bytes of the sample's members (those `only` accepts).

        Raises SampleFault for a member above `max_bytes` (before reading it) and for a shard that changed since it
        was indexed.
        """
        return {
            extension: self._read_member(extension, place, max_bytes)
            for extension, place in self.members(i).items()
            if only is None or only(extension)
        }

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        if self._pid == os.getpid():
            for fd in self._files.values():
                os.close(fd)
        self._files.clear()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": OrderedDict(), "_pid": -1}

    def _read_member(self, extension: str, place: MemberPlace, max_bytes: int | None) -> bytes:
        if max_bytes is not None and place.size > max_bytes:
            raise SampleFault(faults.TOO_MANY_BYTES, f"{extension}: {place.size} bytes, the cap is {max_bytes}")
        try:
            data = os.pread(self._file(place.shard), place.size, place.offset)
        except OSError as error:
            raise SampleFault(faults.UNREADABLE_SHARD, str(error)) from error
        if len(data) != place.size:
            raise SampleFault(faults.UNREADABLE_SHARD, f"{extension}: {len(data)} of {place.size} bytes are there")
        return data

    def _file(self, shard: int) -> int:
        if self._pid != os.getpid():  # descriptors of a forked parent stay the parent's to close
            self._files, self._pid = OrderedDict(), os.getpid()
        fd = self._files.get(shard)
        if fd is None:
            if len(self._files) >= _OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            fd = self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        else:
            self._files.move_to_end(shard)
        return fd


def image_extension(members: dict[str, bytes]) -> str | None:
    """The first extension among `members` that is an image by itself (`mask.png` is not)."""
    return next((extension for extension in IMAGE_EXTENSIONS if extension in members), None)


def open_source(
    source: SourceConfig, *, on_shard: Callable[[int, int], None] | None = None, rebuild: bool = False
) -> Index:
    """The index of a source, from its cache where that still fits every shard, else built and cached.

    on_shard(done, total) is called while building. UserError: a missing shard, no shard at all, or no sample in them.
    """
    shards = find_shards(source.path)
    with index_file.exclusive(shards):  # ranks of one machine wait for the first instead of scanning again
        cache, tables = (None, None) if rebuild else index_file.load(shards)
        if tables is None:
            tables = build_tables(shards, on_shard)
            cache = index_file.save(shards, tables)
    if len(tables.sample_shard) == 0:
        reason = f": {tables.faults[0]}" if tables.faults else ""
        raise UserError(f"data source {source.path!r} holds no sample{reason}; are these webdataset tar shards?")
    return Index(source, shards, tables, cache)


def is_used_in_training(extension: str) -> bool:
    """Masks and other extras of a sample are not read for training."""
    return extension == RECORD_EXTENSION or extension in IMAGE_EXTENSIONS
