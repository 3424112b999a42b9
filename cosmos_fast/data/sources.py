"""From the path of a source to the list of its shards: a directory, a glob, a brace pattern, one file, or URLs."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import braceexpand

from cosmos_fast.data.storage import PIPE, RemoteShard, Shard, Storage
from cosmos_fast.data.transport import MissingError, StorageError, shown
from cosmos_fast.utils.errors import UserError

DEMO = "data/demo"  # where the demo recipes look for what `data synth` makes
_PROBES = 32  # at a time; each waits for the network


class MissingSourceError(UserError):
    """A local path that is not there."""


@contextmanager
def source_named(key: str) -> Iterator[None]:
    """Around the opening of the sources of one key of the configuration, which a missing path is then told with."""
    try:
        yield
    except MissingSourceError as error:
        raise MissingSourceError(f"{key}: {error}") from None


def find_shards(path: str, storage: Storage | None = None) -> list[Shard]:
    """The shards a source path names, in a fixed order. UserError where one is missing or there is none.

    URLs are looked up now, all of them, so that a wrong one ends the run before any work. `pipe:` runs a shell command
    out of a config file and is refused unless the storage allows it.
    """
    storage = storage or Storage()
    if path.startswith(PIPE) and not storage.allow_pipe:
        raise UserError(
            f"data source {shown(path)!r}: pipe: URLs run a shell command, so they are refused; give an https:// or "
            "s3:// URL, or set data.allow_pipe=true if you trust this configuration"
        )
    if path.startswith("file://"):
        path = unquote(urlsplit(path).path)
    if path.startswith(PIPE) or "://" in path:
        return list(_remote_shards(path, storage))
    names = _expand_braces(path)
    shards: list[Path] = []
    for name in names:
        shards.extend(_shards_of(name))
    for shard in shards:
        if not shard.is_file():
            raise MissingSourceError(f"data source {path!r}: shard {shard} is missing; {_mend(path)}")
    return list(shards)


def _mend(path: str) -> str:
    if path.startswith(f"{DEMO}/"):
        return f"make it with `cosmos-fast data synth --out {DEMO}`, or check the path"
    return "check the path or the range of numbers"


def _remote_shards(path: str, storage: Storage) -> list[RemoteShard]:
    try:
        urls = [url for pattern in _expand_braces(path) for url in _listed(pattern, storage)]
        with ThreadPoolExecutor(_PROBES) as pool:
            return list(pool.map(storage.probe, urls))
    except MissingError as error:
        raise UserError(f"data source {shown(path)!r}: {error}; check the address or the range of numbers") from error
    except StorageError as error:
        raise UserError(f"data source {shown(path)!r}: {error}") from error


def _listed(pattern: str, storage: Storage) -> list[str]:
    """URLs of one address without braces: itself, or what a folder or a pattern holds where the storage can list."""
    if pattern.startswith(PIPE):
        return [pattern]
    is_web = pattern.startswith(("http://", "https://"))
    where = urlsplit(pattern).path if is_web else pattern
    is_folder = where.endswith("/") or (not is_web and not Path(where).suffix)
    if not is_folder and not ("*" in where or (not is_web and glob.has_magic(where))):
        return [pattern]
    if is_web:
        raise UserError(
            f"data source {shown(pattern)!r}: web servers do not list their files; name the shards with braces, such "
            "as https://host/{00000..00575}.tar"
        )
    found = storage.listing(pattern.rstrip("/") + "/*.tar" if is_folder else pattern)
    if not found:
        raise UserError(f"data source {shown(pattern)!r} holds no .tar shards; check the address")
    return found


def _expand_braces(path: str) -> list[str]:
    is_local = "://" not in path and not path.startswith(PIPE)
    if is_local and Path(path).expanduser().exists():  # a name that merely contains braces
        return [path]
    try:
        return list(braceexpand.braceexpand(path))
    except ValueError as error:
        raise UserError(f"data source {shown(path)!r}: unbalanced braces; write ranges as {{0000..0012}}") from error


def _shards_of(name: str) -> list[Path]:
    where = Path(name).expanduser()
    if where.is_dir():
        return _shards_in_folder(where)
    if glob.has_magic(name) and not where.exists():
        found = sorted(Path(match) for match in glob.glob(str(where), recursive=True))
        if not found:
            raise UserError(f"data source {name!r}: no file matches; check the path")
        return [match for match in found if not match.is_dir()]
    return [where]


def _shards_in_folder(folder: Path) -> list[Path]:
    shards = sorted(folder / name for name in glob.glob("*.tar", root_dir=folder))  # without hidden ones
    if shards:
        return shards
    below = sorted({shard.parent.name for shard in folder.glob("*/*.tar")})
    if below:
        raise UserError(
            f"data source {str(folder)!r} holds no .tar itself; give one of its folders: {', '.join(below)}"
        )
    packed = next(folder.glob("*.tar.*"), None)
    if packed is not None:
        raise UserError(f"data source {str(folder)!r} holds compressed shards ({packed.name}): decompress them first")
    raise UserError(f"data source {str(folder)!r} holds no .tar shards; check the path")
