"""Folders of shards that this program writes: one writer at a time, whole files, one line when the disk refuses."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

from cosmos_fast.utils import files
from cosmos_fast.utils.errors import UserError


def is_complete_tar(path: Path) -> bool:
    """Whether the file is whole records of 10240 bytes and ends with the two empty blocks that close a tar."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0 or size % 10240:
                return False
            file.seek(-1024, os.SEEK_END)
            return not any(file.read())
    except OSError:
        return False


def write_error(path: Path | str, error: OSError) -> UserError:
    """What to tell when a shard cannot be written."""
    reason = error.strerror or str(error)
    return UserError(
        f"cannot write {path}: {reason}; mend that and run the same command again, finished shards are kept"
    )


def locked(folder: Path) -> AbstractContextManager[None]:
    """Hold the directory for this process, as its one writer."""
    return files.locked(folder, f"another process is writing to {folder}: wait for it, or choose another --out")
