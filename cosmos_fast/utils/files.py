"""Files that are either whole or absent, also after a crash."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from cosmos_fast.utils.errors import UserError

_NOT_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP)  # what some mounted buckets say to fsync of a folder


def fsync_path(path: Path) -> None:
    """Force a file's bytes, or a folder's list of names, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which becomes `path` when the block ends; a crash leaves the old file or the new one.

    It is written aside, forced onto the disk and renamed. A killed process leaves `.{name}.{random}.tmp`.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with aside.open("xb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    try:
        fsync_path(path.parent)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS:
            raise


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` with `content`; a crash leaves the old file or the new one.

    Text is written as UTF-8. A byte of a file name that is none stands as in a string of JSON or YAML, `\\udcff`.
    """
    with replacing(path) as out:
        out.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Hold a folder, or a file that is made where it is missing; UserError(refusal) where another process holds it.

    The lock ends with the process, however it ends, and with the last of those it has forked.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_CREAT | os.O_RDWR
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(refusal) from None
        yield
    finally:
        os.close(descriptor)


class FolderLock:
    """Held while a process writes into a folder; released by the kernel when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self._descriptor: int | None = None

    def __enter__(self) -> FolderLock:
        self._descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        try:
            # A record lock, which forked loader workers do not inherit: they may outlive a killed trainer by seconds.
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(self._descriptor)
            raise UserError(
                f"another process is training in {self._path.parent}: wait for it, or set name=..."
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._descriptor is not None
        os.close(self._descriptor)
