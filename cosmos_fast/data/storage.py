"""Where shards are: files, or URLs that are read in pieces through a bounded cache, with patience for bad networks.

Everything else asks for bytes start..stop of a shard and does not know where it lies.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from cosmos_fast.config.data import DataConfig
from cosmos_fast.config.remote import RemoteConfig
from cosmos_fast.data.disk_cache import CacheFullError, DiskCache, Part
from cosmos_fast.data.http_transport import HttpTransport
from cosmos_fast.data.transport import (
    Facts,
    FsspecTransport,
    PipeTransport,
    StorageError,
    TransientError,
    Transport,
    UnreachableError,
    file_name,
    shown,
)
from cosmos_fast.utils.files import sha256_of

log = logging.getLogger(__name__)

PIPE = "pipe:"
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 15.0
_PROBE_RETRY_S = 20.0  # at the start somebody is watching; later a run of days is at stake
_GIB = 1 << 30

Answer = TypeVar("Answer")
Span = tuple[int, int]  # first byte, byte after the last


@dataclass(frozen=True)
class RemoteShard:
    """A shard behind a URL (or `pipe:` and a command), as it was when its source was opened."""

    url: str
    facts: Facts

    @property
    def name(self) -> str:
        """Its file name, for messages."""
        return file_name(self.url)

    def __str__(self) -> str:
        return shown(self.url)


Shard = Path | RemoteShard


def stamp(shard: Shard) -> list[Any]:
    """The version of a shard: name, bytes, and modification time in ns or the server's tag. Raises OSError."""
    if isinstance(shard, RemoteShard):
        return [shard.name, shard.facts.size, shard.facts.tag]
    state = shard.stat()
    return [shard.name, state.st_size, state.st_mtime_ns]


def addresses(shards: Iterable[Shard]) -> list[str]:
    """What tells each shard from every other: its path by the folder's one true name, or its URL.

    A URL may hold secrets, so addresses are hashed, never shown.
    """
    shards = list(shards)
    true_names = {shard.parent: shard.parent.resolve() for shard in shards if isinstance(shard, Path)}
    return [str(true_names[s.parent] / s.name) if isinstance(s, Path) else s.url for s in shards]


def folder(shard: Shard) -> Path | None:
    """Where files that belong to the shard may lie; None for a remote one."""
    return None if isinstance(shard, RemoteShard) else shard.parent.resolve()


def folders(shards: Iterable[Shard]) -> list[Path]:
    """Every folder that folder() names for these shards, and those of files that they are links to."""
    local = [shard for shard in shards if isinstance(shard, Path)]
    linked = {shard.resolve().parent for shard in local if shard.is_symlink()}
    return sorted({parent.resolve() for parent in {shard.parent for shard in local}} | linked)


def size_bytes(shard: Shard) -> int:
    """Bytes of a shard; 0 where that is not known before it is read."""
    return (shard.facts.size or 0) if isinstance(shard, RemoteShard) else shard.stat().st_size


def digest(shard: Shard) -> str:
    """SHA-256 of a shard's bytes, in hex; of a remote shard's name and version, which stand for them."""
    if isinstance(shard, RemoteShard):
        return sha256(repr(stamp(shard)).encode()).hexdigest()
    return sha256_of(shard)


class Storage:
    """Reads remote shards. Cheap to copy to another process, which then has connections of its own."""

    def __init__(self, config: RemoteConfig | None = None, *, allow_pipe: bool = False) -> None:
        self.config = config or RemoteConfig()
        self.allow_pipe = allow_pipe
        self.cache = DiskCache(_cache_folder(self.config), int(self.config.cache_gib * _GIB))
        self._http = HttpTransport(self.config.timeout_s)
        self._fsspec = FsspecTransport()
        self._pipe = PipeTransport()
        self._is_down = False  # the last read has failed after all its tries: the next one gets a single try
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    @classmethod
    def of(cls, data: DataConfig) -> Storage:
        """As the settings of a run have it."""
        return cls(data.remote, allow_pipe=data.allow_pipe)

    def __reduce__(self) -> tuple[Callable[..., Storage], tuple[RemoteConfig, bool]]:
        return _storage, (self.config, self.allow_pipe)

    def probe(self, url: str) -> RemoteShard:
        """The shard at `url` as it is now. Raises StorageError."""
        patience = min(self.config.retry_s, _PROBE_RETRY_S)
        return RemoteShard(url, self._patiently(shown(url), lambda: self._way(url).probe(url), patience))

    def listing(self, pattern: str) -> list[str]:
        """URLs that match a pattern, where the storage can list. Raises StorageError."""
        patience = min(self.config.retry_s, _PROBE_RETRY_S)
        return self._patiently(shown(pattern), lambda: self._fsspec.listing(pattern), patience)

    def read(self, shard: RemoteShard, start: int, size: int, piece: Span | None = None) -> bytes:
        """Up to `size` bytes from byte `start`; fewer at the end of the shard. Raises StorageError.

        piece: what to fetch and keep around them, for neighbours that are wanted soon; None fetches these bytes alone.
        A shard that cannot be read in parts is fetched as a whole.
        """
        if not shard.facts.ranged:
            fd, offset = self.open_whole(shard), start
        elif piece is None or start < piece[0] or start + size > piece[1]:
            return self._fetch(shard, start, start + size)
        else:
            try:
                fd, offset = self._kept(shard, piece), start - piece[0]
            except OSError as error:  # a full disk makes reading slow, not impossible
                kind = "full" if isinstance(error, CacheFullError) else "disk"
                cause = error.strerror or error
                self._warn(kind, "the cache %s is not used (%s): reading is slow", self.cache.folder, cause)
                return self._fetch(shard, start, start + size)
        try:
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)

    def open_whole(self, shard: RemoteShard) -> int:
        """Descriptor of the whole shard in the cache, to be closed by the caller. Raises StorageError."""
        try:
            return self._kept(shard, None)
        except OSError as error:
            raise StorageError(
                f"{shard}: can only be had as a whole, and the cache {self.cache.folder} does not take it "
                f"({error.strerror or error}); raise data.remote.cache_gib={self.config.cache_gib:g}, or set "
                "data.remote.cache_dir to another disk"
            ) from error

    def fetch_ahead(self, shard: RemoteShard, piece: Span | None) -> None:
        """Have the piece in the cache. Failures are left to read(), which meets them again."""
        try:
            os.close(self._kept(shard, piece if shard.facts.ranged else None))
        except (StorageError, OSError) as error:
            log.debug("not read ahead: %s", error)

    def holds(self, shard: RemoteShard, piece: Span | None) -> bool:
        """Whether the piece is in the cache."""
        return self.cache.holds(_cache_name(shard, piece if shard.facts.ranged else None))

    def _kept(self, shard: RemoteShard, piece: Span | None) -> int:
        """Descriptor of the cached piece, fetched where it is not there; None is the whole shard."""
        size = shard.facts.size if piece is None else piece[1] - piece[0]
        return self.cache.open(_cache_name(shard, piece), size, lambda part: self._fill(shard, piece, part))

    def _fill(self, shard: RemoteShard, piece: Span | None, part: Part) -> None:
        way, facts = self._way(shard.url), shard.facts
        start, stop = piece or (0, facts.size)

        def attempt() -> None:
            if not facts.ranged:
                part.restart()
            for chunk in way.read(shard.url, start + part.position, stop, facts):
                part.write(chunk)

        self._patiently(str(shard), attempt, self.config.retry_s, lambda: part.position)

    def _fetch(self, shard: RemoteShard, start: int, stop: int) -> bytes:
        way, facts = self._way(shard.url), shard.facts
        stop = min(stop, facts.size or 0)
        data = bytearray()

        def attempt() -> None:
            for chunk in way.read(shard.url, start + len(data), stop, facts):
                data.extend(chunk)

        if start < stop:
            self._patiently(str(shard), attempt, self.config.retry_s, lambda: len(data))
        return bytes(data)

    def _patiently(
        self, name: str, attempt: Callable[[], Answer], patience_s: float, progress: Callable[[], int] = lambda: 0
    ) -> Answer:
        """Try until it works, with growing pauses, as long as `patience_s` seconds pass without progress."""
        wait, reached = _FIRST_WAIT_S, progress()
        since = time.monotonic()  # the start, or the last progress
        deadline = since + (0 if self._is_down else patience_s)
        while True:
            try:
                answer = attempt()
            except TransientError as error:
                if progress() > reached:
                    wait, reached, since = _FIRST_WAIT_S, progress(), time.monotonic()
                    deadline = since + patience_s
                pause = max(wait * random.uniform(0.5, 1.0), error.retry_after)
                if time.monotonic() + pause > deadline:
                    message = f"{name}: {error}; tried for {time.monotonic() - since:.0f} s"
                    if pause > patience_s:
                        message += f", and no more than {patience_s:g} s are waited"
                    self._is_down = True
                    raise UnreachableError(message) from error
                self._warn(str(error)[:16], "%s: %s; trying again", name, error)
                time.sleep(pause)
                wait = min(2 * wait, _LONGEST_WAIT_S)
            else:
                self._is_down = False
                return answer

    def _warn(self, kind: str, message: str, *arguments: object) -> None:
        """Each kind of trouble is told once a process, then in the debug log."""
        with self._lock:
            level = logging.DEBUG if kind in self._warned else logging.WARNING
            self._warned.add(kind)
        log.log(level, message, *arguments)

    def _way(self, url: str) -> Transport:
        if url.startswith(PIPE):
            if not self.allow_pipe:
                raise StorageError(f"{shown(url)}: runs a shell command, which data.allow_pipe=false forbids")
            return self._pipe
        return self._http if url.startswith(("http://", "https://")) else self._fsspec


def _storage(config: RemoteConfig, allow_pipe: bool) -> Storage:
    return Storage(config, allow_pipe=allow_pipe)


def _cache_folder(config: RemoteConfig) -> Path:
    if config.cache_dir is not None:
        # a folder of its own: what lies in it may be removed
        return Path(config.cache_dir).expanduser() / "cosmos-fast-shards"
    return Path(os.environ.get("COSMOS_CACHE_DIR") or Path.home() / ".cache" / "cosmos-fast") / "shards"


def _cache_name(shard: RemoteShard, piece: Span | None) -> str:
    """Address and version of the shard, and the span: another version is another file."""
    text = "\n".join([shard.url, str(shard.facts.size), shard.facts.tag])
    span = f"{piece[0]:x}-{piece[1]:x}" if piece else "whole"
    return f"{sha256(text.encode()).hexdigest()[:24]}-{span}"
