"""Random access to the samples of tar shards: where each member lies, and its bytes on request.

A sample is the members that share a key: the name up to the first dot of its last part. The rest of the name,
lower-cased, is the member's extension: `jpg`, `json`, `mask.png`. Members are read with pread and never leave memory.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_fast.config import SourceConfig
from cosmos_fast.data import faults, index_file
from cosmos_fast.data.faults import Fault, SampleFault
from cosmos_fast.data.index_build import build_tables
from cosmos_fast.data.index_file import IndexTables
from cosmos_fast.data.pieces import Pieces, cut, sample_starts
from cosmos_fast.data.quarantine_search import rows_left_out
from cosmos_fast.data.read_ahead import ReadAhead
from cosmos_fast.data.sources import find_shards
from cosmos_fast.data.storage import RemoteShard, Shard, Storage
from cosmos_fast.data.transport import StorageError, UnreachableError, shown
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
    """The samples of one source, in shard order. Cheap to copy to another process; files are opened when read.

    left_out: rows of the tables, ascending, that are no samples here: those in quarantine.
    """

    def __init__(
        self,
        source: SourceConfig,
        shards: list[Shard],
        stamps: list[list[Any]],
        tables: IndexTables,
        cache: Path | None,
        left_out: Sequence[int] = (),
        storage: Storage | None = None,
    ) -> None:
        self.source = source
        self.shards = shards
        self.stamps = stamps  # the versions that the tables are of, see index_file.stamp()
        self.cache = cache  # the file the tables were read from or written to
        self.tables = tables
        self.storage = storage or Storage()
        self.is_remote = any(isinstance(shard, RemoteShard) for shard in shards)
        # Of remote shards; else every member is fetched by itself, whenever it is read.
        self.keeps_pieces = self.storage.config.cache_gib > 0
        self._ahead = ReadAhead(self.storage.config.threads)
        self.left_out = len(left_out)
        # How many samples stand before each row left out; a few bytes a bad sample, none a good one.
        self._before = array("q", (row - number for number, row in enumerate(left_out)))
        self._files: OrderedDict[int, int] = OrderedDict()  # shard number -> descriptor, least recently used first
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self.tables.sample_shard) - self.left_out

    @property
    def faults(self) -> list[Fault]:
        """What was wrong with the shards when they were indexed."""
        return self.tables.faults

    def row(self, i: int) -> int:
        """Where sample `i` stands in the tables."""
        return i + bisect_right(self._before, i)

    def key(self, i: int) -> str:
        """The sample's key, as webdataset has it; unique in a shard, not always in a source."""
        return self.tables.key(self.row(i))

    def name(self, i: int) -> str:
        """`shard.tar:key`, for messages."""
        return f"{self.shards[int(self.tables.sample_shard[self.row(i)])].name}:{self.key(i)}"

    def members(self, i: int) -> dict[str, MemberPlace]:
        """Extension -> place, without reading."""
        tables, row = self.tables, self.row(i)
        shard = int(tables.sample_shard[row])
        start, stop = (int(edge) for edge in tables.member_start[row : row + 2])
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
            extension: self._read_member(i, extension, place, max_bytes)
            for extension, place in self.members(i).items()
            if only is None or only(extension)
        }

    @cached_property
    def pieces(self) -> Pieces:
        """Runs of rows that one read of a remote shard fetches, and that window order keeps together."""
        whole = [n for n, shard in enumerate(self.shards) if isinstance(shard, RemoteShard) and not shard.facts.ranged]
        return cut(self.tables, int(self.storage.config.piece_mib * 2**20), whole)

    def piece_starts(self) -> np.ndarray:
        """First sample of each piece, and the number of samples: int64, ascending."""
        return sample_starts(self.pieces, self.rows_left_out())

    def rows_left_out(self) -> np.ndarray:
        """Rows of the tables that are no samples here: int64, ascending."""
        return np.array([before + number for number, before in enumerate(self._before)], dtype=np.int64)

    def fetch_ahead(self, i: int) -> None:
        """Have the piece of sample `i` fetched by a thread, if it is remote and not here; does not wait."""
        shard = self.shards[int(self.tables.sample_shard[self.row(i)])]
        if not isinstance(shard, RemoteShard) or not self.keeps_pieces:
            return
        piece = self._piece(shard, i)
        if not self.storage.holds(shard, piece):
            self._ahead.submit((shard.url, piece), partial(self.storage.fetch_ahead, shard, piece))

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        if self._pid == os.getpid():
            for fd in self._files.values():
                os.close(fd)
        self._files.clear()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": OrderedDict(), "_pid": -1}

    def _read_member(self, i: int, extension: str, place: MemberPlace, max_bytes: int | None) -> bytes:
        if max_bytes is not None and place.size > max_bytes:
            raise SampleFault(faults.TOO_MANY_BYTES, f"{extension}: {place.size} bytes, the cap is {max_bytes}")
        try:
            data = self._bytes(i, place)
        except UnreachableError as error:
            raise SampleFault(faults.UNREACHABLE_SHARD, str(error)) from error
        except (OSError, StorageError) as error:
            raise SampleFault(faults.UNREADABLE_SHARD, str(error)) from error
        if len(data) != place.size:
            raise SampleFault(faults.UNREADABLE_SHARD, f"{extension}: {len(data)} of {place.size} bytes are there")
        return data

    def _bytes(self, i: int, place: MemberPlace) -> bytes:
        shard = self.shards[place.shard]
        if isinstance(shard, RemoteShard):
            return self.storage.read(shard, place.offset, place.size, self._piece(shard, i))
        return os.pread(self._file(place.shard), place.size, place.offset)

    def _piece(self, shard: RemoteShard, i: int) -> tuple[int, int] | None:
        return self.pieces.span(self.row(i)) if self.keeps_pieces and shard.facts.ranged else None

    def _file(self, shard: int) -> int:
        if self._pid != os.getpid():  # descriptors of a forked parent stay the parent's to close
            self._files, self._pid = OrderedDict(), os.getpid()
        fd = self._files.get(shard)
        if fd is None:
            if len(self._files) >= _OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            path = self.shards[shard]
            assert isinstance(path, Path)
            fd = self._files[shard] = os.open(path, os.O_RDONLY)
        else:
            self._files.move_to_end(shard)
        return fd


def image_extension(members: dict[str, bytes]) -> str | None:
    """The first extension among `members` that is an image by itself (`mask.png` is not)."""
    return next((extension for extension in IMAGE_EXTENSIONS if extension in members), None)


def open_source(
    source: SourceConfig,
    *,
    on_shard: Callable[[int, int], None] | None = None,
    rebuild: bool = False,
    whole: bool = False,
    storage: Storage | None = None,
) -> Index:
    """The index of a source, from its cache where that still fits every shard, else built and cached.

    on_shard(done, total) is called while building. whole: with the samples in quarantine, which are left out else.
    storage: how remote shards are read.
    UserError: a missing shard, no shard at all, no sample in them, or all of them in quarantine.
    """
    storage = storage or Storage()
    shards = find_shards(source.path, storage)
    with index_file.exclusive(shards):  # ranks of one machine wait for the first instead of scanning again
        stamps = index_file.stamp(shards)
        cache, tables = (None, None) if rebuild else index_file.load(shards, stamps)
        if tables is None:
            tables = build_tables(shards, on_shard, storage)
            cache = index_file.save(shards, stamps, tables)
    if len(tables.sample_shard) == 0:
        reason = f": {tables.faults[0]}" if tables.faults else ""
        raise UserError(f"data source {shown(source.path)!r} holds no sample{reason}; are these webdataset tar shards?")
    left_out = [] if whole else rows_left_out(shown(source.path), shards, stamps, tables)
    return Index(source, shards, stamps, tables, cache, left_out, storage)


def is_used_in_training(extension: str) -> bool:
    """Masks and other extras of a sample are not read for training."""
    return extension == RECORD_EXTENSION or extension in IMAGE_EXTENSIONS
