"""Files fetched from far away, kept on the local disk up to a cap; many processes may use one folder.

A file is written aside under a lock and renamed when it is whole, so a process killed at any moment leaves nothing that
another would believe: its lock goes with it, and its unfinished file is taken over or removed. The files not used for
longest go first. Room is booked before it is filled, so the cap holds at every moment.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_ACCOUNT = ".bytes"  # holds how many bytes are booked; its lock guards booking and eviction
_PART = ".part"
_KEPT_SHARE = 0.9  # eviction makes more room than one file needs: a scan of the folder costs milliseconds
_TOUCH_S = 10.0  # times of use are no finer than this
_BOOKED_AHEAD = 16 << 20  # bytes, for files of unknown size
_WAIT_S = 0.02


class CacheFullError(OSError):
    """The file is larger than the cap, or grows to where files that are being written leave no room."""


class DiskCache:
    """Files by name in `folder`, together never more than `cap_bytes`. OSError where the folder cannot be used."""

    def __init__(self, folder: Path, cap_bytes: int) -> None:
        self.folder = folder
        self.cap_bytes = cap_bytes

    def holds(self, name: str) -> bool:
        """Whether the file is there now."""
        return (self.folder / name).exists()

    def open(self, name: str, size: int | None, fill: Callable[[Part], None]) -> int:
        """Descriptor of the whole file, to be closed by the caller; valid also when the file is evicted meanwhile.

        A file that is not there is made by fill(part), which writes `size` bytes (None: as many as there are). What
        fill raises is passed on, and leaves nothing. Processes that want the same file wait for the first.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            fd = self._open_whole(name, size)
            if fd is None:
                fd = self._make(name, size, fill)
            if fd is not None:
                return fd

    def used_bytes(self) -> int:
        """Bytes of all files, unfinished ones included."""
        with self._account():
            return sum(size for _, size, _ in self._files())

    def book(self, fd: int, old: int, new: int) -> None:
        """Change the size of an unfinished file from `old` to `new`, after making room. Raises CacheFullError.

        The file gets its size at once, so that a scan of the folder counts what is booked. A process killed in here
        leaves more booked than there is, never less.
        """
        with self._account() as account:
            text = os.pread(account, 32, 0)
            used = int(text) if text.isdigit() else sum(size for _, size, _ in self._files())
            if new > old and used + new - old > self.cap_bytes:
                used = self._evict(max(0, int(self.cap_bytes * _KEPT_SHARE) - (new - old)))
                if used + new - old > self.cap_bytes:
                    os.pwrite(account, b"%020d" % used, 0)
                    raise CacheFullError(errno.ENOSPC, f"the cache {self.folder} has no room for {new} bytes")
            if new < old:
                os.ftruncate(fd, new)
            os.pwrite(account, b"%020d" % max(0, used + new - old), 0)
            os.ftruncate(fd, new)

    @contextlib.contextmanager
    def _account(self) -> Iterator[int]:
        """The locked file that holds how many bytes are booked."""
        fd = os.open(self.folder / _ACCOUNT, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)

    def _open_whole(self, name: str, size: int | None) -> int | None:
        try:
            fd = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        state = os.fstat(fd)
        if size is not None and state.st_size != size:  # a disk that lost power, or a stranger's hand
            os.close(fd)
            (self.folder / name).unlink(missing_ok=True)
            return None
        if time.time() - state.st_mtime > _TOUCH_S:
            with contextlib.suppress(OSError):
                os.utime(self.folder / name)
        return fd

    def _make(self, name: str, size: int | None, fill: Callable[[Part], None]) -> int | None:
        """Descriptor of the new file; None where another process was faster."""
        path = self.folder / (name + _PART)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            # Who waited for the lock may hold a file that has been finished or removed since.
            is_ours = _is_at(fd, path) and not self.holds(name)
            if is_ours:
                part = Part(self, fd, os.fstat(fd).st_size)
                part.make(size, fill)
                with self._account():  # a scan of the folder may miss a file that changes its name meanwhile
                    os.rename(path, self.folder / name)
                fcntl.flock(fd, fcntl.LOCK_UN)
                return fd
        except BaseException:
            _unlink_if_at(fd, path)
            os.close(fd)
            raise
        _unlink_if_at(fd, path)
        os.close(fd)
        return None

    def _evict(self, target: int) -> int:
        """Remove files, least recently used first, until no more than `target` bytes are left; returns what is left."""
        files = sorted(self._files())
        left = sum(size for _, size, _ in files)
        for _, size, path in files:
            if path.suffix == _PART and _remove_if_abandoned(path):
                left -= size
        for _, size, path in files:
            if left <= target:
                break
            if path.suffix != _PART:
                path.unlink(missing_ok=True)
                left -= size
        return left

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name == _ACCOUNT or not entry.is_file(follow_symlinks=False):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    state = entry.stat(follow_symlinks=False)
                    yield state.st_mtime, state.st_size, Path(entry.path)


class Part:
    """An unfinished file of a cache. position: bytes written so far."""

    def __init__(self, cache: DiskCache, fd: int, size: int) -> None:
        self._cache, self._fd = cache, fd
        self._size = size  # of the file, and booked; what a killed process left is taken over
        self.position = 0

    def make(self, size: int | None, fill: Callable[[Part], None]) -> None:
        """Have the file filled. OSError unless it has `size` bytes then."""
        try:
            self._wait_for_room(size or 0)
            fill(self)
            if size is not None and self.position != size:
                raise OSError(errno.EIO, f"{self.position} of {size} bytes arrived")
            self._resize(self.position)
            os.fsync(self._fd)
        except BaseException:
            with contextlib.suppress(OSError):
                self._resize(0)
            raise

    def write(self, data: bytes) -> None:
        """Append."""
        if self.position + len(data) > self._size:
            self._resize(self.position + len(data) + _BOOKED_AHEAD)
        left = memoryview(data)
        while left:
            written = os.pwrite(self._fd, left, self.position)
            self.position += written
            left = left[written:]

    def restart(self) -> None:
        """Write from the beginning again."""
        self.position = 0

    def _wait_for_room(self, size: int) -> None:
        """Book `size` bytes; while nothing is held, waiting for others that write cannot lock anybody out."""
        while True:
            try:
                return self._resize(size)
            except CacheFullError:
                if size > self._cache.cap_bytes:
                    raise
                time.sleep(_WAIT_S)

    def _resize(self, size: int) -> None:
        if size != self._size:
            self._cache.book(self._fd, self._size, size)
            self._size = size


def _is_at(fd: int, path: Path) -> bool:
    """Whether `path` is still the name of this open file."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    ours = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _unlink_if_at(fd: int, path: Path) -> None:
    with contextlib.suppress(OSError):
        if _is_at(fd, path):
            path.unlink(missing_ok=True)


def _remove_if_abandoned(path: Path) -> bool:
    """Remove an unfinished file unless somebody is writing it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(fd, path):
            return False
        path.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
